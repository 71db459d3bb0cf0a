"""What every set of images gives: raw uint8 batches with labels, in an order drawn from seed and epoch alone.

The augmentation of a whole epoch is drawn at once, a row an image, so that it depends neither on the number of worker
processes nor on where a resumed run starts. Nothing draws from torch's global random numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .errors import DataError

Batch = tuple[Any, Tensor]  # images uint8 [B, C, H, W] or an ImageList, labels int64 [B]


class ImageSet(Dataset[Any]):
    """Images by index, with labels.

    Args:
        read: gives the images at some indices, uint8 [B, C, H, W] or an ImageList, augmented by their rows of random
            numbers.
        labels: int64 [N].
        draws: how many numbers in [0, 1) the augmentation of an image takes; 0: the set is not augmented.
        tokens: of each image of an ImageList, those of the model's prefix included; else none.
    """

    def __init__(
        self, read: Callable[[list[int], Tensor], Any], labels: Tensor, draws: int = 0, tokens: Sequence[int] = ()
    ) -> None:
        self.read, self.labels, self.draws, self.tokens = read, labels, draws, tokens
        self.random = torch.zeros(len(labels), 0)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, seed: int, epoch: int) -> None:
        """Draw this epoch's augmentation."""
        if self.draws:
            self.random = torch.rand(len(self), self.draws, generator=epoch_generator(seed, epoch, "augment"))

    def __getitem__(self, indices: list[int]) -> Any:
        """A Batch."""
        # A worker's exception arrives with its traceback inside the message: send the error itself instead.
        try:
            return self.read(indices, self.random[indices]), self.labels[indices]
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error


@dataclass(frozen=True)
class ImageData:
    """A training set, a test set, and the arguments that they settle of a model (mean and std in the 0..1 scale)."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    arguments: dict[str, Any]
    fingerprint: str  # of the classes and the split: a resumed run must see the same


def fingerprint(*parts: str) -> str:
    text = "\n".join(parts).encode(errors="surrogateescape")  # names of files may be any bytes
    return hashlib.sha256(text).hexdigest()[:16]


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose of each epoch."""
    return torch.Generator().manual_seed(int(fingerprint(f"{purpose}/{seed}/{epoch}"), 16) >> 1)


def split_by_class(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and the test images: about `share` of each class, by a fixed shuffle.

    Each class of two images or more gets at least one on either side.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(share * len(members))), len(members) - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def training_batches(
    length: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This process's batches of one epoch: a fixed shuffle in as few batches as can be, of the same size but for one.

    Every image is in one, but for what is left over where `world` does not divide the length.
    """
    order = torch.randperm(length, generator=epoch_generator(seed, epoch, "order"))
    mine = order[rank : length - length % world : world]
    count = math.ceil(len(mine) / batch_size)
    return [part.tolist() for part in mine.tensor_split(count)] if count else []


def evaluation_batches(length: int, batch_size: int, *, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This process's share of the test set, every image exactly once over all processes."""
    return [part.tolist() for part in torch.arange(length)[rank::world].split(batch_size) if len(part)]


def iterate(images: ImageSet, batches: list[list[int]], *, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """The given batches in order. Raises DataError, whichever process met it."""
    workers = min(workers, len(batches))
    sampler: Any = batches  # without a batch size of its own, the loader asks the set for each whole list
    generator = torch.Generator()
    loader = DataLoader(
        images, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pin, generator=generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
