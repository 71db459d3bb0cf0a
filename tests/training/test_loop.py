"""The loop: it learns, goes on exactly where it stopped, in one process or several, and stops with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastvit
from fastvit.training import CheckpointError, OptionError, TrainingError, TrainOptions, UserError, resume_options, train
from fastvit.training import digits as digits_module
from fastvit.training import models as models_module
from fastvit.training.observers import TensorBoard
from tests.training.runs import TINY, StopAt, assert_same, in_two_processes


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a data set on which an epoch takes a moment."""
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", {**TINY, "proj_drop_rate": 0.1})
    whole = digits_module.digit_tensors
    monkeypatch.setattr(digits_module, "digit_tensors", lambda: tuple(part[:300] for part in whole()))


def options(output: Path, **given: Any) -> TrainOptions:
    given = {"epochs": 3, "device": "cpu", "drop_path": 0.1, "tensorboard": False, **given}
    return TrainOptions(output=str(output), **given)


def test_it_writes_and_learns(tmp_path: Path) -> None:
    result = train(options(tmp_path / "run", epochs=6, drop_path=0.0))
    assert len(result.losses) == 6 * 8 and len(result.history) == 6
    assert result.data.train.random.shape == (len(result.data.train), 2), "every sample was augmented"
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.test_accuracy == result.history[-1]["test_accuracy"] > 0.2
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"last.pt", "best.pt", "metrics.jsonl"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    images, _ = result.data.test[list(range(8))]
    with pytest.raises(CheckpointError, match="the folder of a run; name one of its checkpoints: best.pt, last.pt"):
        fastvit.load_pretrained(tmp_path / "run")
    loaded = fastvit.load_pretrained(tmp_path / "run" / "last.pt").eval()
    assert torch.equal(loaded(images), result.model.eval()(images)), "heads and normalisation are in the checkpoint"


@pytest.mark.parametrize(
    ("stop", "given"),
    [
        (9, {}),  # in the second epoch: go on after the first
        (11, {"save_steps": 2}),  # inside an epoch
        (9, {"amp": "bf16"}),
        (10, {"amp": "fp16", "save_steps": 1}),
        (9, {"clip_grad": 0.0, "augment": False}),
    ],
)
def test_resuming_is_bit_exact(tmp_path: Path, stop: int, given: dict[str, Any]) -> None:
    straight = train(options(tmp_path / "straight", **given))
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "broken", **given), observers=[StopAt(stop)])
    torch.manual_seed(12345)  # another process would not have this one's random numbers either
    resumed, contents = resume_options(tmp_path / "broken" / "last.pt", {})
    result = train(resumed, resume=contents)
    assert result.history == straight.history
    assert result.losses == straight.losses[-len(result.losses) :] and len(result.losses) < len(straight.losses)
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "broken"))
    for key in ("model", "optimizer", "groups", "scaler", "processes", "history"):
        assert_same(one[key], other[key], key)


@pytest.mark.parametrize("forgotten", ["random", "optimizer"])
def test_the_resume_test_would_notice_a_forgotten_state(tmp_path: Path, forgotten: str) -> None:
    straight = train(options(tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "broken"), observers=[StopAt(9)])
    resumed, contents = resume_options(tmp_path / "broken" / "last.pt", {})
    if forgotten == "random":
        contents["processes"][0]["torch"] = torch.manual_seed(1).get_state()
    else:
        for state in contents["optimizer"].values():
            state["exp_avg"].zero_()
    assert train(resumed, resume=contents).losses != straight.losses[8:]


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(options(tmp_path, epochs=1))
    with pytest.raises(OptionError, match="a folder without a run; go on with --resume"):
        train(options(tmp_path, epochs=1))
    with pytest.raises(CheckpointError, match="complete"):
        resume_options(tmp_path / "last.pt", {})


