"""Images of any size: how large each becomes, which go together in a step, and that a run on them is as any other."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from rich.console import Console
from torch.nn import functional as F

import fastvit
from fastvit.training import CheckpointError, DataError, OptionError, TrainOptions, resume_options, train
from fastvit.training import models as models_module
from fastvit.training.any_size import ImageList, grid_within
from fastvit.training.batches import packed_training_steps, parts_of
from fastvit.training.decoding import decode, random_box, upright_size
from fastvit.training.distributed import Team
from fastvit.training.image_set import ImageData, iterate
from fastvit.training.loop import evaluate, load_data, train_step
from fastvit.training.observers import ProgressBar
from fastvit.training.run import Run, start
from tests.training.runs import StopAt, assert_same, in_two_processes, write_photos

pytestmark = pytest.mark.usefixtures("tiny")

MAX_TOKENS, BUDGET = 12, 40
sides = st.integers(1, 5000)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of images of all SIZES, the one darker than the other."""
    return write_photos(tmp_path / "photos")


def options(photos: Path, **more: Any) -> TrainOptions:
    fixed = {"data": str(photos), "output": str(photos.parent / "run"), "model": "vit_digits", "device": "cpu"}
    budget = {"image_size": 16, "tokens_per_batch": BUDGET, "max_tokens": MAX_TOKENS}
    return TrainOptions(**{**fixed, **budget, "epochs": 3, "workers": 0, "threads": 1, "tensorboard": False, **more})


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "patch", "most", "expected"),
    [
        (224, 224, 16, 196, (14, 14)),
        (3000, 3000, 16, 196, (14, 14)),
        (375, 500, 16, 196, (12, 16)),  # 0.75 as it was
        (500, 375, 16, 196, (16, 12)),
        (278, 282, 10, 196, (14, 14)),  # 13.9 x 14.1 would have as many
        (200, 350, 10, 7, (1, 2)),  # 2 x 3.5 would have as many, but 2 x 4 has more
        (100, 150, 16, 196, (6, 9)),  # no larger than it is
        (7, 40, 16, 196, (1, 2)),  # but for one patch on each side
        (1, 1, 16, 1, (1, 1)),
        (16, 16000, 16, 100, (1, 100)),  # longer than a row may be
        (4000, 2, 16, 9, (9, 1)),
    ],
)
def test_grids_of_some_images(height: int, width: int, patch: int, most: int, expected: tuple[int, int]) -> None:
    assert grid_within(height, width, patch, most) == expected


@given(height=sides, width=sides, patch=st.integers(1, 40), most=st.integers(1, 2000))
def test_a_grid_is_as_large_and_as_true_as_it_can_be(height: int, width: int, patch: int, most: int) -> None:
    rows, columns = grid_within(height, width, patch, most)
    assert grid_within(width, height, patch, most) == (columns, rows)
    assert rows >= 1 and columns >= 1 and rows * columns <= most
    own = max(1, round(height / patch)), max(1, round(width / patch))
    assert rows <= own[0] and columns <= own[1], "enlarged"
    if own[0] * own[1] <= most:
        assert (rows, columns) == own, "resized more than to whole patches"
        return
    ratio = Fraction(max(height, width), min(height, width))
    few, many = sorted((rows, columns))
    if few * round(few * ratio) > most:
        assert (few, many) == (1, most), "only a row or column that is too long by itself is cut"
    else:
        assert many == round(few * ratio), "aspect ratio"
    assert (few + 1) * round((few + 1) * ratio) > most, "a larger one would have fitted"


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.png", "a.webp"])
def test_sizes_are_those_of_decoded_images(tmp_path: Path, name: str, orientation: int) -> None:
    how = {"tiffinfo": {0x0112: orientation}} if name == "a.tif" else {"exif": turned(orientation)}
    Image.new("RGB", (48, 20), "white").save(tmp_path / name, **how)
    with Image.open(tmp_path / name) as image:
        width, height = ImageOps.exif_transpose(image).size
    assert upright_size(tmp_path / name) == (height, width) == ((20, 48) if orientation < 5 else (48, 20))


