"""What the loop is given: digits, folders of images, their split, order and augmentation, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit.peers import import_peer
from fastvit.training import DataError, OptionError, TrainOptions
from fastvit.training.decoding import decode, in_eight_bits, random_box
from fastvit.training.digits import digit_tensors, shift
from fastvit.training.folder import scan, split_folder
from fastvit.training.image_set import iterate, split_by_class
from fastvit.training.loop import load_data

WriteImages = Callable[[Path, dict[str, int]], Path]


def folder_options(root: Path, **given: object) -> TrainOptions:
    return TrainOptions(data=str(root), image_size=16, workers=0, **given)  # type: ignore[arg-type]


def test_digits_are_raw_and_split_the_same_for_every_seed() -> None:
    first, second = (load_data(TrainOptions(seed=seed)) for seed in (0, 1))
    images, labels = first.train[list(range(len(first.train)))]
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8)
    assert images.max() == 255 and images.min() == 0
    assert len(first.train) + len(first.test) == 1797
    assert set(labels.tolist()) == set(range(10))
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.test[[3, 5]][0], second.test[[3, 5]][0])
    assert first.arguments["mean"][0] == pytest.approx(images.double().mean().item() / 255, abs=1e-4)


def test_no_digit_is_in_both_parts() -> None:
    data = load_data(TrainOptions())
    assert torch.bincount(data.test[list(range(len(data.test)))][1]).min() >= 30
    train, test = split_by_class(digit_tensors()[1], 0.2)
    assert not set(train.tolist()) & set(test.tolist())
    assert len(train) + len(test) == 1797


def test_shift_moves_each_image_by_its_own_amount() -> None:
    images = torch.randint(1, 256, (3, 2, 5, 4), dtype=torch.uint8)
    moved = shift(images, torch.tensor([[0, 0], [1, -1], [-1, 1]]))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, 1:, :-1], images[1, :, :-1, 1:])
    assert torch.equal(moved[2, :, :-1, 1:], images[2, :, 1:, :-1])
    assert moved[1, :, 0].sum() == 0 and moved[2, :, -1:].sum() == 0


def test_the_order_is_drawn_from_seed_and_epoch() -> None:
    images = load_data(TrainOptions()).train
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        images.draw(seed, epoch)
        orders.append(images.order.tolist())
        assert sorted(orders[-1]) == list(range(len(images)))
    assert orders[0] == orders[3] and orders[0] != orders[1] != orders[2] != orders[0]
    labels = images.labels[images.order]
    assert torch.equal(images[[5, 2]][1], labels[[5, 2]])


def test_folder_gives_raw_squares_and_holds_out_a_share_of_each_class(
    tmp_path: Path, write_images: WriteImages
) -> None:
    write_images(tmp_path, {"cat": 10, "dog": 5})
    (tmp_path / "dog" / "0.png").rename(tmp_path / "dog" / os.fsdecode(b"\xff.png"))  # no UTF-8
    data = load_data(folder_options(tmp_path, validation_share=0.2))
    assert data.classes == ("cat", "dog") and data.arguments["in_chans"] == 3
    assert (len(data.train), len(data.test)) == (12, 3)
    images, labels = data.test[[0, 1, 2]]
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1]


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


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_images_of_a_line_or_a_point(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    for draws in ([], [0.0] * 5, [0.99999] * 5):
        assert decode(tmp_path / "a.png", size=8, channels=3, draws=draws).min() == 255


def test_random_boxes_stay_inside() -> None:
    for draws in torch.rand(200, 5).tolist():
        left, top, right, bottom = random_box(30, 200, draws)
        assert 0 <= left < right <= 30.0001 and 0 <= top < bottom <= 200.0001


RAMP = np.tile(np.linspace(0, 255, 48).round().astype(np.uint8), (40, 1))  # from black, left, to white
COLOURS = np.stack([RAMP, RAMP, 255 - RAMP], -1)
GREY, COLOURED, DEEP = Image.fromarray(RAMP), Image.fromarray(COLOURS), Image.fromarray(RAMP.astype(np.uint16) * 257)
HOLE = Image.fromarray(255 - RAMP)  # opaque on the left alone


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "image", "how"),
    [
        ("grey.png", GREY, {}),
        ("colour.png", COLOURED, {}),
        ("palette.png", COLOURED.quantize(256), {}),
        ("palette with opacity.png", COLOURED.quantize(256), {"transparency": bytes(range(256))}),
        ("palette with opacity.tif", COLOURED.quantize(256).convert("PA"), {}),
        ("grey with opacity.png", Image.merge("LA", [GREY, HOLE]), {}),
        ("colour with opacity.png", Image.merge("RGBA", [*COLOURED.split(), HOLE]), {}),
        ("CMYK.jpg", COLOURED.convert("CMYK"), {"quality": 99, "subsampling": 0}),
        ("CMYK.TIFF", COLOURED.convert("CMYK"), {}),
        ("16 bits.png", DEEP, {}),
        ("16 bits.tif", DEEP, {}),
        ("16 bits.pgm", DEEP, {}),
        ("white is zero.tif", Image.fromarray(65535 - np.asarray(DEEP)), {"tiffinfo": {262: 0}}),
        ("floats.tif", Image.fromarray(RAMP.astype(np.float32) / 255), {}),
        ("turned.jpg", COLOURED.transpose(Image.Transpose.ROTATE_90), {"exif": {0x0112: 6}, "quality": 99}),
        ("turned.tif", DEEP.transpose(Image.Transpose.ROTATE_180), {"tiffinfo": {0x0112: 3}}),
        ("damaged EXIF.jpg", COLOURED, {"exif": b"Exif\0\0no TIFF at all", "quality": 99}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_pixels_comes_out_as_it_looks(
    tmp_path: Path, name: str, image: Image.Image, how: dict[str, Any], channels: int
) -> None:
    if isinstance(how.get("exif"), dict):
        exif = Image.Exif()
        exif.update(how["exif"])
        how = {**how, "exif": exif}
    image.save(tmp_path / name, **how)
    looks = GREY if image.mode in ("L", "LA", "F") or image.mode.startswith("I") else COLOURED
    looks = looks.convert("L" if channels == 1 else "RGB").resize((24, 24), box=(6.5, 2.5, 41.5, 37.5))
    found = decode(tmp_path / name, size=24, channels=channels, draws=[])
    assert found.dtype == torch.uint8 and found.shape == (channels, 24, 24)
    found = found[0] if channels == 1 else found.permute(1, 2, 0)
    assert (found.float() - torch.from_numpy(np.array(looks)).float()).abs().mean() < 3


def test_twelve_bits_are_scaled_from_their_own_white() -> None:
    image = Image.fromarray(RAMP.astype(np.uint16) * 16)
    image.tag_v2 = {258: (12,)}
    assert np.abs(np.asarray(in_eight_bits(image)).astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (RAMP.astype(np.float32), "values from 0 to 255; accepted are 0 to 1"),
        (np.full((9, 9), -0.1, np.float32), "values from -0.1 to -0.1"),
        (np.full((9, 9), np.nan, np.float32), "values from nan to nan"),
        (RAMP.astype(np.int32), "32-bit or signed integers, whose white is not known"),
    ],
)
def test_pixels_of_no_known_scale_are_refused(tmp_path: Path, pixels: np.ndarray, said: str) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=f"a.tif: the image cannot be decoded .*{said}"):
        decode(tmp_path / "a.tif", size=8, channels=3, draws=[])


def test_what_systems_leave_among_images_is_no_class_and_no_sample(tmp_path: Path, write_images: WriteImages) -> None:
    write_images(tmp_path, {"cat": 4, "dog/puppy": 4})
    left = "__MACOSX/cat/._0.png .ipynb_checkpoints/a.png cat/.ipynb_checkpoints/0-checkpoint.png cat/._0.png"
    left += " .DS_Store cat/.DS_Store cat/Thumbs.db dog/__MACOSX/1.png dog/@eaDir/1.png notes.txt dog/labels.csv"
    for name in left.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "0.PNG")
    train, test, classes = split_folder(tmp_path, 0.25)
    assert classes == ("cat", "dog")
    found = sorted(path.relative_to(tmp_path).as_posix() for path, _ in train + test)
    assert found == sorted(
        ["cat/0.PNG", *(f"cat/{i}.png" for i in (1, 2, 3)), *(f"dog/puppy/{i}.png" for i in range(4))]
    )


def test_classes_and_samples_are_those_of_imagefolder(tmp_path: Path, write_images: WriteImages) -> None:
    """Links among them: to a class, to a directory in one, to an image."""
    datasets = import_peer("torchvision.datasets")
    write_images(tmp_path / "elsewhere", {"c": 2, "more": 2})
    root = write_images(tmp_path / "root", {"B": 3, "a": 2})
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "a" / "link.jpeg").symlink_to(root / "B" / "0.png")
    theirs = datasets.ImageFolder(root)
    found, classes = scan(root)
    assert list(classes) == theirs.classes
    assert sorted((str(path), label) for path, label in found) == sorted(theirs.samples)
    (root / "a" / "round").symlink_to(root)
    assert sum(path.name == "link.jpeg" for path, _ in scan(root)[0]) == 1, "a circle of links"
    (root / "a" / "9.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match="a/9.png: no file, or a link to nothing"):
        scan(root)


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Testing"), ("train", "valid")])
def test_a_split_is_found_by_its_usual_names(tmp_path: Path, write_images: WriteImages, names: tuple[str, str]) -> None:
    write_images(tmp_path / names[0], {"a": 3, "b": 2})
    with pytest.raises(DataError, match="a part of a split without the other"):
        split_folder(tmp_path, 0.2)
    write_images(tmp_path / names[1], {"a": 1})
    with pytest.raises(DataError, match=f"{names[1]}: other classes than in .*{names[0]}: without b$"):
        split_folder(tmp_path, 0.2)
    write_images(tmp_path / names[1], {"b": 1, "c": 1, "d": 1})
    with pytest.raises(DataError, match=": with c, d$"):
        split_folder(tmp_path, 0.2)
    for name in "cd":
        shutil.rmtree(tmp_path / names[1] / name)
    train, test, classes = split_folder(tmp_path, 0.2)
    assert (len(train), len(test), classes) == (5, 2, ("a", "b"))


def test_train_may_be_the_name_of_a_class(tmp_path: Path, write_images: WriteImages) -> None:
    assert split_folder(write_images(tmp_path, {"bus": 2, "train": 2, "train/steam": 1}), 0.2)[2] == ("bus", "train")


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
    (tmp_path / "file").write_text("x")
    with pytest.raises(OptionError, match="is a file"):
        load_data(folder_options(tmp_path / "file"))


def test_sizes_the_digits_do_not_have() -> None:
    with pytest.raises(OptionError, match="image_size = 16: accepted is 8"):
        load_data(TrainOptions(image_size=16))
    with pytest.raises(OptionError, match="channels = 3"):
        load_data(TrainOptions(channels=3))
