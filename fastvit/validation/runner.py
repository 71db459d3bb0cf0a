"""Runs the cases: candidate, plain PyTorch and float64 truth side by side, forward and every gradient.

`validate` holds the package's backends to the rule of `fastvit.validation.tolerance`; `validate_function` does the
same for a kernel of one's own.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvit import functional
from fastvit.backend import (
    BACKENDS,
    available_backends,
    check_known,
    launch_counts,
    multiplies_at_tf32,
    triton_is_interpreted,
    why_missing,
)
from fastvit.validation.cases import DTYPES, SHORT_NAMES, Case, Inputs, InputUnavailable, cases_for, make_inputs
from fastvit.validation.ops import OPS, Outputs, Tensors, call, results_of, truth
from fastvit.validation.report import FAILED, PASSED, SKIPPED, Report, Row
from fastvit.validation.tolerance import FEW_VALUES, compare

Progress = Callable[[int, int, str], None]
"""Called before each case with (done, total, description), and once more when all is done."""

Work = tuple["Candidate", Case, str, str]  # who, what, in which compute dtype, and why not
DRAWS = 16  # of a case whose verdict hangs on fewer than FEW_VALUES values

Results = dict[str, Tensor]


class _Unsupported(Exception):
    """The candidate said, by NotImplementedError, that it does not do this."""


@dataclass(frozen=True)
class Candidate:
    """Something to validate: a name, a device, and how to run a case forward and backward.

    `backward`, where given, is called as backward(grad, inputs) and returns {argument: gradient}; otherwise the
    gradients are taken by autograd through `forward`.
    """

    name: str
    device: torch.device
    forward: Callable[[str, Inputs, Tensors], Outputs]
    backward: Callable[[Tensor, Inputs], dict[str, Tensor]] | None = None
    counts_launches: bool = False
    may_decline: bool = False  # NotImplementedError means "skipped" rather than "failed"

    def row(self, op: str, case: str, dtype: str, status: str = FAILED, reason: str = "") -> Row:
        """A row about a case as a whole."""
        return Row(self.name, op, dtype, case, "all", status, reason=reason, device=str(self.device))


def validate(
    backends: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str | torch.dtype] | None = None,
    quick: bool = False,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Report:
    """Hold backends to the float64 reference: backend × op × dtype × case, forward and each gradient.

    Outputs are poisoned with NaN before each call, so that an element that is never written is seen. A backend that
    did not launch, as counted by `fastvit.backend.launch_counts`, has failed whatever its numbers.

    Args:
        backends: names; default: every backend but the reference, which is the truth and is never held to itself, and
            the emulated one, which is slow and compiles its kernels first.
        ops: of `fastvit.validation.cases.OPS`; default: all.
        dtypes: compute dtypes, as torch dtypes or as "float32" / "fp32" and so on; default: float32, bfloat16 and
            float16, with `quick` the first two. Image dtypes, uint8 among them, are part of the cases.
        quick: a few cases of each op instead of all.
        device: where to run; default: for each backend, the CUDA device if it runs there, else the CPU.
        progress: called as progress(done, total, description).

    Returns:
        The report; `report.ok` says that something ran and nothing failed.

    Raises:
        ValueError: an unknown backend, op or dtype.
    """
    names = list(backends) if backends else [name for name in BACKENDS if name != "reference"]
    for name in names:
        check_known(name, "backends")
    work: list[Work] = []
    for name in names:
        where, reason = _device_for(name, device)
        if not backends and name == "emulated":
            reason = reason or "slow: it runs where it is named (--backend emulated)"
        plan = _plan(ops, dtypes, large=where.type == "cuda" or name == "cpu", quick=quick)
        work += [
            (backend_candidate(name, where), case, dtype, reason or why_missing(name, case.op)) for case, dtype in plan
        ]
    if any(candidate.name == "emulated" and not reason for candidate, _, _, reason in work):
        _compile_emulated(len(work), progress)
    return _run(work, progress)


def validate_function(
    forward: Callable[..., Tensor],
    backward: Callable[[Tensor, Inputs], dict[str, Tensor]] | None = None,
    *,
    op: str = "patch_embed",
    name: str = "",
    dtypes: Sequence[str | torch.dtype] | None = None,
    cases: Sequence[Case] | None = None,
    supports: Callable[[Case], str] | None = None,
    quick: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Hold a kernel of your own to the same cases and the same rule as the package's backends.

    >>> def my_patch_embed(images, weight, bias=None, *, pos_embed=None, prefix=None, mean=None, std=None,
    ...                    keep=None, dtype=None):
    ...     if keep is not None:
    ...         raise NotImplementedError("keep")
    ...     return my_kernel(...)
    >>> report = validate_function(my_patch_embed, name="mine")
    >>> print(report.summary()); report.failures

    Args:
        forward: called like the op in `fastvit.functional`, without `backend`. In the cases whose `parameters` are
            "masters" it is called under autocast. NotImplementedError skips the case.
        backward: called as backward(grad, inputs) with the upstream gradient and the case's `Inputs`; returns
            {argument: gradient} for any of `inputs.differentiable()`; arguments that are left out are skipped.
            Default: autograd through `forward`; where its result does not require gradients, they are skipped.
        op: of `fastvit.validation.cases.OPS`.
        name: for the report; default: the function's.
        dtypes, quick, progress: as in `validate`.
        cases: default: all cases of the op, real sizes too.
        supports: given a case, "" or the reason why it can't be run; such cases are counted as skipped.
        device: where the tensors live.

    Raises:
        ValueError: an unknown op or dtype.
    """
    candidate = Candidate(
        name or getattr(forward, "__name__", "function"),
        torch.device(device),
        functools.partial(call, forward),
        backward,
        may_decline=True,
    )
    plan = _plan([op], dtypes, large=True, quick=quick, cases=cases)
    work = [(candidate, case, dtype, supports(case) if supports else "") for case, dtype in plan]
    return _run(work, progress)


