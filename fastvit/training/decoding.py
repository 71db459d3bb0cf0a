"""From an image file to raw uint8 pixels: a square, or the whole image at a size of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import DataError

CROP_SHARE = 0.875  # of the shorter side that a test image keeps
CROP_AREA = (0.35, 1.0)  # of a training image's area
CROP_RATIO = (3 / 4, 4 / 3)
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # TIFF tags
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that make the width the height


class Source(Protocol):
    """Where an image lies: a Path, or what opens as one does and has a `str` that names it to a reader of errors."""

    def open(self, mode: Literal["rb"], /) -> IO[bytes]: ...


def decode(source: Source, *, size: int | tuple[int, int], channels: int, draws: list[float]) -> Tensor:
    """The image at `source` as uint8 [channels, height, width], upright, in grey or RGB; opacity is dropped.

    16 bits a channel and floats from 0 to 1 are scaled to 8 bits.

    Args:
        size: of a square, which without `draws` is the middle of the image; or height and width, which without `draws`
            are those of the whole image resized.
        draws: none, or five numbers in [0, 1): a crop at random, resized to `size`, and a flip.

    Raises:
        DataError: unreadable, damaged, or with pixels whose white is not known; names the file.
    """
    with _opened(source) as image:
        image.load()
        with suppress(Exception):  # a damaged EXIF block beside whole pixels; most images are upright
            ImageOps.exif_transpose(image, in_place=True)
        image = in_eight_bits(image).convert("L" if channels == 1 else "RGB")
    height, width = (size, size) if isinstance(size, int) else size
    bicubic = Image.Resampling.BICUBIC
    if draws:
        box = random_box(image.width, image.height, draws, width / height)
        image = image.resize((width, height), bicubic, box=box)
        image = ImageOps.mirror(image) if draws[4] < 0.5 else image
    elif isinstance(size, int):
        image = ImageOps.fit(image, (width, height), bicubic, bleed=(1 - CROP_SHARE) / 2)
    else:
        image = image.resize((width, height), bicubic)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def upright_size(source: Source) -> tuple[int, int]:
    """Height and width that `decode` finds at `source`, from the header alone. Raises DataError as it does.

    Where a PNG says behind its pixels that it lies on its side, the sides come as they are stored.
    """
    with _opened(source) as image:
        width, height = image.size
        orientation = 1
        with suppress(Exception):  # as in `decode`
            # Not the method of PNG's own, which decodes the pixels to see what stands behind them.
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
    # Pillow has turned the size of a TIFF already.
    return (width, height) if orientation in ON_ITS_SIDE and image.format != "TIFF" else (height, width)


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """The image at `source`, not decoded yet; what goes wrong with it inside becomes a DataError that names it."""
    try:
        with source.open("rb") as file, Image.open(file) as image:
            yield image
    # Decoders of broken files raise nearly anything: OSError, SyntaxError, ValueError, struct.error …
    except Exception as error:
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: the image cannot be decoded ({reason}); mend or remove it") from error


def in_eight_bits(image: Image.Image) -> Image.Image:
    """`image`, where its pixels are deeper than 8 bits scaled from the format's range: Pillow would cut them off."""
    if image.mode == "P":
        return image.convert("RGBA")
    if image.mode[0] not in "IF":
        return image
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        white = 1.0
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        white = 2.0 ** tags.get(BITS, (16,))[0] - 1
    else:
        raise ValueError("32-bit or signed integers, whose white is not known; accepted are 8 bits, 16 bits and floats")
    pixels = np.asarray(image)
    if not (pixels.min() >= 0 and pixels.max() <= white):  # or NaN
        raise ValueError(f"values from {pixels.min():g} to {pixels.max():g}; accepted are 0 to {white:g}")
    if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds in 8 bits alone
        pixels = white - pixels
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))


def random_box(width: int, height: int, draws: list[float], ratio: float = 1.0) -> tuple[float, float, float, float]:
    """A crop of random area, aspect ratio and place (Szegedy et al., 2014): left, top, right, bottom, in the image.

    The aspect ratio, width to height, is drawn around `ratio`, that of the size which the crop is resized to.
    """
    area = width * height * (CROP_AREA[0] + draws[0] * (CROP_AREA[1] - CROP_AREA[0]))
    low, high = map(math.log, CROP_RATIO)
    ratio *= math.exp(low + draws[1] * (high - low))
    box_width, box_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draws[2] * (width - box_width), draws[3] * (height - box_height)
    return left, top, left + box_width, top + box_height
