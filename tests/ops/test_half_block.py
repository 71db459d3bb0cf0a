"""Half a block as one node of autograd: the bits of its ops one by one, and what else autograd does with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastvit import functional, stream
from fastvit.backend import available_backends, why_missing
from fastvit.cpu.linear import linear
from fastvit.half_block import Products
from fastvit.stream import Norm, Normed, Result, Setup, Stream
from fastvit.validation.tolerance import assert_close

BACKENDS = [
    name for name in ("cpu", "native") if not (available_backends("cpu")[name] or why_missing(name, "add_norm"))
]
B, T, D, H, F_ = 3, 5, 16, 2, 40
EPS = 1e-3
F32, BF16 = torch.float32, torch.bfloat16
BY = "cpu"  # where it makes no difference
KINDS, BRANCHES, PRECISIONS = (
    ("heads", "packed", "mlp", "alone"),  # packed: heads of three weights
    ("none", "given", "before"),
    ("float32", "bfloat16", "mixed", "autocast"),  # mixed: everything but the residual is float32
)
HEADS = ("heads", "packed")
EXTRAS = ("scale", "keep", "bias", "norm_bias", "first_bias", "last_bias", "rms")
# All of them, none, and each alone.
CHOICES = (frozenset(EXTRAS), frozenset(EXTRAS) - {"rms"}, frozenset(), *(frozenset({extra}) for extra in EXTRAS))


class Case(NamedTuple):
    kind: str
    branch: str
    precision: str
    extras: frozenset[str]

    def __str__(self) -> str:
        return f"{self.kind}, branch {self.branch}, {self.precision}: {', '.join(sorted(self.extras)) or 'no extras'}"

    def around(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", BF16) if self.precision == "autocast" else nullcontext()


def cases(kinds: Sequence[str], branches: Sequence[str] = BRANCHES, *, few: bool = False) -> Iterator[Case]:
    """Those that differ; a few are two of each kind and branch: float32 with all extras, autocast with layer norm's."""
    for kind, branch, precision, extras in itertools.product(kinds, branches, PRECISIONS, CHOICES):
        chosen = {("float32", CHOICES[0]), ("autocast", CHOICES[1])}
        if (branch, precision) == ("none", "mixed"):  # whose norm is of another dtype than the weights
            continue
        left_out = () if branch != "none" else ("scale", "keep", "bias")
        left_out += () if kind == "mlp" else ("last_bias",)
        is_alone = len(extras) == 1
        if (few and (precision, extras) not in chosen) or (
            is_alone and (precision != "float32" or extras & {*left_out})
        ):
            continue
        yield Case(kind, branch, precision, extras - {*left_out})


def few(**options: Any) -> Any:
    return pytest.mark.parametrize("case", list(cases(few=True, **{"kinds": KINDS, **options})), ids=str)


def leaves_of(case: Case, requires_grad: bool = True) -> dict[str, Tensor]:
    """Everything that there is a gradient of, and `keep`."""
    torch.manual_seed(1)
    narrow = BF16 if case.precision == "bfloat16" else F32
    of_residual = BF16 if case.precision in ("bfloat16", "mixed") else F32
    of_branch = BF16 if case.precision in ("bfloat16", "autocast") else F32
    features = {"heads": 3 * D, "packed": 3 * D, "mlp": F_, "alone": 24}[case.kind]
    found = {"residual": torch.randn(B, T, D, dtype=of_residual), "weight": 1 + 0.3 * torch.randn(D, dtype=narrow)}
    if case.branch != "none":
        found["x"] = torch.randn(B, T, D, dtype=of_branch)
    if case.branch == "before":
        found["before"] = (0.3 * torch.randn(D, D)).to(narrow)
    found["first"] = (0.3 * torch.randn(features, D)).to(narrow)
    if case.kind == "packed":
        found["first"], found["below"], found["lowest"] = (part.clone() for part in found["first"].chunk(3))
    if case.kind == "mlp":
        found["second"] = (0.3 * torch.randn(D, F_)).to(narrow)
    sizes = {"scale": D, "bias": D, "norm_bias": D, "first_bias": features, "last_bias": D}
    found |= {name: torch.randn(sizes[name]).to(narrow) for name in EXTRAS if name in case.extras & {*sizes}}
    found = {name: tensor.requires_grad_(requires_grad) for name, tensor in found.items()}
    return found | ({"keep": torch.tensor([0.0, 1.5, 1.5])} if "keep" in case.extras else {})


