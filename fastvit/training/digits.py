"""scikit-learn's 1,797 handwritten digits: real 8×8 images that come with the library, so nothing is downloaded."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import OptionError
from .image_set import ImageData, ImageSet, fingerprint, split_by_class
from .options import TrainOptions

SIZE = 8
TEST_SHARE = 0.2
SHIFT = 1  # pixels, each way


def shifted(pixels: Tensor, indices: list[int], random: Tensor) -> Tensor:
    """Those of `pixels` [N, C, H, W]; with `random` [B, 2], each shifted by up to SHIFT each way."""
    by = (random * (2 * SHIFT + 1)).long() - SHIFT
    return shift(pixels[indices], by) if by.numel() else pixels[indices]


def shift(images: Tensor, by: Tensor) -> Tensor:
    """images [B, C, H, W] moved down and right by `by` [B, 2] pixels, SHIFT at most each way, zeros coming in."""
    height, width = images.shape[-2:]
    places = F.pad(images, [SHIFT] * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2·SHIFT+1, 2·SHIFT+1, H, W]
    down, right = (SHIFT - by).unbind(1)
    return places[torch.arange(len(images)), :, down, right]


def load_digits(options: TrainOptions) -> ImageData:
    """The digits with a fixed split, the same for every seed: a fifth of each digit is the test set."""
    if options.image_size not in (0, SIZE):
        raise OptionError("image_size", options.image_size, f"{SIZE} for the digits (or leave it out)")
    if options.channels not in (0, 1):
        raise OptionError("channels", options.channels, "1 for the digits (or leave it out)")
    images, labels = digit_tensors()
    train, test = split_by_class(labels, TEST_SHARE)
    std, mean = (round(value.item(), 4) for value in torch.std_mean(images[train].double() / 255))
    return ImageData(
        train=ImageSet(partial(shifted, images[train]), labels[train], draws=2 * options.augment),
        test=ImageSet(partial(shifted, images[test]), labels[test]),
        classes=tuple("0123456789"),
        arguments={"img_size": SIZE, "in_chans": 1, "num_classes": 10, "mean": (mean,), "std": (std,)},
        fingerprint=fingerprint("digits", str(len(train)), str(len(test))),
    )


def digit_tensors() -> tuple[Tensor, Tensor]:
    """All digits as uint8 [1797, 1, 8, 8] (their 17 grey levels spread over 0..255) and their labels."""
    from sklearn.datasets import load_digits as bundled

    raw = bundled()
    images = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return images, torch.from_numpy(raw.target).long()