def check_inputs(candidate: Candidate, op: str, inputs: Inputs, case: str = "", dtype: str = "") -> list[Row]:
    """One set of inputs, forward and every gradient; open to tests and benchmarks."""
    blank = candidate.row(op, case, dtype)
    try:
        ours, theirs, exact = _three(candidate, op, inputs)
    except _Unsupported as error:
        return [replace(blank, status=SKIPPED, reason=str(error))]
    except Exception as error:  # whatever a kernel raises is a finding, and the other cases still count
        return [_broken(blank, error)]
    rows = []
    for quantity in exact:
        row = replace(blank, quantity=quantity)
        if quantity not in ours:
            reason = "no gradient: forward's result does not require gradients, or backward left this one out"
            row = replace(row, status=SKIPPED if candidate.may_decline else FAILED, reason=reason)
        elif ours[quantity].dtype is not (wanted := _judged(inputs, quantity).dtype):
            row = replace(row, reason=f"dtype is {ours[quantity].dtype}, expected {wanted}")
        else:
            row = _compared(row, ours[quantity], theirs[quantity], exact[quantity])
        rows.append(row)
    return rows


def check_case(candidate: Candidate, case: Case, dtype: str) -> list[Row]:
    """One case: `check_inputs` on its inputs, and on more draws of them where a verdict hangs on a handful of values.

    Plain PyTorch can be exact on a handful of values by luck, and "twice luck" is no bound. Such a failure is judged
    again, by the same rule, on the results of DRAWS draws of the case laid side by side, the failed one among them.

    Raises:
        InputUnavailable: the case's input can't be made here.
    """
    draws = [make_inputs(case, DTYPES[dtype], candidate.device)]
    rows = check_inputs(candidate, case.op, draws[0], case.name, dtype)
    if not any(_hangs_on_few(row, draws[0]) for row in rows):
        return rows
    draws += [make_inputs(case, DTYPES[dtype], candidate.device, seed) for seed in range(1, DRAWS)]
    threes = [_three(candidate, case.op, inputs) for inputs in draws]
    for place, row in enumerate(rows):
        if _hangs_on_few(row, draws[0]):
            row = _compared(row, *(torch.cat([three[i][row.quantity] for three in threes]) for i in range(3)))
            rows[place] = replace(row, where=f"{row.where}, of {DRAWS} draws")
    return rows


def backend_candidate(name: str, device: str | torch.device = "cpu") -> Candidate:
    """A backend of the package as a candidate for `check_inputs`."""

    def forward(op: str, inputs: Inputs, tensors: Tensors) -> Outputs:
        return call(getattr(functional, op), op, inputs, tensors, backend=name)

    return Candidate(name, torch.device(device), forward, counts_launches=True)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written reads as NaN inside the block, so that forgotten elements are seen."""
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    memory.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # Operations without a deterministic version are no concern here: only the filling is wanted.
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_deterministic_debug_mode(mode)


def _device_for(backend: str, device: str | torch.device | None) -> tuple[torch.device, str]:
    """Where a backend is validated, and why it can't be ("" if it can)."""
    usual = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    choices = [torch.device(choice) for choice in (usual if device is None else [device])]
    if backend == "reference":
        return choices[0], "the reference is the truth and is never held to itself"
    reasons = [(choice, available_backends(choice)[backend]) for choice in choices]
    return next((found for found in reasons if not found[1]), reasons[0])


