"""`patch_embed` by the C++/CUDA extension: what the library's ops need beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastvit.backend import multiplies_at_tf32
from fastvit.cuda.call import call
from fastvit.kernels.layout import INT32_LIMIT
from fastvit.kernels.normalisation import channel_constants, constants_on_device, image_gradient_constants

Normalisation = Sequence[float] | None


def forward(*arguments: Any) -> Tensor:
    """[B, C, H, W] images, [D, C, P_h, P_w] weight → [B, R+N, D] tokens in dtype; [B, R+N_keep, D] with keep.

    Arguments as in `fastvit.functional.patch_embed`, already checked, in the order of the op. An index in `keep` that
    is out of range gives a row of NaN.
    """
    return run_forward(torch.ops.fastvit.patch_embed_cuda, multiplies_at_tf32, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of images, weight, bias and table rows, each where needs has it, else of size 0.

    grad is [B, R+N, D], or [B, R+N_keep, D] with keep. d_images and d_weight have the shape and dtype of images and
    weight; d_bias is [D] and d_rows [R+N, D], both float32: the gradient summed over patches, and over the batch.
    """
    return run_backward(torch.ops.fastvit.patch_embed_backward_cuda, multiplies_at_tf32, *arguments)


def run_forward(
    op: Any,
    multiplies_at_tf32: Callable[[torch.dtype], bool],
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """`forward` through `op`: the library's, or the emulated one."""
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    _check_sizes(images, weight, max(patches, 0 if keep is None else keep.shape[1]), prefix)
    constants = constants_of(mean, std, images.shape[1], images, compute_dtype)
    return call(
        op,
        images,
        weight,
        bias,
        pos_embed,
        prefix,
        keep,
        constants,
        compute_dtype,
        dtype,
        multiplies_at_tf32(compute_dtype),
    )


def run_backward(
    op: Any,
    multiplies_at_tf32: Callable[[torch.dtype], bool],
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mean: Normalisation,
    std: Normalisation,
    compute_dtype: torch.dtype,
    prefix_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward` through `op`: the library's, or the emulated one."""
    need_images, need_weight, _, _ = needs
    product_grad = grad.to(compute_dtype) if need_images or need_weight else grad
    constants = constants_of(mean, std, images.shape[1], images, compute_dtype)
    of_images = constants
    if need_images:
        stds = None if std is None else tuple(std)
        of_images = constants_on_device(_image_constants(stds, images.shape[1]), images.device)
    results = call(
        op,
        grad,
        product_grad,
        images,
        weight,
        keep,
        constants,
        of_images,
        compute_dtype,
        prefix_rows,
        multiplies_at_tf32(compute_dtype),
        mean is not None,
        list(needs),
    )
    d_images = results[0]
    # The kernels write NCHW and NHWC alone; the gradient of another layout is laid out as torch lays out its like.
    if need_images and not images.is_contiguous():
        strides = torch.empty_like(images, device="meta").stride()
        if d_images.stride() != strides:
            d_images = torch.empty_like(images).copy_(d_images)
    return d_images, *results[1:]


def constants_of(
    mean: Normalisation, std: Normalisation, channels: int, images: Tensor, compute_dtype: torch.dtype
) -> Tensor:
    """[4, C] float32 on the images' device: the rows of fastvit/kernels/normalisation.py."""
    means, stds = (None if values is None else tuple(values) for values in (mean, std))
    constants = _channel_constants(means, stds, channels, images.dtype, compute_dtype)
    return constants_on_device(constants, images.device)


@lru_cache(maxsize=64)
def _channel_constants(*arguments: Any) -> tuple[Any, ...]:
    return tuple(channel_constants(*arguments))


@lru_cache(maxsize=64)
def _image_constants(std: Normalisation, channels: int) -> tuple[Any, ...]:
    return tuple(image_gradient_constants(std, channels))


def _check_sizes(images: Tensor, weight: Tensor, patches: int, prefix: Tensor | None) -> None:
    length = patches + (0 if prefix is None else prefix.shape[0])
    batch, dim = images.shape[0], weight.shape[0]
    # Less a tile, to which the kernels round the rows up.
    if batch * length >= INT32_LIMIT - 1024 or length * dim >= INT32_LIMIT:
        raise ValueError(
            f"images: {batch} x {length} tokens of width {dim}; rows and values a sample must be < 2^31 - 1024"
        )
