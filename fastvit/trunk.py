"""The blocks of a Vision Transformer by the trunk's ops: what our own model and accelerated ones share.

Between two halves of blocks the residual stream is a pair, a tensor and what is still to be added to it, so that the
addition, the bias of the linear layer before it and the norm behind it are one call of
:func:`fastvit.functional.add_norm`. Each part runs by the ops only while it is what the ops do; a part that is watched,
wrapped or of another class runs as it is, and the stream becomes the tensor that it would have been given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import backend as backends
from fastvit import functional
from fastvit.cpu.linear import linear as apply_linear
from fastvit.guards import attribute, full_name, is_transformed, why_not_plain, why_not_plain_parameters, why_observed

__all__ = [
    "ATTENTION",
    "MLP",
    "SWIGLU",
    "WHOLE",
    "TIMM",
    "Branch",
    "Half",
    "Names",
    "Setup",
    "Stream",
    "activated",
    "attend",
    "has_own_branch",
    "half_of",
    "is_dropping",
    "know",
    "mlp",
    "product",
    "run_blocks",
    "run_half",
    "whole",
    "why_not_half",
    "why_not_linear",
]

# Of B·T·D in an eager call.
LEAST_VALUES = 2**22  # on a GPU: ViT-S at a batch of 64. A rule, not a measurement
LEAST_ON_A_CPU = 2**18  # ViT-Ti at a batch of 7. Measured on two cores: at 8 faster by 3%, at 4 slower by 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Forward = Callable[..., Any]


class Branch(NamedTuple):
    """How a known module is run as a branch: from the norm's result to its own, and the bias that is still to be added
    to it; and why a module of that class can't be, "" if it can."""

    run: Callable[..., tuple[Tensor, Tensor | None]]
    why_not: Callable[[Any], str]
    is_whole: bool = False  # whether the module itself runs in it, and is only given what the norm gives ours


# By the `forward` of a class, which subclasses share that have none of their own:
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


class Setup(NamedTuple):
    """How the ops are called."""

    backend: str | None = None
    keeps_dtype: bool = False  # the stream keeps its dtype, whatever is added to it
    ends: bool = False  # the stream is a tensor behind this half: no norm comes that would add the product's bias

    @classmethod
    def of(cls, x: Any, backend: str | None, keeps_dtype: bool) -> Setup | None:
        """For a call on tokens [B, T, D]; None where blocks are to run their own code.

        That is where something watches that can't see into the ops, where a graph is traced that needs no gradients
        (the compiler fuses as well by itself there) or is to be exported, and where the ops need not pay: for few
        tokens, which wait for the calls rather than for memory, and on a CPU without the backend "native". A
        `backend` that the blocks were given themselves says that they are wanted; one that is forced for every op
        says so on a GPU alone.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in DTYPES or _has_any_global_hook():
            return None
        if is_transformed() or (torch.compiler.is_compiling() and not _is_trained()):
            return None
        if backend is None and not _pay(x):
            return None
        return cls(backend, keeps_dtype)


def _pay(x: Tensor) -> bool:
    """Whether the ops are known to pay for a call on these tokens."""
    if x.device.type == "cuda":
        return torch.compiler.is_compiling() or x.numel() >= LEAST_VALUES or backends.is_forced(None)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() < LEAST_ON_A_CPU:
        return False
    return backends.resolve(None, "cpu", False, "add_norm") == "native"


def _is_trained() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_exporting()


class Stream(NamedTuple):
    """The residual stream: a tensor [B, T, D], and a branch that is still to be added to it."""

    residual: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None  # of the linear layer that made the branch
    scale: Tensor | None = None
    keep: Tensor | None = None  # [B] float32

    def tensor(self, setup: Setup) -> Tensor:
        """With the branch added, in the dtype that torch's addition gives."""
        if self.branch is None:
            return self.residual
        branch = _with(self.branch, self.bias)
        branch = branch if self.scale is None else branch * self.scale
        branch = branch if self.keep is None else branch * self.keep.to(branch.dtype)[:, None, None]
        narrows = setup.keeps_dtype and torch.promote_types(self.residual.dtype, branch.dtype) != self.residual.dtype
        return self.residual + (branch.to(self.residual.dtype) if narrows else branch)

    def normed(self, norm: Any, dtype: torch.dtype | None, setup: Setup) -> tuple[Stream, Tensor]:
        """The stream with nothing to be added, and its norm, in dtype."""
        total, normed = functional.add_norm(
            self.residual,
            self.branch,
            self.bias,
            scale=self.scale,
            keep=self.keep,
            weight=attribute(norm, "weight"),
            norm_bias=attribute(norm, "bias"),
            eps=norm.eps,
            rms=_norms[type(norm).forward],
            residual_dtype=self.residual.dtype if setup.keeps_dtype and self.branch is not None else None,
            dtype=dtype,
            backend=setup.backend,
        )
        return Stream(total), normed


class Half(NamedTuple):
    """One half of a block: its norm, its branch (attention or MLP), and what is done to the branch's result."""

    norm: Any
    branch: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    why_whole: str = ""  # why the branch is a module as it is, which is given what its own norm gives; "": ours
    dropout: Any = None
    scale: Any = None  # a module or a parameter
    drop_path: Any = None


