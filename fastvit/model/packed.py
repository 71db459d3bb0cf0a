"""Images of any sizes through a Vision Transformer at once, packed as NaViT packs them (Dehghani et al., 2023).

The tokens of all images are one sequence [ΣT, D], to which norms, linear layers and MLPs do what they do to a batch.
Attention alone looks at several tokens, and stays within an image. The images stand in the order of their numbers of
tokens, so that those with as many are a batch [B, T, D], a view, wherever one is needed: for whatever is not known to
treat every token by itself, or is watched, replaced or a part of somebody's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from fastvit.checks import check_image_list, require
from fastvit.guards import attribute, forward_of, why_not_plain, why_observed
from fastvit.model.layers import Attention, Block, DropPath, GluMlp, LayerScale, Mlp, QuickGELU, first_parameter
from fastvit.positions import rotate
from fastvit.stream import Setup, Stream
from fastvit.transfer import to_device
from fastvit.trunk import TIMM, half_of, run_half, takes_run

__all__ = ["Packing", "features", "logits"]


class Packing(NamedTuple):
    """Which tokens of a packed sequence belong to which image."""

    order: tuple[int, ...]  # the images as they stand in it, by their places in the list that was given
    groups: tuple[tuple[int, int], ...]  # how many images follow each other that have so many tokens

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        """For images with so many tokens."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        runs = itertools.groupby(lengths[i] for i in order)
        return cls(tuple(order), tuple((len(list(run)), length) for length, run in runs))

    @property
    def lengths(self) -> list[int]:
        """Of the images, in order."""
        return [length for images, length in self.groups for _ in range(images)]

    def batches(self, x: Tensor) -> Iterator[Tensor]:
        """[ΣT, ...] as batches [B, T, ...] of images with as many tokens."""
        for part, (images, length) in zip(x.split([b * t for b, t in self.groups]), self.groups, strict=True):
            yield part.unflatten(0, (images, length))

    def by_batch(self, module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """[ΣT, D] to [ΣT, D] by a module that takes batches."""
        return torch.cat([module(batch).flatten(0, 1) for batch in self.batches(x)])

    def each(self, module: nn.Module, x: Tensor) -> Tensor:
        """The same by a module that may treat every token by itself."""
        return module(x) if _is_by_token(module) else self.by_batch(module, x)

    def given(self, found: Sequence[Tensor]) -> list[Tensor]:
        """What there is of each image, in the order that they were given in."""
        placed = dict(zip(self.order, found, strict=True))
        return [placed[i] for i in range(len(placed))]


# Which images have as many tokens decides what is called: compiled, a program for nearly every batch, until torch
# gives up.
_uncompiled = torch.compiler.disable(reason="images of any sizes would be another program for nearly every batch")


@_uncompiled
def logits(model: Any, images: Sequence[Tensor]) -> Tensor:
    """See `VisionTransformer.forward_packed`."""
    if not model.global_pool and model.attn_pool is None:
        raise ValueError("global_pool: '' gives tokens, not features of an image; forward_features_packed has those")
    x, packing = _tokens(model, images)
    if not packing.order:
        return model.head(x)
    out = torch.cat([model.forward_head(batch) for batch in packing.batches(x)])
    places = to_device(packing.order, torch.int64, out.device)
    return torch.zeros_like(out).index_copy(0, places, out)


@_uncompiled
def features(model: Any, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See `VisionTransformer.forward_features_packed`."""
    x, packing = _tokens(model, images)
    own = packing.given(x.split(packing.lengths))
    ends = itertools.accumulate((len(tokens) for tokens in own), initial=0)
    return torch.cat([x[:0], *own]), to_device(list(ends), torch.int32, x.device)


def _check_units(model: Any, is_own: bool) -> None:
    """Refuse what FSDP2 would gather once for each size of images, of which another process has more or fewer."""
    for name, module in model.named_modules():
        is_unit = hasattr(type(module), "set_requires_gradient_sync") and module is not model
        if is_unit and (is_own or not takes_run(module)):
            raise ValueError(
                f"images of several sizes: {name} is a unit of fully_shard that would be called once for each size, "
                "not as often in every process; shard FastViT's blocks and the model, without other hooks on them"
            )


def _tokens(model: Any, images: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """The normed tokens of the last block."""
    images = check_image_list(images)
    is_own = _is_own(model, "forward_features", "_run_blocks", "_run_block")
    _check_units(model, is_own)
    if is_own:
        return _one_by_one(model, model.forward_features, images)
    x, packing = _embed(model, images)
    if not packing.order:
        return x, packing
    rotary = _rotary(model, images, packing)
    return packing.each(model.norm, model._leave_residual(_run_blocks(model, x, packing, rotary))), packing


def _is_own(model: Any, *names: str) -> bool:
    """Whether a subclass, or the model itself, has one of these methods of its own."""
    from fastvit.model.vision_transformer import VisionTransformer

    return any(
        name in vars(model) or getattr(type(model), name) is not getattr(VisionTransformer, name) for name in names
    )


def _one_by_one(model: Any, run: Callable[[Tensor], Tensor], images: list[Tensor]) -> tuple[Tensor, Packing]:
    """What a step of the model gives for each image by itself, packed."""
    found = [run(image[None])[0] for image in images]
    packing = Packing.of([len(tokens) for tokens in found])
    if found:
        return torch.cat([found[i] for i in packing.order]), packing
    like = first_parameter(model)
    return (torch.empty(0) if like is None else like).new_empty(0, model.embed_dim), packing


def _embed(model: Any, images: list[Tensor]) -> tuple[Tensor, Packing]:
    """What enters the first block."""
    embed = attribute(model, "patch_embed")
    has_own = _is_own(model, "_embed", "_positions", "_resampled")
    may_pack = bool(images) and not has_own and model._is_one_call(embed, images[0])
    if not may_pack or not isinstance(embed.norm, nn.Identity):
        return _one_by_one(model, model._embed, images)
    grids = [embed.dynamic_feat_size(image.shape[1:]) for image in images]
    packing = Packing.of([model.num_prefix_tokens + rows * columns for rows, columns in grids])
    table, prefix = _positions(model, embed), model._prefix()
    rows = model._positioned_prefix_tokens
    if table is not None and prefix is not None and rows:
        prefix = prefix + model.pos_embed[:, :rows]
    dtype = model._token_dtype(images[0].device, embed.proj.weight.dtype)
    x = embed.packed(images, packing.order, table, prefix, dtype)
    x = x if table is None else packing.each(model.pos_drop, x)
    x, packing = _with_patches_dropped(model.patch_drop, x, packing)
    if isinstance(model.norm_pre, nn.Identity):
        return packing.each(model.norm_pre, x), packing
    x = packing.each(model.norm_pre, model._leave_residual(x))
    return (x if model.residual_dtype is None else x.to(model.residual_dtype)), packing


def _positions(model: Any, embed: Any) -> Tensor | None:
    """The table of the patches' positions on the model's own grid, [rows, columns, D]."""
    if model.pos_embed is None:
        return None
    return model.pos_embed[0, model._positioned_prefix_tokens :].unflatten(0, tuple(embed.grid_size))


def _rotary(model: Any, images: list[Tensor], packing: Packing) -> Tensor | None:
    """The rotary positions of all tokens as they stand, [2, ΣT, D/heads]; None where the model has none."""
    tables = {size: model._rotary(size, images[0].device) for size in {image.shape[1:] for image in images}}
    if not all(tables.values()):
        return None
    return torch.cat([tables[images[i].shape[1:]]["rotary"] for i in packing.order], dim=1)


def _with_patches_dropped(drop: Any, x: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    if _is_by_token(drop):
        return drop(x), packing
    kept = [drop(batch) for batch in packing.batches(x)]
    groups = tuple((batch.shape[0], batch.shape[1]) for batch in kept)
    return torch.cat([batch.flatten(0, 1) for batch in kept]), packing._replace(groups=groups)


# What treats every token by itself, whatever dimensions there are before the last: by the `forward` that these classes
# have now, so that a subclass with its own is not taken for one, nor a class whose forward somebody replaces.
_BY_TOKEN = frozenset(
    kind.forward
    for kind in (
        *(nn.Identity, nn.Dropout, nn.LayerNorm, nn.RMSNorm, nn.Linear),
        *(nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, QuickGELU, LayerScale, Mlp, GluMlp),
    )
)
_WRITTEN_OUT = Block.forward, Attention.forward  # here


def _is_by_token(module: nn.Module) -> bool:
    return all(forward_of(type(part)) in _BY_TOKEN and not why_observed(part) for part in module.modules())


def _is_plain(block: Any, is_gathered: bool = False) -> bool:
    """Whether a block and its attention are the ones that are written out here, and all else is done by token.

    With `is_gathered` in a call of the block, whose class and hooks may be those of FSDP2.
    """
    attention = attribute(block, "attn")
    if _has_any_global_hook() or why_not_plain(attention, Attention):
        return False
    if not is_gathered and why_not_plain(block, Block):
        return False
    is_as_written = (Block.forward, Attention.forward) == _WRITTEN_OUT and "_heads" not in vars(attention)
    if not is_as_written:
        return False
    drops = attribute(block, "drop_path1"), attribute(block, "drop_path2")
    if not all(isinstance(drop, nn.Identity) or not why_not_plain(drop, DropPath) for drop in drops):
        return False
    parts = *block.children(), *attention.children()
    return all(_is_by_token(part) for part in parts if part is not attention and part not in drops)


def _run_blocks(model: Any, x: Tensor, packing: Packing, rotary: Tensor | None) -> Tensor:
    """All blocks one after another; by the trunk's ops, where these pay, as one sequence [1, ΣT, D]."""
    if reason := why_not_plain(model.blocks, nn.Sequential):
        require(rotary is None, f"blocks: with pos_embed='rotary' they are called one by one, and the whole {reason}")
        return packing.by_batch(model.blocks, x)
    setup = Setup.of(x[None], None, model.residual_dtype is not None)
    stream = Stream(x[None])
    for index, block in enumerate(model.blocks):
        is_recomputed = model._is_recomputed(index)
        if setup is not None and not is_recomputed and _is_plain(block) and not _drops_depth(block):
            stream = _stream_block(block, stream, packing, rotary, setup)
            continue
        x = (stream.residual if setup is None else stream.tensor(setup))[0]
        run = _run_block if _is_plain(block) else _run_sharded if takes_run(block) else _run_batches
        if is_recomputed:
            x = checkpoint(run, block, x, packing, rotary, use_reentrant=False)
        else:
            x = run(block, x, packing, rotary)
        stream = Stream(x[None])
    return (stream.residual if setup is None else stream.tensor(setup))[0]


def _stream_block(
    block: Block, stream: Stream, packing: Packing, rotary: Tensor | None, setup: Setup, ends: bool = False
) -> Stream:
    """`Block.stream`, but for attention within each image."""

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        q, k, v = (each[0].transpose(0, 1) for each in (q, k, v))  # [ΣT, heads, D/heads]
        return _within_images(q, k, v, dropout, packing).flatten(1)[None]

    first, second = TIMM
    stream = run_half(stream, half_of(block, first, setup, attend=attend, rotary=rotary), setup)
    return run_half(stream, half_of(block, second, setup._replace(ends=ends)), setup)


def _drops_depth(block: Block) -> bool:
    """Whether stochastic depth is at work, which draws a factor an image."""
    drops = (block.drop_path1, block.drop_path2)
    return any(isinstance(drop, DropPath) and drop.training and drop.drop_prob for drop in drops)


def _run_sharded(block: Any, x: Tensor, packing: Packing, rotary: Tensor | None) -> Tensor:
    """A block whose parameters its hooks gather, in one call: every process must gather as often as the others."""
    run = _run_block if _is_plain(block, is_gathered=True) else _run_batches
    return block(x, run=lambda block, x: run(block, x, packing, rotary))


def _run_batches(block: Any, x: Tensor, packing: Packing, rotary: Tensor | None) -> Tensor:
    """Any block, on one batch after another of images with as many tokens."""
    if takes_run(block):
        block = block.forward  # in a call of it
    if rotary is None:
        return packing.by_batch(block, x)
    tables = packing.batches(rotary.transpose(0, 1))  # [B, T, 2, D/heads] each
    return torch.cat([
        block(batch, rotary=table.movedim(2, 0).unsqueeze(2)).flatten(0, 1)
        for batch, table in zip(packing.batches(x), tables, strict=True)
    ])  # fmt: skip


def _run_block(block: Block, x: Tensor, packing: Packing, rotary: Tensor | None) -> Tensor:
    """[ΣT, D] to [ΣT, D]: `Block.forward`, but for attention within each image, and depth that is dropped by image."""
    setup = None if _drops_depth(block) else Setup.of(x[None], None, block.residual_dtype is not None)
    if setup is not None:
        return _stream_block(block, Stream(x[None]), packing, rotary, setup, ends=True).tensor(setup)[0]
    branch = block.ls1(_attend(block.attn, block.norm1(block._branch_input(x)), packing, rotary))
    x = block._add(x, _drop_path(block.drop_path1, branch, packing))
    branch = block.ls2(block.mlp(block.norm2(block._branch_input(x))))
    return block._add(x, _drop_path(block.drop_path2, branch, packing))


def _attend(attention: Any, x: Tensor, packing: Packing, rotary: Tensor | None) -> Tensor:
    """`Attention.forward` within each image."""
    heads = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).unflatten(-1, (3, *heads)).unbind(1)  # each [ΣT, heads, D/heads]
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rotary is not None:
        q, k = rotate(q, rotary.unsqueeze(2)), rotate(k, rotary.unsqueeze(2))
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = _within_images(q, k, v, dropout, packing)
    return attention.proj_drop(attention.proj(attention.norm(out.flatten(1))))


def _within_images(q: Tensor, k: Tensor, v: Tensor, dropout: float, packing: Packing) -> Tensor:
    """Attention of [ΣT, heads, D/heads] each, to the same."""
    if v.is_cuda and not dropout and v.dtype in (torch.float16, torch.bfloat16):
        return _attend_at_once(q.to(v.dtype), k.to(v.dtype), v, packing)
    found = []
    for batch in zip(*(packing.batches(each) for each in (q, k, v)), strict=True):
        of_q, of_k, of_v = (each.transpose(1, 2) for each in batch)  # [B, heads, T, D/heads]
        own = F.scaled_dot_product_attention(of_q, of_k, of_v, dropout_p=dropout)
        found.append(own.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """By torch's kernel for sequences of many lengths, which a GPU has, for half precision and without dropout."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = packing.lengths
    ends = to_device([0, *itertools.accumulate(lengths)], torch.int32, q.device)
    longest = max(lengths)
    out = varlen_attn(q, k, v, ends, ends, longest, longest)
    assert isinstance(out, Tensor)  # nothing more was asked for
    return out


def _drop_path(drop: Any, branch: Tensor, packing: Packing) -> Tensor:
    if not isinstance(drop, DropPath) or not drop.training or not drop.drop_prob:
        return drop(branch)
    lengths = packing.lengths
    factors = drop(branch.new_ones(len(lengths), 1))  # drawn for each image
    counts = to_device(lengths, torch.int64, branch.device)
    return branch * factors.repeat_interleave(counts, 0, output_size=len(branch))
