"""Half a block in one call of the library each way: the bits of its ops one by one, over the same library."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backend as backends
from fastvit import half_block
from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.cpu import gemm
from fastvit.cuda import half_block as extension
from fastvit.half_block import Made, Saved, Settings
from tests.ops import test_half_block as of_the_ops
from tests.ops.test_half_block import Case, expect_same_bits, few, gradients, in_one, leaves_of, loss_of

OPS = ("add_norm_cuda", "add_norm_backward_cuda", "bias_act_cuda", "bias_act_backward_cuda",
       "split_heads_backward_cuda", "half_block_cuda", "half_block_backward_cuda")  # fmt: skip
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _on_the_cpu(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "cuda" runs here, over emulated kernels; products are those that the library's are."""
    monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type: "")
    for name in OPS:
        monkeypatch.setattr(torch.ops.fastvit, name, getattr(ops, name), raising=False)
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: False)


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nodes go op by op."""
    monkeypatch.setattr(extension, "forward", half_block._forward)
    monkeypatch.setattr(extension, "backward", half_block._backward)


def both_ways(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What is found in one call each way, and op by op; which count as many launches."""
    reset_launch_counts()
    got, counts = run(), launch_counts()
    assert counts and {backend for _, backend in counts} == {"cuda"}
    with monkeypatch.context() as patched:
        in_python(patched)
        reset_launch_counts()
        want = run()
    assert counts == launch_counts()
    return got, want