class Names(NamedTuple):
    """What a block calls the parts of one half."""

    norm: str
    branch: str
    dropout: str = ""
    scale: str = ""
    drop_path: str = ""


TIMM = Names("norm1", "attn", "", "ls1", "drop_path1"), Names("norm2", "mlp", "", "ls2", "drop_path2")


def whole(module: Any, x: Tensor, **options: Any) -> Tensor:
    """A branch as it is: what it gives, or the first of what it gives."""
    found = module(x, **options)
    return found[0] if isinstance(found, tuple) else found


def half_of(block: Any, names: Names, setup: Setup, call: Callable[..., Tensor] = whole, **options: Any) -> Half:
    """A half of a block by its names. `call(module, x, **options)` runs a branch as it is."""
    norm, module, dropout, scale, drop_path = (attribute(block, name) if name else None for name in names)
    kind: Any = type(module)
    reason = why_no_branch(module)
    if reason:
        return Half(
            norm, lambda x: (call(module, x, **options), None), f"{names.branch} {reason}", dropout, scale, drop_path
        )
    run = functools.partial(_branches[kind.forward].run, module, setup=setup, **options)
    return Half(norm, run, "", dropout, scale, drop_path)


def run_half(stream: Stream, half: Half, setup: Setup) -> Stream:
    """Half a block."""
    if why_not_norm(half.norm):
        stream = Stream(stream.tensor(setup))
        normed = half.norm(stream.residual)
    else:
        stream, normed = stream.normed(half.norm, _norm_dtype(stream.residual, half, setup), setup)
    branch, bias = half.branch(normed)
    scale, keep = None, None
    if is_dropping(half.dropout):
        branch, bias = half.dropout(_with(branch, bias)), None
    if isinstance(half.scale, Tensor):
        scale = half.scale
    elif isinstance(half.scale, nn.Module) and type(half.scale) is not nn.Identity:
        if _why_not_known(half.scale, _scales):
            branch, bias = half.scale(_with(branch, bias)), None
        else:
            scale = attribute(half.scale, _scales[type(half.scale).forward])
    if half.drop_path is not None and type(half.drop_path) is not nn.Identity:
        if _why_not_known(half.drop_path, _drop_paths):
            branch = _with(branch, bias)
            branch, bias, scale = half.drop_path(branch if scale is None else branch * scale), None, None
        elif half.drop_path.training:
            keep = _factors(half.drop_path, branch, scale)
    return Stream(stream.residual, branch, bias, scale, keep)


def _norm_dtype(residual: Tensor, half: Half, setup: Setup) -> torch.dtype | None:
    """Of the norm's result; None: autocast's where it is on, which linear layers take, else the sum's."""
    device_type = residual.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return attribute(half.norm, "weight").dtype if setup.keeps_dtype else None
    if not half.why_whole:
        return None
    return residual.dtype if _norms[type(half.norm).forward] else torch.float32


def _factors(drop_path: Any, branch: Tensor, scale: Tensor | None) -> Tensor:
    """[B] float32, drawn as the module draws them: it multiplies ones of the dtype that it would be given."""
    dtype = branch.dtype if scale is None else torch.promote_types(branch.dtype, scale.dtype)
    return drop_path(branch.new_ones((branch.shape[0], 1, 1), dtype=dtype)).flatten().float()


def _with(branch: Tensor, bias: Tensor | None) -> Tensor:
    return branch if bias is None else branch + bias.to(branch.dtype)


def run_blocks(blocks: Iterable[Any], x: Tensor, setup: Setup) -> Tensor:
    """Blocks one after another. A block has a `stream(stream, setup)` that gives the stream behind it, or None where it
    runs its own code; it is called as a module, with a tensor, where somebody watches it."""
    stream = Stream(x)
    for block in blocks:
        following = None
        if hasattr(block, "stream") and not why_observed(block):
            following = block.stream(stream, setup)
        stream = Stream(block(stream.tensor(setup))) if following is None else following
    return stream.tensor(setup)


# Branches. Each gives its result, and the bias of its last linear layer where that is not in it.


def product(linear: Any, x: Tensor, setup: Setup, dropout: Any = None) -> tuple[Tensor, Tensor | None]:
    """A linear layer and the dropout behind it; its bias apart where the op that comes next can add it."""
    drops = is_dropping(dropout)
    bias, is_more = attribute(linear, "bias"), why_not_linear(linear)
    if setup.ends or drops or bias is None or is_more:
        x = linear(x) if is_more else apply_linear(x, attribute(linear, "weight"), bias)
        return (dropout(x) if drops else x), None
    return apply_linear(x, attribute(linear, "weight")), bias


def is_dropping(dropout: Any) -> bool:
    """Whether this dropout does something, or may."""
    if dropout is None or type(dropout) is nn.Identity:
        return False
    return bool(why_not_plain(dropout, nn.Dropout)) or (dropout.p > 0 and dropout.training)


