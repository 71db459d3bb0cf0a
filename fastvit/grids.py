"""Tables of positions resampled to other grids, as images are, by a small matrix for each axis.

Every mode of `torch.nn.functional.interpolate` is linear in the image and treats one axis after the other. A table P of
h × w positions on another grid is therefore A_h · P · A_wᵀ, and its gradient the same product with both matrices
transposed. The matrices are what torch itself makes of an identity, made once for a size. What results differs from
`interpolate` by the rounding of sums, less than 8 eps of the largest position. A position that is not finite may make
all others so, not its neighbours alone.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.checks import FLOAT_DTYPES, check_dtype, check_tensor, pairs, require, shape_of, whole
from fastvit.guards import is_transformed
from fastvit.transfer import to_device

__all__ = [
    "Filter",
    "axis_matrix",
    "gathered",
    "grid_rows",
    "grid_rows_gradient",
    "grid_starts",
    "resample_grid",
    "resample_grids",
]

MODES = ("nearest", "nearest-exact", "area", "bilinear", "bicubic", "lanczos")
CORNERED = ("bilinear", "bicubic")
ANTIALIASED = (*CORNERED, "lanczos")
_COMPUTED = (torch.float32, torch.float64)
MOST_MATRICES = 256  # of a side of 64 some 4 MB together
MOST_TAPS = 256  # grids; of 256 positions some 10 MB together, of 16,384 at most 500 MB


class Filter(NamedTuple):
    """How values between grid points are found, in the words of `torch.nn.functional.interpolate`."""

    interpolation: str = "bicubic"
    antialias: bool = True
    align_corners: bool | None = None


class _Axis(NamedTuple):
    """All that a matrix depends on."""

    new: int
    old: int
    filter: Filter
    scale: float | None
    device: torch.device
    dtype: torch.dtype
    stream: int  # what another stream of a GPU has made may not be there yet


def axis_matrix(
    new: int,
    old: int,
    *,
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    scale: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix that resamples one axis of an image: `matrix @ values` has `new` values for `old`.

    Args:
        interpolation, antialias, align_corners: as `torch.nn.functional.interpolate` takes them.
        scale: the factor that coordinates are scaled by, where `interpolate` is given a `scale_factor`; old · scale,
            rounded down, must be `new`. None: by size.
        device: None: torch's default.
        dtype: float32, or float64 for tables of float64.

    Returns:
        [new, old], without a gradient. It is shared with other callers: not to be written to.

    Raises:
        TypeError, ValueError: an argument that can't be; the message names it.
    """
    new, old = whole("new", new), whole("old", old)
    check_dtype("dtype", dtype, _COMPUTED)
    how = _checked_filter(interpolation, antialias, align_corners)
    scale = None if scale is None else _checked_scale("scale", scale, new, old)
    # A device without a number is what its next tensor gets.
    device = torch.empty(0, device=device).device
    return _matrix(new, old, how, scale, device, dtype)


def resample_grid(
    table: Tensor,
    rows: int,
    columns: int,
    how: Filter,
    scale: tuple[float, float] | None = None,
) -> Tensor:
    """A table [h, w, D] on a grid of `rows` × `columns`: [rows, columns, D], in float32, or float64 for float64.

    Its own grid is the table itself, unless a scale is given. Arguments are the caller's to check.
    """
    old_rows, old_columns, _ = table.shape
    if table.dtype not in _COMPUTED:
        table = table.float()
    if not _may_keep() or type(table) not in (Tensor, torch.nn.Parameter):
        # Traced or transformed: torch's own step, which tools know, works for sizes that are symbols, and bakes no
        # matrix of one size into a graph.
        image = table[None].permute(0, 3, 1, 2)
        image = F.interpolate(image, mode=how.interpolation, **_options(how, (rows, columns), scale))
        return image[0].permute(1, 2, 0)
    by_row, by_column = _matrices((rows, columns), (old_rows, old_columns), how, scale, table)
    if by_row is None and by_column is None:
        return table
    product = _Product.apply if table.requires_grad and torch.is_grad_enabled() else _product
    return product(table, by_row, by_column)


