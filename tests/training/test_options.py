"""Options: defaults by data, bad values, the schedule and the decay groups."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

import fastvit
from fastvit.training import OptionError, TrainOptions
from fastvit.training.schedule import learning_rate, make_optimizer


def test_defaults_follow_the_data() -> None:
    digits, folder = TrainOptions(), TrainOptions(data="photos")
    assert (digits.model, digits.epochs, digits.batch_size, digits.workers) == ("vit_digits", 36, 32, 0)
    assert (folder.model, folder.epochs, folder.batch_size, folder.workers) == ("vit_tiny_patch16_224", 100, 64, 2)
    assert digits.min_lr == digits.lr / 100 and digits.warmup_epochs == 3.6
    assert TrainOptions(**asdict(digits)) == digits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", -3),
        ("accumulate_steps", 0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "fast"),
        ("min_lr", 1.0),
        ("min_lr", -0.5),
        ("warmup_epochs", 1000),
        ("weight_decay", -1.0),
        ("clip_grad", -1.0),
        ("label_smoothing", 1.0),
        ("drop_path", 1.0),
        ("validation_share", 0.0),
        ("validation_share", 1.0),
        ("amp", "fp8"),
        ("seed", -1),
        ("seed", 2**31),
        ("threads", -2),
        ("workers", -2),
        ("channels", 2),
        ("image_size", -8),
        ("save_steps", -1),
        ("data", ""),
        ("output", ""),
    ],
)
def test_bad_values_are_named_with_what_is_accepted(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name} = .*: accepted is ") as caught:
        TrainOptions(**{name: value})
    assert caught.value.value is value or caught.value.value == value


def test_schedule_rises_then_falls_to_the_lowest() -> None:
    options = TrainOptions(epochs=10, warmup_epochs=1, lr=1.0, min_lr=0.01)
    rates = [learning_rate(step, 10, options) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))
    assert rates[-1] == pytest.approx(0.01)
    assert learning_rate(0, 1, TrainOptions(epochs=1, warmup_epochs=0, lr=1.0)) == 1.0


def test_what_decays_is_what_timm_decays() -> None:
    timm = pytest.importorskip("fastvit.peers").import_timm()
    arguments: dict[str, Any] = {
        "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "reg_tokens": 2, "init_values": 1e-5,
    }  # fmt: skip
    ours = fastvit.VisionTransformer(**arguments)
    theirs = timm.models.vision_transformer.VisionTransformer(**arguments)
    from timm.optim import param_groups_weight_decay

    expected = param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay())
    names = {id(p): n for n, p in theirs.named_parameters()}
    own_names = {id(p): n for n, p in ours.named_parameters()}
    found = make_optimizer(ours, lr=1.0, weight_decay=0.05).param_groups
    for group, reference in zip(found, expected, strict=True):
        assert group["weight_decay"] == reference["weight_decay"]
        assert {own_names[id(p)] for p in group["params"]} == {names[id(p)] for p in reference["params"]}  # type: ignore


def test_resuming_refuses_what_would_change_the_training() -> None:
    options = TrainOptions(seed=3)
    assert options.resumed_with({"device": "cpu", "workers": 1, "seed": 3}).workers == 1
    with pytest.raises(OptionError, match="lr = 0.5: accepted is 0.002 when resuming"):
        options.resumed_with({"lr": 0.5})
