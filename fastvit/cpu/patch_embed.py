"""`patch_embed` on a CPU: one GEMM that starts from the finished table of positions and writes the final sequence.

Prefix rows take part as patches of zeros: for a few rows more, the GEMM reads and writes whole contiguous sequences,
forward and backward, and nothing is cut out, concatenated or added afterwards. Everything is computed in float32 and
rounded once: without bf16 units that is about three times faster than a bf16 GEMM, and more exact with or without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.cpu.add_position import sum_over_batch
from fastvit.cpu.prepare_weight import pixel_mean_and_std, prepare_weight

Normalisation = Sequence[float] | None

# Raw pixels are centred at the middle of their range, as the sums would otherwise spend precision on their offset. As
# an integer step this costs a pass over bytes rather than over floats; the weights take care of the offset.
UINT8_CENTRE = 128


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
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    patches = patch_rows(images, weight, prefix_rows, keep)  # [B, T, K]
    start = _start_table(full_bias, pos_embed, prefix, patch_count(images, weight))  # [R+N, D]
    if keep is not None:
        start = _select(start, prefix_rows, keep)  # [B, T, D]
    tokens = start.expand(images.shape[0], -1, -1).clone(memory_format=torch.contiguous_format)
    tokens.flatten(0, 1).addmm_(patches.flatten(0, 1), matrix.t())  # flatten is a view of the contiguous result
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
    grad = grad.to(torch.float32).contiguous()  # [B, T, D]
    nothing = grad.new_empty(0)

    rows = d_bias = nothing
    if need_weight or need_bias or need_rows:
        rows = _row_gradients(grad, prefix_rows, patch_count(images, weight), keep)
        d_bias = rows[prefix_rows:].sum(0)
    d_weight = d_images = None
    if need_weight:
        d_weight = _weight_gradient(grad, images, weight, mean, std, prefix_rows, keep, d_bias)
    if need_images:
        d_images = _image_gradient(grad[:, prefix_rows:], images, weight, std, keep)
    return (
        images.new_empty(0) if d_images is None else d_images,
        weight.new_empty(0) if d_weight is None else d_weight,
        d_bias if need_bias else nothing.clone(),
        rows if need_rows else nothing.clone(),
    )


def patch_count(images: Tensor, weight: Tensor) -> int:
    """N, the number of patches of an image."""
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


def patch_rows(images: Tensor, weight: Tensor, prefix_rows: int, keep: Tensor | None) -> Tensor:
    """[B, C, H, W] of any dtype and strides → [B, R+N, C·P_h·P_w] float32; R rows of zeros, then the (kept) patches.

    uint8 pixels come out centred: pixel − UINT8_CENTRE.
    """
    if images.dtype == torch.uint8:
        images = images.bitwise_xor(UINT8_CENTRE).view(torch.int8)  # pixel − 128
    view = _as_patches(images, weight)  # [B, g_h, g_w, C, P_h, P_w]
    batch, grid_height, grid_width = view.shape[:3]
    count = grid_height * grid_width if keep is None else keep.shape[1]
    out = torch.empty(batch, prefix_rows + count, weight[0].numel(), device=images.device)
    out[:, :prefix_rows] = 0
    patches = out[:, prefix_rows:]
    if keep is None:
        patches.unflatten(2, view.shape[3:]).unflatten(1, (grid_height, grid_width)).copy_(view)
    else:
        sample = torch.arange(batch, device=images.device)[:, None]
        patches.unflatten(2, view.shape[3:]).copy_(view[sample, keep // grid_width, keep % grid_width])
    return out


def _as_patches(images: Tensor, weight: Tensor) -> Tensor:
    """A view [B, g_h, g_w, C, P_h, P_w] of the images, whatever their strides."""
    _, _, height, width = weight.shape
    return images.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)


def _matrix(
    weight: Tensor, bias: Tensor | None, mean: Normalisation, std: Normalisation, is_uint8: bool
) -> tuple[Tensor, Tensor]:
    """W' [D, K] and b' [D] in float32; the weight itself where nothing is to be folded in."""
    if not is_uint8 and mean is None and weight.dtype == torch.float32:
        full_bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.to(torch.float32)
        return weight.reshape(weight.shape[0], -1), full_bias
    return prepare_weight(weight, bias, mean, std, is_uint8, torch.float32, _centre(is_uint8))


def _centre(is_uint8: bool) -> int:
    return UINT8_CENTRE if is_uint8 else 0


def _start_table(bias: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, patches: int) -> Tensor:
    """[R+N, D] float32: all of the result that does not depend on the image."""
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    table = bias.new_zeros(prefix_rows + patches, bias.shape[0])
    table[prefix_rows:] = bias
    if prefix is not None:
        table[:prefix_rows] = prefix
    if pos_embed is not None:
        table[table.shape[0] - pos_embed.shape[0] :] += pos_embed
    return table


def _select(table: Tensor, prefix_rows: int, keep: Tensor) -> Tensor:
    """The rows of the table that each sample's kept patches start from: [R+N, D] → [B, R+N_keep, D]."""
    prefix = torch.arange(prefix_rows, device=keep.device).expand(keep.shape[0], -1)
    return table[torch.cat([prefix, keep + prefix_rows], dim=1)]


