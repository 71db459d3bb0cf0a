"""What the loop is given: digits, folders of images, their split, order and augmentation, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit.training import DataError, OptionError, TrainOptions
from fastvit.training.data import evaluation_batches, iterate, load_data, training_batches
from fastvit.training.digits import shift
from fastvit.training.folder import decode, random_box

WriteImages = Callable[[Path, dict[str, int]], Path]


def folder_options(root: Path, **given: object) -> TrainOptions:
    return TrainOptions(data=str(root), image_size=16, workers=0, **given)  # type: ignore[arg-type]


def test_digits_are_raw_and_split_the_same_for_every_seed() -> None:
    first, second = (load_data(TrainOptions(seed=seed)) for seed in (0, 1))
    images, labels = first.train.load(list(range(len(first.train))))
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8)
    assert images.max() == 255 and images.min() == 0
    assert len(first.train) + len(first.test) == 1797
    assert set(labels.tolist()) == set(range(10))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.test.load([3, 5])[0], second.test.load([3, 5])[0])
    assert first.mean[0] == pytest.approx(images.double().mean().item() / 255, abs=1e-4)


def test_no_digit_is_in_both_parts() -> None:
    data = load_data(TrainOptions())
    assert torch.bincount(data.test.load(list(range(len(data.test))))[1]).min() >= 30
    from fastvit.training.digits import digit_tensors, split_by_class

    train, test = split_by_class(digit_tensors()[1], 0.2)
    assert not set(train.tolist()) & set(test.tolist())
    assert len(train) + len(test) == 1797


def test_shift_moves_each_image_by_its_own_amount() -> None:
    images = torch.randint(1, 256, (3, 2, 5, 4), dtype=torch.uint8)
    moved = shift(images, torch.tensor([[0, 0], [1, -1], [-2, 3]]))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, 1:, :-1], images[1, :, :-1, 1:])
    assert torch.equal(moved[2, :, :-2, 3:], images[2, :, 2:, :1])
    assert moved[1, :, 0].sum() == 0 and moved[2, :, -2:].sum() == 0


def test_every_training_image_once_over_all_processes() -> None:
    parts = [training_batches(103, 10, seed=1, epoch=2, rank=rank, world=2) for rank in range(2)]
    seen = [index for part in parts for batch in part for index in batch]
    assert len(seen) == len(set(seen)) == 100
    assert all(len(batch) == 10 for part in parts for batch in part)
    assert training_batches(103, 10, seed=1, epoch=3) != training_batches(103, 10, seed=1, epoch=2)
    assert training_batches(103, 10, seed=1, epoch=3) == training_batches(103, 10, seed=1, epoch=3)
    assert training_batches(3, 10, seed=0, epoch=0) and not training_batches(1, 10, seed=0, epoch=0, world=2)


def test_every_test_image_once_over_all_processes() -> None:
    seen = [i for rank in range(3) for batch in evaluation_batches(50, 8, rank=rank, world=3) for i in batch]
    assert sorted(seen) == list(range(50))


def test_folder_gives_raw_squares_and_holds_out_a_share_of_each_class(
    tmp_path: Path, write_images: WriteImages
) -> None:
    data = load_data(folder_options(write_images(tmp_path, {"cat": 10, "dog": 5}), validation_share=0.2))
    assert data.classes == ("cat", "dog") and data.channels == 3
    assert (len(data.train), len(data.test)) == (12, 3)
    images, labels = data.test.load([0, 1, 2])
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1]


def test_folder_with_train_and_val_keeps_them_apart(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 2})
    write_images(tmp_path / "val", {"a": 1, "b": 1})
    data = load_data(folder_options(tmp_path))
    assert (len(data.train), len(data.test)) == (5, 2)


def test_augmentation_depends_on_seed_and_epoch_not_on_workers(tmp_path: Path, write_images: WriteImages) -> None:
    data = load_data(folder_options(write_images(tmp_path, {"a": 4, "b": 4})))
    batches = [[0, 1, 2], [3, 4]]

    def images(seed: int, epoch: int, workers: int) -> torch.Tensor:
        data.train.draw(seed, epoch)
        return torch.cat([images for images, _ in iterate(data.train, batches, workers=workers)])

    state = torch.get_rng_state()
    here = images(0, 1, 0)
    assert torch.equal(here, images(0, 1, 2))
    assert not torch.equal(here, images(0, 2, 0)) and not torch.equal(here, images(1, 1, 0))
    assert torch.equal(state, torch.get_rng_state()), "loading must not use torch's global random numbers"


def test_a_middle_crop_is_the_image_itself(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "half.png")
    found = decode(tmp_path / "half.png", size=8, channels=3, draws=[])
    assert found[0, :, 7].min() == 255 and found[:, :, 0].max() == 0 and found[1:].max() == 0


def test_random_boxes_stay_inside() -> None:
    for draws in torch.rand(200, 5).tolist():
        left, top, right, bottom = random_box(30, 200, draws)
        assert 0 <= left < right <= 30.0001 and 0 <= top < bottom <= 200.0001


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_becomes_uint8(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "I;16") else "a.png")
    Image.new(mode, (20, 12)).save(path)
    found = decode(path, size=8, channels=channels, draws=[])
    assert found.dtype == torch.uint8 and found.shape == (channels, 8, 8)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named(tmp_path: Path, write_images: WriteImages, damage: str, workers: int) -> None:
    write_images(tmp_path, {"a": 3, "b": 3})
    broken = tmp_path / "b" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[damage])
    data = load_data(folder_options(tmp_path))
    with pytest.raises(DataError, match="b/1.png.*cannot be decoded") as caught:
        for part in (data.train, data.test):
            list(iterate(part, [list(range(len(part)))], workers=workers))
    assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_used(tmp_path: Path, write_images: WriteImages) -> None:
    with pytest.raises(OptionError, match="does not exist"):
        load_data(folder_options(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no class directories"):
        load_data(folder_options(tmp_path))
    write_images(tmp_path / "one", {"a": 2})
    with pytest.raises(DataError, match="only one class, a"):
        load_data(folder_options(tmp_path / "one"))
    write_images(tmp_path / "empty", {"a": 2, "b": 0})
    with pytest.raises(DataError, match="empty/b: no images"):
        load_data(folder_options(tmp_path / "empty"))
    write_images(tmp_path / "single", {"a": 2, "b": 1})
    with pytest.raises(DataError, match="single/b: one image only"):
        load_data(folder_options(tmp_path / "single"))
    write_images(tmp_path / "split/train", {"a": 2, "b": 2})
    write_images(tmp_path / "split/val", {"a": 2, "c": 2})
    with pytest.raises(DataError, match="other classes.*: b, c"):
        load_data(folder_options(tmp_path / "split"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="is a file"):
        load_data(folder_options(tmp_path / "file"))


def test_sizes_the_digits_do_not_have() -> None:
    with pytest.raises(OptionError, match="image_size = 16: accepted is 8"):
        load_data(TrainOptions(image_size=16))
    with pytest.raises(OptionError, match="channels = 3"):
        load_data(TrainOptions(channels=3))
