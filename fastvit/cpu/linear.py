"""Linear layers, on a CPU by the faster of the two libraries that PyTorch brings; `fastvit.cpu.gemm` says which."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.cpu import gemm


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, for which PyTorch takes MKL whatever the processor; float32, on a CPU, in an eager
    call goes to oneDNN where that is faster. Differentiable any number of times."""
    is_float32 = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if not is_float32 or torch.is_autocast_enabled("cpu") or _is_watched() or not gemm.prefers_onednn():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        result: Tensor = _Linear.apply(x, weight, bias)
        return result
    return _multiply(x, weight, bias)


def _is_watched() -> bool:
    """Whether a compiler or a mode, such as one that counts operations, looks for PyTorch's own op."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """With the products of the forward and of the input's gradient by oneDNN. The weight's gradient, a product of two
    transposed matrices, is MKL's, which takes them as they lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        # A derivative of this is wanted where gradients are on, and oneDNN's op has none.
        multiply = _by_torch if torch.is_grad_enabled() else _multiply
        return (
            multiply(grad, weight.t(), None) if need_x else None,
            weight_gradient(grad, x) if need_weight else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None,
        )


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[F, D] of the gradient [..., F] of a product and of what it was made from, [..., D]."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _by_torch(x: Tensor, weight: Tensor, bias: None) -> Tensor:
    return F.linear(x, weight)