def test_resuming_on_other_data_or_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path), observers=[StopAt(9)])
    resumed, contents = resume_options(tmp_path / "last.pt", {})
    contents["data"]["fingerprint"] = "another"
    with pytest.raises(CheckpointError, match="not those the checkpoint was trained on"):
        train(resumed, resume=contents)
    resumed, contents = resume_options(tmp_path / "last.pt", {})
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", {**TINY, "embed_dim": 32})
    with pytest.raises(CheckpointError, match=r"--resume: does not fit the model; .*pos_embed: shape \[1, 5, 16\]"):
        train(resumed, resume=contents)


def test_accumulated_batches_are_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without dropout, and without the bias of keys: its gradient is zero but for rounding, which AdamW makes large.
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", {**TINY, "qkv_bias": False})
    given = {"epochs": 2, "drop_path": 0.0, "augment": False}
    whole = train(options(tmp_path / "whole", batch_size=96, **given))
    parts = train(options(tmp_path / "parts", batch_size=32, accumulate_steps=3, **given))
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-5, atol=1e-6)
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_starting_from_weights(tmp_path: Path) -> None:
    first = train(options(tmp_path / "a", epochs=1))
    again = train(options(tmp_path / "b", epochs=1, init_from=str(tmp_path / "a" / "last.pt"), lr=1e-9))
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> nn.Module:
        model: Any = models_module.build_model(*arguments)
        nn.init.constant_(model.head.bias, float("nan"))
        return model

    monkeypatch.setattr("fastvit.training.run.build_model", broken)
    with pytest.raises(TrainingError, match="the loss became nan in epoch 1, step 1; try a lower --lr"):
        train(options(tmp_path))
    assert not (tmp_path / "last.pt").exists()


def test_unknown_models_and_devices(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="model = 'vit_huge_typo'"):
        train(options(tmp_path, model="vit_huge_typo"))
    with pytest.raises(OptionError, match="model = 'vit_tiny_patch16_224'"):
        train(options(tmp_path, model="vit_tiny_patch16_224"))  # 8x8 digits are no multiple of its patch
    with pytest.raises(OptionError, match="device = 'tpu': accepted is one of auto, cpu"):
        train(options(tmp_path, device="tpu"))
    assert issubclass(OptionError, UserError)


def test_a_forced_backend_that_cannot_run_is_refused_first(tmp_path: Path) -> None:
    with fastvit.use_backend("cuda"), pytest.raises(UserError, match="'cuda' can't run on device 'cpu'"):
        train(options(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_trains_with_workers(tmp_path: Path, write_images: Callable[[Path, dict[str, int]], Path]) -> None:
    root = write_images(tmp_path / "photos", {"a": 6, "b": 6})
    given = {"model": "vit_tiny_patch16_224", "image_size": 32, "batch_size": 4, "epochs": 1, "workers": 1}
    result = train(options(tmp_path / "run", data=str(root), **given))
    assert len(result.losses) == 3 and result.data.classes == ("a", "b")


def test_tensorboard_gets_each_epoch(tmp_path: Path) -> None:
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no TensorBoard")
    result = train(options(tmp_path), observers=[TensorBoard()])
    events = events_of.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("accuracy/test")
    assert [event.step for event in found] == [1, 2, 3]
    assert found[-1].value == pytest.approx(result.test_accuracy)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """As torchrun starts them. Both see the same averages, each other half of the images, and one writes."""
    output = tmp_path / "run"
    one, other = in_two_processes(output, epochs=2, batch_size=64)
    assert one["history"] == other["history"] and one["sum"] == other["sum"]
    assert one["losses"] != other["losses"]
    assert len(one["losses"]) == 2 * 12  # 1437 images, at most 2 x 64 a step
    assert {path.name for path in output.iterdir()} == {"last.pt", "best.pt", "metrics.jsonl"}
    stored = torch.load(output / "last.pt", weights_only=True)
    assert len(stored["processes"]) == 2
    assert not any(name.startswith("module.") for name in stored["model"])
