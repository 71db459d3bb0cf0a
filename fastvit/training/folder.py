"""A folder of images, one directory a class, decoded to uint8 tensors.

FOLDER/cat/1.jpg, FOLDER/dog/7.png …                   a fixed share of each class is held out, or
FOLDER/train/cat/1.jpg …, FOLDER/val/cat/9.jpg …       (also test/ or validation/)
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from .data import Batch, ImageData, ImageSet, epoch_generator, fingerprint
from .digits import split_by_class
from .errors import DataError, OptionError
from .options import TrainOptions

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
HELD_OUT_NAMES = ("val", "validation", "test")
DEFAULT_SIZE = 224
CROP_SHARE = 0.875  # of the shorter side that a test image keeps
CROP_AREA = (0.35, 1.0)  # of a training image's area
CROP_RATIO = (3 / 4, 4 / 3)

Sample = tuple[Path, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class FolderSet(ImageSet):
    """Images on disk, cropped to squares of `size`: at random with a flip (`augment`), else the middle."""

    def __init__(self, samples: list[Sample], *, size: int, channels: int, augment: bool) -> None:
        self.samples, self.size, self.channels, self.augment = samples, size, channels, augment
        self.random = torch.zeros(len(samples), 0)

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, seed: int, epoch: int) -> None:
        if self.augment:
            self.random = torch.rand(len(self), 5, generator=epoch_generator(seed, epoch, "augment"))

    def load(self, indices: list[int]) -> Batch:
        images = torch.stack([self._image(index) for index in indices])
        return images, torch.tensor([self.samples[index][1] for index in indices])

    def _image(self, index: int) -> Tensor:
        draws = self.random[index].tolist()
        return decode(self.samples[index][0], size=self.size, channels=self.channels, draws=draws)


def decode(path: Path, *, size: int, channels: int, draws: list[float]) -> Tensor:
    """The image at `path` as uint8 [channels, size, size]. `draws`: none, or five numbers in [0, 1)."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            image = upright.convert("L" if channels == 1 else "RGB")
    # Decoders of broken files raise nearly anything: OSError, SyntaxError, ValueError, struct.error …
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: the image cannot be decoded ({reason}); mend or remove it") from error
    box = random_box(image.width, image.height, draws) if draws else middle_box(image.width, image.height)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if draws and draws[4] < 0.5:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def middle_box(width: int, height: int) -> Box:
    side = CROP_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, draws: list[float]) -> Box:
    """A crop of random area, aspect ratio and place (Szegedy et al., 2014), cut down to the image."""
    area = width * height * (CROP_AREA[0] + draws[0] * (CROP_AREA[1] - CROP_AREA[0]))
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = math.exp(low + draws[1] * (high - low))
    box_width, box_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draws[2] * (width - box_width), draws[3] * (height - box_height)
    return left, top, left + box_width, top + box_height


def load_folder(options: TrainOptions) -> ImageData:
    """The folder `options.data`. Every class must hold images; the split is the same for every seed."""
    root = Path(options.data)
    if not root.is_dir():
        found = "is a file" if root.is_file() else "does not exist"
        raise OptionError("data", options.data, f"'digits' or a folder with one directory a class; this {found}")
    size, channels = options.image_size or DEFAULT_SIZE, options.channels or 3
    train, test, classes = split_folder(root, options.validation_share)
    mean, std = ((0.5,), (0.5,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    names = [f"{path.relative_to(root).as_posix()} {label}" for path, label in [*train, *test]]
    return ImageData(
        train=FolderSet(train, size=size, channels=channels, augment=options.augment),
        test=FolderSet(test, size=size, channels=channels, augment=False),
        classes=classes,
        channels=channels,
        image_size=size,
        mean=mean,
        std=std,
        fingerprint=fingerprint(*classes, str(len(train)), *names),
    )


def split_folder(root: Path, share: float) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Training samples, test samples and class names of `root`."""
    held_out = [root / name for name in HELD_OUT_NAMES if (root / name).is_dir()]
    if (root / "train").is_dir() and held_out:
        train, classes = scan(root / "train")
        test, test_classes = scan(held_out[0])
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise DataError(f"{held_out[0]}: other classes than in {root / 'train'}: {', '.join(odd[:5])}")
        return train, test, classes
    samples, classes = scan(root)
    sizes = Counter(label for _, label in samples)
    for label, name in enumerate(classes):
        if sizes[label] < 2:
            raise DataError(f"{root / name}: one image only; a class needs two, one of them to test on")
    kept, tested = split_by_class(torch.tensor([label for _, label in samples]), share)
    return [samples[i] for i in kept.tolist()], [samples[i] for i in tested.tolist()], classes


def scan(root: Path) -> tuple[list[Sample], tuple[str, ...]]:
    """Every image under each class directory of `root`, sorted by name, so that the order is the same everywhere."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{root}: no class directories; expected FOLDER/<class>/<image>, such as {root}/cat/1.jpg")
    if len(folders) == 1:
        raise DataError(f"{root}: only one class, {folders[0].name}; at least two are needed")
    samples: list[Sample] = []
    for label, folder in enumerate(folders):
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        if not found:
            raise DataError(f"{folder}: no images in this class; accepted are {', '.join(sorted(EXTENSIONS))}")
        samples += [(path, label) for path in found]
    return samples, tuple(folder.name for folder in folders)
