"""What a training of a Vision Transformer is expected to have: mixed images, an average of the parameters, learning
rates by depth, repeated augmentation; each for what it must do, and all of them together."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import fastvit
from fastvit.peers import import_peer
from fastvit.training import TrainOptions, loop, resume_options, train
from fastvit.training import digits as digits_module
from fastvit.training import models as models_module
from fastvit.training.batches import parts_of, training_steps
from fastvit.training.distributed import Team
from fastvit.training.ema import Ema
from fastvit.training.image_set import epoch_generator
from fastvit.training.loop import batch_loss, evaluate, load_data, measure, train_step
from fastvit.training.mixing import Mixing, numpy_seed
from fastvit.training.observers import Observer, ProgressBar, TensorBoard
from fastvit.training.run import Run, start
from tests.libraries import needs
from tests.training.runs import TINY, StopAt, assert_same, in_processes

needs_timm = needs("timm")

WHOLE: dict[str, Any] = {
    "mixup": 0.8, "cutmix": 1.0, "ema": 0.9, "ema_warmup": True, "layer_decay": 0.8, "repeated_aug": 2,
    "drop_path": 0.05,
}  # fmt: skip


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and a data set on which an epoch takes a moment: 8 steps, of which most have an odd number of images."""
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", TINY)
    whole = digits_module.digit_tensors
    monkeypatch.setattr(digits_module, "digit_tensors", lambda: tuple(part[:300] for part in whole()))


def options(output: Path, **given: Any) -> TrainOptions:
    return TrainOptions(output=str(output), **{"epochs": 2, "device": "cpu", "tensorboard": False, **given})


def begin(**given: Any) -> Run:
    """A run before its first step, with its first epoch drawn."""
    settings = TrainOptions(device="cpu", **given)
    run = start(settings, load_data(settings), Team(torch.device("cpu")))
    run.data.train.draw(settings.seed, 0, settings.repeated_aug)
    return run


# ---- mixup and CutMix ------------------------------------------------------------------------------------------------