def resample_grids(
    table: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    scales: Sequence[tuple[float, float]] | None = None,
) -> Tensor:
    """The positions of images of many sizes, one image behind the other; differentiable in `table`.

    Each size is resampled once, however many images have it, and nothing waits for the device. The same call gives the
    same bits, forward and backward.

    Args:
        table: [h, w, D], the learned positions.
        sizes: rows and columns of patches of each image, as numbers of Python; constants of a compiled program.
        interpolation, antialias, align_corners: as `torch.nn.functional.interpolate` takes them. timm's NaFlexViT has
            ("bicubic", True, None), SigLIP 2 ("bilinear", True, None), DINOv2 ("bicubic", False, None), Qwen3-VL
            ("bilinear", False, True).
        scales: the two factors of each image, for models that give `interpolate` a `scale_factor`; None: by size, where
            an image of h × w has the table as it is.

    Returns:
        [Σ rows · columns, D], in the dtype of the table; interpolated in float32, or float64 for a float64 table.

    Raises:
        TypeError, ValueError: an argument that can't be; the message names it.
    """
    check_tensor("table", table)
    if table.dim() != 3 or table.shape[0] < 1 or table.shape[1] < 1:
        raise ValueError(f"table: expected shape [rows, columns, D], got {shape_of(table)}")
    check_dtype("table", table.dtype, FLOAT_DTYPES)
    how = _checked_filter(interpolation, antialias, align_corners)
    images = _images(table, sizes, scales)
    if not images:
        return table.flatten(0, 1)[:0]
    copies: dict[Any, list[Tensor]] = {}
    for image, count in Counter(images).items():
        size, scale = image
        grid = table if scale is None and size == table.shape[:2] else resample_grid(table, *size, how, scale)
        # A view an image: its gradient is one stack and one sum for all images of a size, in a fixed order.
        copies[image] = list(grid.flatten(0, 1).to(table.dtype).expand(count, -1, -1).unbind(0))
    return torch.cat([copies[image].pop() for image in images])


def grid_rows(
    table: Tensor,
    sizes: Sequence[tuple[int, int]],
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    merge: int = 1,
) -> tuple[Tensor, list[int]]:
    """A table [h, w, D] on the grids of these sizes, each once, however many images have it.

    The positions of a grid come row by row, or in windows of merge × merge of them, which divides rows and columns.

    Returns:
        [P, D], one grid behind the other, and of each image the row that its grid begins at.
    """
    how = _checked_filter(interpolation, antialias, align_corners)
    starts, _ = grid_starts(sizes)
    if not starts:
        return table.flatten(0, 1)[:0], starts
    sizes = list(dict.fromkeys(sizes))
    if _is_gathered(table, sizes):
        return gathered(table, sizes, how, merge), starts
    grids = [table if size == table.shape[:2] else resample_grid(table, *size, how) for size in sizes]
    return torch.cat([_in_windows(grid, merge) for grid in grids]), starts


def position_rows(
    pos_embed: Tensor | None,
    sizes: Sequence[tuple[int, int]],
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    merge: int = 1,
) -> tuple[Tensor | None, list[int]]:
    """Positions of images of these sizes, a grid [h, w, D] or a row a patch, as `grid_rows` gives a grid's."""
    if pos_embed is not None and pos_embed.dim() == 3:
        return grid_rows(pos_embed, sizes, interpolation, antialias, align_corners, merge)
    starts, _ = position_starts(() if pos_embed is None else pos_embed.shape, sizes)
    return pos_embed, starts