@pytest.mark.parametrize(("name", "how"), [("a.png", {}), ("a.jpg", {"exif": b"Exif\0\0no TIFF"}), ("a.tif", {})])
def test_a_header_is_all_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: dict[str, Any]
) -> None:
    Image.new("RGB", (48, 20)).save(tmp_path / name, **how)
    decoded: list[Any] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    assert upright_size(tmp_path / name) == (20, 48) and not decoded


@pytest.mark.parametrize("contents", [b"", b"no image"])
def test_a_damaged_header_is_named(photos: Path, contents: bytes) -> None:
    (photos / "b" / "03.png").write_bytes(contents)
    with pytest.raises(DataError, match="b/03.png: the image cannot be decoded .*; mend or remove it"):
        load_data(options(photos))


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_the_whole_image_is_resized_without_draws(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", size=(10, 20), channels=3, draws=[])
    expected = pixels_of(image.resize((20, 10), Image.Resampling.BICUBIC))
    assert found.dtype == torch.uint8 and torch.equal(found, expected)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_crop_has_about_the_shape_that_it_is_resized_to(tmp_path: Path) -> None:
    for draws in torch.rand(200, 5).tolist():
        left, top, right, bottom = random_box(900, 300, draws, ratio=3.0)
        assert 0 <= left < right <= 900.001 and 0 <= top < bottom <= 300.001
        assert 0.74 < (right - left) / (bottom - top) / 3.0 < 1.34
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    draws = [0.1, 0.3, 0.6, 0.9]
    box = random_box(90, 30, draws, ratio=3.0)
    expected = pixels_of(image.resize((24, 8), Image.Resampling.BICUBIC, box=box))
    for flip, turned_over in ((0.7, expected), (0.2, expected.flip(2))):
        found = decode(tmp_path / "a.png", size=(8, 24), channels=3, draws=[*draws, flip])
        assert torch.equal(found, turned_over)


def test_augmentation_keeps_the_sizes_and_depends_on_seed_and_epoch_alone(photos: Path) -> None:
    data = load_data(options(photos))
    batches = [[0, 1, 2, 3], [7, 6, 5, 4]]

    def images(seed: int, epoch: int, workers: int = 0) -> list[torch.Tensor]:
        data.train.draw(seed, epoch)
        loaded = iterate(data.train, batches, workers=workers)
        return [image for batch, _ in loaded for image in batch.to(torch.device("cpu"))]

    state = torch.get_rng_state()
    here = images(0, 1)
    for index, image in zip((i for batch in batches for i in batch), here, strict=True):
        assert image.dtype == torch.uint8 and image.shape[1] % 4 == image.shape[2] % 4 == 0
        assert 1 + image[0].numel() // 16 == data.train.tokens[index] <= 1 + MAX_TOKENS
    assert len({image.shape for image in here}) > 2
    assert_same(here, images(0, 1, workers=2), "workers")
    for other in (images(0, 2), images(1, 1)):
        assert any(not torch.equal(one, two) for one, two in zip(here, other, strict=True))
    assert torch.equal(state, torch.get_rng_state()), "loading must not use torch's global random numbers"


def test_an_image_list_is_its_images() -> None:
    images = [torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8) for rows, columns in ((4, 8), (12, 4))]
    assert_same(ImageList.of(images).to(torch.device("cpu")), images, "images")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_it_learns_and_its_checkpoint_takes_any_size(photos: Path, tmp_path: Path) -> None:
    result = train(options(photos, epochs=8, lr=5e-3, batch_size=0))
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]
    assert result.test_accuracy > 0.8
    assert len(result.losses) == sum(steps_of(result.data, BUDGET, epochs=8))
    loaded = fastvit.load_pretrained(tmp_path / "run" / "last.pt").eval()
    images = result.data.test[list(range(4))][0].to(torch.device("cpu"))
    expected = result.model.eval()(images)
    assert torch.equal(loaded(images), expected)
    torch.testing.assert_close(torch.cat([loaded(image[None]) for image in images]), expected)


def steps_of(data: ImageData, most: int, *, epochs: int) -> list[int]:
    """How many an epoch of one process has."""
    found = []
    for epoch in range(epochs):
        data.train.draw(0, epoch)
        found.append(len(packed_training_steps(data.train.tokens, most, 1)))
    return found


