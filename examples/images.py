"""What the examples share, so that each shows its library alone: real images, options, epochs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from fastvit.training.decoding import decode
from fastvit.training.digits import digit_tensors
from fastvit.training.errors import UserError
from fastvit.training.folder import split_folder
from fastvit.training.image_set import split_by_class
from fastvit.validation import photographs


def missing(error: BaseException, packages: str) -> str:
    """What to do about an import that failed, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{error}; pip install {packages} (torchvision: the build that fits your torch)"


try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(missing(error, "tqdm"))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # in the 0..1 scale
BUILT_IN = ("photographs", "digits")
CROPS, HELD_OUT = 512, 0.2

# A tiny model, as timm and as transformers call its sizes.
TINY_SIZE, TINY_IMAGES = 32, 640
TINY_TIMM: dict[str, Any] = {"img_size": TINY_SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TINY_TRANSFORMERS: dict[str, Any] = {
    "image_size": TINY_SIZE,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
}


class Images(Dataset[tuple[Tensor, int]]):
    """Images [3, size, size] and labels: normalised floats, or, with `raw`, the uint8 that was read."""

    def __init__(self, read: Callable[[int], Tensor], labels: Sequence[int], raw: bool) -> None:
        self.read, self.labels, self.raw = read, labels, raw

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.read(index)
        return image if self.raw else normalise(image), self.labels[index]


def normalise(images: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] to float32, as torchvision's ToTensor and Normalize do."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def options(description: str | None, *, raw: bool = True) -> argparse.ArgumentParser:
    """The options that all examples have, and one to load uint8 where images are normalised when loaded."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=_source, default="photographs", help="%(default)s (default), digits or a folder")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few images: a few seconds on a CPU")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--plain", action="store_true", help="leave out the one line, for comparison")
    if raw:
        one.add_argument("--raw", action="store_true", help="load raw uint8, which the accelerated model normalises")
    parser.add_argument("--epochs", type=_whole(1), default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=_whole(1), default=32, help="default: %(default)s")
    parser.add_argument("--workers", type=_whole(0), default=0, help="processes that load images; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def load(args: argparse.Namespace, raw: bool, drop_last: bool = False) -> tuple[DataLoader, DataLoader, int]:
    """Loaders of training and of held-out images, and the number of classes."""
    read, labels, train, test = _images(args.data, TINY_SIZE if args.tiny else 224)
    images = Images(read, labels, raw)
    loading: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": args.workers}
    if args.tiny:
        train, test = _some(train, TINY_IMAGES), _some(test, TINY_IMAGES // 4)
    if drop_last and len(train) < args.batch_size:
        raise SystemExit(f"--batch-size {args.batch_size}: there are {len(train)} images, and no full batch")
    return (
        DataLoader(Subset(images, train), shuffle=True, drop_last=drop_last, **loading),
        DataLoader(Subset(images, test), **loading),
        max(labels) + 1,
    )


def fit(
    loader: DataLoader, epochs: int, optimizer: torch.optim.Optimizer, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Minimise what `loss_of` makes of images and labels: the mean loss of the last epoch, and images per second."""
    seen, start = 0, time.perf_counter()
    for epoch in range(epochs):
        losses = []
        for images, labels in tqdm(loader, desc=f"epoch {epoch}", unit="batch"):
            loss = loss_of(images.to(DEVICE), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(images)
            losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()  # waits for the GPU
    return mean_loss, seen / (time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """The share of images that are classified correctly."""
    model.eval()
    correct = [(model(images.to(DEVICE)).argmax(1).cpu() == labels).float() for images, labels in loader]
    return torch.cat(correct).mean().item()


def _images(source: str, size: int) -> tuple[Callable[[int], Tensor], list[int], list[int], list[int]]:
    """What reads an image as uint8 [3, size, size], all labels, and which to train and to test on."""
    if source not in BUILT_IN:
        train, test, _ = split_folder(Path(source), HELD_OUT)
        labels = [label for _, label in (*train, *test)]
        paths = [path for path, _ in (*train, *test)]
        numbers = list(range(len(labels)))
        return partial(_of_folder, paths, size), labels, numbers[: len(train)], numbers[len(train) :]
    read: Callable[[int], Tensor]
    if source == "digits":
        digits, classes = digit_tensors()  # [1797, 1, 8, 8]
        read = partial(_of_digits, digits, size)
    else:
        # Of two photographs in turn.
        read, classes = photographs(CROPS, size, size).__getitem__, torch.arange(CROPS) % 2
    kept, held_out = split_by_class(classes, HELD_OUT)
    return read, classes.tolist(), kept.tolist(), held_out.tolist()


# Functions of the module, so that they reach loading processes however those are started.
def _of_folder(paths: Sequence[Path], size: int, index: int) -> Tensor:
    return decode(paths[index], size=size, channels=3, draws=[])


def _of_digits(digits: Tensor, size: int, index: int) -> Tensor:
    return F.interpolate(digits[index, None], size=size)[0].expand(3, -1, -1)


def _some(indices: list[int], count: int) -> list[int]:
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).tolist()
    return [indices[place] for place in order[:count]]


def _source(text: str) -> str:
    if text in BUILT_IN:
        return text
    if not Path(text).is_dir():
        accepted = f"{', '.join(BUILT_IN)}, or a folder with a directory of images for each class"
        raise argparse.ArgumentTypeError(f"{text} is no folder; accepted: {accepted}")
    try:
        split_folder(Path(text), HELD_OUT)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} up")
        return int(text)

    return number
