"""What every set of images gives: raw uint8 batches with labels, in an order drawn from seed and epoch alone.

The order and the augmentation of a whole epoch are drawn at once, a row a place of the order, so that they depend
neither on the number of processes and workers nor on where a resumed run starts. Nothing draws from torch's global
random numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .errors import DataError

Batch = tuple[Any, Tensor]  # images uint8 [B, C, H, W] or an ImageList, labels int64 [B]


class ImageSet(Dataset[Any]):
    """Images with labels by their places in an order, which is that of the set until an epoch's is drawn.

    Args:
        read: gives the images at some indices, uint8 [B, C, H, W] or an ImageList, augmented by their rows of random
            numbers.
        labels: int64 [N], of the images by index.
        draws: how many numbers in [0, 1) the augmentation of an image takes; 0: the set is not augmented.
        tokens: of each image of an ImageList by index, those of the model's prefix included; else none.
        shuffle: gives an order of all N indices, int64 [N], from a generator; None: any order is as good.
    """

    def __init__(
        self,
        read: Callable[[list[int], Tensor], Any],
        labels: Tensor,
        draws: int = 0,
        tokens: Sequence[int] = (),
        shuffle: Callable[[torch.Generator], Tensor] | None = None,
    ) -> None:
        self.read, self.labels, self.draws = read, labels, draws
        self._tokens = torch.tensor(tokens, dtype=torch.int64)
        self._shuffle = shuffle or (lambda generator: torch.randperm(len(labels), generator=generator))
        self.order = torch.arange(len(labels))
        self.random = torch.zeros(len(labels), 0)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def tokens(self) -> list[int]:
        """Of the image at each place."""
        return self._tokens[self.order].tolist() if len(self._tokens) else []

    def draw(self, seed: int, epoch: int, repeats: int = 1) -> None:
        """Draw this epoch's order and augmentation.

        With `repeats`, the first images of the order come so many times each, one time after the other, with another
        augmentation every time (Hoffer et al., 2020); an epoch is of as many images as without.
        """
        order = self._shuffle(epoch_generator(seed, epoch, "order"))
        self.order = order.repeat_interleave(repeats)[: len(order)]
        if self.draws:
            self.random = torch.rand(len(self), self.draws, generator=epoch_generator(seed, epoch, "augment"))

    def __getitem__(self, places: list[int]) -> Any:
        """A Batch."""
        indices = self.order[places]
        # A worker's exception arrives with its traceback inside the message: send the error itself instead.
        try:
            return self.read(indices.tolist(), self.random[places]), self.labels[indices]
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are no forks of this process: they read, and draw nothing."""
        return {**self.__dict__, "_shuffle": None}


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


def iterate(images: ImageSet, batches: list[list[int]], *, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """The images at the given places, in order. Raises DataError, whichever process met it."""
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
