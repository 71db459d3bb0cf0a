"""scikit-learn's 1,797 handwritten digits: real 8×8 images that come with the library, so nothing is downloaded."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import Batch, ImageData, ImageSet, epoch_generator, fingerprint
from .errors import OptionError
from .options import TrainOptions

SIZE = 8
TEST_SHARE = 0.2
SHIFT = 1  # pixels, each way


class DigitSet(ImageSet):
    """Digits in memory. With `augment`, each is shifted by up to one pixel each way, black coming in."""

    def __init__(self, images: Tensor, labels: Tensor, *, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.shifts = torch.zeros(len(images), 2, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def draw(self, seed: int, epoch: int) -> None:
        if self.augment:
            generator = epoch_generator(seed, epoch, "augment")
            self.shifts = torch.randint(-SHIFT, SHIFT + 1, (len(self), 2), generator=generator)

    def load(self, indices: list[int]) -> Batch:
        index = torch.tensor(indices)
        return shift(self.images[index], self.shifts[index]), self.labels[index]


def shift(images: Tensor, by: Tensor) -> Tensor:
    """images [B, C, H, W] moved down and right by `by` [B, 2] pixels (negative: up and left), zeros coming in."""
    batch, _, height, width = images.shape
    rows = torch.arange(height) - by[:, :1]  # [B, H] where each row comes from
    columns = torch.arange(width) - by[:, 1:]  # [B, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    moved = images[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return moved.permute(0, 3, 1, 2).mul(inside[:, None]).contiguous()


def load_digits(options: TrainOptions) -> ImageData:
    """The digits with a fixed split, the same for every seed: a fifth of each digit is the test set."""
    if options.image_size not in (0, SIZE):
        raise OptionError("image_size", options.image_size, f"{SIZE} for the digits (or leave it out)")
    if options.channels not in (0, 1):
        raise OptionError("channels", options.channels, "1 for the digits (or leave it out)")
    images, labels = digit_tensors()
    train, test = split_by_class(labels, TEST_SHARE)
    pixels = images[train].double() / 255
    return ImageData(
        train=DigitSet(images[train], labels[train], augment=options.augment),
        test=DigitSet(images[test], labels[test], augment=False),
        classes=tuple("0123456789"),
        channels=1,
        image_size=SIZE,
        mean=(round(pixels.mean().item(), 4),),
        std=(round(pixels.std().item(), 4),),
        fingerprint=fingerprint("digits", str(len(train)), str(len(test))),
    )


def digit_tensors() -> tuple[Tensor, Tensor]:
    """All digits as uint8 [1797, 1, 8, 8] (their 17 grey levels spread over 0..255) and their labels."""
    from sklearn.datasets import load_digits as bundled

    raw = bundled()
    images = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(raw.target).long()


def split_by_class(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and the test images: about `share` of each class, by a fixed shuffle.

    Each class of two images or more gets at least one on either side.
    """
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        held_out = min(max(1, round(share * len(members))), len(members) - 1)
        test.append(members[:held_out])
        train.append(members[held_out:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
