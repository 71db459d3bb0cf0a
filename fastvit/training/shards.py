"""A folder of tar shards in the layout of WebDataset, read by an index of their members.

FOLDER/train-000000.tar …, FOLDER/val-000000.tar …     (the same words as for class folders, anywhere in the name), or
FOLDER/train/*.tar, FOLDER/val/*.tar, or
FOLDER/*.tar                                           a fixed share of each class is held out

The members of a sample share their name up to the first dot: an image, and its label as a number, in KEY.cls or as
"label" or "cls" in KEY.json. FOLDER/classes.txt or classnames.txt names the classes, one a line; else they are "0" …

A reader that streams shards, such as webdataset's, can't go on inside an epoch on another number of processes or
workers: its order is settled by which of them reads what. With an index, shards are images by number, so that their
order is a function of seed and epoch alone, and a run resumes on them exactly as on a folder of images.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from tarfile import TarInfo

import torch
from torch import Tensor

from .errors import DataError
from .folder import class_folders, images_under
from .image_files import EXTENSIONS, HELD_OUT_NAMES, TRAIN_NAMES, check_same_classes, hold_out, image_data
from .image_set import ImageData
from .options import TrainOptions
from .tars import Member, Shard, members_of

PARTS = (*TRAIN_NAMES, *HELD_OUT_NAMES)
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
CLASS_FILES = ("classes.txt", "classnames.txt")
KEY_AND_KIND = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # of a member's name, as WebDataset splits it
IMAGE, CLS, JSON = "image", "cls", "json"
SCANNERS = 16  # threads that index shards: on a network's file system they wait, each for its own
LONGEST = 40  # bytes of a label in an error
WINDOW = 16  # shards whose images are shuffled together


Sample = tuple[Member, int]


def load_shards(options: TrainOptions) -> ImageData:
    """The shards in the folder `options.data`. Every class must have images; the split is the same for every seed.

    Raises:
        DataError: a shard, a sample or a label that cannot be used; names shard and member.
    """
    root = Path(options.data).expanduser()
    train, test, classes = split_samples(root, options.validation_share)
    lengths = [len(list(samples)) for _, samples in groupby(train, key=lambda sample: sample[0].shard)]
    return image_data(
        options,
        train,
        test,
        classes,
        name=lambda member: f"{member.shard.path.relative_to(root).as_posix()} {member.name}",
        shuffle=functools.partial(shuffled, lengths),
    )


def shuffled(lengths: Sequence[int], generator: torch.Generator) -> Tensor:
    """An order of the images of shards that have so many each, int64 [N], in which few shards are read at a time.

    The shards are shuffled, then the images of WINDOW of them at a time.
    """
    shards = torch.arange(sum(lengths)).split(list(lengths))
    order = torch.randperm(len(shards), generator=generator)
    parts = order.tensor_split(math.ceil(len(shards) / WINDOW))
    windows = [torch.cat([shards[index] for index in part.tolist()]) for part in parts]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])


def split_samples(root: Path, share: float) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Training samples, test samples and class names of `root`."""
    shards, held_out = split_shards(root)
    names = class_names(root)
    train, test = indexed(shards, names), indexed(held_out, names)
    labels, tested = ({label for _, label in samples} for samples in (train, test))
    count = len(names) or max(labels) + 1
    called = functools.partial(_called, names)
    if held_out:
        check_same_classes({*map(called, labels)}, {*map(called, tested)}, shards[0], held_out[0])
    missing = next((label for label in range(count) if label not in labels), None)
    if missing is not None:
        raise DataError(f"{root}: no images of class {called(missing)}, though the labels are from 0 to {count - 1}")
    if count < 2:
        raise DataError(f"{root}: only one class, {called(0)}; at least two are needed")
    if not held_out:
        train, test = hold_out(train, share, [f"{root}: class {called(label)}" for label in range(count)])
    return train, test, tuple(names) or tuple(map(str, range(count)))


def _called(names: Sequence[str], label: int) -> str:
    """A class in an error: names alone need not differ, as the two cranes of ImageNet don't."""
    return f"{label} ({names[label]})" if names else str(label)


def class_names(root: Path) -> list[str]:
    """Those that `root` has a file of, if it has one."""
    path = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    if path is None:
        return []
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text in UTF-8 ({error})") from error
    if "" in names or not names:
        raise DataError(f"{path}: line {names.index('') + 1 if names else 1} is empty; expected the name of a class")
    return names


def holds_shards(root: Path) -> bool:
    """Whether `root` has tars to train on, and not the images of class folders beside them."""
    folders = class_folders(root) if root.is_dir() else []
    parts = [folder for folder in folders if folder.name.lower() in PARTS]
    if not any(shards_in(folder) for folder in [root, *parts] if folder.is_dir()):
        return False
    return not any(next(images_under(folder), None) for folder in folders)


