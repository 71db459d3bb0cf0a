"""Whole numbers on their way to a device, without a wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_captured: list[Tensor] = []  # what CUDA graphs copy from whenever they are replayed


def to_device(numbers: Sequence[int] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, or a tensor of them on the host, as a tensor [n] on `device`, copied in its current stream."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device=device)
    host = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    # From other memory than this the copy, and so the host, would wait for all that the stream has still to do.
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)
