"""`patch_embed_packed` as the validator knows it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.validation import faults
from fastvit.validation.cases import DTYPES, Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors, tensors_of
from fastvit.validation.ops.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from fastvit.validation.plain import tf32_conv2d

Sizes = tuple[tuple[int, int], ...]


@dataclass
class PackedInputs(Inputs):
    """The tensors images[0], images[1], ..., or images where the patches are cut already, weight, bias, pos_embed and
    prefix, and what else a call takes."""

    sizes: Sizes | None = None
    order: str = "CPP"
    still: bool = False
    merge: int = 1
    interpolation: str = "bicubic"
    antialias: bool = True
    align_corners: bool | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def rows(self) -> int:
        """Patches of all images."""
        prefix, images = self.tensors["prefix"], tensors_of("images", self.tensors)
        number = len(images) if self.sizes is None else len(self.sizes)
        return self.grad.shape[0] - (0 if prefix is None else number * prefix.shape[0])


@dataclass(frozen=True)
class PackedCase(Case[PackedInputs]):
    """One input of `patch_embed_packed`, all but the compute dtype; without `batch`."""

    sizes: Sizes = ((2, 3), (1, 1), (3, 2))  # rows and columns of patches
    channels: int = 3
    patch: tuple[int, int] = (8, 8)
    images: str = "same"  # uint8, same, or the name of a float dtype
    layout: str = "nchw"  # nchw, channels_last, mixed (both), cropped; of cut patches: packed, padded
    order: str = "CPP"
    frames: int = 1  # of a cut patch
    still: bool = False
    merge: int = 1
    bias: bool = True
    prefix: int = 1
    positions: str = "grid"  # none, grid, rows
    grid: tuple[int, int] = (2, 3)
    filter: tuple[str, bool, bool | None] = ("bicubic", True, None)
    normalise: bool = False

    @property
    def scatters(self) -> bool:
        return len(set(self.sizes)) < len(self.sizes)

    def make(self, draw: Draw) -> PackedInputs:
        (ph, pw), compute = self.patch, draw.compute
        table_dtype = self.table_dtype(compute)
        length = self.channels * self.frames * ph * pw
        kernel = (self.channels, *((self.frames,) if self.frames > 1 else ()), ph, pw)
        counts = [rows * columns for rows, columns in self.sizes]
        shapes = {"none": None, "grid": (*self.grid, self.width), "rows": (sum(counts), self.width)}
        table = shapes[self.positions]
        interpolation, antialias, align_corners = self.filter
        weight_dtype = torch.float32 if self.parameters == "masters" else compute
        tokens = sum(counts) + self.prefix * len(counts)
        return PackedInputs(
            tensors={
                **self._images(draw),
                "weight": draw.normal(self.width, *kernel, dtype=weight_dtype, scale=length**-0.5),
                "bias": draw.normal(self.width, dtype=table_dtype) if self.bias else None,
                "pos_embed": None if table is None else draw.normal(*table, dtype=table_dtype),
                "prefix": draw.normal(self.prefix, self.width, dtype=table_dtype) if self.prefix else None,
            },
            grad=draw.normal(tokens, self.width, dtype=self.dtype or compute),
            compute=compute,
            sizes=self.sizes if self.layout in ("packed", "padded") else None,
            order=self.order,
            still=self.still,
            merge=self.merge,
            interpolation=interpolation,
            antialias=antialias,
            align_corners=align_corners,
            mean=tuple(IMAGENET_MEAN[c % 3] for c in range(self.channels)) if self.normalise else None,
            std=tuple(IMAGENET_STD[c % 3] for c in range(self.channels)) if self.normalise else None,
            autocast=self.parameters == "masters" and compute is not torch.float32,
            dtype=self.dtype,
            data=tuple(f"images[{i}]" for i in range(len(self.sizes))) + ("images",),
        )

    def _images(self, draw: Draw) -> Tensors:
        (ph, pw), compute = self.patch, draw.compute
        dtype = {"uint8": torch.uint8, "same": compute}.get(self.images) or DTYPES[self.images]
        counts = [rows * columns for rows, columns in self.sizes]
        length = self.channels * self.frames * ph * pw
        if self.layout == "packed":
            return {"images": draw.laid_out((sum(counts), length), "contiguous", dtype)}
        if self.layout == "padded":
            return {"images": draw.laid_out((len(counts), max(counts, default=0) + 2, length), "contiguous", dtype)}
        images: Tensors = {}
        for i, (rows, columns) in enumerate(self.sizes):
            layout = {"mixed": ("channels_last", "nchw")[i % 2]}.get(self.layout, self.layout)
            shape = (1, self.channels, rows * ph, columns * pw)
            images[f"images[{i}]"] = draw.laid_out(shape, layout, dtype)[0]
        return images


def plain(inputs: PackedInputs, tensors: Tensors, tf32: bool = False) -> Tensor:
    """The eager pipeline, a loop over the images: to-float, normalise, cast, convolution, interpolate, add, cat."""
    weight, bias, table, prefix = (tensors[name] for name in ("weight", "bias", "pos_embed", "prefix"))
    assert weight is not None
    images = tensors_of("images", tensors)
    if weight.dim() == 5:  # of several frames, as so many more channels; of stills the first one alone
        if inputs.still:
            images = [patches.unflatten(-1, (*weight.shape[1:3], -1))[..., 0, :].flatten(-2) for patches in images]
        weight = weight.sum(2) if inputs.still else weight.flatten(1, 2)
    images = _uncut(inputs, images, weight)
    convolution = tf32_conv2d if tf32 else F.conv2d
    tokens, first = [], 0
    with torch.autocast(weight.device.type, inputs.compute, enabled=inputs.autocast):
        kernel = weight if inputs.autocast else weight.to(inputs.compute)
        offset = bias if inputs.autocast or bias is None else bias.to(inputs.compute)
        for image in images:
            x = image.float() / 255 if image.dtype is torch.uint8 else image
            if inputs.mean is not None and inputs.std is not None:
                x = x.float()
                repeats = x.shape[0] // len(inputs.mean)  # frames
                mean, std = (
                    x.new_tensor(v).repeat_interleave(repeats)[:, None, None] for v in (inputs.mean, inputs.std)
                )
                x = (x - mean) / std
            x = x if inputs.autocast else x.to(inputs.compute)
            out = convolution(x[None], kernel, offset, stride=kernel.shape[2:])
            rows, columns = out.shape[2:]
            own = out.flatten(2).transpose(1, 2)[0]
            if table is not None:
                own = own + _positions(inputs, table, rows, columns, first)
            first += rows * columns
            tokens += [own] if prefix is None else [prefix, own]
        widest = functools.reduce(torch.promote_types, (part.dtype for part in tokens), inputs.out)
        parts = [part.to(widest) for part in tokens] or [weight.new_empty(0, weight.shape[0])]
        return torch.cat(parts).to(inputs.out)


def _positions(inputs: PackedInputs, table: Tensor, rows: int, columns: int, first: int) -> Tensor:
    if table.dim() == 2:
        return table[first : first + rows * columns]
    grid = table.float().permute(2, 0, 1)[None]
    options: dict[str, Any] = {"antialias": inputs.antialias, "align_corners": inputs.align_corners}
    for length in (rows, columns):  # see the reference
        grid = F.interpolate(grid.mT, (grid.shape[3], length), mode=inputs.interpolation, **options)
    windows = grid[0].unflatten(2, (-1, inputs.merge)).unflatten(1, (-1, inputs.merge))  # [D, r/m, m, c/m, m]
    return windows.permute(1, 3, 2, 4, 0).flatten(0, 3).to(table.dtype)


def _uncut(inputs: PackedInputs, images: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """The images, put together from their patches where these are cut."""
    if inputs.sizes is None:
        return list(images)
    (patches,), (_, channels, height, width) = images, weight.shape
    counts = [rows * columns for rows, columns in inputs.sizes]
    firsts = itertools.accumulate(counts, initial=0)
    found = []
    for i, (first, count, (rows, columns)) in enumerate(zip(firsts, counts, inputs.sizes, strict=False)):
        own = patches[first : first + count] if patches.dim() == 2 else patches[i, :count]
        if inputs.order == "CPP":
            own = own.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
        else:
            own = own.reshape(rows, columns, height, width, channels).permute(4, 0, 2, 1, 3)
        found.append(own.reshape(channels, rows * height, columns * width))
    return found


def _position_of_the_neighbour(run: Run, arguments: Arguments) -> Tensor:
    starts = arguments["starts"]
    return run({**arguments, "starts": [min(starts[:1] + starts, default=0), *starts[:-1]]} if starts else arguments)


def _positions_off_by_one(run: Run, arguments: Arguments) -> Tensor:
    positions = arguments["pos_embed"]
    return run({**arguments, "pos_embed": None if positions is None else positions.roll(1, 0)})


def _last_patch_of_an_image_twice(run: Run, arguments: Arguments) -> Tensor:
    out = run(arguments).clone()
    if len(out) > 1:
        out[-1] = out[-2]
    return out


def _prefix_of_the_last_image_lost(run: Run, arguments: Arguments) -> Tensor:
    out, weight, prefix = run(arguments).clone(), arguments["weight"], arguments["prefix"]
    if prefix is not None and arguments["images"]:
        _, height, width = arguments["images"][-1].shape
        patches = height // weight.shape[2] * (width // weight.shape[3])
        out[-patches - prefix.shape[0] : len(out) - patches] = 0
    return out


def _rows_of_one_image_lost(run: Run, arguments: Arguments) -> Any:
    *others, d_rows = run(arguments)
    weight, prefix_rows = arguments["weight"], arguments["prefix_rows"]
    if d_rows.shape[0] > prefix_rows and arguments["images"]:
        _, height, width = arguments["images"][-1].shape
        patches, start = height // weight.shape[2] * (width // weight.shape[3]), arguments["starts"][-1]
        d_rows = d_rows.clone()
        d_rows[prefix_rows + start : prefix_rows + start + patches] -= arguments["grad"][-patches:].float()
    return *others, d_rows


def _bias_gradient_counts_the_prefix(run: Run, arguments: Arguments) -> Any:
    d_images, d_weight, d_bias, d_rows = run(arguments)
    return d_images, d_weight, arguments["grad"].float().sum(0) if d_bias.numel() else d_bias, d_rows


def _weight_gradient_without_an_image(run: Run, arguments: Arguments) -> Any:
    found = run(arguments)
    if not arguments["images"] or not found[1].numel():
        return found
    grad, (_, height, width), weight = arguments["grad"].clone(), arguments["images"][-1].shape, arguments["weight"]
    grad[-(height // weight.shape[2] * (width // weight.shape[3])) :] = 0
    return found[0], run({**arguments, "grad": grad})[1], *found[2:]


_SIZES = ((14, 14), (10, 20), (20, 10), (7, 28), (16, 12), (14, 14), (1, 30), (25, 8))
_P = PackedCase
_RAW = functools.partial(PackedCase, images="uint8", normalise=True)
OP = Op(
    tiny=(
        _RAW("three sizes, raw, class token"),
        _P("three sizes", patch=(16, 16)),
        _RAW("cut patches, raw", layout="packed"),
        _P("padded patches, (P, P, C)", layout="padded", order="PPC", prefix=0, filter=("bilinear", True, None)),
        _P("sizes that repeat, a row a patch", sizes=((2, 2), (1, 3), (2, 2), (1, 3)), positions="rows", prefix=0),
        _P("sizes that repeat", sizes=((2, 2), (3, 1), (2, 2), (2, 3), (3, 1)), parameters="mixed"),
        _RAW("fp32 masters under autocast, raw", parameters="masters"),
        _RAW("one image, patch 14, width 193", sizes=((3, 2),), patch=(14, 14), width=193),
        _P("images of one patch, width 63", sizes=((1, 1),) * 3, width=63, bias=False, prefix=4),
        _P("no positions, no prefix, no bias", positions="none", prefix=0, bias=False),
        _RAW("channels last", layout="channels_last", prefix=0),
        _P("both layouts, width 1", layout="mixed", width=1, sizes=((4, 4), (2, 5), (6, 3))),
        _P("cropped, five channels, patch 7", layout="cropped", channels=5, patch=(7, 7)),
        _P("one channel, non-square patch, width 264", channels=1, patch=(4, 2), width=264),
        _RAW("cut patches, (P, P, C), raw", layout="packed", order="PPC", positions="rows", prefix=5),
        _P("aligned corners, without antialias", filter=("bilinear", False, True), grid=(4, 4)),
        _P("fp32 images, normalised", images="float32", normalise=True, out="float32"),
        _P("patches of two frames in windows", layout="packed", frames=2, merge=2, sizes=((2, 4), (4, 2), (6, 4)),
           filter=("bilinear", False, True)),
        _P("windows, a row a patch", layout="padded", merge=2, sizes=((2, 4), (4, 2)), positions="rows", patch=(4, 4)),
        _RAW("stills of two frames, raw", layout="packed", frames=2, still=True, prefix=0, parameters="masters"),
        _P("padded stills of three frames", layout="padded", frames=3, still=True, normalise=True, channels=2),
        _P("no images", sizes=(), batch=0),
        _P("a hundred sizes", sizes=tuple((1 + i % 10, 1 + i // 10) for i in range(100)), patch=(2, 2), width=24),
    ),
    large=(
        _RAW("ViT-S/16, eight sizes", width=384, patch=(16, 16), grid=(14, 14), sizes=_SIZES),
        _P("SigLIP 2's patches, ViT-S", width=384, patch=(16, 16), grid=(16, 16), sizes=_SIZES, layout="padded",
           order="PPC", prefix=0, filter=("bilinear", True, None)),
    ),
    quick=4,
    plain=plain,
    faults=(
        Fault("packed: bias dropped", "forward", forward=faults.bias_dropped),
        Fault("packed: last column wrong", "forward", forward=faults.last_column_wrong),
        Fault("packed: positions of the neighbour image", "forward", forward=_position_of_the_neighbour),
        Fault("packed: positions off by one", "forward", forward=_positions_off_by_one),
        Fault("packed: last patch of an image", "forward", forward=_last_patch_of_an_image_twice),
        Fault("packed: prefix of the last image lost", "forward", forward=_prefix_of_the_last_image_lost),
        Fault("packed: position rows of an image lost", "d_pos_embed", backward=_rows_of_one_image_lost),
        Fault("packed: dBias counts the prefix", "d_bias", backward=_bias_gradient_counts_the_prefix),
        Fault("packed: weight gradient without an image", "d_weight", backward=_weight_gradient_without_an_image),
    ),
    multiplies=True,
)  # fmt: skip
