"""The branches of a block, attention and MLP, by the trunk's ops, and the classes of modules that the trunk knows.

A branch is looked at before it runs: `plan` takes a module as it is, with whatever watches or wraps a part of it, and
gives the function that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import functional
from fastvit.cpu.linear import linear as apply_linear
from fastvit.guards import attribute, forward_of, full_name, why_not_plain, why_not_plain_parameters, why_observed
from fastvit.half_block import Products
from fastvit.positions import rotate
from fastvit.stream import MOST_READY, Normed, Result, Setup

__all__ = [
    "ATTENTION",
    "MLP",
    "SWIGLU",
    "WHOLE",
    "Branch",
    "MLPLayers",
    "Run",
    "attend_packed",
    "attention_of",
    "branch_of",
    "has_own_branch",
    "is_dropping",
    "is_rms",
    "know",
    "mlp",
    "plan_mlp",
    "product",
    "product_of",
    "scale_of",
    "whole",
    "whole_branch",
    "why_no_branch",
    "why_no_drop_path",
    "why_no_scale",
    "why_not_linear",
    "why_not_norm",
    "why_watched",
]

Forward = Callable[..., Any]
Run = Callable[[Normed], Result]


class Branch(NamedTuple):
    """How a known module is run as a branch, and why a module of that class can't be, "" if it can."""

    plan: Callable[..., Run]  # from the module, `setup` and options by name
    why_not: Callable[[Any], str]
    is_whole: bool = False  # whether the module itself runs in it, and is only given what the norm gives ours


# By the `forward` of a class, which subclasses share that have none of their own:
_of_torch = {nn.Linear.forward, nn.Dropout.forward}
_norms: dict[Forward, bool] = {nn.LayerNorm.forward: False, nn.RMSNorm.forward: True}  # whether it is an RMS norm
_scales: dict[Forward, str] = {}  # LayerScale: the name of its parameter
_drop_paths: set[Forward] = set()  # they multiply samples by random factors
_branches: dict[Forward, Branch] = {}
# Activations: their names, from the module; "": not known.
_acts: dict[Forward, Callable[[Any], str]] = {
    nn.GELU.forward: lambda act: {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate, ""),
    nn.SiLU.forward: lambda _: "silu",
    nn.ReLU.forward: lambda act: "" if act.inplace else "relu",
}


def know(
    norms: Mapping[Forward, bool] | None = None,
    scales: Mapping[Forward, str] | None = None,
    drop_paths: Iterable[Forward] = (),
    branches: Mapping[Forward, Branch] | None = None,
    acts: Mapping[Forward, Callable[[Any], str]] | None = None,
) -> None:
    """Tell of a library's classes, each by its `forward`."""
    _norms.update(norms or {})
    _scales.update(scales or {})
    _drop_paths.update(drop_paths)
    _branches.update(branches or {})
    _acts.update(acts or {})


# Branches. The bias of the last linear layer is left to what comes next, where that can add it.


def product(linear: Any, setup: Setup, dropout: Any = None) -> Callable[[Tensor], Result]:
    """A linear layer and the dropout behind it."""
    drops = is_dropping(dropout)
    weight, bias = attribute(linear, "weight"), attribute(linear, "bias")
    if why_not_linear(linear):
        return lambda x: Result(dropout(linear(x)) if drops else linear(x))
    if drops:
        return lambda x: Result(dropout(apply_linear(x, weight, bias)))
    if setup.ends:
        return lambda x: Result(apply_linear(x, weight, bias))
    return product_of(weight, bias, setup)


def product_of(weight: Tensor, bias: Tensor | None, setup: Setup) -> Callable[[Tensor], Result]:
    """The product of a linear layer's parameters, whose bias is left to what comes next."""

    def run(x: Tensor) -> Result:
        return Result(x, bias, weight) if _can_wait(x, weight, setup) else Result(apply_linear(x, weight), bias)

    return run


def _can_wait(x: Tensor, weight: Tensor, setup: Setup) -> bool:
    """Whether a product of x may be left to the node of what comes next: it has x's shape and dtype."""
    state = setup.state
    if not state.joins or weight.shape != (x.shape[-1], x.shape[-1]):
        return False
    return x.dtype == state.autocast and weight.dtype != torch.float64 if state.autocast else x.dtype == weight.dtype


