"""`patch_embed` on a CPU: the GEMM starts from bias + position and writes into the final sequence.

Everything is computed in float32 and rounded once: without bf16 units that is about three times faster than a
bf16 GEMM, and more exact with or without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cpu.add_position import sum_over_batch
from fastvit.cpu.prepare_weight import pixel_mean_and_std, prepare_weight

Normalisation = Sequence[float] | None


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Normalisation,
    std: Normalisation,
    keep: Tensor | None,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] → [B, R+N, D]; arguments as in `fastvit.functional.patch_embed`, already checked."""
    matrix, full_bias = _matrix(weight, bias, mean, std, images.dtype == torch.uint8)
    patches = extract_patches(images, weight.shape[2], weight.shape[3], keep)  # [B, N, K]
    batch, rows, _ = patches.shape
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    tokens = patches.new_empty((batch, prefix_rows + rows, weight.shape[0]))
    patch_tokens = tokens[:, prefix_rows:]
    patch_tokens.copy_(_start_values(full_bias, pos_embed, patch_grid(images, weight), keep))
    if prefix is not None:
        tokens[:, :prefix_rows] = _prefix_values(prefix, pos_embed, patch_grid(images, weight))
    patch_tokens.baddbmm_(patches, matrix.t().expand(batch, -1, -1))
    return tokens.to(dtype)


def backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Normalisation,
    std: Normalisation,
    keep: Tensor | None,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of images, weight, bias and of every position row; size 0 where not needed."""
    need_images, need_weight, need_bias, need_rows = needs
    patch_grad = grad[:, prefix_rows:].to(torch.float32)  # [B, N, D]
    d_images, d_weight = images.new_empty(0), weight.new_empty(0)
    d_bias = d_rows = grad.new_empty(0, dtype=torch.float32)

    rows = None
    if need_rows or ((need_bias or need_weight) and keep is None):
        rows = _row_gradients(grad, patch_grad, prefix_rows, patch_grid(images, weight), keep)
    if need_bias or need_weight:
        bias_grad = patch_grad.sum((0, 1)) if rows is None else rows[prefix_rows:].sum(0)
    if need_weight:
        d_weight = _weight_gradient(patch_grad, images, weight, mean, std, keep, bias_grad)
    if need_images:
        d_images = _image_gradient(patch_grad, images, weight, std, keep)
    if need_bias:
        d_bias = bias_grad
    if need_rows and rows is not None:
        d_rows = rows
    return d_images, d_weight, d_bias, d_rows.clone() if d_rows is d_bias else d_rows


def patch_grid(images: Tensor, weight: Tensor) -> int:
    """N, the number of patches of an image."""
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


def extract_patches(images: Tensor, patch_height: int, patch_width: int, keep: Tensor | None) -> Tensor:
    """[B, C, H, W] of any dtype and strides → [B, N, C·P_h·P_w] float32, one copy; only the kept ones if asked."""
    view = _as_patches(images, patch_height, patch_width)  # [B, g_h, g_w, C, P_h, P_w]
    batch, grid_height, grid_width = view.shape[:3]
    patches, size = grid_height * grid_width, view[0, 0, 0].numel() if batch else 0
    if keep is None:
        out = torch.empty(view.shape, dtype=torch.float32, device=images.device)
        return out.copy_(view).view(batch, patches, -1) if batch else out.view(0, patches, _size(images, view))
    if batch == 0:
        return images.new_empty((0, keep.shape[1], _size(images, view)), dtype=torch.float32)
    sample = torch.arange(batch, device=images.device)[:, None]
    kept = view[sample, keep // grid_width, keep % grid_width]  # [B, N_keep, C, P_h, P_w]
    return kept.to(torch.float32).reshape(batch, keep.shape[1], size)


def _size(images: Tensor, view: Tensor) -> int:
    return view.shape[3] * view.shape[4] * view.shape[5]


def _as_patches(images: Tensor, patch_height: int, patch_width: int) -> Tensor:
    """A view [B, g_h, g_w, C, P_h, P_w] of the images, whatever their strides."""
    return images.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width).permute(0, 2, 3, 1, 4, 5)


def _matrix(
    weight: Tensor, bias: Tensor | None, mean: Normalisation, std: Normalisation, is_uint8: bool
) -> tuple[Tensor, Tensor]:
    """W' [D, K] and b' [D] in float32; the weight itself where nothing is to be folded in."""
    if not is_uint8 and mean is None and weight.dtype == torch.float32:
        full_bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(torch.float32)
        return weight.reshape(weight.shape[0], -1), full_bias
    return prepare_weight(weight, bias, mean, std, is_uint8, torch.float32)


def _start_values(bias: Tensor, pos_embed: Tensor | None, patches: int, keep: Tensor | None) -> Tensor:
    """What the GEMM of each token starts from: [D], [N, D] or, with keep, [B, N_keep, D]; float32."""
    if pos_embed is None:
        return bias
    table = pos_embed[pos_embed.shape[0] - patches :].to(torch.float32) + bias  # [N, D]
    return table if keep is None else table[keep]


def _prefix_values(prefix: Tensor, pos_embed: Tensor | None, patches: int) -> Tensor:
    """[R, D]: the prefix, with its positions where pos_embed has rows for it."""
    prefix_rows = prefix.shape[0]
    if pos_embed is None or pos_embed.shape[0] == patches:
        return prefix.to(torch.float32)
    return prefix.to(torch.float32) + pos_embed[:prefix_rows].to(torch.float32)


def _row_gradients(grad: Tensor, patch_grad: Tensor, prefix_rows: int, patches: int, keep: Tensor | None) -> Tensor:
    """[R+N, D] float32: the gradient summed over the batch, each token's at the row of its position."""
    if keep is None:
        return sum_over_batch(grad)
    dim = grad.shape[2]
    rows = grad.new_zeros((prefix_rows + patches, dim), dtype=torch.float32)
    rows[:prefix_rows] = grad[:, :prefix_rows].sum(0, dtype=torch.float32)
    # index_add_ on a CPU adds in the order of its index, one thread a column block: the same bits every time.
    rows[prefix_rows:].index_add_(0, keep.reshape(-1), patch_grad.reshape(-1, dim))
    return rows