def begin(photos: Path, **more: Any) -> tuple[Run, ImageData]:
    settings = options(photos, clip_grad=0.0, **more)
    data = load_data(settings)
    return start(settings, data, Team(torch.device("cpu"))), data


def test_a_step_is_the_mean_of_its_images_alone(photos: Path) -> None:
    run, data = begin(photos)
    data.train.draw(0, 0)
    parts = parts_of(packed_training_steps(data.train.tokens, BUDGET, 1)[0])
    batch = data.train[parts[0].places]
    images = batch[0].to(torch.device("cpu"))
    assert len({image.shape for image in images}) > 1
    files = [file for name in "ab" for file in sorted((photos / name).iterdir())]
    kept = sorted(set(files) - set(held_out(photos)))
    labels = [int(kept[data.train.order[place]].parent.name == "b") for place in parts[0].places]
    losses = [
        F.cross_entropy(run.model(image[None]), torch.tensor([label]), label_smoothing=0.1)
        for image, label in zip(images, labels, strict=True)
    ]
    mean = torch.stack(losses).mean()
    gradients = torch.autograd.grad(mean, list(run.model.parameters()))
    loss = train_step(run, parts, iter([batch]), 1e-3)
    torch.testing.assert_close(loss, mean.detach(), atol=1e-6, rtol=1e-6)
    for parameter, gradient in zip(run.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def held_out(photos: Path) -> list[Path]:
    from fastvit.training.folder import split_folder

    return [path for path, _ in split_folder(photos, 0.2)[1]]


def test_evaluation_is_of_every_whole_image(photos: Path) -> None:
    run, _ = begin(photos)
    losses, hits = [], []
    for path in held_out(photos):
        height, width = (4 * side for side in grid_within(*upright_size(path), 4, MAX_TOKENS))
        image, label = decode(path, size=(height, width), channels=3, draws=[]), int(path.parent.name == "b")
        logits = run.model.eval()(image[None])
        losses.append(F.cross_entropy(logits, torch.tensor([label])).item())
        hits.append(logits.argmax().item() == label)
    assert evaluate(run) == pytest.approx((np.mean(losses), np.mean(hits)), rel=1e-5)


def test_no_step_is_over_the_budget(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvit.training import loop

    totals: list[int] = []

    class Counted(fastvit.VisionTransformer):
        def forward(self, x: Any, *rest: Any) -> Any:
            totals.append(sum(1 + image[0].numel() // 16 for image in x))
            return super().forward(x, *rest)

    monkeypatch.setattr(models_module, "VisionTransformer", Counted)
    run = loop.train(options(photos, epochs=1))
    assert max(totals) <= BUDGET and sum(totals) == sum(run.data.train.tokens) + sum(run.data.test.tokens)


def test_max_tokens_are_by_default_those_of_the_image_size(photos: Path) -> None:
    by_default, given = (load_data(options(photos, max_tokens=most)) for most in (0, 16))
    assert by_default.train.tokens == given.train.tokens and max(given.train.tokens) == 17


@pytest.mark.parametrize("stop", [9, 12])
@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_inside_an_epoch_is_bit_exact(photos: Path, tmp_path: Path, stop: int, workers: int) -> None:
    common = {"save_steps": 1, "drop_path": 0.1, "workers": workers}
    straight = train(options(photos, output=str(tmp_path / "straight"), **common))
    with pytest.raises(KeyboardInterrupt):
        train(options(photos, output=str(tmp_path / "broken"), **common), observers=[StopAt(stop)])
    torch.manual_seed(12345)
    resumed, contents = resume_options(tmp_path / "broken" / "last.pt", {})
    assert contents["step"] and (resumed.tokens_per_batch, resumed.max_tokens, resumed.batch_size) == (BUDGET, 12, 0)
    result = train(resumed, resume=contents)
    assert result.history == straight.history and len(result.losses) == len(straight.losses) - (stop - 1)
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "broken"))
    for key in ("model", "optimizer", "processes", "history"):
        assert_same(one[key], other[key], key)


def test_resuming_where_an_image_has_become_another_size(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(options(photos, save_steps=1), observers=[StopAt(2)])
    resumed, contents = resume_options(tmp_path / "run" / "last.pt", {})
    Image.new("RGB", (40, 40)).save(photos / "a" / "02.png")
    with pytest.raises(CheckpointError, match="not those the checkpoint was trained on"):
        train(resumed, resume=contents)


def test_two_processes_have_as_many_steps(photos: Path, tmp_path: Path) -> None:
    given = {"data": str(photos), "model": "vit_digits", "image_size": 16, "tokens_per_batch": 45, "workers": 0}
    one, other = in_two_processes(tmp_path / "run", epochs=2, max_tokens=12, **given)
    assert one["history"] == other["history"] and one["sum"] == other["sum"]
    assert one["losses"] != other["losses"]
    alone = steps_of(load_data(options(photos)), 45, epochs=2)
    assert any(count % 2 for count in alone), "one must be halved, or this test shows little"
    assert len(one["losses"]) == len(other["losses"]) == sum((count + 1) // 2 for count in alone)


def test_the_bar_goes_from_epoch_to_epoch(photos: Path) -> None:
    class Watched(ProgressBar):
        seen: list[float] = []

        def on_step(self, run: Run, steps: int) -> None:
            super().on_step(run, steps)
            self.seen.append(self.bar.tasks[0].completed)

    bar = Watched(Console(file=io.StringIO()))
    run = train(options(photos), observers=[bar])
    assert bar.seen == sorted(bar.seen) and bar.seen[-1] == bar.bar.tasks[0].total == 3
    assert {1.0, 2.0} <= set(bar.seen) and len(bar.seen) == len(run.losses)


@pytest.mark.parametrize(
    ("name", "more", "accepted"),
    [
        ("tokens_per_batch", {"tokens_per_batch": -1}, "a whole number of at least 1"),
        ("tokens_per_batch", {"tokens_per_batch": 2.5}, "a whole number of at least 1"),
        ("tokens_per_batch", {"tokens_per_batch": True}, "a whole number of at least 1"),
        ("tokens_per_batch", {"data": "digits"}, "a folder's alone"),
        ("max_tokens", {"max_tokens": -1}, "a whole number of at least 1"),
        ("max_tokens", {"max_tokens": "many"}, "a whole number of at least 1"),
        ("max_tokens", {"tokens_per_batch": 0}, "with --tokens-per-batch alone"),
        ("batch_size", {"batch_size": 64}, "none beside --tokens-per-batch"),
        ("compile", {"compile": True}, "off beside --tokens-per-batch"),
    ],
)
def test_options_that_do_not_go_together(photos: Path, name: str, more: dict[str, Any], accepted: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} = .*: accepted is {accepted}"):
        options(photos, **more)


@pytest.mark.parametrize(
    ("name", "more", "accepted"),
    [
        (
            "tokens_per_batch",
            {"max_tokens": 40},
            "at least 41: an image of --max-tokens 40 and the model's",
        ),
        ("tokens_per_batch", {"max_tokens": 0, "image_size": 28}, "at least 50: an image of --max-tokens 49"),
        ("image_size", {"max_tokens": 0, "image_size": 3}, "at least the patch of vit_digits, 4"),
        ("model", {"image_size": 18}, "a model that fits the data"),
        ("model", {"model": "vit_typo"}, "vit_digits, or a model that FastViT has"),
    ],
)
def test_limits_that_no_image_fits(photos: Path, name: str, more: dict[str, Any], accepted: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} = .*: accepted is {accepted}"):
        train(options(photos, **more))


def test_an_image_may_fill_the_budget(photos: Path) -> None:
    assert max(load_data(options(photos, max_tokens=BUDGET - 1)).train.tokens) == 37  # 6 x 6 of 64 x 64 pixels


def test_resuming_keeps_the_budget(photos: Path) -> None:
    budget = options(photos)
    assert budget.batch_size == 0 and TrainOptions(**budget.__dict__) == budget
    assert budget.resumed_with({"tokens_per_batch": BUDGET, "workers": 1}).workers == 1
    for name, value in (("tokens_per_batch", 50), ("max_tokens", 11), ("batch_size", 8)):
        with pytest.raises(OptionError, match=f"{name} = {value}: accepted is .* when resuming"):
            budget.resumed_with({name: value})
    with pytest.raises(OptionError, match="tokens_per_batch = 9: accepted is 0 when resuming"):
        TrainOptions(data="photos").resumed_with({"tokens_per_batch": 9})