def is_dropping(dropout: Any) -> bool:
    """Whether this dropout does something, or may."""
    if dropout is None or (type(dropout) is nn.Identity and not why_observed(dropout)):
        return False
    return bool(_why_not_of_torch(dropout, nn.Dropout)) or (dropout.p > 0 and dropout.training)


def attend_packed(
    weight: Tensor, bias: Tensor | None, heads: int, setup: Setup, **options: Any
) -> Callable[[Normed], Tensor]:
    """Self-attention [B, T, D] of the packed projection of these parameters, with options of `functional.attention`."""
    products, attend = Products(weight, bias, "", heads), attention_of(setup, **options)
    return lambda x: attend(x, products)


def attention_of(setup: Setup, **options: Any) -> Callable[[Normed, Products], Tensor]:
    """Self-attention [B, T, D] of packed projections, with options of `functional.attention`. A projection adds its
    bias in its product, and the bias's gradient is one of what comes behind it."""
    ready: dict[Any, functional.SettledAttention] = {}  # how it is run, by what it is given

    def run(x: Normed, products: Products) -> Tensor:
        bias, heads = products.bias, products.heads
        if not setup.state.joins:
            return functional.attention(_projected(x, products), bias, heads, backend=setup.backend, **options)
        key = (*x.key(), functional.may_stand_in())
        found = ready.get(key)
        if found is not None and found.of_heads is not None:
            queries_keys_values = x.in_one(products, found.backend)
            if queries_keys_values is not None:
                return found.of_heads(*queries_keys_values)
        qkv = _projected(x, products)
        if found is None:
            if len(ready) >= MOST_READY:
                ready.clear()
            found = ready[key] = functional.settle_attention(qkv, bias, heads, setup.backend, **options)
        return found.run(qkv, bias)

    return run


def _projected(x: Normed, products: Products) -> Tensor:
    """A product whose bias is added without a gradient."""
    result = x.in_one(products._replace(heads=0))
    if result is not None:
        return result[0]
    bias, tokens = products.bias, x.tensor()
    weight = products.weight(tokens.dtype) if products.below else products.first
    return apply_linear(tokens, weight, None if bias is None else bias.detach())


def _attend(
    linear: Any,
    heads: int,
    setup: Setup,
    norms: tuple[Any, Any],
    dropout: float,
    attend: Callable[..., Tensor] | None = None,
    rotary: Tensor | None = None,
    **options: Any,
) -> Callable[[Normed], Tensor]:
    """The same of a linear layer, with what goes over queries and keys: norms, and `rotary` as of
    `fastvit.positions.rotary_2d`. `attend(q, k, v, dropout)`, where it is given, makes [B, T, D] of [B, H, T, D/H]
    each."""
    weight, bias, backend = attribute(linear, "weight"), attribute(linear, "bias"), setup.backend
    is_as_it_is = bool(why_not_linear(linear))
    has_norms = not all(norm is None or (type(norm) is nn.Identity and not why_observed(norm)) for norm in norms)
    if attend is None and rotary is None and not has_norms:
        if not is_as_it_is:
            return attend_packed(weight, bias, heads, setup, dropout=dropout, **options)
        return lambda x: functional.attention(
            linear(x.tensor()), None, heads, dropout=dropout, backend=backend, **options
        )

    products = Products(weight, bias)

    def run(x: Normed) -> Tensor:
        qkv, added = (linear(x.tensor()), None) if is_as_it_is else (_projected(x, products), bias)
        q, k, v = functional.split_heads(qkv, added, heads, backend=backend)
        q, k = (tensor if norm is None else norm(tensor) for norm, tensor in zip(norms, (q, k), strict=True))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if attend is not None:
            return attend(q, k, v, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options).transpose(1, 2).flatten(2)

    return run


