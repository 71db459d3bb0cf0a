"""The images of a run: scikit-learn's handwritten digits, or a folder with one directory a class.

Both give raw uint8 tensors [B, C, H, W]; the model's kernel scales and normalises them. Both draw their
augmentation for a whole epoch at once from (seed, epoch), one row an image, so that it depends neither on the
number of worker processes nor on where a resumed run starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .errors import DataError
from .options import TrainOptions

Batch = tuple[Tensor, Tensor]  # images uint8 [B, C, H, W], labels int64 [B]


class ImageSet(Dataset[Any]):
    """Images by index. `draw` fixes an epoch's augmentation; `load` returns a batch."""

    def __len__(self) -> int:
        raise NotImplementedError

    def draw(self, seed: int, epoch: int) -> None:
        """Draw this epoch's augmentation (nothing for a set that is not augmented)."""

    def load(self, indices: list[int]) -> Batch:
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Batch | DataError:
        # A worker's exception arrives with its traceback inside the message: send the error itself instead.
        try:
            return self.load(indices)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return error


@dataclass(frozen=True)
class ImageData:
    """A training set and a test set with what a model must know of them. mean and std in the 0..1 scale."""

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str  # of the classes and the split: a resumed run must see the same


def load_data(options: TrainOptions) -> ImageData:
    """The data that `options.data` names. Raises DataError or OptionError where it cannot be used."""
    if options.is_digits:
        from .digits import load_digits

        return load_digits(options)
    from .folder import load_folder

    return load_folder(options)


def fingerprint(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose of each epoch."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def training_batches(
    length: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """This process's batches of one epoch: a fixed shuffle, all of one size, a last partial one dropped.

    A set smaller than one batch in every process makes one smaller batch.
    """
    order = torch.randperm(length, generator=epoch_generator(seed, epoch, "order"))
    mine = order[rank : length - length % world : world].tolist()
    whole = len(mine) // batch_size
    if whole == 0:
        return [mine] if mine else []
    return [mine[i * batch_size : (i + 1) * batch_size] for i in range(whole)]


def evaluation_batches(length: int, batch_size: int, *, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This process's share of the test set, every image exactly once over all processes."""
    mine = list(range(rank, length, world))
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


def iterate(images: ImageSet, batches: list[list[int]], *, workers: int = 0, pin: bool = False) -> Iterator[Batch]:
    """The given batches in order. Draws nothing from torch's global random numbers."""
    if not batches:
        return
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_as_loaded,
        pin_memory=pin,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_loaded(batch: Any) -> Any:
    return batch