def position_starts(table: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Of each image the row that its positions begin at, and how many rows there are, for positions of this shape: a
    grid's, as `grid_rows` gives them; a row a patch; or none."""
    if not table:
        return [0] * len(sizes), 0
    if len(table) == 3:
        return grid_starts(sizes)
    *starts, end = itertools.accumulate((rows * columns for rows, columns in sizes), initial=0)
    return starts, end


def grid_starts(sizes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Of each image the row of `grid_rows` that its grid begins at, and how many rows there are."""
    first: dict[tuple[int, int], int] = {}
    rows = 0
    for size in sizes:
        if size not in first:
            first[size] = rows
            rows += size[0] * size[1]
    return [first[size] for size in sizes], rows


def grid_rows_gradient(
    d_rows: Tensor,
    table: tuple[int, int],
    sizes: Sequence[tuple[int, int]],
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    merge: int = 1,
) -> Tensor:
    """What the gradient of the rows [P, D] that `grid_rows` gives is of its table, [h, w, D], whose h and w are given;
    for where nothing records how they were made."""
    how = _checked_filter(interpolation, antialias, align_corners)
    sizes = list(dict.fromkeys(sizes))
    if _is_gathered(d_rows, sizes):
        sums = _gathers(table, sizes, how, merge, d_rows.device)
        return _Sums.apply(d_rows.float(), *_transposed(math.prod(table), *sums)).unflatten(0, table)
    total = d_rows.new_zeros(*table, d_rows.shape[1])
    for size, own in zip(sizes, d_rows.split([rows * columns for rows, columns in sizes]), strict=True):
        matrices = _matrices(size, table, how, None, d_rows)
        by_row, by_column = (None if matrix is None else matrix.mT for matrix in matrices)
        total += _product(_out_of_windows(own, size, merge), by_row, by_column)
    return total


def _in_windows(grid: Tensor, merge: int) -> Tensor:
    """[rows, columns, ...] as [rows · columns, ...], in windows of merge × merge."""
    if merge == 1:
        return grid.flatten(0, 1)
    return grid.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2).flatten(0, 3)


def _out_of_windows(grid: Tensor, size: tuple[int, int], merge: int) -> Tensor:
    """[rows · columns, ...] in windows of merge × merge as [rows, columns, ...], of this size."""
    if merge == 1:
        return grid.unflatten(0, size)
    windows = grid.unflatten(0, (size[0] // merge, size[1] // merge, merge, merge))
    return windows.transpose(1, 2).flatten(2, 3).flatten(0, 1)


FEW_SIZES = 2  # whose products a GPU makes in no more launches than the sums of all sizes take


def _is_gathered(table: Tensor, sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether a grid's positions are better summed one by one, all sizes' in one launch: on a GPU, where launches of
    two products a size would be what takes the time."""
    return table.device.type == "cuda" and table.dtype != torch.float64 and len(sizes) > FEW_SIZES and _may_keep()


def gathered(table: Tensor, sizes: Sequence[tuple[int, int]], how: Filter, merge: int = 1) -> Tensor:
    """A table [h, w, D] on the grids of these sizes, [Σ rows · columns, D] float32: one copy to the device and one
    launch."""
    sums = _gathers((table.shape[0], table.shape[1]), sizes, how, merge, table.device)
    return _Sums.apply(table.flatten(0, 1).float(), *sums)


def _gathers(
    table: tuple[int, int], sizes: Sequence[tuple[int, int]], how: Filter, merge: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What the positions of these grids are sums of, as `_Sums` takes it."""
    taps = [_taps(size, table, how, merge) for size in sizes]
    counts, rows, factors = (torch.cat(parts) for parts in zip(*taps, strict=True))
    starts = counts.cumsum(0, dtype=torch.int32) - counts
    numbers = to_device(torch.cat([rows, starts, factors.view(torch.int32)]), torch.int32, device)
    rows, starts, factors = numbers.split([len(rows), len(starts), len(factors)])
    return rows, starts, factors.view(torch.float32)


class _Sums(torch.autograd.Function):
    """Weighted sums of the rows of a table [n, D]: the i-th of rows[starts[i]:starts[i+1]], by as many factors.

    A function of its own, because torch's bags can be differentiated once, and this, whose gradient is again such sums,
    any number of times.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, starts: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(rows, starts, factors)
        ctx.count = len(table)
        return F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Sums.apply(gradients[0], *_transposed(ctx.count, *ctx.saved_tensors)), None, None, None


def _transposed(count: int, rows: Tensor, starts: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that bring the gradients of sums to the `count` rows that these were made of."""
    sums = torch.bucketize(torch.arange(len(rows), device=rows.device), starts, right=True) - 1
    ordered, order = torch.sort(rows, stable=True)
    firsts = torch.searchsorted(ordered, torch.arange(count, dtype=rows.dtype, device=rows.device))
    return sums[order], firsts, factors[order]


@lru_cache(maxsize=MOST_TAPS)
def _taps(new: tuple[int, int], old: tuple[int, int], how: Filter, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each position of a grid is a sum of, on the host: how many rows of the table [N], which, by what factors."""
    host = torch.device("cpu")
    axes = [_taps_of_axis(_matrix(*sides, how, None, host, torch.float32)) for sides in zip(new, old, strict=True)]
    (rows, by_row), (columns, by_column) = axes
    found = rows[:, None, :, None] * old[1] + columns[:, None]  # [rows, columns, taps, taps]
    factors = by_row[:, None, :, None] * by_column[:, None]
    found, factors = (_in_windows(each, merge).flatten(1) for each in (found, factors))
    is_tap = factors != 0
    return is_tap.sum(1).int(), found[is_tap].int(), factors[is_tap]


def _taps_of_axis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the old values each new one is a sum of, and by what factors, [new, most of them]; the rest are 0."""
    most = int(matrix.count_nonzero(1).max())
    found = (matrix == 0).int().argsort(dim=1, stable=True)[:, :most]
    return found, matrix.gather(1, found)


class _Product(torch.autograd.Function):
    """`_product` with a gradient.

    A function of its own, rather than torch's two products, because its backward is to have the precision of the
    forward too where it runs under autocast. Further derivatives are torch's of the products in `backward`.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, by_row: Tensor | None, by_column: Tensor | None) -> Tensor:
        ctx.save_for_backward(by_row, by_column)
        return _product(table, by_row, by_column)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        by_row, by_column = (None if matrix is None else matrix.mT for matrix in ctx.saved_tensors)
        return _product(gradients[0], by_row, by_column), None, None


def _product(table: Tensor, by_row: Tensor | None, by_column: Tensor | None) -> Tensor:
    """by_row · table · by_columnᵀ, [h, w, D] to [rows, columns, D]; None stands for an identity."""
    device, dtype = table.device, table.dtype
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _product(table, by_row, by_column)
    if dtype == torch.float32 and _rounds_products(device):
        exact = (None if matrix is None else matrix.double() for matrix in (by_row, by_column))
        return _product(table.double(), *exact).to(dtype)
    height, width, dim = table.shape
    if by_row is not None:
        height = by_row.shape[0]
        table = torch.mm(by_row, table.reshape(table.shape[0], width * dim)).view(height, width, dim)  # [rows, w, D]
    return table if by_column is None else torch.bmm(by_column.expand(height, -1, -1), table)  # [rows, columns, D]


def _rounds_products(device: torch.device) -> bool:
    """Whether torch may multiply float32 at TF32's or bfloat16's precision here, as it never does in `interpolate`."""
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return device.type in ("cuda", "cpu") and backend.matmul.fp32_precision not in ("none", "ieee")


def _may_keep() -> bool:
    """Whether a tensor that is made now is one for later calls too: values, which nothing traces or transforms."""
    return not torch.compiler.is_compiling() and not is_transformed() and not torch._C._len_torch_dispatch_stack()


def _matrices(
    new: tuple[int, int], old: tuple[int, int], how: Filter, scale: tuple[float, float] | None, like: Tensor
) -> list[Tensor | None]:
    """Those of rows and of columns, on the device and in the dtype of `like`; None where an axis stays as it is."""
    if scale is None:
        return [
            None if to == side else _matrix(operator.index(to), side, how, None, like.device, like.dtype)
            for to, side in zip(new, old, strict=True)
        ]
    return [
        _matrix(operator.index(to), side, how, factor, like.device, like.dtype)
        for to, side, factor in zip(new, old, scale, strict=True)
    ]


def _matrix(new: int, old: int, how: Filter, scale: float | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    stream = 0
    keeps = _may_keep()
    if device.type == "cuda" and keeps:
        # What a graph under capture computes is there when it is replayed, and what it reads must not be freed.
        keeps = not torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device).cuda_stream
    axis = _Axis(new, old, how, scale, device, dtype, stream)
    return _kept(axis) if keeps else _made(axis)


@lru_cache(maxsize=MOST_MATRICES)  # threads that ask for the same one at a time may each make it; they are equal
def _kept(axis: _Axis) -> Tensor:
    # Whoever asks first, the tensor serves all later calls: no inference tensor, none with a history, and none of a
    # class that a mode of the caller's puts in its place.
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        return _made(axis)


def _made(axis: _Axis) -> Tensor:
    # A square image, in which nothing changes along the other axis; torch (2.13 too) antialiases one of a single column
    # wrongly on a CPU.
    scale = None if axis.scale is None else (axis.scale, 1.0)
    how = axis.filter
    identity = torch.eye(axis.old, dtype=axis.dtype, device=axis.device)[None, None]
    image = F.interpolate(identity, mode=how.interpolation, **_options(how, (axis.new, axis.old), scale))
    return image[0, 0]


def _options(how: Filter, size: tuple[int, int], scale: tuple[float, float] | None) -> dict[str, Any]:
    options: dict[str, Any] = {"antialias": how.antialias, "align_corners": how.align_corners}
    return {**options, "size": size} if scale is None else {**options, "scale_factor": scale}


def _images(table: Tensor, sizes: Any, scales: Any) -> list[tuple[tuple[int, int], tuple[float, float] | None]]:
    """Size and scale of each image, checked."""
    found = [(whole("sizes", rows), whole("sizes", columns)) for rows, columns in pairs("sizes", sizes)]
    if scales is None:
        return [(size, None) for size in found]
    factors = pairs("scales", scales)
    require(len(factors) == len(found), f"scales: {len(factors)} of them for {len(found)} sizes")
    images: list[tuple[tuple[int, int], tuple[float, float] | None]] = []
    for size, (by_row, by_column) in zip(found, factors, strict=True):
        by_row = _checked_scale("scales", by_row, size[0], table.shape[0])
        images.append((size, (by_row, _checked_scale("scales", by_column, size[1], table.shape[1]))))
    return images


def _checked_scale(name: str, scale: Any, new: int, old: int) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name}: expected factors as numbers of Python, got {scale!r}")
    found = math.floor(old * scale) if math.isfinite(scale) else None
    if found != new:
        raise ValueError(f"{name}: a factor of {scale} makes {found} of {old}, not {new}")
    return float(scale)


def _checked_filter(interpolation: str, antialias: bool, align_corners: bool | None) -> Filter:
    """The filter, with one spelling for what is the same."""
    require(interpolation in MODES, f"interpolation: {interpolation!r} is not one of {', '.join(MODES)}")
    if antialias not in (False, True) or align_corners not in (None, False, True):
        raise TypeError(f"antialias, align_corners: expected truth values, got {antialias!r} and {align_corners!r}")
    has_filter, has_corners = interpolation in ANTIALIASED, interpolation in CORNERED
    require(has_filter or not antialias, f"antialias: {interpolation} has none; only {', '.join(ANTIALIASED)} have")
    require(has_corners or not align_corners, f"align_corners: only {' and '.join(CORNERED)} take it")
    require(antialias or interpolation != "lanczos", "antialias: lanczos is nothing without it")
    return Filter(interpolation, bool(antialias), True if align_corners else None)
