"""The cases every backend is held to: awkward widths, patches, strides, dtypes and prefix counts.

A case says everything about one input except the compute dtype, which the runner varies. `make_inputs` turns a
case into tensors: random numbers or crops of real photographs, never zeros or ones, from the case's own seed.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputUnavailable(RuntimeError):
    """A case's input can't be made on this machine; the message says why. Counted as skipped, with that reason."""


@dataclass(frozen=True)
class PatchEmbedCase:
    """One input of `patch_embed`, all but the compute dtype.

    `images` is "uint8", "same" (the compute dtype) or the name of a float dtype; `parameters` is "same", "masters"
    (fp32 weights under autocast) or "mixed" (bias, positions and prefix in fp32 beside a weight in the compute dtype);
    `out` is None for the default or the name of a float dtype.
    """

    name: str
    batch: int = 2
    channels: int = 3
    grid: tuple[int, int] = (2, 2)
    patch: tuple[int, int] = (16, 16)
    width: int = 64
    images: str = "same"
    layout: str = "nchw"  # nchw, channels_last, sliced_batch, cropped, transposed, strided_channels
    bias: bool = True
    prefix: int = 1
    positions: str = "all"  # none, patches (N rows), all (R+N rows)
    keep: int | None = None
    repeat_keep: bool = False
    normalise: bool = False
    source: str = "random"  # random, photo
    parameters: str = "same"
    weight_channels_last: bool = False
    out: str | None = None
    op: str = field(default="patch_embed", init=False)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class AddPositionCase:
    """One input of `add_position`, all but the tokens' dtype."""

    name: str
    batch: int = 2
    patches: int = 9
    width: int = 64
    layout: str = "contiguous"  # contiguous, sliced_batch, sliced_rows, from_nchw
    prefix: int = 1
    positions: str = "all"
    parameters: str = "same"
    out: str | None = None
    op: str = field(default="add_position", init=False)


Case = PatchEmbedCase | AddPositionCase


@dataclass
class Inputs:
    """The tensors of one case. `grad` is the upstream gradient, in the dtype and shape of the tokens."""

    tensors: dict[str, torch.Tensor | None]  # images/weight/bias/pos_embed/prefix or tokens/pos_embed/prefix
    grad: torch.Tensor
    compute: torch.dtype
    out: torch.dtype
    keep: torch.Tensor | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    autocast: bool = False
    # The argument `dtype` of the call; None where the default is what the case is about.
    dtype: torch.dtype | None = None

    def differentiable(self) -> list[str]:
        """Names of the tensors that have a gradient."""
        return [name for name, tensor in self.tensors.items() if tensor is not None and tensor.is_floating_point()]


_P = PatchEmbedCase
_RAW = functools.partial(PatchEmbedCase, images="uint8", normalise=True)
# Small enough for an interpreter that runs a GPU kernel program by program.
PATCH_EMBED_TINY: tuple[PatchEmbedCase, ...] = (
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
)
# Real sizes, for backends that run at full speed.
PATCH_EMBED_LARGE: tuple[PatchEmbedCase, ...] = (
    _RAW("ViT-S/16, photographs at 224", batch=4, grid=(14, 14), width=384, source="photo"),
    _P("ViT-S/16 at 224", batch=4, grid=(14, 14), width=384),
    _RAW("ViT-B/16 at 224, fp32 masters", grid=(14, 14), width=768, parameters="masters"),
    _RAW("ViT-S/14 at 224, five registers", grid=(16, 16), patch=(14, 14), width=384, prefix=5),
    _RAW("75% masked", batch=4, grid=(14, 14), width=193, keep=49, positions="patches"),
    _P("patch 32, 384 x 256, channels last", grid=(12, 8), patch=(32, 32), width=192, layout="channels_last"),
    _P("width 1023, patch 8", batch=3, grid=(12, 12), patch=(8, 8), width=1023, layout="cropped"),
)
ADD_POSITION_TINY: tuple[AddPositionCase, ...] = (
    AddPositionCase("class token, positions everywhere"),
    AddPositionCase("five prefix rows, positions on patches", prefix=5, positions="patches", width=193),
    AddPositionCase("no prefix, width 63", prefix=0, positions="patches", width=63),
    AddPositionCase("width 1", patches=16, width=1),
    AddPositionCase("width 1023, sliced batch", width=1023, layout="sliced_batch"),
    AddPositionCase("sliced rows", layout="sliced_rows", width=80),
    AddPositionCase("tokens from a feature map", layout="from_nchw", patches=16),
    AddPositionCase("empty batch", batch=0),
    AddPositionCase("one token, one sample", batch=1, patches=1, width=96),
    AddPositionCase("fp32 positions", parameters="mixed"),
    AddPositionCase("fp32 tokens out", out="float32"),
)
ADD_POSITION_LARGE: tuple[AddPositionCase, ...] = (
    AddPositionCase("ViT-S, batch 16", batch=16, patches=196, width=384),
    AddPositionCase("ViT-B, five registers", batch=4, patches=256, width=768, prefix=5, positions="patches"),
)
OPS = ("patch_embed", "add_position")
_LISTS: dict[str, tuple[tuple[Case, ...], tuple[Case, ...]]] = {
    "patch_embed": (PATCH_EMBED_TINY, PATCH_EMBED_LARGE),
    "add_position": (ADD_POSITION_TINY, ADD_POSITION_LARGE),
}
# The first cases of each list are the ones that find most; `quick` stops after this many.
QUICK = {"patch_embed": 6, "add_position": 3}


