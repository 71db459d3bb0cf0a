"""Positions of patches: the fixed 2-D sine/cosine table, and resampling a table to another grid."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.grids import Filter, resample_grid

__all__ = ["numbers_where_traced", "resample_pos_embed", "rotary_2d", "rotate", "sincos_2d"]


def sincos_2d(
    grid: Sequence[int],
    dim: int,
    *,
    num_prefix_tokens: int = 0,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The fixed two-dimensional sine/cosine table of MoCo v3 (Chen et al., 2021) and MAE (He et al., 2022).

    With ω_i = temperature^(−i / (dim/4)), the row of the patch at (y, x) is
    [sin(xω), cos(xω), sin(yω), cos(yω)], a quarter of the width each.

    Args:
        grid: rows and columns of patches.
        dim: width of a token; a multiple of 4.
        num_prefix_tokens: rows of zeros in front, for class and register tokens.
        temperature: sets the longest wavelength, 2π · temperature.

    Returns:
        [num_prefix_tokens + rows · columns, dim], computed in float64 and rounded once to `dtype`.

    Raises:
        ValueError: a grid, width or count that can't be.
    """
    rows, columns = _grid("grid", grid)
    if dim < 4 or dim % 4 != 0:
        raise ValueError(f"dim: {dim} is not a positive multiple of 4, which a sine/cosine table needs")
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens: {num_prefix_tokens} must be 0 or more")
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature} must be greater than 0")
    quarter = dim // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
    omega = temperature**-exponents  # [D/4]
    y = torch.arange(rows, dtype=torch.float64, device=device)[:, None] * omega  # [rows, D/4]
    x = torch.arange(columns, dtype=torch.float64, device=device)[:, None] * omega  # [columns, D/4]
    of_x = torch.cat([x.sin(), x.cos()], dim=1).expand(rows, -1, -1)  # [rows, columns, D/2]
    of_y = torch.cat([y.sin(), y.cos()], dim=1)[:, None].expand(-1, columns, -1)
    table = torch.cat([of_x, of_y], dim=2).reshape(rows * columns, dim)
    return F.pad(table, (0, 0, num_prefix_tokens, 0)).to(dtype)


def rotary_2d(
    grid: Sequence[int],
    dim: int,
    *,
    num_prefix_tokens: int = 0,
    temperature: float = 10000.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rotary positions on a grid (Su et al., 2021), rows and columns apart, as timm's `RotaryEmbeddingCat` has them.

    With ω_i = temperature^(−i / (dim/4)), of a head's dim values the pairs (2i, 2i + 1) of the first half are turned by
    the angle y · ω_i, and those of the second by x · ω_i; see :func:`rotate`.

    Args:
        grid: rows and columns of patches.
        dim: width of a head; a multiple of 4.
        num_prefix_tokens: class and register tokens in front, which are not turned.
        temperature: sets the longest wavelength, 2π · temperature.

    Returns:
        [2, num_prefix_tokens + rows · columns, dim] float32: cosines and sines.

    Raises:
        ValueError: a width that can't be.
    """
    rows, columns = _grid("grid", grid)
    if dim < 4 or dim % 4 != 0:
        raise ValueError(f"dim: {dim} is not a positive multiple of 4, which rotary positions need")
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    y = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * omega  # [rows, dim/4]
    x = torch.arange(columns, dtype=torch.float32, device=device)[:, None] * omega
    of_y, of_x = y[:, None].expand(-1, columns, -1), x.expand(rows, -1, -1)
    angles = torch.cat([of_y, of_x], dim=2).flatten(0, 1).repeat_interleave(2, 1)  # [N, dim]
    angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Queries or keys [..., dim] turned by cosines and sines [2, ..., dim], in float32, and rounded once."""
    cosines, sines = rotary.unbind(0)
    wide = x.to(torch.promote_types(x.dtype, rotary.dtype))
    turned = torch.stack([-wide[..., 1::2], wide[..., ::2]], dim=-1).flatten(-2)
    return (wide * cosines + turned * sines).to(x.dtype)


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: Sequence[int],
    old_grid: Sequence[int] | None = None,
    *,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Resample a position table to another grid of patches; differentiable.

    The table's own grid returns the table itself. Any other grid is interpolated, also one with as many patches:
    the same values in another arrangement are other positions. Otherwise as timm's `resample_abs_pos_embed`, within 8
    eps of the largest position: sums are the same, in another order (see `fastvit.grids`).

    Args:
        pos_embed: [1, R + rows · columns, D], or without the leading 1; the R prefix rows are kept as they are.
        new_grid: rows and columns wanted.
        old_grid: rows and columns of the table; None: it is square.
        num_prefix_tokens: R, the number of prefix rows in the table.
        interpolation: a mode of `torch.nn.functional.interpolate`.

    Returns:
        A table of as many dimensions and the same dtype; interpolated in float32, or float64 for a float64 table.

    Raises:
        ValueError: the rows of the table do not fill `old_grid`, or it can't be square.
    """
    if pos_embed.dim() not in (2, 3) or (pos_embed.dim() == 3 and pos_embed.shape[0] != 1):
        raise ValueError(f"pos_embed: expected shape [1, rows, D] or [rows, D], got {list(pos_embed.shape)}")
    if pos_embed.dim() == 2:
        return resample_pos_embed(
            pos_embed[None],
            new_grid,
            old_grid,
            num_prefix_tokens=num_prefix_tokens,
            interpolation=interpolation,
            antialias=antialias,
        )[0]
    new_rows, new_columns = _grid("new_grid", numbers_where_traced(new_grid))
    patches = pos_embed.shape[1] - num_prefix_tokens
    if old_grid is None:
        side = math.isqrt(max(patches, 0))
        old_grid = (side, side)
        if side * side != patches or side == 0:
            raise ValueError(f"pos_embed: {patches} patch rows are not a square; give old_grid")
    old_rows, old_columns = _grid("old_grid", old_grid)
    if old_rows * old_columns != patches:
        raise ValueError(
            f"old_grid: {old_rows} x {old_columns} needs {old_rows * old_columns} patch rows, "
            f"pos_embed has {patches} (and {num_prefix_tokens} prefix rows)"
        )
    if old_rows == new_rows and old_columns == new_columns:
        return pos_embed
    prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    table = table.reshape(old_rows, old_columns, table.shape[2])
    table = resample_grid(table, new_rows, new_columns, Filter(interpolation, antialias))
    table = table.flatten(0, 1)[None].to(pos_embed.dtype)  # [1, new_rows · new_columns, D]
    return torch.cat([prefix, table], dim=1) if num_prefix_tokens else table


def numbers_where_traced(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes to resample to, as numbers where torch.compile traces for training: a graph for each size of images.

    torch has no gradient of an antialiased resampling to a size that is a symbol (an assertion about lists fails).
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and torch.is_grad_enabled():
        return tuple([operator.index(size) for size in sizes])
    return tuple(sizes)


def _grid(name: str, grid: Sequence[int]) -> tuple[int, int]:
    if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
        raise ValueError(f"{name}: {tuple(grid)} must be two positive numbers, rows and columns of patches")
    return grid[0], grid[1]