def in_one(case: Case, given: dict[str, Tensor], backend: str, ready: Any = None) -> tuple[Tensor, ...]:
    """The sum, and what is made of its norm."""
    with case.around():
        branch = Result(given["x"], given.get("bias"), given.get("before")) if "x" in given else None
        part = Stream(given["residual"], branch, given.get("scale"), given.get("keep"))
        setup = Setup(backend, state=stream._state(given["residual"]))
        assert setup.state.joins
        norm = Norm(given["weight"], given.get("norm_bias"), EPS, "rms" in case.extras)
        normed = Normed(part, setup, norm, ready=ready)
        products = Products(
            given["first"],
            given.get("first_bias"),
            "gelu" if case.kind == "mlp" else "",
            H if case.kind in HEADS else 0,
            given.get("second"),
            given.get("last_bias"),
            (given["below"], given["lowest"]) if case.kind == "packed" else (),
        )
        found = normed.in_one(products, "" if case.kind == "alone" else backend)
    assert found is not None
    return (normed.stream.residual, *found)


def packed(given: dict[str, Tensor]) -> Tensor:
    """The weight of the first product."""
    return torch.cat([given[name] for name in ("first", "below", "lowest") if name in given])


def one_by_one(case: Case, given: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
    """The same by the ops."""
    with case.around():
        x = linear(given["x"], given["before"]) if "before" in given else given.get("x")
        more = {name: given.get(name) for name in ("scale", "keep", "norm_bias")}
        options = {"weight": given["weight"], "eps": EPS, "rms": "rms" in case.extras, "backend": backend}
        total, normed = functional.add_norm(given["residual"], x, given.get("bias"), **more, **options)
        bias = given.get("first_bias")
        if case.kind == "mlp":
            active = functional.bias_act(linear(normed, given["first"]), bias, backend=backend)
            return total, linear(active, given["second"], given.get("last_bias"))
        result = linear(normed, packed(given), None if bias is None else bias.detach())
        return (
            (total, result)
            if case.kind == "alone"
            else (total, *functional.split_heads(result, bias, H, backend=backend))
        )


def plainly(case: Case, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The same as a library has it."""
    with case.around() if given["first"].dtype != torch.float64 else nullcontext():
        total = given["residual"]
        if "x" in given:
            x = F.linear(given["x"], given["before"]) if "before" in given else given["x"]
            x = (x + given.get("bias", 0)) * given.get("scale", 1)
            total = total + (x if "keep" not in given else x * given["keep"].to(x.dtype)[:, None, None])
        norm = F.rms_norm if "rms" in case.extras else F.layer_norm
        normed = norm(total, (D,), given["weight"], eps=EPS) + given.get("norm_bias", 0)
        bias = given.get("first_bias")
        if case.kind == "mlp":
            active = F.gelu(F.linear(normed, given["first"], bias))
            return total, F.linear(active, given["second"], given.get("last_bias"))
        if case.kind == "alone":
            return total, F.linear(normed, given["first"], None if bias is None else bias.detach())
        made = F.linear(normed, packed(given), bias)
        return (total, *made.reshape(B, T, 3, H, -1).permute(2, 0, 3, 1, 4))


def loss_of(results: Sequence[Tensor]) -> Tensor:
    """Another weight for every value."""
    generator = torch.Generator().manual_seed(2)
    return sum(
        (r.float() if r.dtype != torch.float64 else r).mul(torch.randn(r.shape, generator=generator)).sum()
        for r in results
    )  # type: ignore[return-value]


def gradients(given: dict[str, Tensor], results: Sequence[Tensor], **options: Any) -> dict[str, Tensor | None]:
    wanted = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    found = torch.autograd.grad(loss_of(results), list(wanted.values()), allow_unused=True, **options)
    return dict(zip(wanted, found, strict=True))


def expect_same_bits(got: Any, want: Any, what: object) -> None:
    """Of results, or of gradients by name; what has none may be zero."""
    pairs = got.items() if isinstance(got, dict) else enumerate(got)
    assert len(got) == len(want), what
    for name, one in pairs:
        other = want[name]
        if one is None or other is None:
            assert not any(tensor is not None and bool(tensor.any()) for tensor in (one, other)), (str(what), name)
        else:
            assert one.dtype == other.dtype and torch.equal(one, other), (str(what), name)


@pytest.mark.parametrize("by", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_ops(kind: str, by: str) -> None:
    """The second call goes by what was settled for the first."""
    for case in cases([kind]):
        given, ready = leaves_of(case), {}
        want = one_by_one(case, given, by)
        of_want = gradients(given, want)
        for _ in range(2):
            got = in_one(case, given, by, ready)
            expect_same_bits(got, want, case)
            expect_same_bits(gradients(given, got), of_want, case)
        assert len(ready) == 1
        with torch.no_grad():
            alone = in_one(case, given, by, ready)
        assert len(ready) == 2 and not any(result.requires_grad for result in alone[1:])
        with torch.inference_mode():
            inferred = in_one(case, given, by, ready)
        for others in (alone, inferred):
            expect_same_bits(others, want, case)


@pytest.mark.parametrize("by", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_exact_as_pytorch(kind: str, by: str) -> None:
    for case in cases([kind]):
        if len(case.extras) == 1:
            continue
        given = leaves_of(case)
        exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in given.items()}
        rows = []
        for leaves, results in (
            (given, in_one(case, given, by)),
            (given, plainly(case, given)),
            (exact, plainly(case, exact)),
        ):
            rows.append([*results, *gradients(leaves, results).values()])
        for place, three in enumerate(zip(*rows, strict=True)):
            if three[0] is not None:
                assert_close(*three, f"{case}, {place}")


@few()
def test_results_that_nobody_reads(case: Case) -> None:
    given = leaves_of(case)
    for count in range(1, 3 if case.kind in HEADS else 2):
        for read in itertools.combinations(range(4 if case.kind in HEADS else 2), count):
            found = []
            for make in (in_one, one_by_one):
                results = make(case, given, BY)
                found.append(gradients(given, [results[place] for place in read]))
            expect_same_bits(*found, (str(case), read))


@few()
def test_frozen_parameters(case: Case) -> None:
    want = gradients(given := leaves_of(case), one_by_one(case, given, BY))
    names = list(want)
    for trained in [[n for n in names if n != frozen] for frozen in names] + [[name] for name in names]:
        given = leaves_of(case, requires_grad=False)
        for name in trained:
            given[name].requires_grad_()
        results = in_one(case, given, BY)
        if not any(result.requires_grad for result in results):
            continue
        loss_of(results).backward()
        assert all(given[name].grad is None for name in names if name not in trained)
        expect_same_bits({name: given[name].grad for name in trained}, {name: want[name] for name in trained}, case)


def derivatives(make: Callable[..., Any], case: Case, backend: str, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Of two orders: the second of a nonlinear function of the results and of the first."""
    given = leaves_of(case, requires_grad=not names)
    for name in names:
        given[name].requires_grad_()
    first = gradients(given, results := make(case, given, backend), create_graph=True)
    loss = sum(t.float().square().sum() for t in (*first.values(), *results) if t is not None)
    wanted = [tensor for tensor in given.values() if tensor.requires_grad]
    second = torch.autograd.grad(loss, wanted, allow_unused=True)  # type: ignore[arg-type]
    found = {
        f"{order}, {name}": t
        for order, grads in enumerate((first.values(), second))
        for name, t in zip(first, grads, strict=True)
    }
    return {name: torch.zeros(()) if tensor is None else tensor.detach() for name, tensor in found.items()}


@few()
def test_second_derivatives(case: Case) -> None:
    every = [name for name, tensor in leaves_of(case).items() if tensor.requires_grad]
    for names in (every, ["residual"], [name for name in every if name not in ("residual", "x")]):
        got, want = (derivatives(make, case, BY, names) for make in (in_one, one_by_one))
        scale = max(float(tensor.abs().max()) for tensor in want.values())
        bound = 1e-5 if case.precision == "float32" else 2e-2
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=bound, atol=bound * scale * 0.1, msg=f"{case}: {name}")


@few()
def test_what_autograd_does_with_a_node(case: Case) -> None:
    """Hooks on what is saved, checkpoints, two passes over one graph, and its search for anomalies."""
    given = leaves_of(case)
    want = gradients(given, one_by_one(case, given, BY))

    def run(*_: Any) -> tuple[Tensor, ...]:
        return in_one(case, given, BY)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (t.numpy() if t.dtype == F32 else t.float().numpy(), t.dtype),
        lambda kept: torch.from_numpy(kept[0].copy()).to(kept[1]),
    ):
        results = run()
    expect_same_bits(gradients(given, results), want, case)
    for use_reentrant in (False, True):
        for tensor in given.values():
            tensor.grad = None
        loss_of(checkpoint(run, given["residual"], use_reentrant=use_reentrant)).backward()
        expect_same_bits({name: given[name].grad for name in want}, want, case)
    with torch.autograd.detect_anomaly(check_nan=True):
        results = run()
        for _ in range(2):
            expect_same_bits(gradients(given, results, retain_graph=True), want, case)
    expect_same_bits(gradients(given, results), want, case)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(given, results)


