"""A folder of images, one directory a class, in the order and with the links that torchvision's ImageFolder takes.

FOLDER/cat/1.jpg, FOLDER/dog/7.png …                   a fixed share of each class is held out, or
FOLDER/train/cat/1.jpg …, FOLDER/val/cat/9.jpg …       (also training/; valid/, validation/, test/ or testing/)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastvit.checkpoints.errors import listed

from .any_size import ImageList, grid_within
from .decoding import decode, upright_size
from .errors import DataError, OptionError
from .image_set import ImageData, ImageSet, fingerprint, split_by_class
from .models import model_arguments
from .options import TrainOptions

EXTENSIONS = frozenset(".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2".split())
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "valid", "validation", "test", "testing")
# What systems and tools leave among images, beside all that is hidden by a dot.
LEFTOVERS = frozenset({"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"})
DEFAULT_SIZE = 224
LISTED = 5  # names in an error, at most

Sample = tuple[Path, int]
Size = tuple[int, int]  # height and width


def read_images(paths: list[Path], size: int, channels: int, indices: list[int], random: Tensor) -> Tensor:
    """Those of `paths`, cropped to squares of `size`: with `random` [B, 5] at random with a flip, else the middle."""
    drawn = zip(indices, random.tolist(), strict=True)
    return torch.stack([decode(paths[index], size=size, channels=channels, draws=draws) for index, draws in drawn])


def read_any_size(paths: list[Path], sizes: list[Size], channels: int, indices: list[int], random: Tensor) -> ImageList:
    """Those of `paths`, each at its own of `sizes`: with `random` [B, 5] a crop with a flip, else the whole image."""
    drawn = zip(indices, random.tolist(), strict=True)
    return ImageList.of([decode(paths[i], size=sizes[i], channels=channels, draws=draws) for i, draws in drawn])


def load_folder(options: TrainOptions) -> ImageData:
    """The folder `options.data`. Every class must hold images; the split is the same for every seed."""
    root = Path(options.data).expanduser()
    if not root.is_dir():
        found = "is a file" if root.is_file() else "does not exist"
        raise OptionError("data", options.data, f"'digits' or a folder with one directory a class; this {found}")
    size, channels = options.image_size or DEFAULT_SIZE, options.channels or 3
    train, test, classes = split_folder(root, options.validation_share)
    mean, std = ((0.5,), (0.5,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    names = [f"{path.relative_to(root).as_posix()} {label}" for path, label in [*train, *test]]
    arguments = {"img_size": size, "in_chans": channels, "num_classes": len(classes), "mean": mean, "std": std}
    measure = None
    if options.tokens_per_batch:
        measure = partial(measured, *token_limits(options, size))
        arguments["dynamic_img_size"] = True

    def image_set(samples: list[Sample], draws: int) -> ImageSet:
        paths, labels = [path for path, _ in samples], torch.tensor([label for _, label in samples])
        if measure is None:
            return ImageSet(partial(read_images, paths, size, channels), labels, draws)
        sizes, tokens = measure(paths)
        return ImageSet(partial(read_any_size, paths, sizes, channels), labels, draws, tokens)

    sets = image_set(train, 5 * options.augment), image_set(test, 0)
    # The numbers of tokens settle the batches of an epoch, and are to be the same in a resumed run.
    tokens = [str(count) for images in sets for count in images.tokens]
    return ImageData(*sets, classes, arguments, fingerprint(*classes, str(len(train)), *names, *tokens))


def token_limits(options: TrainOptions, size: int) -> tuple[int, int, int]:
    """The model's patch size in pixels, its prefix tokens, and the most patches of an image.

    Raises:
        OptionError: the largest image does not fit into a batch.
    """
    arguments = model_arguments(options.model, {})
    patch = arguments["patch_size"]
    prefix = int(arguments.get("class_token", True)) + arguments.get("reg_tokens", 0)
    most = options.max_tokens or (size // patch) ** 2
    if most < 1:
        raise OptionError("image_size", size, f"at least the patch of {options.model}, {patch}")
    if options.tokens_per_batch < most + prefix:
        accepted = f"at least {most + prefix}: an image of --max-tokens {most} and the model's prefix of {prefix}"
        raise OptionError("tokens_per_batch", options.tokens_per_batch, accepted)
    return patch, prefix, most


def measured(patch: int, prefix: int, most: int, paths: list[Path]) -> tuple[list[Size], list[int]]:
    """Of each image the size it is resized to, in pixels, and its number of tokens with `prefix`."""
    grids = [grid_within(*upright_size(path), patch, most) for path in paths]
    sizes = [(rows * patch, columns * patch) for rows, columns in grids]
    return sizes, [prefix + rows * columns for rows, columns in grids]


def split_folder(root: Path, share: float) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Training samples, test samples and class names of `root`. Raises DataError where it is no such folder."""
    named = {folder.name.lower(): folder for folder in class_folders(root)}
    train_root, test_root = (
        next((named[name] for name in names if name in named), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    if train_root and test_root:
        train, classes = scan(train_root)
        test, test_classes = scan(test_root, least=1)
        differing = {
            "without": sorted(set(classes) - set(test_classes)),
            "with": sorted(set(test_classes) - set(classes)),
        }
        if any(differing.values()):
            found = " and ".join(f"{word} {listed(names, LISTED)}" for word, names in differing.items() if names)
            raise DataError(f"{test_root}: other classes than in {train_root}: {found}")
        return train, test, classes
    alone = train_root or test_root
    if alone and class_folders(alone) and not any(_is_image(entry.name) for entry in os.scandir(alone)):
        raise DataError(f"{alone}: a part of a split without the other; expected FOLDER/train and FOLDER/val")
    samples, classes = scan(root)
    sizes = Counter(label for _, label in samples)
    for label, name in enumerate(classes):
        if sizes[label] < 2:
            raise DataError(f"{root / name}: one image only; a class needs two, one of them to test on")
    kept, tested = split_by_class(torch.tensor([label for _, label in samples]), share)
    return [samples[i] for i in kept.tolist()], [samples[i] for i in tested.tolist()], classes


def scan(root: Path, least: int = 2) -> tuple[list[Sample], tuple[str, ...]]:
    """Every image under each class directory of `root`, sorted by name, so that the order is the same everywhere."""
    folders = class_folders(root)
    if not folders:
        raise DataError(f"{root}: no class directories; expected FOLDER/<class>/<image>, such as {root}/cat/1.jpg")
    if len(folders) < least:
        raise DataError(f"{root}: only one class, {folders[0].name}; at least two are needed")
    samples: list[Sample] = []
    for label, folder in enumerate(folders):
        found = sorted(images_under(folder))
        if not found:
            raise DataError(f"{folder}: no images in this class; accepted are {', '.join(sorted(EXTENSIONS))}")
        samples += [(path, label) for path in found]
    return samples, tuple(folder.name for folder in folders)


def class_folders(root: Path) -> list[Path]:
    """The directories of `root`, sorted, without what is hidden or left over."""
    return sorted(path for path in root.iterdir() if not _is_leftover(path.name) and path.is_dir())


def images_under(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The images in `folder` and the directories below it, through links, but not round a circle of links."""
    above = (*above, os.path.realpath(folder))
    for entry in os.scandir(folder):
        if entry.is_dir():
            if not _is_leftover(entry.name) and os.path.realpath(entry) not in above:
                yield from images_under(folder / entry.name, above)
        elif _is_image(entry.name):
            if not entry.is_file():
                raise DataError(f"{entry.path}: no file, or a link to nothing; mend or remove it")
            yield folder / entry.name


def _is_image(name: str) -> bool:
    return not _is_leftover(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_leftover(name: str) -> bool:
    return name.startswith(".") or name.lower() in LEFTOVERS