def _compile_emulated(total: int, progress: Progress | None) -> None:
    from fastvit.emulated import build

    if progress and not build.is_built():
        progress(0, total, "compiling the emulated kernels, once: about a minute")
    build.library()


def _plan(
    ops: Sequence[str] | None,
    dtypes: Sequence[str | torch.dtype] | None,
    *,
    large: bool,
    quick: bool,
    cases: Sequence[Case] | None = None,
) -> Iterator[tuple[Case, str]]:
    """Every case in every dtype."""
    names = [dtype_name(dtype) for dtype in dtypes or list(DTYPES)[: 2 if quick else None]]
    for op in ops or OPS:
        if op not in OPS:
            raise ValueError(f"ops: unknown op {op!r}; known: {', '.join(OPS)}")
        chosen = cases if cases is not None else cases_for(op, large=large, quick=quick)
        yield from ((case, name) for name in names for case in chosen)


def dtype_name(dtype: str | torch.dtype) -> str:
    """ "bf16", "bfloat16" or torch.bfloat16 → "bfloat16".

    Raises:
        ValueError: not a compute dtype.
    """
    text = str(dtype).removeprefix("torch.").lower()
    name = SHORT_NAMES.get(text, text)
    if name not in DTYPES:
        raise ValueError(
            f"dtypes: unknown compute dtype {dtype!r}; known: {', '.join(DTYPES)} (images may be uint8 too)"
        )
    return name


def _run(work: list[Work], progress: Progress | None) -> Report:
    """What can run, then what can't."""
    skipped = [candidate.row(case.op, case.name, dtype, SKIPPED, why) for candidate, case, dtype, why in work if why]
    work = [item for item in work if not item[-1]]
    rows: list[Row] = []
    repeated: set[tuple[str, str, str]] = set()
    for done, (candidate, case, dtype, _) in enumerate(work):
        if progress:
            progress(done, len(work), f"{candidate.name} {case.op} {dtype}: {case.name}")
        found = _check_and_repeat(candidate, case, dtype, repeated)
        label = f"{dtype}, tf32" if _is_tf32(candidate, case.op, DTYPES[dtype]) else dtype
        rows += [replace(row, dtype=label) for row in found]
    if progress and work:
        progress(len(work), len(work), "done")
    return Report((*rows, *skipped))


def _check_and_repeat(candidate: Candidate, case: Case, dtype: str, repeated: set[tuple[str, str, str]]) -> list[Row]:
    """`check_case`, and bit-exact repetition on the first case of each kind, and wherever sums are scattered."""
    blank = candidate.row(case.op, case.name, dtype)
    try:
        rows = check_case(candidate, case, dtype)
    except InputUnavailable as error:
        return [replace(blank, status=SKIPPED, reason=str(error))]
    except Exception as error:  # after a fault on a GPU everything there raises, but what was found stays found
        return [_broken(blank, error)]
    key = (candidate.name, case.op, dtype)
    if all(row.status == PASSED for row in rows) and (key not in repeated or case.scatters):
        repeated.add(key)
        rows.append(_check_repeat(candidate, case, dtype, replace(blank, quantity="repeat")))
    return rows


def _broken(row: Row, error: Exception) -> Row:
    return replace(row, reason=f"{type(error).__name__}: {error}")


def _check_repeat(candidate: Candidate, case: Case, dtype: str, row: Row) -> Row:
    try:
        inputs = make_inputs(case, DTYPES[dtype], candidate.device)
        first, second = (_candidate_results(candidate, case.op, inputs) for _ in range(2))
    except Exception as error:  # as above
        return _broken(row, error)
    differing = [name for name, value in first.items() if not torch.equal(value, second[name])]
    if differing:
        return replace(row, reason=f"two runs differ in {', '.join(differing)}")
    return replace(row, status=PASSED)


def _compared(row: Row, ours: Tensor, theirs: Tensor, truth: Tensor) -> Row:
    """The row with its verdict."""
    found = compare(ours, theirs, truth, row.quantity)
    status = PASSED if found.passed else FAILED
    return replace(row, status=status, error=found.error, bound=found.bound, where=found.where, reason=found.message)


def _hangs_on_few(row: Row, inputs: Inputs) -> bool:
    """Whether a row failed by its numbers, and there are few of them."""
    if row.status != FAILED or row.reason:
        return False
    values = _judged(inputs, row.quantity)
    # Rows that are copied are exact, or as exact as any.
    return (values[:, inputs.copied :] if row.quantity == "forward" else values).numel() < FEW_VALUES