def _plan_attention(module: Any, setup: Setup, **options: Any) -> Run:
    """Self-attention of timm's form: qkv, q_norm, k_norm, attn_drop, norm, proj, proj_drop."""
    norms = attribute(module, "q_norm"), attribute(module, "k_norm")
    dropout = attribute(module, "attn_drop").p if module.training else 0.0
    attention = _attend(attribute(module, "qkv"), module.num_heads, setup, norms, dropout, **options)
    norm, projection = (
        attribute(module, "norm"),
        product(attribute(module, "proj"), setup, attribute(module, "proj_drop")),
    )
    if type(norm) is nn.Identity and not why_observed(norm):
        return lambda x: projection(attention(x))
    return lambda x: projection(norm(attention(x)))


def whole(module: Any, x: Tensor, **options: Any) -> Tensor:
    """A branch as it is: what it gives, or the first of what it gives."""
    found = module(x, **options)
    return found[0] if isinstance(found, tuple) else found


def whole_branch(module: Any, setup: Setup, **options: Any) -> Run:
    """A branch that runs as it is."""
    return lambda x: Result(whole(module, x.tensor(), **options))


def mlp(first: str, act: str, *between: str, last: str, dropout: str = "", up: str = "") -> Branch:
    """An MLP by the names of its modules: a linear layer, its activation, others, a linear layer and its dropout; with
    `up`, that of the linear layer whose result the activation gates."""

    def plan(module: Any, setup: Setup) -> Run:
        layers = MLPLayers(
            attribute(module, first),
            attribute(module, act),
            [attribute(module, name) for name in between],
            attribute(module, last),
            attribute(module, dropout) if dropout else None,
            attribute(module, up) if up else None,
            getattr(module, "gate_last", None),
        )
        return plan_mlp(layers, setup)

    return Branch(plan, lambda _: "")


class MLPLayers(NamedTuple):
    """The modules of an MLP, in the order in which they are called."""

    first: Any
    act: Any
    between: list[Any]
    last: Any
    dropout: Any = None
    up: Any = None  # the linear layer whose result the activation gates
    gate_last: bool | None = None


def plan_mlp(layers: MLPLayers, setup: Setup) -> Run:
    """An MLP, in one node with the norm before it where it is two products and an activation."""
    activated, last = _activated(layers, setup), product(layers.last, setup, layers.dropout)
    between = [part for part in layers.between if type(part) is not nn.Identity or why_observed(part)]

    def one_by_one(x: Normed) -> Result:
        hidden = activated(x.tensor())
        for part in between:
            hidden = part(hidden)
        return last(hidden)

    if _why_not_in_one(layers):
        return one_by_one
    weight, bias = attribute(layers.first, "weight"), attribute(layers.first, "bias")
    last_weight, last_bias = attribute(layers.last, "weight"), attribute(layers.last, "bias")
    added, left = (last_bias, None) if setup.ends else (None, last_bias)
    products = Products(weight, bias, _act_of(layers.act), second=last_weight, last_bias=added)

    def run(x: Normed) -> Result:
        result = x.in_one(products)
        return one_by_one(x) if result is None else Result(result[0], left)

    return run


def _why_not_in_one(layers: MLPLayers) -> str:
    """Why there is more in an MLP than two products and an activation, "" if there is not."""
    if layers.up is not None or layers.gate_last is not None:
        return "has a gate"
    if not _act_of(layers.act):
        return "has an activation of another kind"
    for part in (*layers.between, layers.dropout):
        if is_dropping(part):
            return "has a part that does something"
    return why_not_linear(layers.first) or why_not_linear(layers.last)


def _act_of(act: Any) -> str:
    """The name of an activation, "" where it is none of those known."""
    return "" if _why_not_known(act, _acts) else _acts[type(act).forward](act)


def _activated(layers: MLPLayers, setup: Setup) -> Callable[[Tensor], Tensor]:
    """What lies between the products of an MLP, and the first of these. Where a linear layer makes both halves,
    `gate_last` says which is gated by the other."""
    layer, act, up, gate_last = layers.first, layers.act, layers.up, layers.gate_last
    name = _act_of(act)
    if not name or why_not_linear(layer) or (up is not None and why_not_linear(up)):
        return lambda x: _activated_as_it_is(x, layer, act, up, gate_last)
    weight, bias = attribute(layer, "weight"), attribute(layer, "bias")
    up_weight, up_bias = attribute(up, "weight"), attribute(up, "bias")

    def run(x: Tensor) -> Tensor:
        hidden = apply_linear(x, weight)
        other = None if up is None else apply_linear(x, up_weight)
        return functional.bias_act(
            hidden, bias, name, up=other, up_bias=up_bias, gate_last=gate_last, backend=setup.backend
        )

    return run


