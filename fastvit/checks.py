"""Checks of arguments, made once, before any kernel runs: each error names the argument, its value and what fits."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def shape_of(tensor: Tensor) -> str:
    """A shape as it is written in messages: [2, 3, 224, 224]."""
    return str(list(tensor.shape))


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_dtype(name: str, dtype: torch.dtype, accepted: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless `dtype` is accepted."""
    if dtype not in accepted:
        raise TypeError(f"{name}: dtype {dtype} is not supported; accepted: {', '.join(map(str, accepted))}")


def check_device(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors live on one device."""
    if tensor is not None and tensor.device != other.device:
        raise ValueError(f"{name}: on device {tensor.device}, but {other_name} is on {other.device}; they must match")


def check_weight(weight: Tensor) -> None:
    """A convolution's, [D, C, P_h, P_w]."""
    check_tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"weight: expected 4 dimensions [D, C, P_h, P_w], got {weight.dim()}: {shape_of(weight)}")
    check_dtype("weight", weight.dtype, FLOAT_DTYPES)
    if min(weight.shape) < 1:
        raise ValueError(f"weight: every size must be at least 1, got {shape_of(weight)}")


def check_images_and_weight(images: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Ranks, dtypes, channels, divisibility and devices of the projection's own arguments."""
    check_tensor("images", images)
    if images.dim() != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got {images.dim()}: {shape_of(images)}")
    check_weight(weight)
    check_dtype("images", images.dtype, IMAGE_DTYPES)
    _check_sides("images", images, weight)
    check_device("images", images, "weight", weight)
    _check_bias(bias, weight)


def check_image_list(images: Any) -> list[Tensor]:
    """A list of [C, H_i, W_i], which are named by their index."""
    if isinstance(images, Tensor) or not isinstance(images, Sequence):
        raise TypeError(f"images: expected a list of [C, H, W] tensors, got {type(images).__name__}")
    for index, image in enumerate(images):
        name = f"images[{index}]"
        check_tensor(name, image)
        if image.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions [C, H, W], got {image.dim()}: {shape_of(image)}")
    return list(images)


def check_packed_images(images: Any, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The projection's arguments, of a list of images of any sizes."""
    images = check_image_list(images)
    check_weight(weight)
    for index, image in enumerate(images):
        name = f"images[{index}]"
        check_dtype(name, image.dtype, IMAGE_DTYPES)
        if image.dtype != images[0].dtype:
            raise TypeError(f"{name}: dtype {image.dtype}, but images[0] has {images[0].dtype}; they must match")
        _check_sides(name, image, weight)
        check_device(name, image, "weight", weight)
    _check_bias(bias, weight)
    return images


def check_cut_weight(weight: Tensor, order: str, still: bool) -> None:
    """The weight for cut patches, [D, C, P_h, P_w] or of several frames [D, C, T, P_h, P_w], and what it goes with."""
    check_tensor("weight", weight)
    has_frames = weight.dim() == 5
    check_weight(weight.flatten(1, 2) if has_frames else weight)
    require(order in ORDERS, f"order: unknown {order!r}; known: {', '.join(ORDERS)}")
    require(order == "CPP" or not has_frames, f"order: of patches with frames it is CPP, not {order}")
    if still not in (False, True):
        raise TypeError(f"still: expected a truth value, got {still!r}")
    require(has_frames or not still, "still: weight has no frames, [D, C, T, P_h, P_w]")


def check_windows(merge: int, grids: list[tuple[int, int]]) -> None:
    """Whether grids of patches are whole windows of merge × merge."""
    merge = whole("merge", merge)
    for index, (rows, columns) in enumerate(grids):
        is_whole = rows % merge == 0 and columns % merge == 0
        require(is_whole, f"sizes[{index}]: {rows} x {columns} patches are not whole windows of merge={merge}")


def check_one_tensor(images: Any, weight: Tensor, bias: Tensor | None, still: bool, merge: int) -> Tensor:
    """Pixels of whole patches [Σ C·H_i·W_i], or patches [ΣN_i, K] or [B, N_max, K] with the values of the weight's."""
    check_tensor("images", images)
    check_dtype("images", images.dtype, IMAGE_DTYPES)
    length = math.prod(weight.shape[1:])
    if images.dim() == 1:
        require(weight.dim() == 4, "images: pixels [Σ C·H·W] have no frames, but weight has, [D, C, T, P_h, P_w]")
        require(not still and merge == 1, "still, merge: of patches that are cut already alone")
        if images.shape[0] % length:
            raise ValueError(f"images: {images.shape[0]} pixels are no whole patches of {length}")
    elif images.dim() > 3 or images.shape[-1] != length:
        raise ValueError(
            f"images: expected pixels [Σ C·H·W], or patches [N, {length}] or [B, N, {length}], where sizes are given, "
            f"got {shape_of(images)}"
        )
    check_device("images", images, "weight", weight)
    _check_bias(bias, weight)
    return images


def check_sizes(sizes: Tensor, images: Tensor) -> None:
    """Sizes that are a tensor, by what can be said without its values."""
    if sizes.device.type != "cpu":
        raise TypeError(f"sizes: a tensor on {sizes.device}, not on the host{_ADVICE}")
    if sizes.dim() != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes: expected [B, 2], rows and columns, got {shape_of(sizes)}")
    check_dtype("sizes", sizes.dtype, (torch.int32, torch.int64))
    require(
        images.dim() < 3, "sizes: a tensor is for images behind each other; with padded patches give Python numbers"
    )


def patches_in(images: Sequence[int], weight: Sequence[int]) -> int:
    """How many patches there are in pixels [Σ C·H_i·W_i] or patches [ΣN_i, K], from shapes."""
    return images[0] // math.prod(weight[1:]) if len(images) == 1 else images[0]


def check_grids(sizes: Any, images: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of each image, from pairs of Python numbers or a tensor with values, that fit the images."""
    listed = sizes.tolist() if isinstance(sizes, Tensor) else pairs("sizes", sizes)
    grids = [(whole("sizes", rows), whole("sizes", columns)) for rows, columns in listed]
    if images.dim() < 3:
        total, patches = sum(rows * columns for rows, columns in grids), patches_in(images.shape, weight.shape)
        if total != patches:
            raise ValueError(f"sizes: {total} patches in all, but images has {patches}")
        return grids
    require(len(grids) == images.shape[0], f"sizes: {len(grids)} of them, but images has {images.shape[0]}")
    for index, (rows, columns) in enumerate(grids):
        if rows * columns > images.shape[1]:
            raise ValueError(f"sizes[{index}]: {rows * columns} patches, but images has {images.shape[1]} of each")
    return grids


def check_packed_positions(pos_embed: Tensor, weight: Tensor, patches: int) -> None:
    """A grid of positions [h, w, D], or a row for every patch of all images."""
    check_tensor("pos_embed", pos_embed)
    dim = weight.shape[0]
    is_grid = pos_embed.dim() == 3 and min(pos_embed.shape[:2]) > 0
    if not (is_grid or pos_embed.dim() == 2 and pos_embed.shape[0] == patches) or pos_embed.shape[-1] != dim:
        raise ValueError(
            f"pos_embed: expected a grid [rows, columns, {dim}] or a row a patch [{patches}, {dim}], "
            f"got {shape_of(pos_embed)}"
        )
    check_dtype("pos_embed", pos_embed.dtype, FLOAT_DTYPES)
    check_device("pos_embed", pos_embed, "weight", weight)


def _check_sides(name: str, images: Tensor, weight: Tensor) -> None:
    """Channels, and height and width, the last three dimensions."""
    channels, *sides = images.shape[-3:]
    if channels != weight.shape[1]:
        raise ValueError(f"{name}: {channels} channels, but weight expects {weight.shape[1]}")
    for axis, size, patch in zip(("height", "width"), sides, weight.shape[2:], strict=True):
        if size < 1 or size % patch != 0:
            raise ValueError(f"{name}: {axis} {size} is not a positive multiple of the patch {axis} {patch}")


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    check_tensor("bias", bias)
    dim = weight.shape[0]
    if bias.dim() != 1 or bias.shape[0] != dim:
        raise ValueError(f"bias: expected shape [{dim}], got {shape_of(bias)}")
    check_dtype("bias", bias.dtype, FLOAT_DTYPES)
    check_device("bias", bias, "weight", weight)


def pairs(name: str, values: Any) -> list[tuple[Any, Any]]:
    """A pair for each image."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a pair of Python numbers an image, got {type(values).__name__}{_ADVICE}")
    for value in values:
        if isinstance(value, Tensor) or not isinstance(value, Sequence):
            raise TypeError(f"{name}: expected pairs of Python numbers, got {type(value).__name__}{_ADVICE}")
        if len(value) != 2:  # what is written in words only where it is wrong costs nothing, and can be traced
            raise ValueError(f"{name}: {value!r} is no pair, rows and columns")
    return [(value[0], value[1]) for value in values]


_ADVICE = "; of a tensor take .tolist(), where waiting for its device does no harm"


def whole(name: str, value: Any) -> int:
    """A number of rows or columns."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected whole numbers of Python, got {value!r}")
    size = operator.index(value)
    if size < 1:
        raise ValueError(f"{name}: {size} must be at least 1")
    return size


def rows_of(name: str, table: Tensor | None, dim: int, like_name: str, like: Tensor) -> Tensor | None:
    """A [rows, D] table given with or without a leading 1, as a two-dimensional tensor."""
    if table is None:
        return None
    check_tensor(name, table)
    if table.dim() == 3 and table.shape[0] == 1:
        table = table[0]
    if table.dim() != 2:
        raise ValueError(f"{name}: expected shape [rows, {dim}] or [1, rows, {dim}], got {shape_of(table)}")
    if table.shape[1] != dim:
        raise ValueError(f"{name}: width {table.shape[1]}, but {like_name} has width {dim}")
    check_dtype(name, table.dtype, FLOAT_DTYPES)
    check_device(name, table, like_name, like)
    return table


def check_positions(pos_embed: Tensor | None, prefix: Tensor | None, patches: int) -> None:
    """`pos_embed` has a row for every patch, or for every prefix row and every patch."""
    if pos_embed is None:
        return
    rows = pos_embed.shape[0]
    if rows == patches:
        return
    if prefix is None:
        raise ValueError(f"pos_embed: {rows} rows, expected {patches} (one a patch; there is no prefix)")
    total = patches + prefix.shape[0]
    if rows != total:
        raise ValueError(f"pos_embed: {rows} rows, expected {patches} (patches) or {total} (prefix and patches)")


def check_keep(keep: Tensor | None, images: Tensor) -> None:
    """`keep` is [B, N_keep] int64 on the images' device (the op checks its range, where that needs no wait)."""
    if keep is None:
        return
    check_tensor("keep", keep)
    if keep.dtype != torch.int64:
        raise TypeError(f"keep: dtype {keep.dtype} is not supported; accepted: torch.int64")
    if keep.dim() != 2 or keep.shape[0] != images.shape[0]:
        raise ValueError(f"keep: expected shape [{images.shape[0]}, N_keep], got {shape_of(keep)}")
    check_device("keep", keep, "images", images)


def check_keep_range(keep: Tensor, patches: int) -> None:
    """Raise ValueError unless every index is in 0..patches-1 (reads the values: on a CPU only)."""
    if keep.numel() == 0:
        return
    low, high = (int(value) for value in keep.aminmax())
    if low < 0 or high >= patches:
        raise ValueError(f"keep: index {low if low < 0 else high} is out of range; accepted: 0 to {patches - 1}")


MOST_VALUES = 8192  # of a token, in the trunk's ops
MOST_FEATURES = 65536  # of a token, within an MLP
ORDERS = ("CPP", "PPC")  # of the values of a patch
ACTS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


def check_residual_and_branch(residual: Tensor, branch: Tensor | None) -> None:
    """Two float tensors [..., D] of one shape, on one device."""
    check_tensor("residual", residual)
    if residual.dim() < 1 or not 1 <= residual.shape[-1] <= MOST_VALUES:
        raise ValueError(f"residual: expected shape [..., D] with D from 1 to {MOST_VALUES}, got {shape_of(residual)}")
    check_dtype("residual", residual.dtype, FLOAT_DTYPES)
    if branch is None:
        return
    check_tensor("branch", branch)
    if branch.shape != residual.shape:
        raise ValueError(f"branch: shape {shape_of(branch)}, but residual has {shape_of(residual)}; they must match")
    check_dtype("branch", branch.dtype, FLOAT_DTYPES)
    check_device("branch", branch, "residual", residual)


def check_vector(name: str, vector: Tensor | None, tokens: Tensor, tokens_name: str = "residual") -> None:
    """A float a value of a token."""
    if vector is None:
        return
    check_tensor(name, vector)
    if vector.dim() != 1 or vector.shape[0] != tokens.shape[-1]:
        raise ValueError(f"{name}: expected shape [{tokens.shape[-1]}], got {shape_of(vector)}")
    check_dtype(name, vector.dtype, FLOAT_DTYPES)
    check_device(name, vector, tokens_name, tokens)


def check_factors(
    branch: Tensor | None, bias: Tensor | None, scale: Tensor | None, keep: Tensor | None, residual: Tensor
) -> None:
    """What belongs to the branch needs one; `keep` is a float32 a sample, without a gradient."""
    if branch is None:
        for name, value in (("bias", bias), ("scale", scale), ("keep", keep)):
            require(value is None, f"{name}: it belongs to the branch, and there is none")
    if keep is None:
        return
    check_tensor("keep", keep)
    if residual.dim() < 2 or keep.dim() != 1 or keep.shape[0] != residual.shape[0]:
        raise ValueError(f"keep: expected a value a sample of residual {shape_of(residual)}, got {shape_of(keep)}")
    check_dtype("keep", keep.dtype, (torch.float32,))
    check_device("keep", keep, "residual", residual)
    require(not keep.requires_grad, "keep: it has no gradient; detach it")


def check_products(
    x: Tensor, bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, gate_last: bool | None
) -> None:
    """Float tensors [..., F] with [F] biases: x alone, x and up, or both as the halves of x."""
    check_tensor("x", x)
    if gate_last not in (None, False, True):
        raise TypeError(f"gate_last: expected True, False or None, got {gate_last!r}")
    most = MOST_FEATURES if gate_last is None else 2 * MOST_FEATURES
    if x.dim() < 1 or not 1 <= x.shape[-1] <= most:
        raise ValueError(f"x: expected shape [..., F] with F from 1 to {most}, got {shape_of(x)}")
    check_dtype("x", x.dtype, FLOAT_DTYPES)
    check_vector("bias", bias, x, "x")
    if gate_last is not None:
        require(up is None and up_bias is None, "up: with gate_last it is half of x, not a tensor of its own")
        if x.shape[-1] % 2 != 0:
            raise ValueError(f"x: with gate_last its last size is halved; got {shape_of(x)}")
    if up is None:
        require(up_bias is None, "up_bias: it belongs to up, and there is none")
        return
    check_tensor("up", up)
    if up.shape != x.shape:
        raise ValueError(f"up: shape {shape_of(up)}, but x has {shape_of(x)}; they must match")
    check_dtype("up", up.dtype, (x.dtype,))
    check_device("up", up, "x", x)
    check_vector("up_bias", up_bias, up, "up")


def check_heads(qkv: Tensor, bias: Tensor | None, num_heads: int) -> None:
    """`qkv` is [B, T, 3D] float, D a multiple of the number of heads, and `bias` as long as its rows."""
    check_tensor("qkv", qkv)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected a whole number, got {num_heads!r}")
    if num_heads < 1:
        raise ValueError(f"num_heads: {num_heads} must be at least 1")
    if qkv.dim() != 3 or qkv.shape[-1] < 1 or qkv.shape[-1] % (3 * num_heads) != 0:
        raise ValueError(f"qkv: expected shape [B, T, 3D] with D a multiple of {num_heads} heads, got {shape_of(qkv)}")
    check_dtype("qkv", qkv.dtype, FLOAT_DTYPES)
    check_vector("bias", bias, qkv, "qkv")


def normalisation(
    mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None, channels: int
) -> tuple[list[float] | None, list[float] | None]:
    """`mean` and `std` as lists of one Python float a channel, or None and None."""
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError(f"mean, std: give both or neither, got mean={mean!r}, std={std!r}")
    return _floats("mean", mean, channels), _floats("std", std, channels, positive=True)


def check_scale(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Raise ValueError where `mean` and `std`, one float a channel, are not in the 0..1 scale."""
    for name, values in (("mean", mean), ("std", std)):
        largest = max(values or (0.0,))
        require(largest <= 1.0, f"{name}: in the 0..1 scale; {largest:g} looks like the 0..255 scale: divide by 255")


def _floats(name: str, values: Sequence[float] | Tensor, channels: int, positive: bool = False) -> list[float]:
    largest = sys.float_info.max
    least = sys.float_info.min if positive else -largest
    if type(values) in (list, tuple) and len(values) == channels:  # what is usual, and costs every call some time
        for value in values:
            if type(value) is not float or not least <= value <= largest:
                break
        else:
            return list(values)
    if hasattr(values, "tolist"):  # a tensor, or an array of numpy's
        if torch.compiler.is_compiling():
            raise ValueError(f"{name}: inside torch.compile or torch.export give Python floats, not a tensor")
        values = values.detach().flatten().tolist() if isinstance(values, Tensor) else values.tolist()
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: expected {channels} floats, one a channel, got {values!r}")
    if len(values) != channels:
        raise ValueError(f"{name}: {len(values)} values, expected {channels}, one a channel")
    floats = [_float(name, place, value) for place, value in enumerate(values)]
    for place, value in enumerate(floats):
        # A comparison rather than math.isfinite, which torch.compile can't trace for a float it keeps dynamic.
        if not -largest <= value <= largest:
            raise ValueError(f"{name}: {value} of channel {place} must be finite")
        if positive and value <= 0:
            raise ValueError(f"{name}: {value} of channel {place} must be greater than zero")
    return floats


def _float(name: str, place: int, value: Any) -> float:
    """A number of Python's, of numpy's, or a tensor that is one; neither a truth value nor a word that spells one."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool:
        if torch.compiler.is_compiling():
            raise ValueError(f"{name}: inside torch.compile or torch.export give Python floats, not a tensor")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{name}: {value!r} of channel {place} is no number; expected floats, one a channel")
    return float(value)