def batch_of(count: int, channels: int = 3, height: int = 12, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


@needs_timm
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_mixup_by_hand(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mixing = Mixing(TrainOptions(mixup=0.8, label_smoothing=0.2), 10)
    monkeypatch.setattr(mixing.parameters, "_params_per_batch", lambda: (0.3, False))
    images, labels = batch_of(count)
    before = images.clone()
    mixed, targets = mixing(images, labels, epoch=0, step=0, part=0)
    assert torch.equal(images, before) and mixed.dtype == torch.uint8
    other = list(range(count))[::-1]
    exact = 0.3 * images.double() + 0.7 * images[other].double()
    assert (mixed.double() - exact).abs().max() <= 0.5 + 1e-4, "rounded to the nearest"
    expected = torch.zeros(count, 10).double()
    for row in range(count):
        expected[row, labels[row]] += 0.3 * 0.8
        expected[row, labels[other[row]]] += 0.7 * 0.8
    torch.testing.assert_close(targets.double(), expected + 0.2 / 10, atol=1e-6, rtol=0)
    if count % 2:
        assert torch.equal(mixed[count // 2], images[count // 2]), "in the middle of an odd batch"


@needs_timm
@pytest.mark.parametrize("count", [1, 4, 7])
def test_cutmix_copies_a_box(count: int) -> None:
    mixing = Mixing(TrainOptions(cutmix=1.0, label_smoothing=0.0), 10)
    images, labels = batch_of(count, height=20, width=30)
    other = images.flip(0)
    areas = set()
    for step in range(20):
        mixed, targets = mixing(images, labels, epoch=0, step=step, part=0)
        is_other = (mixed != images).any(0).any(0)  # [H, W]
        assert torch.equal(mixed[:, :, ~is_other], images[:, :, ~is_other])
        rows, columns = is_other.any(1).nonzero(), is_other.any(0).nonzero()
        area = 0
        if len(rows):
            box = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
            assert torch.equal(mixed[box], other[box])
            area = mixed[box][0, 0].numel()
        areas.add(area)
        if count > 1:
            share = 1 - area / (20 * 30)
            expected = share * F.one_hot(labels, 10) + (1 - share) * F.one_hot(labels.flip(0), 10)
            torch.testing.assert_close(targets, expected.float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
    assert len(areas) > 10 or count == 1


@needs_timm
@pytest.mark.parametrize("given", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.5, "mixup_prob": 0.7}])
def test_an_even_batch_is_mixed_as_timm_does(given: dict[str, float]) -> None:
    mixing = Mixing(TrainOptions(seed=3, **given), 10)  # type: ignore[arg-type]
    theirs = import_peer("timm.data.mixup").FastCollateMixup(
        given.get("mixup", 0), given.get("cutmix", 0), prob=given.get("mixup_prob", 1), num_classes=10
    )
    images, labels = batch_of(6)
    batch = [(image.numpy(), int(label)) for image, label in zip(images, labels, strict=True)]
    for step in range(20):
        found = mixing(images, labels, epoch=2, step=step, part=1)
        with numpy_seed(epoch_generator(3, 2, f"mixing/{step}/1").initial_seed()):
            expected = theirs(batch)
        assert_same(found, expected, f"step {step}")


@needs_timm
def test_mixing_is_drawn_from_seed_epoch_step_and_part_alone() -> None:
    images, labels = batch_of(6, height=32, width=32)

    def mixed(seed: int = 0, epoch: int = 0, step: int = 0, part: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        mixing = Mixing(TrainOptions(seed=seed, mixup=0.8, cutmix=1.0), 10)
        mixing(images, labels, epoch=9, step=9, part=9)  # leaves nothing behind
        return mixing(images, labels, epoch=epoch, step=step, part=part)

    np.random.seed(5)
    torch.manual_seed(5)
    first = mixed()
    ours, theirs = torch.get_rng_state(), np.random.get_state()
    np.random.seed(6)
    torch.manual_seed(6)
    assert_same(mixed(), first, "again")
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.get_rng_state())
    assert all(np.array_equal(one, other) for one, other in zip(theirs, np.random.get_state(), strict=True))
    for name in ("seed", "epoch", "step", "part"):
        assert not torch.equal(mixed(**{name: 1})[1], first[1]), name


@needs_timm
def test_how_often_batches_are_mixed_and_how() -> None:
    mixing = Mixing(TrainOptions(mixup=1.0, cutmix=1.0, mixup_prob=0.6, mixup_switch_prob=0.25), 10)
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 1, 32, 32).contiguous()
    found: Counter[str] = Counter()
    for step in range(1000):
        mixed, _ = mixing(images, torch.tensor([0, 1]), epoch=0, step=step, part=0)
        values = set(mixed[0].unique().tolist())
        found["none" if values == {0} else "cutmix" if 255 in values else "mixup"] += 1
    # Within four standard deviations; a lambda near 1 looks like none at all.
    assert 330 < found["none"] < 480 and 390 < found["mixup"] < 510 and 100 < found["cutmix"] < 200


@needs_timm
@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-6), ("bf16", 1e-2)])
def test_the_loss_is_that_of_the_mixed_targets(few: None, amp: str, tolerance: float) -> None:
    run = begin(mixup=0.8, label_smoothing=0.1, amp=amp)
    assert run.mixing is not None
    batch = run.data.train[list(range(7))]
    run.epoch, run.step, run.team = 1, 5, Team(torch.device("cpu"), rank=1, world=2)
    images, targets = run.mixing(*batch, epoch=1, step=5, part=2 * 3 + 1)
    expected = -(targets * run.model(images).log_softmax(1)).sum(1).mean()
    loss = batch_loss(run, batch, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)


@needs_timm
def test_two_processes_train_as_one_with_two_parts_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", TINY)
    given = {**WHOLE, "drop_path": 0.0, "epochs": 1, "batch_size": 96}
    alone = train(options(tmp_path / "one", accumulate_steps=2, **given))
    for one, other in in_processes(2, (tmp_path / "two", given), (tmp_path / "shards", {**given, "shard": "full"})):
        both = [(first + second) / 2 for first, second in zip(one["losses"], other["losses"], strict=True)]
        assert both == pytest.approx(alone.losses, rel=1e-4)
        assert one["history"] == other["history"]
        assert one["history"][0] == pytest.approx(alone.history[0], rel=1e-4)