def _activated_as_it_is(x: Tensor, layer: Any, act: Any, up: Any, gate_last: bool | None) -> Tensor:
    if gate_last is None:
        return act(layer(x)) if up is None else act(layer(x)) * up(x)
    one, other = layer(x).chunk(2, dim=-1)
    return one * act(other) if gate_last else act(one) * other


# What is known, and why something else is not.


def why_not_norm(norm: Any) -> str:
    """Why `add_norm` is not what this norm does, "" if it is."""
    reason = _why_not_known(norm, _norms)
    if reason:
        return reason
    weight, eps = attribute(norm, "weight"), norm.eps
    if weight is None or weight.dim() != 1:
        return "has no weight of one dimension"
    if eps is None or getattr(norm, "_fast_norm", False):
        return "has a precision of its own"
    return ""


def why_not_linear(linear: Any) -> str:
    """Why a linear layer is more than a product with plain parameters, "" if it is just that."""
    return _why_not_of_torch(linear, nn.Linear) or why_not_plain_parameters(linear)


def _why_not_of_torch(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why this is more than torch's class, "" if it is that."""
    reason = why_not_plain(module, kind)
    return reason or ("" if kind.forward in _of_torch else "has a forward that was replaced in its class")


def why_no_scale(module: Any) -> str:
    """Why a module is no LayerScale, "" if it is."""
    return _why_not_known(module, _scales)


def why_no_drop_path(module: Any) -> str:
    """Why a module is no DropPath, "" if it is."""
    return _why_not_known(module, _drop_paths)


def is_rms(norm: Any) -> bool:
    """Whether a norm that is known is RMS norm."""
    return _norms[type(norm).forward]


def scale_of(module: Any) -> Tensor:
    """The parameter of a LayerScale that is known."""
    return attribute(module, _scales[type(module).forward])


def branch_of(module: Any) -> Branch:
    """How a branch that is known is run."""
    return _branches[type(module).forward]


def has_own_branch(module: Any) -> bool:
    """Whether a branch is ours from its first product to its last."""
    return not why_no_branch(module) and not _branches[type(module).forward].is_whole


def why_no_branch(module: Any) -> str:
    """Why a branch runs as it is, "" if ours runs in its place."""
    reason = _why_not_known(module, _branches)
    return reason or _branches[type(module).forward].why_not(module)


def _why_no_attention(module: Any) -> str:
    if not getattr(module, "fused_attn", True):
        return "does not use scaled_dot_product_attention"
    return "" if attribute(module, "gate") is None else "has a gate"


def why_watched(module: Any) -> str:
    """Why somebody would see that tokens come in autocast's dtype, which its layers give them anyway; "" if nobody."""
    for name, part in module._modules.items():
        if part is None or forward_of(type(part)) in _norms:
            continue
        if type(part) not in (nn.Linear, nn.Dropout, nn.Identity):
            return f"has a {name} that is a {full_name(type(part))}"
        if reason := why_observed(part):
            return f"has a {name} that {reason}"
    return ""


def _why_not_known(module: Any, known: Any) -> str:
    if forward_of(type(module)) not in known:
        return f"is a {full_name(type(module))}"
    return why_observed(module) or why_not_plain_parameters(module)


ATTENTION = Branch(_plan_attention, _why_no_attention)
WHOLE = Branch(whole_branch, why_watched, is_whole=True)  # attention of other forms, as it is
MLP = mlp("fc1", "act", "drop1", "norm", last="fc2", dropout="drop2")  # of timm's form
SWIGLU = mlp("fc1_g", "act", "drop1", "norm", last="fc2", dropout="drop2", up="fc1_x")