def _row_gradients(grad: Tensor, prefix_rows: int, patches: int, keep: Tensor | None) -> Tensor:
    """[R+N, D] float32: the gradient summed over the batch, each token's at the row of its position."""
    if keep is None:
        return sum_over_batch(grad)
    dim = grad.shape[2]
    rows = grad.new_zeros(prefix_rows + patches, dim)
    rows[:prefix_rows] = grad[:, :prefix_rows].sum(0)
    return _add_in_order(rows, prefix_rows, keep.flatten(), grad[:, prefix_rows:].reshape(-1, dim))


def _add_in_order(rows: Tensor, first: int, index: Tensor, values: Tensor) -> Tensor:
    """rows[first + index[i]] += values[i]. On a CPU index_add_ adds in the order of i: the same bits every time."""
    rows[first:].index_add_(0, index, values)
    return rows


def _weight_gradient(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Normalisation,
    std: Normalisation,
    prefix_rows: int,
    keep: Tensor | None,
    d_bias: Tensor,
) -> Tensor:
    """dW [D, C, P_h, P_w] in the weight's dtype: from raw pixels, with mean and std applied to the result."""
    dim, channels = weight.shape[:2]
    patches = patch_rows(images, weight, prefix_rows, keep)
    product = grad.flatten(0, 1).t() @ patches.flatten(0, 1)  # [D, K]
    product = product.view(dim, channels, -1)
    is_uint8 = images.dtype == torch.uint8
    means, stds = pixel_mean_and_std(mean, std, is_uint8, channels, _centre(is_uint8))
    if any(value != 0.0 for value in means):
        product -= d_bias[:, None, None] * product.new_tensor(means)[:, None]
    if any(value != 1.0 for value in stds):
        product /= product.new_tensor(stds)[:, None]
    return product.view(weight.shape).to(weight.dtype)


def _image_gradient(
    patch_grad: Tensor, images: Tensor, weight: Tensor, std: Normalisation, keep: Tensor | None
) -> Tensor:
    """dX in the images' shape and dtype; patches that were not kept have none."""
    matrix = weight.to(torch.float32).flatten(1)  # [D, K]
    if std is not None:
        matrix = matrix / matrix.new_tensor(std).repeat_interleave(weight[0, 0].numel())
    d_images = torch.empty_like(images)
    view = _as_patches(d_images, weight)  # [B, g_h, g_w, C, P_h, P_w]
    batch, grid_height, grid_width = view.shape[:3]
    if keep is not None:
        dim, patches = weight.shape[0], grid_height * grid_width
        first = torch.arange(batch, device=keep.device)[:, None] * patches
        summed = patch_grad.new_zeros(batch * patches, dim)
        patch_grad = _add_in_order(summed, 0, (first + keep).flatten(), patch_grad.reshape(-1, dim))
    d_patches = patch_grad.reshape(-1, weight.shape[0]) @ matrix
    view.copy_(d_patches.view(view.shape))
    return d_images
