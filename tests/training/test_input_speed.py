"""Which waits, the loader or the step: found where one of them was made slow, said in words, and refused in words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastvit.training import OptionError, TrainOptions, input_speed
from fastvit.training import models as models_module
from fastvit.training.any_size import ImageList
from fastvit.training.image_set import ImageSet
from fastvit.training.input_speed import InputSpeed, Rate, placed, prepared, verdict
from tests.training.runs import TINY

Cli = Callable[..., tuple[int, str, str]]
FOUND = InputSpeed(
    *(Rate(value, 0.9 * value, 1.1 * value) for value in (410.0, 1200.0, 408.0)),
    data="photos", images=10**6, reads=10**4, steps=10, workers=2, processors=8, device="cuda:0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", TINY)
    monkeypatch.setattr(input_speed, "ROUNDS", 2)


@pytest.fixture
def photos(tmp_path: Path, write_images: Callable[[Path, dict[str, int]], Path]) -> Path:
    return write_images(tmp_path / "photos", {"a": 15, "b": 15})


def options(photos: Path, **more: Any) -> TrainOptions:
    given = {"image_size": 16, "batch_size": 4, "model": "vit_digits", "device": "cpu", "threads": 1, **more}
    return TrainOptions(data=str(photos), output=str(photos.parent / "run"), **given)


def measure(options: TrainOptions, **more: Any) -> InputSpeed:
    with prepared(options) as run:
        return input_speed.measure(run, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slow_loader_makes_the_step_wait(photos: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    read = ImageSet.__getitem__

    def slow(images: ImageSet, places: list[int]) -> Any:
        time.sleep(0.08)
        return read(images, places)

    monkeypatch.setattr(ImageSet, "__getitem__", slow)
    found = measure(options(photos, workers=workers), steps=4)
    assert found.loader.median < found.step.median and found.waiting > 0.4
    ideal = 4 * max(1, workers) / 0.08
    assert 0.5 * ideal < found.loader.median < 1.05 * ideal, "what was read ahead does not count"
    assert f"the step waits {found.waiting:.0%} of the time for the loader" in verdict(found)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_step_makes_the_loader_wait(photos: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    step = input_speed.train_step

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(0.1)
        return step(*arguments)

    monkeypatch.setattr(input_speed, "train_step", slow)
    found = measure(options(photos, workers=workers), steps=2)
    assert found.step.median < found.loader.median and found.waiting < 0.25
    assert found.both.median == pytest.approx(found.step.median, rel=0.3)
    assert "the loader waits for the step" in verdict(replace(found, both=found.step))


def test_both_have_images_of_their_own_and_weights_stay(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[list[int]] = []
    read, seen = ImageSet.__getitem__, []
    monkeypatch.setattr(ImageSet, "__getitem__", lambda images, found: places.append(found) or read(images, found))
    told: list[tuple[int, int, str]] = []

    def step(run: Any, *arguments: Any) -> torch.Tensor:
        seen.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
        return real(run, *arguments)

    real = input_speed.train_step
    monkeypatch.setattr(input_speed, "train_step", step)
    found = measure(options(photos, workers=0), steps=4, progress=lambda *said: told.append(said))
    assert found.images == 24 and found.reads == sum(map(len, places)) and found.steps == 4
    assert [places[i : i + 6] for i in range(0, 12, 6)] == [places[:6]] * 2, "epochs, whose images all come in turn"
    assert all(torch.equal(seen[0], weights) for weights in seen)
    assert told[0] == (0, 7, "warming up") and told[-1] == (7, 7, "done") and len(told) == 8
    assert sorted(name for _, _, name in told[1:-1]) == ["both"] * 2 + ["loader"] * 2 + ["step"] * 2
    assert not (photos.parent / "run").exists()


def test_steps_fill_the_time(photos: Path) -> None:
    started = time.perf_counter()
    found = measure(options(photos, workers=0), seconds=3.0)
    assert found.steps > 8 and 1 < time.perf_counter() - started < 20
    assert measure(options(photos, workers=2), steps=3).steps == 4, "as many for each worker"


def test_images_of_any_size_and_digits(photos: Path) -> None:
    found = measure(options(photos, batch_size=0, tokens_per_batch=60, workers=0), steps=2)
    assert found.both.least <= found.both.median <= found.both.most
    assert "images were repeated" in verdict(found)
    assert "repeated" not in verdict(measure(TrainOptions(device="cpu"), steps=1))
    images = [torch.zeros(1, 2, 3, dtype=torch.uint8)]
    assert placed((ImageList.of(images), torch.tensor([1])), torch.device("meta"))[0].pixels.device.type == "meta"


def rates(*medians: float) -> dict[str, Rate]:
    return {name: Rate.of([median]) for name, median in zip(("loader", "step", "both"), medians, strict=True)}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {},
            "The loader gives 410 images/s, the step takes 1,200: the step waits 66% of the time for the loader; "
            "--workers 6 may keep up.",
        ),
        ({"processors": 4}, "it takes 6 workers to keep up, and there are 4 processors: --workers 4 and smaller files"),
        ({"processors": 2}, "and there are 2 processors: smaller files help."),
        ({"workers": 0}, "the step waits 66% of the time for the loader; --workers 3 may keep up."),
        (
            {"workers": 0, **rates(1000, 500, 333)},
            "the step takes 500, and with --workers 0 one after the other: the step waits 33% of the time; --workers 1",
        ),
        (
            {"workers": 8, **rates(8000, 1200, 1190)},
            "the loader waits for the step; --workers 2 would be enough.",
        ),
        (rates(1300, 1200, 1190), "1,200: the loader waits for the step."),
        (
            {"device": "cpu", **rates(1300, 1200, 600)},
            "together they reach 600: the step waits 50% of the time; both use the 8 processors, so fewer --threads",
        ),
        (rates(1300, 1200, 900), "together they reach 900: the step waits 25% of the time; --workers 3 would read"),
        (
            {"images": 100},
            " The 100 images were repeated (10,000 were read): after the first time they come from",
        ),
    ],
)
def test_the_verdict(more: dict[str, Any], said: str) -> None:
    assert said in verdict(replace(FOUND, **more))
    assert ("repeated" in verdict(replace(FOUND, **more))) == ("images" in more)


def test_bad_options_are_those_of_training(photos: Path) -> None:
    with pytest.raises(OptionError, match="device = 'tpu'"):
        measure(options(photos, device="tpu"))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_a_sentence(run: Cli, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    given = ("--model", "vit_digits", "--image-size", 16, "--workers", 0, "--device", "cpu", "--threads", 1)
    common = ("bench", "input", "--data", photos, *given, "--batch-size", 8, "--steps", 1)
    code, out, _ = run(*common)
    assert code == 0 and all(f" {name} " in out for name in ("loader", "training step", "both", "images/s"))
    assert "The loader gives" in out and "24 images" in out and "were repeated" in out
    code, out, _ = run(*common, "--json")
    (line,) = map(json.loads, out.splitlines())
    assert code == 0 and line["loader"]["median"] > 0 and line["workers"] == 0 and "images/s" in line["verdict"]
    assert [path.name for path in Path().iterdir()] == ["photos"], "something was written"


def test_help_names_the_options(run: Cli) -> None:
    code, out, _ = run("bench", "--help")
    assert code == 0 and "fastvit bench input --data photos/" in out
    for option in ("--data", "--image-size", "--tokens-per-batch", "--workers", "--amp", "--seconds", "--steps"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data digits", "--data: accepted only with the suite input alone"),
        ("model input --data digits", "--data: accepted only with the suite input alone"),
        ("input --workers 2", "--workers: accepted only with the suite input and --data"),
        ("model --compile", "--compile: accepted only with the suite input and --data"),
        ("input --data digits --size tiny --output x", "--data: not accepted together with --size, --output, since"),
        ("input --data digits --host timm --batch 4", "--data: not accepted together with --batch, --host, since"),
        ("traffic --data digits", "traffic: not accepted together with --data, since"),
        ("input --data digits --model vit_digits,S", "--model vit_digits,S: accepted is one model, with --data"),
        ("input --data digits --model S", "--model S: accepted is vit_digits, or a model"),
        ("input --data digits --seconds 3 --steps 2", "--seconds: not accepted together with --steps"),
        ("input --data digits --steps 0", "--steps"),
        ("input --data digits --amp fp8", "--amp fp8: accepted is one of off, bf16, fp16"),
        ("input --data digits --workers -3", "--workers -3: accepted is a whole number"),
        ("input --data /no/such", "--data /no/such: accepted is 'digits' or a folder"),
        ("input --data digits --tokens-per-batch 99", "--tokens-per-batch 99: accepted is a folder's alone"),
    ],
)
def test_bad_input_is_one_line_that_names_it(run: Cli, arguments: str, message: str) -> None:
    code, out, err = run("bench", *arguments.split())
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
