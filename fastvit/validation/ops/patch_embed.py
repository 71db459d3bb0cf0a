"""`patch_embed` as the validator knows it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.validation import faults
from fastvit.validation.cases import DTYPES, Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors
from fastvit.validation.ops.add_position import place, tables
from fastvit.validation.plain import tf32_conv2d

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class PatchEmbedInputs(Inputs):
    """The tensors images, weight, bias, pos_embed and prefix, and what else a call takes."""

    keep: Tensor | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class PatchEmbedCase(Case[PatchEmbedInputs]):
    """One input of `patch_embed`, all but the compute dtype.

    `images` is "uint8", "same" (the compute dtype) or the name of a float dtype.
    """

    channels: int = 3
    grid: tuple[int, int] = (2, 2)
    patch: tuple[int, int] = (16, 16)
    images: str = "same"
    layout: str = "nchw"  # nchw, channels_last, sliced_batch, cropped, transposed, strided_channels
    bias: bool = True
    prefix: int = 1
    positions: str = "all"  # none, patches (N rows), all (R+N rows)
    keep: int | None = None
    repeat_keep: bool = False
    normalise: bool = False
    source: str = "random"  # random, photo
    weight_channels_last: bool = False

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def scatters(self) -> bool:
        return self.repeat_keep

    def make(self, draw: Draw) -> PatchEmbedInputs:
        (rows, columns), (ph, pw), compute = self.grid, self.patch, draw.compute
        table_dtype = self.table_dtype(compute)
        image_dtype = {"uint8": torch.uint8, "same": compute}.get(self.images) or DTYPES[self.images]
        shape = (self.batch, self.channels, rows * ph, columns * pw)
        images = draw.laid_out(shape, self.layout, image_dtype, photo=self.source == "photo")
        fan_in = self.channels * ph * pw
        weight_dtype = torch.float32 if self.parameters == "masters" else compute
        weight = draw.normal(self.width, self.channels, ph, pw, dtype=weight_dtype, scale=fan_in**-0.5)
        if self.weight_channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        tokens = self.prefix + (self.patches if self.keep is None else self.keep)
        return PatchEmbedInputs(
            tensors={
                "images": images,
                "weight": weight,
                "bias": draw.normal(self.width, dtype=table_dtype) if self.bias else None,
                **tables(draw, self.patches, self.prefix, self.width, self.positions, table_dtype),
            },
            grad=draw.normal(self.batch, tokens, self.width, dtype=self.dtype or compute),
            compute=compute,
            keep=self._keep(draw),
            mean=tuple(IMAGENET_MEAN[c % 3] for c in range(self.channels)) if self.normalise else None,
            std=tuple(IMAGENET_STD[c % 3] for c in range(self.channels)) if self.normalise else None,
            autocast=self.parameters == "masters" and compute is not torch.float32,
            dtype=self.dtype,
            copied=self.prefix,
            data=("images",),
        )

    def _keep(self, draw: Draw) -> Tensor | None:
        if self.keep is None:
            return None
        if self.repeat_keep:
            keep = torch.randint(self.patches, (self.batch, self.keep), generator=draw.generator)
            if self.batch and self.keep > 1:
                keep[:, 1] = keep[:, 0]  # at least one repeat, whatever the draw
        else:
            orders = [torch.randperm(self.patches, generator=draw.generator)[: self.keep] for _ in range(self.batch)]
            keep = torch.stack(orders) if orders else torch.empty(0, self.keep, dtype=torch.int64)
        return keep.to(draw.device)


def plain(inputs: PatchEmbedInputs, tensors: Tensors, tf32: bool = False) -> Tensor:
    """The eager pipeline: to-float, normalise, cast, convolution, gather, cat, add."""
    images, weight, bias = tensors["images"], tensors["weight"], tensors["bias"]
    assert images is not None and weight is not None
    x = images
    if x.dtype is torch.uint8:
        x = x.float() / 255
    if inputs.mean is not None and inputs.std is not None:
        x = x.float()
        x = (x - x.new_tensor(inputs.mean).view(-1, 1, 1)) / x.new_tensor(inputs.std).view(-1, 1, 1)
    # Under autocast the convolution casts for itself.
    with torch.autocast(x.device.type, inputs.compute, enabled=inputs.autocast):
        if not inputs.autocast:
            x, weight = x.to(inputs.compute), weight.to(inputs.compute)
            bias = None if bias is None else bias.to(inputs.compute)
        convolution = tf32_conv2d if tf32 else F.conv2d
        tokens = convolution(x, weight, bias, stride=(weight.shape[2], weight.shape[3]))
        tokens = tokens.flatten(2).transpose(1, 2)
        return place(tokens, tensors["pos_embed"], tensors["prefix"], inputs.keep).to(inputs.out)


def _last_position_shifted(run: Run, arguments: Arguments) -> Tensor:
    positions = arguments["pos_embed"]
    if positions is None or positions.shape[0] < 2:
        return run(arguments)
    return run({**arguments, "pos_embed": torch.cat([positions[:-1], positions[-2:-1]])})


def _keep_ignored(run: Run, arguments: Arguments) -> Tensor:
    keep = arguments["keep"]
    if keep is None:
        return run(arguments)
    return run({**arguments, "keep": torch.arange(keep.shape[1], device=keep.device).expand_as(keep)})


def _mean_swapped(run: Run, arguments: Arguments) -> Tensor:
    mean = arguments["mean"]
    return run({**arguments, "mean": None if mean is None else tuple(mean)[::-1]})


def _patch_flattened_in_another_order(run: Run, arguments: Arguments) -> Tensor:
    return run({**arguments, "weight": arguments["weight"].flip(-1)})


def _output_rounded_twice(run: Run, arguments: Arguments) -> Tensor:
    # fp32 results through bf16: the kind of slip that looks right to the eye.
    return run(arguments).to(torch.bfloat16).to(arguments["dtype"])


def _row_gradient_off_by_a_batch(run: Run, arguments: Arguments) -> Any:
    *others, d_rows = run(arguments)
    if arguments["keep"] is None and d_rows.numel():
        d_rows = d_rows - arguments["grad"][-1:].sum(0, dtype=torch.float32)
    return *others, d_rows


def _bias_gradient_counts_the_prefix(run: Run, arguments: Arguments) -> Any:
    d_images, d_weight, d_bias, d_rows = run(arguments)
    if d_bias.numel():
        d_bias = d_bias + arguments["grad"][:, : arguments["prefix_rows"]].float().sum((0, 1))
    return d_images, d_weight, d_bias, d_rows


def _last_weight_row_scaled(run: Run, arguments: Arguments) -> Any:
    d_images, d_weight, *others = run(arguments)
    d_weight = d_weight.clone()
    d_weight[-1:] *= 1.1
    return d_images, d_weight, *others


def _last_pixel_row_has_no_gradient(run: Run, arguments: Arguments) -> Any:
    d_images, *others = run(arguments)
    if d_images.numel():
        d_images = d_images.clone()
        d_images[:, :, -1] = 0
    return d_images, *others


_P = PatchEmbedCase
_RAW = functools.partial(PatchEmbedCase, images="uint8", normalise=True)
OP = Op(
    tiny=(
        _P("patch 16, class token, positions everywhere"),
        _RAW("raw photograph, ImageNet normalisation", source="photo"),
        _RAW("raw photograph, channels last", source="photo", layout="channels_last"),
        _P("keep, some patches", grid=(3, 3), keep=4, positions="patches"),
        _RAW("keep, repeated patches, raw", grid=(3, 3), keep=7, repeat_keep=True, prefix=5),
        _RAW("fp32 masters under autocast, raw", parameters="masters"),
        _P("width 1", grid=(4, 4), patch=(4, 4), width=1, prefix=0, positions="patches"),
        _P("width 63, channels last, no bias", patch=(8, 8), width=63, layout="channels_last", bias=False, prefix=5),
        _RAW("width 193, patch 14, raw", patch=(14, 14), width=193),
        _P("width 1023, one channel, patch 2", batch=1, channels=1, grid=(4, 4), patch=(2, 2), width=1023),
        _P("patch 32, one patch, one image", batch=1, grid=(1, 1), patch=(32, 32), width=80),
        _P("non-square patch and image, sliced batch", grid=(2, 3), patch=(4, 8), layout="sliced_batch"),
        _P("cropped view, five channels, patch 7", channels=5, grid=(3, 2), patch=(7, 7), layout="cropped", prefix=5),
        _RAW("cropped photograph, patch 16, raw", source="photo", layout="cropped"),
        _P("no position, no prefix, no bias", bias=False, prefix=0, positions="none", patch=(8, 8), normalise=True),
        _P("no position, prefix only", prefix=5, positions="none", patch=(8, 8)),
        _P("empty batch", batch=0),
        _RAW("empty batch, raw, keep", batch=0, keep=2),
        _P("fp32 images, normalised", images="float32", normalise=True),
        _P("bf16 images", images="bfloat16", normalise=True, patch=(8, 8)),
        _P("raw without normalisation", images="uint8", patch=(8, 8), positions="patches"),
        _RAW("fp32 tokens", out="float32"),
        _P("fp32 positions beside the weight", parameters="mixed", patch=(8, 8), positions="patches"),
        _P("weight in channels last", patch=(8, 8), weight_channels_last=True),
        _P("transposed image", patch=(8, 8), layout="transposed"),
        _P("every second channel", patch=(8, 8), layout="strided_channels"),
    ),
    large=(
        _RAW("ViT-S/16, photographs at 224", batch=4, grid=(14, 14), width=384, source="photo"),
        _P("ViT-S/16 at 224", batch=4, grid=(14, 14), width=384),
        _RAW("ViT-B/16 at 224, fp32 masters", grid=(14, 14), width=768, parameters="masters"),
        _RAW("ViT-S/14 at 224, five registers", grid=(16, 16), patch=(14, 14), width=384, prefix=5),
        _RAW("75% masked", batch=4, grid=(14, 14), width=193, keep=49, positions="patches"),
        _P("patch 32, 384 x 256, channels last", grid=(12, 8), patch=(32, 32), width=192, layout="channels_last"),
        _P("width 1023, patch 8", batch=3, grid=(12, 12), patch=(8, 8), width=1023, layout="cropped"),
    ),
    quick=6,
    plain=plain,
    faults=(
        Fault("bias dropped", "forward", forward=faults.bias_dropped),
        Fault("last patch's position shifted", "forward", forward=_last_position_shifted),
        Fault("last column wrong", "forward", forward=faults.last_column_wrong),
        Fault("one token zeroed", "forward", forward=faults.one_token_zeroed),
        Fault("last token not written", "forward", forward=faults.last_token_not_written),
        Fault("keep ignored", "forward", forward=_keep_ignored),
        Fault("channels of the mean swapped", "forward", forward=_mean_swapped),
        Fault("patch flattened in another order", "forward", forward=_patch_flattened_in_another_order),
        Fault("fp32 output rounded through bf16", "forward", forward=_output_rounded_twice),
        Fault("dPos off by a batch", "d_pos_embed", backward=_row_gradient_off_by_a_batch),
        Fault("dBias counts the prefix", "d_bias", backward=_bias_gradient_counts_the_prefix),
        Fault("last weight row's gradient scaled", "d_weight", backward=_last_weight_row_scaled),
        Fault("last pixel row without gradient", "d_images", backward=_last_pixel_row_has_no_gradient),
    ),
    multiplies=True,
)
