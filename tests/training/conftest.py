"""Folders of images, a tiny model and a process group for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from fastvit.training import models
from tests.training.runs import TINY


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_digits is a model on which an epoch takes a moment."""
    monkeypatch.setattr(models, "DIGITS_ARGUMENTS", TINY)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def write_images() -> Callable[[Path, dict[str, int]], Path]:
    return _write_images


def _write_images(root: Path, classes: dict[str, int]) -> Path:
    """`classes` by name with the number of images in each; every image of its own random pixels."""
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root