def attend(
    linear: Any, x: Tensor, heads: int, setup: Setup, norms: tuple[Any, Any] = (None, None), **options: Any
) -> Tensor:
    """Self-attention [B, T, D] of a packed projection, with what goes over queries and keys; options of torch's
    attention by name. The projection adds its bias in its product, and the bias's gradient is one of what comes behind
    it."""
    bias, backend = attribute(linear, "bias"), setup.backend
    if bias is None or why_not_linear(linear):
        qkv, bias = linear(x), None
    else:
        qkv = apply_linear(x, attribute(linear, "weight"), bias.detach())
    if all(norm is None or (type(norm) is nn.Identity and not why_observed(norm)) for norm in norms):
        dropout = options.pop("dropout_p", 0.0)
        return functional.attention(qkv, bias, heads, dropout=dropout, backend=backend, **options)
    q, k, v = functional.split_heads(qkv, bias, heads, backend=backend)
    q, k = (tensor if norm is None else norm(tensor) for norm, tensor in zip(norms, (q, k), strict=True))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def attention(module: Any, x: Tensor, setup: Setup, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Self-attention of timm's form: qkv, q_norm, k_norm, attn_drop, norm, proj, proj_drop."""
    norms = attribute(module, "q_norm"), attribute(module, "k_norm")
    dropout = attribute(module, "attn_drop").p if module.training else 0.0
    x = attend(attribute(module, "qkv"), x, module.num_heads, setup, norms, dropout_p=dropout, **options)
    x = attribute(module, "norm")(x)
    return product(attribute(module, "proj"), x, setup, attribute(module, "proj_drop"))


def _run_whole(module: Any, x: Tensor, setup: Setup, **options: Any) -> tuple[Tensor, None]:
    return whole(module, x, **options), None


def mlp(first: str, act: str, *between: str, last: str, dropout: str = "", up: str = "") -> Branch:
    """An MLP by the names of its modules: a linear layer, its activation, others, a linear layer and its dropout; with
    `up`, that of the linear layer whose result the activation gates."""

    def run(module: Any, x: Tensor, setup: Setup) -> tuple[Tensor, Tensor | None]:
        layer, activation = attribute(module, first), attribute(module, act)
        other = attribute(module, up) if up else None
        x = activated(layer, activation, x, setup, other, getattr(module, "gate_last", None))
        for name in between:
            x = attribute(module, name)(x)
        return product(attribute(module, last), x, setup, attribute(module, dropout) if dropout else None)

    return Branch(run, lambda _: "")


def activated(layer: Any, act: Any, x: Tensor, setup: Setup, up: Any = None, gate_last: bool | None = None) -> Tensor:
    """What lies between the products of an MLP. Where a linear layer makes both, `gate_last` says which half is gated
    by the other."""
    name = "" if _why_not_known(act, _acts) else _acts[type(act).forward](act)
    if not name or why_not_linear(layer) or (up is not None and why_not_linear(up)):
        if gate_last is not None:
            one, other = layer(x).chunk(2, dim=-1)
            return one * act(other) if gate_last else act(one) * other
        return act(layer(x)) if up is None else act(layer(x)) * up(x)
    hidden = apply_linear(x, attribute(layer, "weight"))
    other = None if up is None else apply_linear(x, attribute(up, "weight"))
    bias, up_bias = attribute(layer, "bias"), attribute(up, "bias")
    return functional.bias_act(
        hidden, bias, name, up=other, up_bias=up_bias, gate_last=gate_last, backend=setup.backend
    )


# Why not


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
    return why_not_plain(linear, nn.Linear) or why_not_plain_parameters(linear)


def why_not_half(half: Half) -> str:
    """What of half a block runs as it is, and why; "" where all is ours."""
    norm = why_not_norm(half.norm)
    reasons = [norm and f"a norm {norm}", half.why_whole]
    for module, known, name in ((half.scale, _scales, "LayerScale"), (half.drop_path, _drop_paths, "DropPath")):
        if isinstance(module, nn.Module) and type(module) is not nn.Identity:
            reason = _why_not_known(module, known)
            reasons.append(reason and f"{name} {reason}")
    return "; ".join(reason for reason in reasons if reason)


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


def _why_watched(module: Any) -> str:
    """Why somebody would see that tokens come in autocast's dtype, which its layers give them anyway; "" if nobody."""
    for name, part in module._modules.items():
        if part is None or type(part).forward in _norms:
            continue
        if type(part) not in (nn.Linear, nn.Dropout, nn.Identity):
            return f"has a {name} that is a {full_name(type(part))}"
        if reason := why_observed(part):
            return f"has a {name} that {reason}"
    return ""


def _why_not_known(module: Any, known: Any) -> str:
    if type(module).forward not in known:
        return f"is a {full_name(type(module))}"
    return why_observed(module) or why_not_plain_parameters(module)


ATTENTION = Branch(attention, _why_no_attention)
WHOLE = Branch(_run_whole, _why_watched, is_whole=True)  # attention of other forms, as it is
MLP = mlp("fc1", "act", "drop1", "norm", last="fc2", dropout="drop2")  # of timm's form
SWIGLU = mlp("fc1_g", "act", "drop1", "norm", last="fc2", dropout="drop2", up="fc1_x")
