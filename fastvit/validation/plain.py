"""Plain PyTorch at TF32: what a user writes today with tensor cores, for the ops' own yardsticks.

Where torch allows TF32, cuDNN takes it or not as each shape has it. The yardstick for kernels that do take it is
therefore made here: operands rounded to TF32, and nothing else. Shares no code with the reference or with any backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


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
