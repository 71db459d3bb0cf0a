"""The ops of the C++/CUDA extension over emulated kernels: the arguments of `torch.ops.fastvit.*_cuda`, on the CPU.

Every access of a kernel is checked, and each output must be written whole and once.

Raises:
    RuntimeError: a kernel raced, read or wrote out of bounds, or left an output incomplete; or it can't be built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit.cpu.add_norm import is_apart
from fastvit.emulated.call import device, library, type_of, view
from fastvit.kernels.packed_images import read_images


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    constants: Tensor,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    tf32: bool,
) -> Tensor:
    """[B, R+N, D] tokens, or [B, R+N_keep, D] with `keep`."""
    images, weight = _readable(images), weight.contiguous()
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    rows = (0 if prefix is None else prefix.shape[0]) + (patches if keep is None else keep.shape[1])
    tokens = images.new_empty((images.shape[0], rows, weight.shape[0]), dtype=dtype)
    if tokens.numel() == 0:
        return tokens
    held = [_contiguous(tensor) for tensor in (bias, pos_embed, prefix, keep)]
    inputs = _patch_embed_inputs((images, weight, *held, constants), compute_dtype, tf32, False)
    library().patch_embed(device(), inputs, view(tokens))
    return tokens


def patch_embed_backward(
    grad: Tensor,
    product_grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    constants: Tensor,
    constants_of_images: Tensor,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    tf32: bool,
    has_mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_images, d_weight, d_bias [D] and d_rows [R+N, D], the last two float32; of size 0 where not needed."""
    need_images, need_weight, need_bias, need_rows = needs
    dim, _, height, width = weight.shape
    rows = prefix_rows + (images.shape[2] // height) * (images.shape[3] // width)
    d_images = torch.empty_like(images) if need_images else images.new_empty(0)
    if need_images and not library().can_read(view(d_images)):
        d_images = torch.empty_like(images, memory_format=torch.contiguous_format)
    d_weight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype)
    d_bias = torch.empty(dim if need_bias else 0, dtype=torch.float32)
    d_rows = torch.empty((rows, dim) if need_rows else (0,), dtype=torch.float32)
    grad, product_grad, images = grad.contiguous(), product_grad.contiguous(), _readable(images)
    weight, keep = weight.contiguous(), _contiguous(keep)
    inputs = _patch_embed_inputs((images, weight, None, None, None, keep, constants), compute_dtype, tf32, has_mean)
    results = _views((d_images, d_weight, d_bias, d_rows), needs)
    gradients = library().PatchEmbedGradients(view(grad), view(product_grad), view(constants_of_images), *results)
    library().patch_embed_backward(device(), inputs, prefix_rows, gradients)
    return d_images, d_weight, d_bias, d_rows


def patch_embed_packed(
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    images: list[Tensor],
    starts: list[int],
    table: Tensor,
    constants: Tensor,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    tf32: bool,
) -> Tensor:
    """[C, H_i, W_i] each → [Σ R+N_i, D]."""
    weight = weight.contiguous()
    held = [_contiguous(tensor) for tensor in (bias, pos_embed, prefix)]
    inputs = _patch_embed_inputs((None, weight, *held, None, constants), compute_dtype, tf32, False)
    packed, patches = _packed(images, starts, table, weight, 0 if pos_embed is None else pos_embed.shape[0])
    rows = patches + len(images) * (0 if prefix is None else prefix.shape[0])
    tokens = weight.new_empty((rows, weight.shape[0]), dtype=dtype)
    library().patch_embed_packed(device(), inputs, *packed, view(tokens))
    return tokens


