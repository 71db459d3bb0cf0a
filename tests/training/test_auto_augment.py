"""Automatic augmentation: torchvision's, by a draw of each image and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit.peers import import_peer
from fastvit.training import OptionError, TrainOptions
from fastvit.training.auto_augment import KINDS, AutoAugment
from fastvit.training.image_set import ImageData, iterate
from fastvit.training.loop import load_data
from tests.training.runs import write_photos


@pytest.mark.parametrize("kind", ["randaugment", "trivialaugment"])
def test_automatic_augmentation_is_torchvisions_by_a_draw_of_each_image(kind: str) -> None:
    transforms = import_peer("torchvision.transforms.v2")
    image = torch.randint(0, 256, (3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment, state = AutoAugment(kind), torch.get_rng_state()
    found = [augment(image, draw / 8) for draw in range(8)]
    assert torch.equal(state, torch.get_rng_state()), "drawn from the numbers of the run"
    assert all(one.dtype == torch.uint8 and one.shape == image.shape for one in found)
    assert sum(not torch.equal(one, found[0]) for one in found) >= 5
    assert torch.equal(found[3], augment(image, 3 / 8))
    torch.manual_seed(3 * 2**21)
    assert torch.equal(found[3], getattr(transforms, KINDS[kind])()(image))


def test_automatic_augmentation_in_a_run(tmp_path: Path) -> None:
    """By place and epoch alone: the same with workers, another in the next epoch, and none of the test set."""
    settings: dict[str, Any] = {
        "data": str(write_photos(tmp_path / "photos")),
        "image_size": 16,
        "auto_augment": "trivialaugment",
    }
    kinds = ("", "randaugment")
    plain, augmented = (load_data(TrainOptions(**{**settings, "auto_augment": kind})) for kind in kinds)
    data = load_data(TrainOptions(**settings))
    places = [list(range(8)), list(range(8, 20))]

    def images(of: ImageData, epoch: int, workers: int = 0) -> torch.Tensor:
        of.train.draw(0, epoch)
        return torch.cat([images for images, _ in iterate(of.train, places, workers=workers)])

    assert torch.equal(images(data, 0), images(data, 0, workers=2))
    assert not torch.equal(images(data, 0), images(data, 1))
    assert not torch.equal(images(data, 0), images(plain, 0)) and not torch.equal(images(data, 0), images(augmented, 0))
    assert torch.equal(data.test[[0, 1, 2]][0], plain.test[[0, 1, 2]][0])
    assert data.fingerprint == plain.fingerprint
    for given in ({"augment": False}, {"data": "digits"}):
        with pytest.raises(OptionError, match="auto_augment = .*: accepted is with augmentation of a folder"):
            TrainOptions(**{**settings, "image_size": 0, **given})
    with pytest.raises(OptionError, match="auto_augment = 'aa': accepted is one of randaugment, trivialaugment"):
        TrainOptions(**{**settings, "auto_augment": "aa"})