# ---- the average -----------------------------------------------------------------------------------------------------


class Recorder(Observer):
    """The parameters after each step."""

    def __init__(self) -> None:
        self.values: list[dict[str, torch.Tensor]] = []

    def on_step(self, run: Run, steps: int) -> None:
        self.values.append({name: p.detach().double() for name, p in run.model.named_parameters()})


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_by_hand(few: None, tmp_path: Path, warmup: bool) -> None:
    recorder = Recorder()
    given = {"ema": 0.6, "ema_warmup": warmup, "accumulate_steps": 2, "batch_size": 25, "epochs": 1, "lr": 0.02}
    run = train(options(tmp_path, **given), observers=[recorder])
    assert run.ema is not None and len(recorder.values) == run.ema.updates == 5, "one update a step, not a part"
    expected = recorder.values[0]
    for step, values in enumerate(recorder.values[1:], 2):
        decay = min(0.6, 1 - step ** (-2 / 3)) if warmup else 0.6
        expected = {name: decay * value + (1 - decay) * values[name] for name, value in expected.items()}
    for name, value in run.ema.values.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, recorder.values[-1][name].float())


@needs_timm
@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms(warmup: bool) -> None:
    model = nn.Linear(3, 4)
    theirs = import_peer("timm.utils").ModelEmaV3(model, decay=0.8, use_warmup=warmup)
    ours = Ema(model, 0.8, warmup=warmup)
    for step in range(1, 30):
        for parameter in model.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(step))
        ours.update(model)
        theirs.update(model, step=step)
        assert_same(ours.values, dict(theirs.module.named_parameters()), f"step {step}")


def test_the_model_comes_back_exactly() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    ema = Ema(model, 0.9)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 1e-3)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: value.clone() for name, value in ema.values.items()}
    with pytest.raises(KeyboardInterrupt), ema.in_place_of(model):
        assert_same(dict(model.named_parameters()), average, "inside")
        raise KeyboardInterrupt
    assert_same(dict(model.named_parameters()), kept, "model")
    assert_same(ema.values, average, "average")


@needs_timm
@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
def test_a_sharded_model_has_the_same_average(few: None, group: None) -> None:
    found = []
    for shard in ("none", "full"):
        run = begin(shard=shard, **WHOLE)
        for step in training_steps(len(run.data.train), 60, 1)[:3]:
            parts = parts_of(step)
            run.forward.train()
            train_step(run, parts, iter([run.data.train[part.places] for part in parts]), 1e-2)
            run.step += 1
        assert run.ema is not None
        found.append(measure(run))
        assert evaluate(run) == (found[-1]["test_loss"], found[-1]["test_accuracy"]), "the model is back"
        is_sharded = shard == "full"
        held = [*run.ema.values.values(), *run.model.parameters()]
        assert all(isinstance(value, DTensor) == is_sharded for value in held)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["ema_test_loss"] != pytest.approx(found[0]["test_loss"], rel=1e-3)


def test_the_average_is_tested_shown_stored_and_loaded(few: None, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    run = train(options(tmp_path, ema=0.9, epochs=2), observers=[ProgressBar(console)])
    row = run.history[-1]
    assert row["ema_test_loss"] != row["test_loss"]
    assert f"ema {row['ema_test_accuracy']:.2%}" in console.file.getvalue()  # type: ignore[attr-defined]
    images, labels = run.data.test[list(range(len(run.data.test)))]
    for key, prefix in (("ema", "ema_"), (None, "ema_"), ("model", "")):
        loaded = fastvit.load_pretrained(tmp_path / "last.pt", key=key).eval()
        logits = loaded(images)
        assert F.cross_entropy(logits, labels).item() == pytest.approx(row[prefix + "test_loss"], rel=1e-5), key
        assert (logits.argmax(1) == labels).double().mean().item() == row[prefix + "test_accuracy"], key
    assert evaluate(run) == (row["test_loss"], row["test_accuracy"]), "the model is what was trained"


def test_the_best_is_that_of_the_average(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.1, 0.4, 0.2, 0.6, 0.3, 0.5])  # of the model and of the average, of each epoch
    monkeypatch.setattr(loop, "evaluate", lambda run: (1.0, next(accuracies)))
    train(options(tmp_path, epochs=3, ema=0.9))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2


