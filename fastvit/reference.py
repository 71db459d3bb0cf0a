"""The definition of the ops: the few lines of plain PyTorch that every backend is held to.

It shares no code with any backend, checks nothing, and is differentiated by torch's own autograd. Run in
float64 it is the truth of the validator and of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Image to token sequence; arguments and result as in :func:`fastvit.functional.patch_embed`."""
    x = images.to(weight.dtype)  # [B, C, H, W]
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        x = (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)  # [B, N, D]
    return _place(tokens, pos_embed, prefix, keep).to(dtype or weight.dtype)


def patch_embed_packed(
    images: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    order: str = "CPP",
    still: bool = False,
    merge: int = 1,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Images of any sizes to packed tokens; arguments and results as in
    :func:`fastvit.functional.patch_embed_packed`."""
    if weight.dim() == 5:  # frames are so many more channels, in a still all like the first
        assert isinstance(images, Tensor)
        frames = weight.shape[2]
        if still:
            cut = images.unflatten(-1, (*weight.shape[1:3], -1))
            images = cut[..., :1, :].expand_as(cut).flatten(-3)
        mean, std = (None if given is None else [x for x in given for _ in range(frames)] for given in (mean, std))
        weight = weight.flatten(1, 2)
    height, width = weight.shape[2:]
    if sizes is not None:  # put the patches together again
        assert isinstance(images, Tensor)
        split = images.split([rows * columns for rows, columns in sizes]) if images.dim() == 2 else images
        images = [_joined(patches, size, weight, order, merge) for patches, size in zip(split, sizes, strict=True)]
    tokens, first = [weight.new_empty(0, weight.shape[0], dtype=dtype)], 0
    for image in images:
        rows, columns = image.shape[1] // height, image.shape[2] // width
        positions = None if pos_embed is None else pos_embed[first : first + rows * columns]
        if pos_embed is not None and pos_embed.dim() == 3:
            grid = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32)).permute(2, 0, 1)[None]
            for length in (rows, columns):  # one axis at a time: of both torch 2.13 makes a single column wrongly
                filtered: dict[str, Any] = {"antialias": antialias, "align_corners": align_corners}
                grid = F.interpolate(grid.mT, (grid.shape[3], length), mode=interpolation, **filtered)
            positions = grid[0].permute(1, 2, 0).flatten(0, 1)
        elif positions is not None and merge > 1:  # rows that come as the patches do
            windows = positions.unflatten(0, (rows // merge, columns // merge, merge, merge))
            positions = windows.transpose(1, 2).flatten(0, 3)
        given: dict[str, Any] = {"pos_embed": positions, "prefix": prefix, "mean": mean, "std": std, "dtype": dtype}
        own = patch_embed(image[None], weight, bias, **given)[0]
        if merge > 1:  # as the patches came
            in_rows = own[-rows * columns :].unflatten(0, (rows // merge, merge, columns // merge, merge))
            own = torch.cat([own[: -rows * columns], in_rows.transpose(1, 2).flatten(0, 3)])
        tokens.append(own)
        first += rows * columns
    ends = torch.tensor([len(own) for own in tokens]).cumsum(0).to(weight.device, torch.int32)
    return torch.cat(tokens), ends


def _joined(patches: Tensor, size: tuple[int, int], weight: Tensor, order: str, merge: int) -> Tensor:
    """[N, C·P_h·P_w], or more of them than N, to the image [C, H, W]."""
    (rows, columns), (_, channels, height, width) = size, weight.shape
    cut = patches[: rows * columns].unflatten(0, (rows // merge, columns // merge, merge, merge))
    cut = cut.transpose(1, 2).reshape(rows * columns, -1)
    if order == "CPP":
        cut = cut.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    else:
        cut = cut.view(rows, columns, height, width, channels).permute(4, 0, 2, 1, 3)
    return cut.reshape(channels, rows * height, columns * width)


def add_position(
    tokens: Tensor, pos_embed: Tensor, *, prefix: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Tokens to positioned sequence; arguments and result as in :func:`fastvit.functional.add_position`."""
    return _place(tokens, pos_embed, prefix, None).to(dtype or tokens.dtype)


def add_norm(
    residual: Tensor,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float,
    rms: bool = False,
    residual_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A block's addition and the norm behind it; arguments and results as in :func:`fastvit.functional.add_norm`."""
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = residual
    if branch is not None:
        change = branch.to(wide) if bias is None else branch.to(wide) + bias
        change = change if scale is None else change * scale
        change = change if keep is None else change * keep.view(-1, *(1,) * (branch.dim() - 1))
        total_dtype = torch.promote_types(
            torch.result_type(residual, branch), (branch if scale is None else scale).dtype
        )
        total = (residual.to(wide) + change).to(residual_dtype or total_dtype)
    x = total.to(wide)
    x = x if rms else x - x.mean(-1, keepdim=True)  # F.layer_norm's third derivative is wrong
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    normed = normed if norm_bias is None else normed + norm_bias
    return total, normed.to(dtype or total.dtype)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "gelu",
    *,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_last: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What stands between an MLP's products; arguments and result as in :func:`fastvit.functional.bias_act`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = x.to(wide) if bias is None else x.to(wide) + bias
    factor = up if up is None or up_bias is None else up.to(wide) + up_bias
    if gate_last is not None:
        gate, factor = gate.chunk(2, dim=-1)[:: -1 if gate_last else 1]
    out = ACTS[act](gate)
    return (out if factor is None else out * factor).to(dtype or x.dtype)


def split_heads(qkv: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; arguments and results as in :func:`fastvit.functional.split_heads`."""
    if bias is not None:
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype)  # nothing, with a gradient
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """Self-attention; arguments and result as in :func:`fastvit.functional.attention`, but for what draws or masks.

    Raises:
        NotImplementedError: a mask, or dropout.
    """
    if attn_mask is not None or dropout or is_causal:
        raise NotImplementedError("attention with a mask or dropout is PyTorch's own")
    q, k, v = split_heads(qkv, bias, num_heads)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _place(tokens: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, keep: Tensor | None) -> Tensor:
    """Add positions, select the kept patches, prepend the prefix: [B, N, D] → [B, R+N, D]."""
    batch, patches, width = tokens.shape
    if pos_embed is not None:
        tokens = tokens + pos_embed.reshape(-1, width)[-patches:]
    if keep is not None:
        tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, width))
    if prefix is None:
        return tokens
    prefix = prefix.reshape(-1, width)  # [R, D]
    if pos_embed is not None and pos_embed.numel() > patches * width:
        prefix = prefix + pos_embed.reshape(-1, width)[: prefix.shape[0]]
    return torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1)
