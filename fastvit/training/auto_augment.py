"""Automatic augmentation of raw images behind their crop and flip: torchvision's transforms, which take uint8."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import peer_for

KINDS = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}
FINEST = 2**24  # how many numbers in [0, 1) float32 has that lie as far apart


class AutoAugment:
    """RandAugment (Cubuk et al., 2020) or TrivialAugment (Müller and Hutter, 2021), as torchvision sets them.

    Raises:
        OptionError: torchvision can't be imported.
    """

    def __init__(self, kind: str) -> None:
        transforms = peer_for("auto_augment", kind, "torchvision.transforms.v2")
        self.transform = getattr(transforms, KINDS[kind])()

    def __call__(self, image: Tensor, draw: float) -> Tensor:
        """uint8 [C, H, W] to the same, by `draw` in [0, 1) alone."""
        # The transforms draw from torch's global numbers, of which the run has others.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(draw * FINEST))
            return self.transform(image)
