"""Plain PyTorch: what a user writes today, at the precision under test. Its error is the yardstick of the tolerance.

To-float, normalise, cast, convolution, gather, cat, add: every step rounds to the dtype that eager PyTorch gives it.
Shares no code with the reference or with any backend.

Where torch allows TF32, cuDNN takes it or not as each shape has it. The yardstick for kernels that do take it is
therefore made here: operands rounded to TF32, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastvit import reference
from fastvit.validation.cases import Inputs


def plain_patch_embed(inputs: Inputs, tensors: dict[str, Tensor | None], tf32: bool = False) -> Tensor:
    """The eager pipeline on `tensors` (those of `inputs`, perhaps as leaves that require gradients).

    `tf32`: float32 is multiplied at TF32 precision.
    """
    images, weight = tensors["images"], tensors["weight"]
    assert images is not None and weight is not None
    x = images
    if x.dtype is torch.uint8:
        x = x.float() / 255
    if inputs.mean is not None and inputs.std is not None:
        x = x.float()
        x = (x - x.new_tensor(inputs.mean).view(-1, 1, 1)) / x.new_tensor(inputs.std).view(-1, 1, 1)
    # Under autocast the convolution casts for itself.
    with torch.autocast(x.device.type, inputs.compute, enabled=inputs.autocast):
        x = x if inputs.autocast else x.to(weight.dtype)
        bias = _to(tensors["bias"], weight, inputs)
        convolution = tf32_conv2d if tf32 else F.conv2d
        tokens = convolution(x, weight, bias, stride=(weight.shape[2], weight.shape[3]))
        tokens = tokens.flatten(2).transpose(1, 2)
        return _place(tokens, tensors["pos_embed"], tensors["prefix"], inputs.keep).to(inputs.out)


def tf32_conv2d(images: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    """`torch.nn.functional.conv2d` of float32 tensors, as tensor cores multiply."""
    out = _Tf32Convolution.apply(images, weight, stride)
    return out if bias is None else out + bias.view(-1, 1, 1)


class _Tf32Convolution(torch.autograd.Function):
    """Forward and both gradients: the two operands are rounded to TF32's ten explicit bits of mantissa, to nearest;
    their products are added exactly, and the sum is rounded to float32.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride = stride
        return F.conv2d(_as_tf32(images), _as_tf32(weight), stride=stride).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        images, weight = (_as_tf32(tensor) for tensor in ctx.saved_tensors)
        grad = _as_tf32(grads[0])
        d_images = conv2d_input(images.shape, weight, grad, stride=ctx.stride)
        d_weight = conv2d_weight(images, weight.shape, grad, stride=ctx.stride)
        return d_images.float(), d_weight.float(), None


def _as_tf32(tensor: Tensor) -> Tensor:
    """The nearest values that TF32 has, in float64, which holds their products exactly."""
    wide = tensor.double()
    unit = torch.exp2(torch.frexp(wide).exponent.double() - 11)  # of the last of eleven bits, the leading one counted
    return torch.round(wide / unit) * unit


def plain_add_position(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """cat and add, as eager PyTorch promotes them."""
    tokens = tensors["tokens"]
    assert tokens is not None
    return _place(tokens, tensors["pos_embed"], tensors["prefix"], None).to(inputs.out)


def _to(bias: Tensor | None, weight: Tensor, inputs: Inputs) -> Tensor | None:
    return bias if bias is None or inputs.autocast else bias.to(weight.dtype)


def _place(tokens: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, keep: Tensor | None) -> Tensor:
    patches = tokens.shape[1]
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    on_prefix = pos_embed is not None and prefix_rows > 0 and pos_embed.shape[0] == prefix_rows + patches
    if pos_embed is not None and not on_prefix:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if pos_embed is not None and on_prefix:
        tokens = tokens + pos_embed
    if keep is None:
        return tokens
    batch, width = tokens.shape[0], tokens.shape[2]
    first = torch.arange(prefix_rows, device=keep.device).expand(batch, -1)
    rows = torch.cat([first, keep + prefix_rows], dim=1)
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, width))


def true_patch_embed(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """The reference on float64 copies: the truth."""
    images, weight = tensors["images"], tensors["weight"]
    assert images is not None and weight is not None
    return reference.patch_embed(
        images,
        weight,
        tensors["bias"],
        pos_embed=tensors["pos_embed"],
        prefix=tensors["prefix"],
        mean=inputs.mean,
        std=inputs.std,
        keep=inputs.keep,
    )


def true_add_position(inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
    """The reference on float64 copies: the truth."""
    tokens, pos_embed = tensors["tokens"], tensors["pos_embed"]
    assert tokens is not None and pos_embed is not None
    return reference.add_position(tokens, pos_embed, prefix=tensors["prefix"])