def test_tensorboard_gets_the_average(few: None, tmp_path: Path) -> None:
    events_of = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no TensorBoard")
    result = train(options(tmp_path, epochs=1, ema=0.9), observers=[TensorBoard()])
    events = events_of.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, tag in (("ema_test_accuracy", "accuracy/ema_test"), ("ema_test_loss", "loss/ema_test")):
        assert events.Scalars(tag)[0].value == pytest.approx(result.history[0][name])


# ---- learning rates by depth -----------------------------------------------------------------------------------------


@needs_timm
def test_a_step_moves_each_layer_by_its_own_rate(few: None) -> None:
    """AdamW's first step moves each value by its learning rate, whatever the gradient is, but for the decay."""
    run = begin(layer_decay=0.5, weight_decay=0.0, clip_grad=0.0)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    parts = parts_of(training_steps(len(run.data.train), 32, 1)[0])
    train_step(run, parts, iter([run.data.train[parts[0].places]]), 1e-2)
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in run.model.named_parameters()}
    for name, scale in (("head.weight", 1.0), ("blocks.1.mlp.fc1.weight", 0.5), ("blocks.0.mlp.fc1.weight", 0.25)):
        assert moved[name] == pytest.approx(1e-2 * scale, rel=1e-2), name
    assert moved["patch_embed.proj.weight"] == pytest.approx(1e-2 / 8, rel=1e-2)


@needs_timm
def test_the_history_has_the_rate_of_the_head(few: None, tmp_path: Path) -> None:
    given = {"epochs": 1, "lr": 1e-3, "min_lr": 1e-3, "warmup_epochs": 0}
    run = train(options(tmp_path, layer_decay=0.5, **given))
    assert run.history[0]["lr"] == 1e-3 > run.optimizer.param_groups[0]["lr"]