def _judged(inputs: Inputs, quantity: str) -> Tensor:
    """A tensor of the shape and dtype that a quantity must have."""
    return inputs.grads[quantity] if quantity in inputs.grads else inputs[quantity.removeprefix("d_")]


def _three(candidate: Candidate, op: str, inputs: Inputs) -> tuple[Results, Results, Results]:
    """The results of the candidate, of plain PyTorch and of the reference in float64."""
    ours = _candidate_results(candidate, op, inputs)
    options = {"tf32": True} if _is_tf32(candidate, op, inputs.compute) else {}
    theirs = _results(lambda tensors: OPS[op].plain(inputs, tensors, **options), inputs, _leaves(inputs))
    exact = _results(lambda tensors: truth(op, inputs, tensors), inputs, _leaves(inputs, torch.float64))
    return ours, theirs, exact


def _is_tf32(candidate: Candidate, op: str, compute: torch.dtype) -> bool:
    """Whether float32 is multiplied at TF32 precision: where torch allows it, and there is hardware or its like."""
    is_able = candidate.device.type == "cuda" or candidate.name == "triton"
    return is_able and OPS[op].multiplies and multiplies_at_tf32(compute)


def _candidate_results(candidate: Candidate, op: str, inputs: Inputs) -> Results:
    before = launch_counts()
    tensors = _leaves(inputs)
    autocast = torch.autocast(candidate.device.type, inputs.compute) if inputs.autocast else nullcontext()

    def forward(tensors: Tensors) -> Outputs:
        with autocast:
            return candidate.forward(op, inputs, tensors)

    with poisoned():
        try:
            if candidate.backward is None:
                results = _results(forward, inputs, tensors)
            else:
                results = {name: out.detach() for name, out in _named(forward(tensors), inputs).items()}
                gradients = candidate.backward(inputs.grad, inputs)
                results |= {f"d_{name}": gradient for name, gradient in gradients.items()}
        except NotImplementedError as error:
            if candidate.may_decline:
                raise _Unsupported(str(error) or "not implemented") from error
            raise
    if candidate.counts_launches:
        _require_launches(candidate.name, op, before)
    return results


def _require_launches(backend: str, op: str, before: dict[tuple[str, str], int]) -> None:
    after = launch_counts()
    for name in (f"{op}_backward",) if OPS[op].views else (op, f"{op}_backward"):
        ran = {key[1]: count - before.get(key, 0) for key, count in after.items() if key[0] == name}
        others = [other for other, count in ran.items() if count and other != backend]
        # A gradient that is a view needs no launch, but here all gradients are asked for.
        if ran.get(backend, 0) < 1 or others:
            instead = f", but {', '.join(others)} did" if others else ""
            raise RuntimeError(f"backend {backend!r} was forced and did not launch {name}{instead}")


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Tensors:
    """The case's tensors as leaves, with their own strides; floats in `dtype` if given."""
    trained = {name: inputs[name].detach() for name in inputs.differentiable()}
    return inputs.tensors | {
        name: tensor.to(dtype or tensor.dtype).requires_grad_() for name, tensor in trained.items()
    }


def _results(forward: Callable[[Tensors], Outputs], inputs: Inputs, tensors: Tensors) -> Results:
    outs = _named(forward(tensors), inputs)
    results = {name: out.detach() for name, out in outs.items()}
    if any(out.shape != inputs.grads[name].shape for name, out in outs.items()):
        return results  # `compare` reports the shape
    outs = {name: out for name, out in outs.items() if out.requires_grad}
    if not outs:
        return results
    leaves = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    grads = [inputs.grads[name].to(out.dtype) for name, out in outs.items()]
    found = torch.autograd.grad(list(outs.values()), list(leaves.values()), grads, allow_unused=True)
    return results | {f"d_{name}": grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def _named(outputs: Outputs, inputs: Inputs) -> Results:
    """The results of a call by their names."""
    results = results_of(outputs)
    if len(results) != len(inputs.grads):
        raise ValueError(f"{len(results)} results, expected {', '.join(inputs.grads)}")
    return dict(zip(inputs.grads, results, strict=True))


def is_interpreted(backend: str, device: torch.device) -> bool:
    """Whether a backend runs slowly here, through Triton's interpreter or on emulated hardware."""
    return backend == "emulated" or (backend == "triton" and (device.type == "cpu" or triton_is_interpreted()))
