"""`add_position` by the emulated kernels; the same arguments as every backend's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.emulated.call import address, call, type_of

SPLIT_ROWS = 8  # rows a split sums: small, so that small tests have several


def forward(tokens: Tensor, pos_embed: Tensor, prefix: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[B, N, D] → [B, R+N, D]; arguments as in `fastvit.functional.add_position`, already checked."""
    batch, patches, width = tokens.shape
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    pos_embed = pos_embed.contiguous()
    prefix = None if prefix is None else prefix.contiguous()
    out = tokens.new_empty((batch, prefix_rows + patches, width), dtype=dtype)
    if out.numel() == 0:
        return out
    call(
        "add_position",
        {"tokens": tokens, "positions": pos_embed, "prefix": prefix},
        {"out": out},
        type_of(tokens.dtype),
        type_of(dtype),
        address(tokens),
        address(pos_embed),
        type_of(pos_embed.dtype),
        pos_embed.shape[0],
        address(prefix),
        type_of(torch.float32 if prefix is None else prefix.dtype),
        prefix_rows,
        address(out),
        (batch, patches, width),
        tokens.stride(),
    )
    return out


def backward(grad: Tensor) -> Tensor:
    """[B, T, D] → [T, D] float32: the gradient of every row of the table, summed over the batch."""
    batch, length, width = grad.shape
    return sum_rows(grad.contiguous().view(batch, length * width)).view(length, width)


def sum_rows(matrix: Tensor) -> Tensor:
    """[rows, columns] contiguous → [columns] float32, the sum over the rows, in passes of SPLIT_ROWS."""
    rows, columns = matrix.shape
    if rows == 0 or columns == 0:
        return matrix.new_zeros(columns, dtype=torch.float32)
    splits = -(-rows // SPLIT_ROWS)
    sums = matrix.new_empty((splits, columns), dtype=torch.float32)
    call(
        "sum_rows",
        {"matrix": matrix},
        {"sums": sums},
        type_of(matrix.dtype),
        address(matrix),
        address(sums),
        rows,
        columns,
        SPLIT_ROWS,
    )
    return sums[0] if splits == 1 else sum_rows(sums)
