"""Mixup (Zhang et al., 2017) and CutMix (Yun et al., 2019) of raw uint8 batches, as timm does them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .image_set import epoch_generator
from .options import TrainOptions, peer_for


class Mixing:
    """Mixes each image of a batch with the one in its place from the end, all by one lambda.

    That is timm's mode "batch". timm refuses odd batches; here the image in the middle meets itself and stays as it is.
    Raises OptionError where timm is not installed.
    """

    def __init__(self, options: TrainOptions, classes: int) -> None:
        name = "mixup" if options.mixup else "cutmix"
        self.timm = peer_for(name, getattr(options, name), "timm.data.mixup")
        self.seed, self.classes, self.smoothing = options.seed, classes, options.label_smoothing
        self.parameters = self.timm.Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
        )

    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, step: int, part: int) -> tuple[Tensor, Tensor]:
        """The mixed images, as uint8 as before, and what they show, with the label smoothing in it.

        Mixup rounds to the nearest whole number, a half to the even one, as timm's FastCollateMixup does.

        Args:
            images: uint8 [B, C, H, W].
            labels: int64 [B].
            epoch, step, part: with the seed they settle what is drawn. The part is counted over all processes of the
                step, so that another number of processes mixes the same parts in the same way.

        Returns:
            uint8 [B, C, H, W]; the probability of each class, fp32 [B, classes].
        """
        with numpy_seed(epoch_generator(self.seed, epoch, f"mixing/{step}/{part}").initial_seed()):
            share, is_cutmix = self.parameters._params_per_batch()
            if is_cutmix:
                (top, bottom, left, right), share = self.timm.cutmix_bbox_and_lam(images.shape, share)
        if is_cutmix:
            images = images.clone()
            images[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
        elif share != 1:
            mixed = images.float() * share + images.flip(0).float() * (1 - share)
            images = mixed.round_().to(torch.uint8)
        return images, self.timm.mixup_target(labels, self.classes, share, self.smoothing)


@contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """numpy's global random numbers, which timm draws from, by a `seed` of 63 bits; after it they are as before."""
    before = np.random.get_state()
    np.random.seed([seed >> 32, seed & 0xFFFFFFFF])
    try:
        yield
    finally:
        np.random.set_state(before)
