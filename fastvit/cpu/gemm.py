"""Matrix products on a CPU, by the faster of the two libraries that PyTorch brings.

PyTorch hands float32 products to MKL, which does without AVX-512 on processors of other makers than Intel. Where there
is AVX-512, these go to oneDNN, which makes PyTorch's convolutions and uses what the processor has. Elsewhere they stay
with MKL, which is the faster one at AVX2 by a fifth. bfloat16 is oneDNN's in either case.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def has_bfloat16_units() -> bool:
    """Whether bfloat16 products are made in hardware here; elsewhere float32 ones are several times faster."""
    return _onednn_has("_is_avx512_bf16_supported") or has_bfloat16_tiles()


@lru_cache
def has_bfloat16_tiles() -> bool:
    """Whether these units are AMX, which multiplies tiles of matrices."""
    return _onednn_has("_is_amx_tile_supported")


def _onednn_has(check: str) -> bool:
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.cpu, check, bool)())


def add_product(start: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """start + left @ rightᵀ: [M, N] (or None) + [M, K] @ [N, K]ᵀ, all of one dtype; summed in float32, rounded once."""
    by_onednn = left.dtype != torch.float32 or prefers_onednn()
    if by_onednn:
        left = left.contiguous()  # MKL takes a transposed matrix as it lies
    if by_onednn and left.dtype == torch.float32:
        linear = torch.ops.mkldnn._linear_pointwise  # what torch.compile makes of a linear layer on a CPU
        if start is None:
            return linear(left, right, None, "none", [], "")
        return linear.binary(left, start, right, None, "add")
    return left @ right.t() if start is None else torch.addmm(start, left, right.t())


def write_product(target: Tensor, start: Tensor, left: Tensor, right: Tensor) -> None:
    """target = start + left @ rightᵀ, summed in float32; target [B, N, D] of any strides, start [N, D] or [B, N, D]."""
    if left.dtype != torch.float32:
        start = start.expand(target.shape).reshape(-1, target.shape[2])
        target.copy_(add_product(start, left, right).view(target.shape))
        return
    product = add_product(None, left, right).view(target.shape)
    if target.dtype == torch.float32:
        torch.add(product, start, out=target)
    else:
        target.copy_(product.add_(start))


def prefers_onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _is_onednn_faster()


@lru_cache
def _is_onednn_faster() -> bool:
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return built and torch.backends.cpu.get_cpu_capability() == "AVX512"