def cases_for(op: str, *, large: bool, quick: bool = False) -> tuple[Case, ...]:
    """The cases of one op: tiny ones always, real sizes too where `large`; with `quick`, only the first few of each."""
    tiny, real = _LISTS[op]
    if quick:
        return (*tiny[: QUICK[op]], *(real[:1] if large else ()))
    return (*tiny, *(real if large else ()))


def make_inputs(case: Case, compute: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Tensors for a case, already rounded to the dtypes they are passed in. Same seed, same numbers, on any device."""
    # A stable hash: Python's own is salted per process, and a failure must be repeatable.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(case.name.encode()))
    if isinstance(case, PatchEmbedCase):
        return _patch_embed_inputs(case, compute, torch.device(device), generator)
    return _add_position_inputs(case, compute, torch.device(device), generator)


def _patch_embed_inputs(
    case: PatchEmbedCase, compute: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    (rows, columns), (ph, pw) = case.grid, case.patch
    values = case.channels * ph * pw
    other = torch.float32 if case.parameters in ("masters", "mixed") else compute
    weight_dtype = torch.float32 if case.parameters == "masters" else compute
    out = DTYPES[case.out] if case.out else compute
    image_dtype = {"uint8": torch.uint8, "same": compute}.get(case.images) or DTYPES[case.images]

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    images = _images(case, (case.batch, case.channels, rows * ph, columns * pw), image_dtype, device, generator)
    # Unit scale after the projection, as bias, position and prefix have: no term can hide behind another.
    weight = normal(case.width, case.channels, ph, pw, scale=values**-0.5).to(device, weight_dtype)
    if case.weight_channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    position_rows = case.patches + (case.prefix if case.positions == "all" else 0)
    tokens = case.prefix + (case.patches if case.keep is None else case.keep)
    parameters: dict[str, torch.Tensor | None] = {
        "images": images,
        "weight": weight,
        "bias": normal(case.width).to(device, other) if case.bias else None,
        "pos_embed": None if case.positions == "none" else normal(position_rows, case.width).to(device, other),
        "prefix": normal(case.prefix, case.width).to(device, other) if case.prefix else None,
    }
    return Inputs(
        tensors=parameters,
        grad=normal(case.batch, tokens, case.width).to(device, out),
        compute=compute,
        out=out,
        keep=_keep(case, generator, device),
        mean=tuple(IMAGENET_MEAN[c % 3] for c in range(case.channels)) if case.normalise else None,
        std=tuple(IMAGENET_STD[c % 3] for c in range(case.channels)) if case.normalise else None,
        autocast=case.parameters == "masters" and compute is not torch.float32,
        dtype=DTYPES[case.out] if case.out else None,
    )


def _keep(case: PatchEmbedCase, generator: torch.Generator, device: torch.device) -> torch.Tensor | None:
    if case.keep is None:
        return None
    if case.repeat_keep:
        keep = torch.randint(case.patches, (case.batch, case.keep), generator=generator)
        if case.batch and case.keep > 1:
            keep[:, 1] = keep[:, 0]  # at least one repeat, whatever the draw
    else:
        orders = [torch.randperm(case.patches, generator=generator)[: case.keep] for _ in range(case.batch)]
        keep = torch.stack(orders) if orders else torch.empty(0, case.keep, dtype=torch.int64)
    return keep.to(device)


def _images(
    case: PatchEmbedCase,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    """Images of the wanted shape, whose memory is laid out as the case says."""
    batch, channels, height, width = shape
    layout = case.layout
    stored = {
        "sliced_batch": (2 * batch, channels, height, width),
        "cropped": (batch, channels, height + 3, width + 5),
        "transposed": (batch, channels, width, height),
        "strided_channels": (batch, 2 * channels, height, width),
    }.get(layout, shape)
    if case.source == "photo":
        pixels = _photo_crops(stored, generator)
    elif dtype is torch.uint8:
        pixels = torch.randint(256, stored, dtype=torch.uint8, generator=generator)
    else:
        pixels = torch.randn(stored, generator=generator)
    if case.source == "photo" and dtype is not torch.uint8:
        pixels = pixels.float() / 255
    pixels = pixels.to(device, dtype)
    if layout == "channels_last":
        return pixels.contiguous(memory_format=torch.channels_last)
    if layout == "sliced_batch":
        return pixels[::2]
    if layout == "cropped":
        return pixels[:, :, 2 : 2 + height, 3 : 3 + width]
    if layout == "transposed":
        return pixels.transpose(2, 3)
    if layout == "strided_channels":
        return pixels[:, ::2]
    return pixels


@functools.lru_cache(maxsize=1)
def _photographs() -> tuple[torch.Tensor, ...]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise InputUnavailable(f"real photographs need scikit-learn ({error})") from error
    return tuple(torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)


def photographs(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """`batch` crops, `[batch, 3, height, width]` uint8, of scikit-learn's two bundled photographs (427 x 640).

    Raises InputUnavailable where scikit-learn is missing.
    """
    return _photo_crops((batch, 3, height, width), torch.Generator().manual_seed(seed))


def _photo_crops(shape: tuple[int, int, int, int], generator: torch.Generator) -> torch.Tensor:
    batch, channels, height, width = shape
    photos = _photographs()
    crops = torch.empty(shape, dtype=torch.uint8)
    for index in range(batch):
        photo = photos[index % len(photos)]
        top = int(torch.randint(photo.shape[1] - height + 1, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - width + 1, (), generator=generator))
        crops[index] = photo[:channels, top : top + height, left : left + width]
    return crops


def _add_position_inputs(
    case: AddPositionCase, compute: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    batch, patches, width = case.batch, case.patches, case.width
    other = torch.float32 if case.parameters == "mixed" else compute
    out = DTYPES[case.out] if case.out else compute

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    stored = {
        "sliced_batch": (2 * batch, patches, width),
        "sliced_rows": (batch, patches + 3, width),
        "from_nchw": (batch, width, patches),
    }.get(case.layout, (batch, patches, width))
    tokens = normal(*stored).to(device, compute)
    if case.layout == "sliced_batch":
        tokens = tokens[::2]
    elif case.layout == "sliced_rows":
        tokens = tokens[:, 2 : 2 + patches]
    elif case.layout == "from_nchw":
        tokens = tokens.transpose(1, 2)
    position_rows = patches + (case.prefix if case.positions == "all" else 0)
    return Inputs(
        tensors={
            "tokens": tokens,
            "pos_embed": normal(position_rows, width).to(device, other),
            "prefix": normal(case.prefix, width).to(device, other) if case.prefix else None,
        },
        grad=normal(batch, case.prefix + patches, width).to(device, out),
        compute=compute,
        out=out,
        dtype=DTYPES[case.out] if case.out else None,
    )
