"""A call of the library's ops, whose errors all arrive as RuntimeError: torch's stable ABI hands on a text alone."""

from __future__ import annotations

from typing import Any

import torch


def call(op: Any, *arguments: Any) -> Any:
    """`op(*arguments)`.

    Raises:
        torch.OutOfMemoryError: the device has too little memory, as for every op of torch.
        RuntimeError: anything else that the op refuses.
    """
    try:
        return op(*arguments)
    except RuntimeError as error:
        message = str(error)
        # Of an allocation (csrc/torch/call.h) or of CUDA itself, which loads a kernel when it is first launched.
        if message.startswith("fastvit: ") and "out of memory" in message:
            raise torch.OutOfMemoryError(message) from error
        raise