def split_shards(root: Path) -> tuple[list[Path], list[Path]]:
    """Shards to train on and to test on; none of the latter where a share is to be held out."""
    folders = {folder.name.lower(): folder for folder in class_folders(root)}
    groups = {name: shards_in(folders[name]) for name in PARTS if name in folders}
    if not any(groups.values()):
        found = shards_in(root)
        groups = {name: [path for path in found if part_of(path.name) == name] for name in (*PARTS, "")}
    train, held_out = (
        next((groups[name] for name in names if groups.get(name)), []) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    )
    unsaid = groups.get("", [])
    if not train and not held_out:
        return unsaid, []
    if not (train and held_out):
        alone = (train or held_out)[0]
        raise DataError(f"{alone}: a part of a split without the other; expected shards of train and of val")
    if unsaid:
        raise DataError(f"{unsaid[0]}: of neither train nor val by its name, as {train[0].name} is")
    return train, held_out


def part_of(name: str) -> str:
    """Which of PARTS is in `name` as a word, the first if several are: "train" for "food-train-0001.tar"; else ""."""
    return next((word for word in re.findall("[a-z]+", name.lower()) if word in PARTS), "")


def shards_in(folder: Path) -> list[Path]:
    """The tars in `folder`, sorted; those that are compressed too, so that they are not overlooked."""
    found = (path for path in folder.iterdir() if path.name.lower().endswith((".tar", *COMPRESSED)))
    return sorted(path for path in found if path.name[0] != "." and path.is_file())


def indexed(shards: Sequence[Path], names: Sequence[str]) -> list[Sample]:
    """The samples of `shards` in their order. `names`: of the classes, if they have any."""
    with ThreadPoolExecutor(SCANNERS) as threads:
        return list(chain.from_iterable(threads.map(lambda path: samples_of(path, names), shards)))


def samples_of(path: Path, names: Sequence[str]) -> list[Sample]:
    """The images in the shard at `path` with their labels, in its order. Raises DataError where there are none."""
    if path.name.lower().endswith(COMPRESSED):
        raise DataError(f"{path}: compressed; images are read from the middle of a shard, so unpack it to a .tar")
    samples: dict[str, dict[str, TarInfo]] = {}
    with path.open("rb") as file:
        shard = Shard.at(path, file.fileno())
        for member in members_of(path, file):
            key, kind = key_and_kind(member)
            if kind and samples.setdefault(key, {}).setdefault(kind, member) is not member:
                raise DataError(f"{path}: {member.name}: a second {kind} of the sample {key}")
        found = []
        for key, sample in samples.items():
            image, label = sample.get(IMAGE), sample.get(CLS) or sample.get(JSON)
            if image is None:
                raise DataError(f"{path}: {key}: a label without an image; mend or remove it")
            if label is None:
                raise DataError(f"{path}: {image.name}: an image without a label; expected {key}.cls or {key}.json")
            text = os.pread(file.fileno(), label.size, label.offset_data)
            number = label_in(text, f"{path}: {label.name}", names)
            found.append((Member(shard, image.name, image.offset_data, image.size), number))
    if not found:
        raise DataError(f"{path}: no images in this shard; accepted are {', '.join(sorted(EXTENSIONS))}")
    return found


def key_and_kind(member: TarInfo) -> tuple[str, str]:
    """Which sample a member is of, and as what: IMAGE, CLS or JSON; "" for what is neither image nor label."""
    match = KEY_AND_KIND.fullmatch(member.name)
    if not match or not member.isreg() or member.issparse():
        return "", ""
    kind = match[2].lower()
    return match[1], IMAGE if f".{kind}" in EXTENSIONS else kind if kind in (CLS, JSON) else ""


def label_in(text: bytes, name: str, names: Sequence[str]) -> int:
    """The number that the label called `name` holds as `text`."""
    try:
        label = int(text) if name.lower().endswith(CLS) else json.loads(text)
        if isinstance(label, dict):
            label = label.get("label", label.get("cls"))
    except (ValueError, RecursionError):
        label = None
    if type(label) is not int:
        expected = 'a whole number, or {"label": …} or {"cls": …} with one in a .json'
        raise DataError(f"{name}: no label, but {text[:LONGEST]!r}; expected {expected}")
    if label < 0 or (names and label >= len(names)):
        accepted = f"0 to {len(names) - 1}, as {len(names)} classes are named" if names else "0 or more"
        raise DataError(f"{name}: the label {label}; accepted is {accepted}")
    return label