def _weight_gradient(
    patch_grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Normalisation,
    std: Normalisation,
    keep: Tensor | None,
    bias_grad: Tensor,
) -> Tensor:
    """dW [D, C, P_h, P_w] in the weight's dtype, from the raw pixels; mean and std are applied to the result."""
    dim, channels, patch_height, patch_width = weight.shape
    patches = extract_patches(images, patch_height, patch_width, keep)
    size = channels * patch_height * patch_width
    product = patch_grad.reshape(-1, dim).t() @ patches.reshape(-1, size)  # [D, K]
    product = product.view(dim, channels, -1)
    means, stds = pixel_mean_and_std(mean, std, images.dtype == torch.uint8, channels)
    if any(value != 0.0 for value in means):
        product -= bias_grad[:, None, None] * product.new_tensor(means)[None, :, None]
    if any(value != 1.0 for value in stds):
        product /= product.new_tensor(stds)[None, :, None]
    return product.view(weight.shape).to(weight.dtype)


def _image_gradient(
    patch_grad: Tensor, images: Tensor, weight: Tensor, std: Normalisation, keep: Tensor | None
) -> Tensor:
    """dX in the images' shape and dtype; patches that were not kept have none."""
    matrix, _ = prepare_weight(weight, None, None if std is None else [0.0] * len(std), std, False, torch.float32)
    d_patches = patch_grad @ matrix  # [B, N, K]
    d_images = torch.zeros_like(images) if keep is not None else torch.empty_like(images)
    view = _as_patches(d_images, weight.shape[2], weight.shape[3])  # [B, g_h, g_w, C, P_h, P_w]
    if keep is None:
        view.copy_(d_patches.view(view.shape))
        return d_images
    batch, grid_height, grid_width = view.shape[:3]
    summed = patch_grad.new_zeros((batch, grid_height * grid_width, d_patches.shape[-1]))
    summed.scatter_add_(1, keep[:, :, None].expand(-1, -1, d_patches.shape[-1]), d_patches)
    view.copy_(summed.view(view.shape))
    return d_images
