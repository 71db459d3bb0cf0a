"""A folder of images, one directory a class, in the order and with the links that torchvision's ImageFolder takes.

FOLDER/cat/1.jpg, FOLDER/dog/7.png …                   a fixed share of each class is held out, or
FOLDER/train/cat/1.jpg …, FOLDER/val/cat/9.jpg …       (also training/; valid/, validation/, test/ or testing/)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .errors import DataError, OptionError
from .image_files import EXTENSIONS, HELD_OUT_NAMES, TRAIN_NAMES, check_same_classes, hold_out, image_data
from .image_set import ImageData
from .options import TrainOptions

# What systems and tools leave among images, beside all that is hidden by a dot.
LEFTOVERS = frozenset({"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"})

Sample = tuple[Path, int]


def load_folder(options: TrainOptions) -> ImageData:
    """The folder `options.data`. Every class must hold images; the split is the same for every seed."""
    root = Path(options.data).expanduser()
    if not root.is_dir():
        found = "is a file" if root.is_file() else "does not exist"
        accepted = f"'digits' or a folder with one directory a class, or with tar shards; this {found}"
        raise OptionError("data", options.data, accepted)
    train, test, classes = split_folder(root, options.validation_share)
    return image_data(options, train, test, classes, name=lambda path: path.relative_to(root).as_posix())


def split_folder(root: Path, share: float) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Training samples, test samples and class names of `root`. Raises DataError where it is no such folder."""
    named = {folder.name.lower(): folder for folder in class_folders(root)}
    train_root, test_root = (
        next((named[name] for name in names if name in named), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    if train_root and test_root:
        train, classes = scan(train_root)
        test, test_classes = scan(test_root, least=1)
        check_same_classes(classes, test_classes, train_root, test_root)
        return train, test, classes
    alone = train_root or test_root
    if alone and class_folders(alone) and not any(_is_image(entry.name) for entry in os.scandir(alone)):
        raise DataError(f"{alone}: a part of a split without the other; expected FOLDER/train and FOLDER/val")
    samples, classes = scan(root)
    return *hold_out(samples, share, [root / name for name in classes]), classes


def scan(root: Path, least: int = 2) -> tuple[list[Sample], tuple[str, ...]]:
    """Every image under each class directory of `root`, sorted by name, so that the order is the same everywhere."""
    folders = class_folders(root)
    if not folders:
        expected = f"FOLDER/<class>/<image>, such as {root}/cat/1.jpg, or FOLDER/*.tar"
        raise DataError(f"{root}: no class directories; expected {expected}")
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
