"""The blocks of a Vision Transformer by the trunk's ops: what our own model and accelerated ones share.

Between two halves of blocks the residual stream is a pair, a tensor and what is still to be added to it, so that the
addition, the bias of the linear layer before it and the norm behind it are one call of
:func:`fastvit.functional.add_norm`. Each part runs by the ops only while it is what the ops do; a part that is watched,
wrapped or of another class runs as it is, and the stream becomes the tensor that it would have been given.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvit import branches
from fastvit.branches import Run, is_dropping, whole
from fastvit.cpu.linear import linear
from fastvit.guards import Snapshot, attribute, is_sharded, why_observed
from fastvit.half_block import Settings
from fastvit.stream import Norm, Normed, Result, Setup, Stream

__all__ = ["TIMM", "Half", "Kept", "Names", "half_of", "kept", "run_blocks", "run_half", "takes_run", "why_not_half"]


class Half(NamedTuple):
    """One half of a block: its norm, its branch (attention or MLP), and what is done to the branch's result."""

    norm: Any
    branch: Run
    why_whole: str = ""  # why the branch is a module as it is, which is given what its own norm gives; "": ours
    dropout: Any = None  # None where it does nothing
    scale: Any = None  # a module or a parameter; like the next, None where it does nothing
    drop_path: Any = None
    our_norm: Norm | None = None  # with this and the next two the ops do what those modules do
    our_scale: Tensor | None = None
    is_our_drop_path: bool = False
    ready: dict[Any, Settings | None] | None = None  # how its node is run, by what it is given


class Names(NamedTuple):
    """What a block calls the parts of one half."""

    norm: str
    branch: str
    dropout: str = ""
    scale: str = ""
    drop_path: str = ""


TIMM = Names("norm1", "attn", "", "ls1", "drop_path1"), Names("norm2", "mlp", "", "ls2", "drop_path2")


def half_of(block: Any, names: Names, setup: Setup, call: Callable[..., Tensor] = whole, **options: Any) -> Half:
    """A half of a block by its names, as its parts are now. `call(module, x, **options)` runs a branch as it is."""
    norm, module, dropout, scale, drop_path = (attribute(block, name) if name else None for name in names)
    reason = branches.why_no_branch(module)
    if reason:
        reason = f"{names.branch} {reason}"
        run: Run = lambda x: Result(call(module, x.tensor(), **options))  # noqa: E731
    else:
        run = branches.branch_of(module).plan(module, setup=setup, **options)
    return settled(Half(norm, run, reason, dropout if is_dropping(dropout) else None, scale, drop_path))


def settled(half: Half) -> Half:
    """With what the ops do of it."""
    norm = half.norm
    scale, drop_path = (None if _does_nothing(module) else module for module in (half.scale, half.drop_path))
    our_norm = None
    if not branches.why_not_norm(norm):
        our_norm = Norm(attribute(norm, "weight"), attribute(norm, "bias"), norm.eps, branches.is_rms(norm))
    our_scale = scale if isinstance(scale, Tensor) else None
    if isinstance(scale, nn.Module) and not branches.why_no_scale(scale):
        our_scale = branches.scale_of(scale)
    is_our_drop_path = drop_path is not None and not branches.why_no_drop_path(drop_path)
    half = half._replace(scale=scale, drop_path=drop_path, ready={})
    return half._replace(our_norm=our_norm, our_scale=our_scale, is_our_drop_path=is_our_drop_path)


class Kept(NamedTuple):
    """The halves of a block, and what they were made for; a block has it as `fastvit_kept`. A copy has none."""

    block: weakref.ref[nn.Module] | None = None  # which would hold itself
    key: Any = None
    snapshot: Snapshot | None = None
    halves: tuple[Half, Half] | None = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


def kept(block: nn.Module, key: Any, make: Callable[[], tuple[Half, Half]]) -> tuple[Half, Half]:
    """The halves of a block as they were made with this key, if nothing in the block has changed since then."""
    if torch.compiler.is_compiling() or why_observed(block):
        return make()  # what it looks at becomes guards of the graph; a snapshot with hooks holds for no call
    attributes = vars(block)
    found = attributes.get("fastvit_kept")
    # Replicas and shallow copies have that of another block.
    if found is not None and found.key == key and found.block() is block and found.snapshot.holds(block):
        return found.halves
    attributes["fastvit_kept"] = None  # since the snapshot counts the attributes
    made = Kept(weakref.ref(block), key, Snapshot(block), make())
    attributes["fastvit_kept"] = made
    assert made.halves is not None
    return made.halves