# ---- repeated augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 2, 3, 500])
def test_each_image_comes_so_often(few: None, repeats: int) -> None:
    images = load_data(TrainOptions()).train
    images.draw(0, 4)
    order, length = images.order.tolist(), len(images)
    images.draw(0, 4, repeats)
    assert images.order.tolist() == [order[place // repeats] for place in range(length)]
    counts = Counter(images.order.tolist())
    assert len(counts) == -(-length // repeats) and set(counts.values()) <= {min(repeats, length), length % repeats}
    assert len(images.random.unique(dim=0)) == length, "another augmentation every time"


def test_repetitions_are_other_crops_in_other_processes(photographs: Path) -> None:
    settings = TrainOptions(data=str(photographs), image_size=16, workers=0)
    images = load_data(settings).train
    images.draw(0, 0, 3)
    for step in training_steps(len(images), 3, 3):
        parts = [parts_of(step, rank, 3)[0].places for rank in range(3)]
        for places in zip(*parts, strict=False):
            assert max(places) - min(places) == 2, "neighbours in the order are in three processes"
    crops, labels = images[[0, 1, 2]]
    assert len(set(images.order[:3].tolist())) == 1 and len(set(labels.tolist())) == 1
    assert not any(torch.equal(crops[one], crops[two]) for one, two in ((0, 1), (0, 2), (1, 2)))


def test_images_of_any_size_are_repeated(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", {**TINY, "patch_size": 8})
    given = {"image_size": 32, "tokens_per_batch": 60, "repeated_aug": 2, "epochs": 1, "model": "vit_digits"}
    run = train(options(tmp_path, data=str(photographs), workers=0, threads=1, **given))
    assert Counter(Counter(run.data.train.order.tolist()).values()) == {2: len(run.data.train) // 2}


# ---- all of it -------------------------------------------------------------------------------------------------------


PARTS: dict[str, Any] = {**WHOLE, "save_steps": 2, "accumulate_steps": 2, "batch_size": 15}


class StopWhole(StopAt):
    """Only once what is being written in the background is there: the same process goes on."""

    def on_step(self, run: Run, steps: int) -> None:
        if self.left == 1 and run.writer is not None:
            run.writer.finish()
        super().on_step(run, steps)


def go_on(output: Path, **given: Any) -> Run:
    """Resume the run in `output` inside an epoch, in what could be another process."""
    torch.manual_seed(12345)
    np.random.seed(12345)
    resumed, contents = resume_options(output, {"output": str(output), **given})
    assert contents["step"], "inside an epoch"
    return train(resumed, resume=contents)


@needs_timm
@pytest.mark.parametrize("stop", [3, 12])
def test_resuming_inside_an_epoch_is_bit_exact(few: None, tmp_path: Path, stop: int) -> None:
    straight = train(options(tmp_path / "straight", **PARTS))
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "broken", **PARTS), observers=[StopAt(stop)])
    result = go_on(tmp_path / "broken")
    assert result.history == straight.history
    assert result.losses == straight.losses[-len(result.losses) :] and len(result.losses) < len(straight.losses)
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "broken"))
    assert one.keys() == other.keys()
    for key in one.keys() - {"options"}:
        assert_same(one[key], other[key], key)


@needs_timm
@pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")
@pytest.mark.parametrize(("before", "after"), [("full", "full"), ("none", "full"), ("full", "none")])
def test_resuming_in_shards_or_out_of_them(few: None, tmp_path: Path, before: str, after: str) -> None:
    straight = train(options(tmp_path / "straight", **PARTS))
    with pytest.raises(KeyboardInterrupt):
        train(options(tmp_path / "broken", shard=before, **PARTS), observers=[StopWhole(13)])
    result = go_on(tmp_path / "broken", shard=after)
    assert len(result.losses) == 16 - 12
    for row, expected in zip(result.history, straight.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert result.ema is not None and straight.ema is not None and result.ema.updates == straight.ema.updates
    images, labels = result.data.test[list(range(len(result.data.test)))]
    last = tmp_path / "broken" / ("last.pt" if after == "none" else "epoch-0002")
    logits = fastvit.load_pretrained(last, key="ema").eval()(images)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(result.history[-1]["ema_test_loss"], rel=1e-5)


@needs_timm
def test_the_digits_are_learned(tmp_path: Path) -> None:
    run = train(options(tmp_path, epochs=8, lr=4e-3, **WHOLE))
    row = run.history[-1]
    assert min(row["test_accuracy"], row["ema_test_accuracy"]) > 0.6, "chance is 0.1"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Crops of two photographs, a class each."""
    from sklearn import datasets

    generator = np.random.default_rng(0)
    for name in ("china", "flower"):
        pixels = datasets.load_sample_image(f"{name}.jpg")
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for index in range(40):
            top, left = (generator.integers(0, side - 64) for side in pixels.shape[:2])
            crop = Image.fromarray(pixels[top : top + 64, left : left + 64])
            crop.save(tmp_path / "photographs" / name / f"{index:02}.png")
    return tmp_path / "photographs"


@needs_timm
def test_two_photographs_are_told_apart(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "DIGITS_ARGUMENTS", {**TINY, "patch_size": 8, "embed_dim": 32})
    given = {"model": "vit_digits", "image_size": 32, "batch_size": 16, "workers": 0, "threads": 1, "lr": 1e-2}
    run = train(options(tmp_path / "run", data=str(photographs), epochs=10, **given, **WHOLE))
    assert len(run.losses) == 10 * 4 and run.data.classes == ("china", "flower")
    row = run.history[-1]
    assert min(row["test_accuracy"], row["ema_test_accuracy"]) > 0.85
