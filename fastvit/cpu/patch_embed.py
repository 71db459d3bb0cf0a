"""`patch_embed` on a CPU: a few images at a time, from pixels to finished tokens while they are in the cache.

Each chunk of images becomes a patch matrix, one GEMM that starts from bias and positions, and a copy to its place in
the sequence; the patch matrix of a whole batch never exists. Products are made and summed in float32 and rounded once
at the end, except where the processor multiplies bfloat16 in hardware and everything around is bfloat16: elsewhere
float32 is several times faster as well as more exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastvit.cpu import gemm
from fastvit.cpu.add_position import sum_over_batch, write_prefix
from fastvit.cpu.prepare_weight import pixel_mean_and_std, prepare_weight

Channels = Sequence[float] | None  # a value a channel

# Raw pixels are centred at the middle of their range, as the sums would otherwise spend precision on their offset. As
# an integer step this costs a pass over bytes rather than over floats; the weights take care of the offset.
UINT8_CENTRE = 128
# Of the patch matrix, for each thread: as much as stays in its share of the last cache. Smaller chunks are no faster,
# and at the end of each step of a chunk the threads wait for each other: long, where other processes hold a core.
CHUNK_BYTES = 5 * 2**19


@dataclass(frozen=True)
class Operands:
    """How pixels and weight meet: in which dtype, and which of them the normalisation is applied to."""

    dtype: torch.dtype
    is_uint8: bool
    mean: Channels
    std: Channels
    folded: bool  # the weight takes up mean, std and the scale of uint8; else the pixels are normalised

    @classmethod
    def choose(
        cls,
        pixels: torch.dtype,
        patches: int,
        dim: int,
        mean: Channels,
        std: Channels,
        compute: torch.dtype,
        out: torch.dtype,
    ) -> Operands:
        """For so many patches in all; `out` is the dtype of the tokens, or of their gradient."""
        in_bfloat16 = compute == out == torch.bfloat16 and gemm.has_bfloat16_units()
        dtype = torch.bfloat16 if in_bfloat16 else torch.float32
        is_uint8 = pixels == torch.uint8
        if dtype == torch.float32:
            folded = prefers_folding(patches, dim)
        else:
            # Float pixels that must be rounded are normalised first, as eager PyTorch does: rounding both them and a
            # scaled weight would be less exact. Raw pixels are integers, which bfloat16 holds exactly.
            folded = is_uint8 or pixels == dtype
        return cls(dtype, is_uint8, mean, std, folded)

    @property
    def normalises(self) -> bool:
        return self.is_uint8 or self.mean is not None

    @property
    def centre(self) -> int:
        """What is taken off the pixels before they are multiplied."""
        return UINT8_CENTRE if self.is_uint8 and self.folded else 0

    def pixel_mean_and_std(self, channels: int) -> tuple[list[float], list[float]]:
        """Mean and std of each channel of the pixels, once `centre` has been taken off them."""
        return pixel_mean_and_std(self.mean, self.std, self.is_uint8, channels, self.centre)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """W' [D, K] in the operands' dtype and b' [D] in float32; the weight itself where nothing is folded in."""
        if self.folded and self.normalises:
            return prepare_weight(weight, bias, self.mean, self.std, self.is_uint8, self.dtype, self.centre)
        full_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if bias is None else bias.float()
        return weight.to(self.dtype).reshape(weight.shape[0], -1), full_bias

    def chunks(self, images: Tensor, weight: Tensor, keep: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """The batch a chunk at a time: which samples, and their (kept) patches, [b·N, K] in the operands' dtype.

        The patches are overwritten by those of the next chunk. Pixels come out normalised, or, where the weight
        takes that up, as they are but for `centre`.
        """
        kept = kept_patches(images, weight, keep)
        length = weight[0].numel()
        buffer = None
        for chunk in chunks(images.shape[0], kept * length * self.dtype.itemsize):
            view = self._pixels(images[chunk], weight, None if keep is None else keep[chunk])
            if buffer is None:
                buffer = torch.empty(view.shape, dtype=self.dtype, device=images.device)
            patches = buffer[: view.shape[0]].copy_(view)
            yield chunk, patches.view(-1, length)

    def _pixels(self, images: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
        """[B, C, H, W] of any dtype and strides → [B, g_h, g_w, C, P_h, P_w], or [B, N_keep, C, P_h, P_w]."""
        if self.centre:
            images = images.bitwise_xor(UINT8_CENTRE).view(torch.int8)  # pixel − 128
        view = as_patches(images, weight)
        if keep is not None:
            sample = torch.arange(images.shape[0], device=images.device)[:, None]
            view = view[sample, keep // view.shape[2], keep % view.shape[2]]
        if self.folded or not self.normalises:
            return view
        view = view.to(torch.float32)
        mean, std = (view.new_tensor(values)[:, None, None] for values in self.pixel_mean_and_std(images.shape[1]))
        return view.sub(mean).div_(std)


def prefers_folding(patches: int, dim: int) -> bool:
    """Whether the weight rather than the pixels is normalised: the work is a row for a patch, or for an output."""
    return patches >= dim


def forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Channels,
    std: Channels,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """[B, C, H, W] → [B, R+N, D]; arguments as in `fastvit.functional.patch_embed`, already checked."""
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    patches = patch_count(images, weight)
    kept = kept_patches(images, weight, keep)
    projected = images.shape[0] * kept
    operands = Operands.choose(images.dtype, projected, weight.shape[0], mean, std, compute_dtype, dtype)
    matrix, full_bias = operands.matrix(weight, bias)
    tokens = images.new_empty((images.shape[0], prefix_rows + kept, weight.shape[0]), dtype=dtype)
    if prefix is not None:
        write_prefix(tokens, prefix, pos_embed, patches)
    table = patch_table(full_bias, pos_embed, patches).to(operands.dtype)
    for chunk, rows in operands.chunks(images, weight, keep):
        start = table if keep is None else table[keep[chunk]]
        gemm.write_product(tokens[chunk, prefix_rows:], start, rows, matrix)
    return tokens


def backward(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mean: Channels,
    std: Channels,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of images, weight, bias and of every position row; size 0 where not needed."""
    need_images, need_weight, need_bias, need_rows = needs
    projected = images.shape[0] * kept_patches(images, weight, keep)
    operands = Operands.choose(images.dtype, projected, weight.shape[0], mean, std, compute_dtype, grad.dtype)
    nothing = grad.new_empty(0, dtype=torch.float32)
    rows = d_bias = nothing
    if need_weight or need_bias or need_rows:
        rows = _row_gradients(grad, prefix_rows, patch_count(images, weight), keep)
        d_bias = rows[prefix_rows:].sum(0)
    d_weight = d_images = None
    patch_grad = grad[:, prefix_rows:]
    if need_weight:
        d_weight = _weight_gradient(patch_grad, images, weight, keep, d_bias, operands)
    if need_images:
        d_images = image_gradient(patch_grad, images, weight, std, keep, operands.dtype)
    return (
        images.new_empty(0) if d_images is None else d_images,
        weight.new_empty(0) if d_weight is None else d_weight,
        d_bias if need_bias else nothing.clone(),
        rows if need_rows else nothing.clone(),
    )


def patch_count(images: Tensor, weight: Tensor) -> int:
    """N, the number of patches of an image."""
    return (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])


def kept_patches(images: Tensor, weight: Tensor, keep: Tensor | None) -> int:
    """Patches of an image that are projected."""
    return patch_count(images, weight) if keep is None else keep.shape[1]


def chunks(batch: int, sample_bytes: int) -> Iterator[slice]:
    """The batch in slices of as many samples as stay in the caches of all threads."""
    size = max(1, CHUNK_BYTES * torch.get_num_threads() // max(1, sample_bytes))
    return (slice(first, min(first + size, batch)) for first in range(0, batch, size))


def as_patches(images: Tensor, weight: Tensor) -> Tensor:
    """A view [B, g_h, g_w, C, P_h, P_w] of the images, whatever their strides."""
    _, _, height, width = weight.shape
    return images.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)


def patch_table(bias: Tensor, pos_embed: Tensor | None, patches: int) -> Tensor:
    """[N, D] float32: bias [D] and positions, all of a patch's token that does not depend on the image."""
    if pos_embed is None:
        return bias.expand(patches, -1)
    return pos_embed[pos_embed.shape[0] - patches :] + bias


def _row_gradients(grad: Tensor, prefix_rows: int, patches: int, keep: Tensor | None) -> Tensor:
    """[R+N, D] float32: the gradient summed over the batch, each token's at the row of its position."""
    if keep is None:
        return sum_over_batch(grad)
    rows = grad.new_zeros(prefix_rows + patches, grad.shape[2], dtype=torch.float32)
    rows[:prefix_rows] = sum_over_batch(grad[:, :prefix_rows])
    _add_in_order(rows[prefix_rows:], keep, grad[:, prefix_rows:])
    return rows


def _add_in_order(rows: Tensor, index: Tensor, values: Tensor) -> None:
    """rows[index[b, i]] += values[b, i]. On a CPU index_add_ adds in the order of i: the same bits every time."""
    rows.index_add_(0, index.flatten(), values.flatten(0, 1).to(rows.dtype))


def _weight_gradient(
    patch_grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, d_bias: Tensor, operands: Operands
) -> Tensor:
    """dW [D, C, P_h, P_w] in the weight's dtype: what the weight takes up of mean and std is applied to the sum."""
    total = add_weight_gradient(None, patch_grad, images, weight, keep, operands)
    return finish_weight_gradient(total, weight, d_bias, operands)


def add_weight_gradient(
    total: Tensor | None, patch_grad: Tensor, images: Tensor, weight: Tensor, keep: Tensor | None, operands: Operands
) -> Tensor | None:
    """[D, K], of the operands as they are multiplied, added to that of other images."""
    for chunk, rows in operands.chunks(images, weight, keep):
        columns = patch_grad[chunk].reshape(-1, weight.shape[0]).to(operands.dtype).t()  # [D, b·N]
        if operands.dtype == torch.float32:
            total = gemm.add_product(total, columns, rows.t())
        else:  # a product in bfloat16 is rounded; the sum of the chunks is not
            part = gemm.add_product(None, columns, rows.t()).float()
            total = part if total is None else total.add_(part)
    return total


def finish_weight_gradient(total: Tensor | None, weight: Tensor, d_bias: Tensor, operands: Operands) -> Tensor:
    """[D, K] → dW, which takes up what the weight had of mean and std."""
    if total is None:
        return weight.new_zeros(weight.shape)
    dim, channels = weight.shape[:2]
    if operands.folded and operands.normalises:
        _unscale(total.view(dim, channels, -1), d_bias, *operands.pixel_mean_and_std(channels))
    return total.view(weight.shape).to(weight.dtype)


def _unscale(total: Tensor, d_bias: Tensor, means: Sequence[float], stds: Sequence[float]) -> None:
    """The weight's gradient [D, C, P_h·P_w] as of normalised pixels, in place."""
    if any(value != 0.0 for value in means):
        total -= d_bias[:, None, None] * total.new_tensor(means)[:, None]
    if any(value != 1.0 for value in stds):
        total /= total.new_tensor(stds)[:, None]


def image_gradient(
    patch_grad: Tensor, images: Tensor, weight: Tensor, std: Channels, keep: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dX in the images' shape and dtype; patches that were not kept have none."""
    matrix = weight.to(dtype).flatten(1).t()  # [K, D]
    d_images = torch.empty_like(images)
    view = as_patches(d_images, weight)  # [B, g_h, g_w, C, P_h, P_w]
    patches = patch_count(images, weight)
    if keep is not None:
        patch_grad = _scatter(patch_grad, keep, patches)
    for chunk in chunks(images.shape[0], patches * matrix.shape[0] * matrix.element_size()):
        rows = patch_grad[chunk].reshape(-1, matrix.shape[1]).to(dtype)
        d_patches = gemm.add_product(None, rows, matrix).view(view[chunk].shape)
        if std is not None:
            scale = d_patches.new_tensor(std, dtype=torch.float32)[:, None, None]
            d_patches = d_patches / scale
        view[chunk].copy_(d_patches)
    return d_images


def _scatter(patch_grad: Tensor, keep: Tensor, patches: int) -> Tensor:
    """[B, N_keep, D] → [B, N, D] float32: the gradient of every patch, zero where it was not kept."""
    batch, _, dim = patch_grad.shape
    summed = patch_grad.new_zeros(batch * patches, dim, dtype=torch.float32)
    first = torch.arange(batch, device=keep.device)[:, None] * patches
    _add_in_order(summed, first + keep, patch_grad)
    return summed.view(batch, patches, dim)
