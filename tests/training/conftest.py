"""Folders of images for the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