def _does_nothing(module: Any) -> bool:
    return module is None or (type(module) is nn.Identity and not why_observed(module))


def run_half(stream: Stream, half: Half, setup: Setup) -> Stream:
    """Half a block."""
    if half.our_norm is None:
        stream = Stream(stream.tensor(setup))
        normed = Normed(stream, setup, made=half.norm(stream.residual))
    else:
        normed = Normed(stream, setup, half.our_norm, _norm_dtype(stream.residual, half, setup), half.ready)
    branch = half.branch(normed)
    residual = normed.stream.residual
    if half.dropout is not None:
        branch = Result(half.dropout(branch.whole()))
    scale, keep = half.our_scale, None
    if scale is None and half.scale is not None:
        branch = Result(half.scale(branch.whole()))
    if half.is_our_drop_path:
        if half.drop_path.training:
            keep = _factors(half.drop_path, branch.tensor, scale)
    elif half.drop_path is not None:
        whole_branch = branch.whole()
        branch = Result(half.drop_path(whole_branch if scale is None else whole_branch * scale))
        scale = None
    return Stream(residual, branch, scale, keep)


def _norm_dtype(residual: Tensor, half: Half, setup: Setup) -> torch.dtype | None:
    """Of the norm's result; None: autocast's where it is on, which linear layers take, else the sum's."""
    device_type = residual.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return half.our_norm.weight.dtype if setup.keeps_dtype and half.our_norm is not None else None
    if not half.why_whole:
        return None
    return residual.dtype if half.our_norm is not None and half.our_norm.rms else torch.float32


def _factors(drop_path: Any, branch: Tensor, scale: Tensor | None) -> Tensor:
    """[B] float32, drawn as the module draws them: it multiplies ones of the dtype that it would be given."""
    dtype = branch.dtype if scale is None else torch.promote_types(branch.dtype, scale.dtype)
    return drop_path(branch.new_ones((branch.shape[0], 1, 1), dtype=dtype)).flatten().float()


def run_blocks(blocks: Iterable[Any], x: Tensor, setup: Setup, **options: Any) -> Tensor:
    """Blocks one after another, each with these options. A block has a `stream(stream, setup)` that gives the stream
    behind it, or None where it runs its own code; it is called as a module, with a tensor, where somebody watches it.
    """
    stream = Stream(x)
    for block in blocks:
        following = None
        if not hasattr(block, "stream"):
            pass
        elif not why_observed(block):
            following = block.stream(stream, setup, **options)
        elif takes_run(block):
            following = block(stream, run=functools.partial(_outliving, setup=setup, **options))
        stream = Stream(block(stream.tensor(setup), **options)) if following is None else following
    return stream.tensor(setup)


TAKING_RUN: set[Any] = set()  # forwards of blocks that give `run(block, x)` where they are given a `run`


def takes_run(block: Any) -> bool:
    """Whether a block is sharded and its call, whose hooks gather its parameters, may be given something to run."""
    kind = type(block)
    return kind.forward in TAKING_RUN and kind.__call__ is nn.Module.__call__ and is_sharded(block)


def _outliving(block: Any, stream: Stream, setup: Setup, **options: Any) -> Stream | None:
    """The stream behind a block whose parameters are there for the call alone: without any of them."""
    if stream.keep is not None:  # which a policy of FSDP2 has cast; it was drawn in the dtype of a branch
        stream = stream._replace(keep=stream.keep.float())
    following = block.stream(stream, setup, **options)
    if following is None or following.branch is None:
        return following
    tensor, bias, weight = following.branch
    branch = Result(tensor if weight is None else linear(tensor, weight), None if bias is None else bias.clone())
    scale = following.scale
    return following._replace(branch=branch, scale=None if scale is None else scale.clone())


def why_not_half(half: Half) -> str:
    """What of half a block runs as it is, and why; "" where all is ours."""
    norm = branches.why_not_norm(half.norm)
    reasons = [norm and f"a norm {norm}", half.why_whole]
    for module, why_no, name in (
        (half.scale, branches.why_no_scale, "LayerScale"),
        (half.drop_path, branches.why_no_drop_path, "DropPath"),
    ):
        if isinstance(module, nn.Module):
            reason = why_no(module)
            reasons.append(reason and f"{name} {reason}")
    return "; ".join(reason for reason in reasons if reason)