@pytest.mark.parametrize("kind", of_the_ops.KINDS)
def test_bits_of_the_ops(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in of_the_ops.cases([kind]):
        given = leaves_of(case)

        def run(case: Case = case, given: Any = given) -> Any:
            results = in_one(case, given, "cuda")
            return results, gradients(given, results)

        (got, of_got), (want, of_want) = both_ways(monkeypatch, run)
        expect_same_bits(got, want, case)
        assert of_got.keys() == of_want.keys()
        expect_same_bits(of_got, of_want, case)
        assert all((of_got[name] is None) == (of_want[name] is None) for name in of_got), case


def strided(grad: Tensor, form: str) -> Tensor:
    """The same values, or those of a row, in other places of memory."""
    if form == "expanded":
        return grad.select(1, 0).unsqueeze(1).expand(grad.shape)
    if form == "sliced":
        return torch.stack([grad, grad], -1)[..., 0]
    return grad.transpose(0, -1).contiguous().transpose(0, -1)


@few(branches=("none", "before"))
def test_gradients_of_any_strides(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = ("expanded", "sliced", "transposed", "sliced")
    given = leaves_of(case)
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]

    def run() -> list[Tensor | None]:
        results = in_one(case, given, "cuda")
        torch.manual_seed(3)
        grads = [strided(torch.randn_like(r), form) for r, form in zip(results, forms, strict=False)]
        return list(torch.autograd.grad(results, wanted, grads, allow_unused=True))

    expect_same_bits(*both_ways(monkeypatch, run), case)


@few()
def test_results_that_nobody_reads_and_frozen_parameters(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 4 if case.kind in of_the_ops.HEADS else 2
    names = [name for name, tensor in leaves_of(case).items() if tensor.requires_grad]
    reads: list[list[int]] = [[place] for place in range(count)] + [[*range(1, count)]]
    choices = [(read, names) for read in reads] + [([*range(count)], [name]) for name in names[::3]]
    for read, trained in choices:
        given = leaves_of(case, requires_grad=False)
        for name in trained:
            given[name].requires_grad_()

        def run(given: Any = given, read: Any = read) -> Any:
            results = [result for result in in_one(case, given, "cuda") if result.requires_grad]
            return gradients(given, [results[place] for place in read]) if len(results) == count else {}

        got, want = both_ways(monkeypatch, run)
        expect_same_bits(got, want, (str(case), read, trained))


@few()
def test_second_derivatives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lambda: of_the_ops.derivatives(in_one, case, "cuda")  # noqa: E731
    got, want = both_ways(monkeypatch, run)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


@few(branches=("none", "given", "before"))
def test_without_rows(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty batch: no values, and gradients of parameters that are zero."""
    monkeypatch.setattr(of_the_ops, "B", 0)
    given = leaves_of(case)
    if "keep" in given:
        given["keep"] = given["keep"][:0]

    def run() -> Any:
        results = in_one(case, given, "cuda")
        return results, gradients(given, results)

    (got, of_got), (want, of_want) = both_ways(monkeypatch, run)
    assert [result.shape for result in got] == [result.shape for result in want]
    expect_same_bits(of_got, of_want, case)
    assert all(not bool(grad.any()) for grad in of_got.values() if grad is not None)


@few()
def test_saved_tensors_and_precision_are_as_op_by_op(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward under autocast is not cast, and no output lies in memory that is kept for it."""
    given = leaves_of(case)
    want = gradients(given, in_one(case, given, "cuda"))
    results = in_one(case, given, "cuda")
    with torch.autocast("cpu", BF16):
        expect_same_bits(gradients(given, results, retain_graph=True), want, case)
    kept = {tensor.data_ptr() for tensor in results[0].grad_fn.saved_tensors if tensor is not None}  # type: ignore[union-attr]
    assert not kept & {result.data_ptr() for result in results[1:]}
    with torch.no_grad():
        results[-1].zero_()
    loss_of([results[0]]).backward()


# Messages

SHAPES = {"residual": (2, 5, 8), "branch": (2, 5, 8), "bias": (8,), "scale": (8,), "keep": (2,), "weight": (8,),
          "norm_bias": (8,), "before": (8, 8), "first": (16, 8), "first_bias": (16,), "second": (8, 16),
          "last_bias": (8,)}  # fmt: skip
REST = {
    "below": [],
    "eps": 1e-6,
    "rms": False,
    "sum_dtype": F32,
    "dtype": F32,
    "function": 0,
    "linear": 0.0,
    "cubic": 0.0,
}


def arguments(**changes: Any) -> dict[str, Any]:
    return {name: torch.ones(shape) for name, shape in SHAPES.items()} | REST | changes


def call(ops: Any, **changes: Any) -> Any:
    return ops.half_block_cuda(*arguments(**changes).values())


def call_backward(ops: Any, **changes: Any) -> Any:
    given = arguments()
    made = ops.half_block_cuda(*given.values())
    total, normed, statistics, result, first, hidden, active, second, branch, before = made
    given = {"d_sum": total, "d_result": result, "d_k": None, "d_v": None, "sum": total, "branch": branch}
    given |= {name: torch.ones(SHAPES[name]) for name in ("bias", "scale", "keep", "weight", "norm_bias")}
    given |= {
        "statistics": statistics,
        **{n: torch.ones(SHAPES[n]) for n in ("before", "first", "first_bias", "second")},
    }
    given |= {"x": torch.ones(2, 5, 8), "normed": normed, "cast_first": first, "hidden": hidden, "active": active}
    given |= {"cast_second": second, "cast_before": before, "rms": False, "residual_dtype": F32, "function": 0}
    given |= {"linear": 0.0, "cubic": 0.0, "needs_before": True, "needs_first": True, "needs_second": True}
    return ops.half_block_backward_cuda(*(given | changes).values())


ONES = torch.ones
HEADS = {"function": -1, "d_k": ONES(2, 2, 5, 4), "d_v": ONES(2, 2, 5, 4)}
BAD: Sequence[tuple[Callable, dict[str, Any], str]] = (
    (call, {"residual": ONES(10, 8)}, "residual: expected [B, T, D], got 2 dimensions"),
    (call, {"residual": ONES(2, 5, 8).double()}, "residual: dtype Double is not supported"),
    (call, {"branch": None}, "before: it makes the branch, and there is none"),
    (call, {"branch": ONES(2, 4, 8)}, "branch: expected rows [10, 8] as residual, got [8, 8]"),
    (call, {"branch": ONES(2, 5, 7)}, "before: expected [D, 7], got [8, 8]"),
    (call, {"before": ONES(8, 8, 1)}, "before: expected 2 dimensions [D, ...], got 3"),
    (call, {"before": ONES(7, 8)}, "branch: expected rows [10, 8] as residual, got [10, 7]"),
    (call, {"before": ONES(8, 8, dtype=torch.int32)}, "before: dtype Int is not supported"),
    (call, {"bias": ONES(7)}, "bias: expected [8], got [7]"),
    (call, {"scale": ONES(7)}, "scale: expected [8], got [7]"),
    (call, {"keep": ONES(3)}, "keep: expected a value a sample of residual, got [3]"),
    (call, {"weight": ONES(9)}, "weight: expected [8], got [9]"),
    (call, {"first": ONES(16, 9)}, "first: expected [F, 8], got [16, 9]"),
    (call, {"below": [ONES(16, 7)]}, "below: expected [16, 8], got [16, 7]"),
    (call, {"below": [ONES(15, 8)]}, "below: expected [16, 8], got [15, 8]"),
    (call, {"below": [ONES(16, 8).double()]}, "below: dtype Double is not supported"),
    (call, {"below": [ONES(16, 8)]}, "first_bias: expected [32], got [16]"),
    (call, {"first": ONES(16)}, "first: expected 2 dimensions [F, ...], got 1"),
    (call, {"first": ONES(16, 8).double()}, "first: dtype Double is not supported"),
    (call, {"first_bias": ONES(15)}, "first_bias: expected [16], got [15]"),
    (call, {"first_bias": ONES(15), "function": -1}, "first_bias: expected [16], got [15]"),
    (call, {"second": None}, "second: there is none behind the activation"),
    (call, {"second": ONES(8, 15)}, "second: expected [D'', 16], got [8, 15]"),
    (call, {"last_bias": ONES(7)}, "last_bias: expected [8], got [7]"),
    (call, {"function": 3}, "function: 3; accepted: 0 to 2"),
    (call, {"dtype": torch.int32}, "dtype: dtype Int is not supported"),
    (call, {"sum_dtype": torch.float64}, "sum_dtype: dtype Double is not supported"),
    (call_backward, {"sum": ONES(10, 8)}, "sum: expected [B, T, D], got 2 dimensions"),
    (call_backward, {"d_result": ONES(2, 5, 7)}, "d_result: expected [10, 8], got [10, 7]"),
    (call_backward, {"d_result": ONES(2, 4, 8)}, "d_result: expected [10, 8], got [8, 8]"),
    (call_backward, {"d_result": ONES(2, 5, 8).half()}, "d_result: dtype Half, but cast_second has Float"),
    (call_backward, {"d_sum": ONES(2, 4, 8)}, "d_total: expected rows [10, 8] as total, got [8, 8]"),
    (call_backward, {**HEADS, "d_v": None}, "d_k: it comes with d_v, and without an activation"),
    (call_backward, {"d_k": ONES(2, 2, 5, 4), "d_v": ONES(2, 2, 5, 4)}, "d_k: it comes with d_v, and without an act"),
    (call_backward, {"d_v": ONES(2, 2, 5, 4)}, "d_k: it comes with d_v, and without an activation"),
    (call_backward, {"hidden": None}, "hidden, active, second: one of them is missing"),
    (call_backward, {"x": None}, "x, cast_before: they come with before"),
    (call_backward, {"cast_before": None}, "x, cast_before: they come with before"),
    (call_backward, {"branch": None, "scale": None, "keep": None}, "branch: it has a weight before it, and is missing"),
    (call_backward, {"x": ONES(2, 4, 8)}, "x: expected [10, 8], got [8, 8]"),
    (call_backward, {"normed": ONES(9, 8)}, "normed: expected [10, 8], got [9, 8]"),
    (call_backward, {"cast_first": ONES(15, 8)}, "cast_first: expected [16, 8], got [15, 8]"),
    (call_backward, {"cast_before": ONES(7, 8)}, "cast_before: expected [8, 8], got [7, 8]"),
)


@pytest.mark.parametrize(("function", "changes", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_a_bad_argument_is_named(ops: Any, function: Callable, changes: dict[str, Any], message: str) -> None:
    function(ops)  # with nothing changed there is no error
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        function(ops, **changes)


def test_a_gradient_has_its_parameters_dtype(ops: Any) -> None:
    """Vectors are summed in float32, and matrices multiplied in the dtype of the products."""
    changes = {name: torch.ones(SHAPES[name], dtype=BF16) for name in ("bias", "scale", "norm_bias", "first_bias")}
    changes |= {name: torch.ones(SHAPES[name], dtype=torch.half) for name in ("weight", "before", "first", "second")}
    found = call_backward(ops, **changes)
    order = ("weight", "norm_bias", "bias", "scale", "before", "first", "first_bias", "second")
    assert [grad.dtype for grad in found] == [F32, F32, *(changes[name].dtype for name in order)]
    assert [grad.shape for grad in found[2:]] == [SHAPES[name] for name in order]


def test_fields_are_as_the_library_has_them() -> None:
    """What Python keeps for the backward is what the library's backward is given, in its order."""
    schema = torch.ops.fastvit.half_block_backward_cuda.default._schema
    names = [argument.name for argument in schema.arguments][4:23]
    other = {"total": "sum", "act_bias": "first_bias"}
    assert names == [other.get(field, field) for field in Saved._fields]
    assert len(Made._fields) == 10 and Settings._fields[0] == "norm"