@few()
def test_backward_under_autocast(case: Case) -> None:
    """As wide or as narrow as PyTorch's own products are then."""
    given = leaves_of(case)
    exact = gradients(given, one_by_one(case, given, BY))
    results = in_one(case, given, BY)
    with torch.autocast("cpu", BF16):
        found = gradients(given, results)
    for name, tensor in found.items():
        want = exact[name]
        if tensor is None or want is None:
            assert tensor is want and (case.kind, name) == ("alone", "first_bias")
            continue
        assert tensor.dtype == want.dtype
        assert float((tensor.double() - want.double()).norm()) < 0.03 * float(want.double().norm()), name


@few()
def test_a_change_in_place_is_an_error(case: Case) -> None:
    """In what gradients are made of: not in a residual and a branch whose sum is there, nor in a bias without one."""
    unread = {"residual", "first_bias"} if case.kind == "alone" else {"residual"}
    unread -= set() if case.branch != "none" else {"residual"}
    unread |= {"x"} if case.branch == "given" and "scale" not in case.extras else set()
    for name in set(leaves_of(case)) - unread:
        given = leaves_of(case)
        results = in_one(case, given, BY)
        with torch.no_grad():
            given[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
            gradients(given, results)


def test_what_is_not_made_in_one() -> None:
    """The reference, float64, weights that are no matrices or of other dtypes, and where somebody watches ops."""
    case = Case("heads", "given", "float32", frozenset())
    given = leaves_of(case)
    for name, changed in (
        ("reference", {}),
        (BY, {"first": given["first"].double()}),
        (BY, {"first": given["first"].bfloat16()}),
        (BY, {"first": given["first"][..., None]}),
    ):
        with pytest.raises(AssertionError, match="is not None"):
            in_one(case, given | changed, name)
    under_autocast = Case("heads", "given", "autocast", frozenset())
    with pytest.raises(AssertionError, match="is not None"):
        in_one(under_autocast, leaves_of(under_autocast) | {"first": given["first"].double()}, BY)
    with torch.profiler.profile(), pytest.raises(AssertionError, match="joins"):
        in_one(case, given, BY)