def patch_embed_packed_backward(
    grad: Tensor,
    product_grad: Tensor,
    weight: Tensor,
    images: list[Tensor],
    starts: list[int],
    table: Tensor,
    constants: Tensor,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    places: int,
    tf32: bool,
    has_mean: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """d_weight, d_bias [D] and d_rows [R+P, D], the last two float32; of size 0 where not needed."""
    need_weight, need_bias, need_rows = needs
    grad, product_grad, weight = grad.contiguous(), product_grad.contiguous(), weight.contiguous()
    packed, _ = _packed(images, starts, table, weight, places)
    width, places = weight.shape[0], packed[2]
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = torch.empty(width if need_bias else 0, dtype=torch.float32)
    d_rows = torch.empty((prefix_rows + places, width) if need_rows else 0, dtype=torch.float32)
    inputs = _patch_embed_inputs((None, weight, None, None, None, None, constants), compute_dtype, tf32, has_mean)
    results = _views((d_weight, d_bias, d_rows), needs)
    none = view(None)
    gradients = library().PatchEmbedGradients(view(grad), view(product_grad), none, none, *results)
    library().patch_embed_packed_backward(device(), inputs, *packed, prefix_rows, gradients)
    return d_weight, d_bias, d_rows


def add_position(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N, D] → [B, R+N, D]."""
    pos_embed, prefix = pos_embed.contiguous(), _contiguous(prefix)
    batch, patches, dim = tokens.shape
    out = tokens.new_empty((batch, patches + (0 if prefix is None else prefix.shape[0]), dim), dtype=dtype)
    if out.numel():
        library().add_position(device(), view(tokens), view(pos_embed), view(prefix), view(out))
    return out


def add_position_backward(grad: Tensor) -> Tensor:
    """[B, T, D] → [T, D] float32, the sum over the batch."""
    grad = grad.contiguous()
    d_rows = grad.new_empty(grad.shape[1:], dtype=torch.float32)
    if grad.numel() == 0:
        return d_rows.zero_()
    library().add_position_backward(device(), view(grad), view(d_rows))
    return d_rows


def add_norm(
    residual: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., D] sum (of size 0 without a branch) and its norm, and [2, rows] float32 statistics."""
    total = residual.new_empty(0 if branch is None else residual.shape, dtype=sum_dtype)
    normed = residual.new_empty(residual.shape, dtype=dtype)
    held = [_contiguous(tensor) for tensor in (residual, branch, bias, scale, keep, weight, norm_bias)]
    inputs = _add_norm_inputs(held, rms)
    statistics = residual.new_empty((2, residual.shape[:-1].numel()), dtype=torch.float32)
    results = _rows_view(None if branch is None else total), _rows_view(normed), view(statistics)
    library().add_norm(device(), inputs, eps, *results)
    return total, normed, statistics


def add_norm_backward(
    total: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    statistics: Tensor,
    rms: bool,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., D] gradients of residual and branch (of size 0 where it is the residual's), and [vectors, D] float32."""
    apart = branch is not None and is_apart(residual_dtype, branch, scale, keep)
    d_residual = total.new_empty(total.shape, dtype=residual_dtype)
    d_branch = total.new_empty(total.shape if apart else 0, dtype=residual_dtype if branch is None else branch.dtype)
    vectors = sum(vector is not None for vector in (weight, norm_bias, bias, scale))
    d_vectors = total.new_empty((vectors, total.shape[-1]), dtype=torch.float32)
    branch = None if scale is None else branch
    held = [_contiguous(tensor) for tensor in (total, branch, bias, scale, keep, weight, norm_bias)]
    more = [_contiguous(tensor) for tensor in (d_normed, d_total)]
    results = _rows_view(d_residual), _rows_view(d_branch if apart else None), view(d_vectors)
    gradients = library().AddNormGradients(*map(_rows_view, more), view(statistics), *results)
    library().add_norm_backward(device(), _add_norm_inputs(held, rms), gradients)
    return d_residual, d_branch, d_vectors


def bias_act(
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    function: int,
    linear: float,
    cubic: float,
    gate_last: bool | None,
    dtype: torch.dtype,
) -> Tensor:
    """[..., F], or of x [..., 2F] with gate_last."""
    width = x.shape[-1] if gate_last is None else x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width), dtype=dtype)
    held = [_contiguous(tensor) for tensor in (x, bias, up, up_bias)]
    inputs = _bias_act_inputs(held, function, linear, cubic, gate_last)
    library().bias_act(device(), inputs, _rows_view(out))
    return out


def bias_act_backward(
    d_out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    function: int,
    linear: float,
    cubic: float,
    gate_last: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and up (of size 0 without), and float32 sums of the rows of both (of size 0 without a bias)."""
    d_x, d_up = x.new_empty(x.shape), x.new_empty(0 if up is None else up.shape)
    has_bias = bias is not None or up_bias is not None
    sums = x.new_empty(x.shape[-1] * (1 if up is None else 2) if has_bias else 0, dtype=torch.float32)
    held = [_contiguous(tensor) for tensor in (x, bias, up, up_bias)]
    d_out = d_out.contiguous()
    gradients = library().BiasActGradients(
        _rows_view(d_out), _rows_view(d_x), _rows_view(None if up is None else d_up), view(sums if has_bias else None)
    )
    library().bias_act_backward(device(), _bias_act_inputs(held, function, linear, cubic, gate_last), gradients)
    return d_x, d_up, sums


def split_heads_backward(d_q: Tensor, d_k: Tensor, d_v: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Three of [B, H, T, D/H] → [B, T, 3D], and its float32 sums over batch and tokens (of size 0 without a bias)."""
    batch, heads, tokens, width = d_q.shape
    d_qkv = d_q.new_empty((batch, tokens, 3 * heads * width))
    sums = d_q.new_empty(3 * heads * width if has_bias else 0, dtype=torch.float32)
    results = view(d_qkv), view(sums if has_bias else None)
    library().split_heads_backward(device(), *map(view, (d_q, d_k, d_v)), *results)
    return d_qkv, sums


def _patch_embed_inputs(tensors: Sequence[Tensor | None], compute_dtype: torch.dtype, *rest: bool) -> Any:
    """Of images, weight, bias, positions, prefix, keep and constants."""
    return library().PatchEmbedInputs(*map(view, tensors), type_of(compute_dtype), *rest)


def _views(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Any]:
    """Of the gradients that are needed."""
    return [view(tensor if is_needed else None) for tensor, is_needed in zip(gradients, needs, strict=True)]


def _packed(
    images: list[Tensor], starts: list[int], table: Tensor, weight: Tensor, places: int
) -> tuple[tuple[Any, ...], int]:
    """What the library is told of images of any sizes, and how many patches they have."""
    found = read_images(images, starts, (weight.shape[2], weight.shape[3]))
    views = [view(image[None]) for image in images]
    places = max(places, found.positions)
    return (views, starts, places, found.rows, found.layout.channels_last, view(table)), found.rows


def _bias_act_inputs(held: Sequence[Tensor | None], *rest: Any) -> Any:
    x, bias, up, up_bias = held
    return library().BiasActInputs(_rows_view(x), view(bias), _rows_view(up), view(up_bias), *rest)


def _add_norm_inputs(held: Sequence[Tensor | None], rms: bool) -> Any:
    return library().AddNormInputs(*map(_rows_view, held[:2]), *map(view, held[2:]), rms)


def _rows_view(tensor: Tensor | None) -> Any:
    """A contiguous tensor [..., D] as [rows, D]."""
    return view(None if tensor is None else tensor.view(tensor.shape[:-1].numel(), tensor.shape[-1]))


def _readable(images: Tensor) -> Tensor:
    return images if images.numel() == 0 or library().can_read(view(images)) else images.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
