"""Options: defaults by data, bad values, the schedule and the decay groups."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
from torch import nn

import fastvit
from fastvit.training import OptionError, TrainOptions
from fastvit.training.mixing import Mixing
from fastvit.training.schedule import learning_rate, make_optimizer
from tests.libraries import peer


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
        ("mixup", -0.1),
        ("mixup", "much"),
        ("cutmix", math.inf),
        ("mixup_prob", 1.1),
        ("mixup_switch_prob", -0.1),
        ("ema", 1.0),
        ("ema", -0.5),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("repeated_aug", 0),
        ("repeated_aug", 1.5),
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
    timm = peer("timm")
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


RECIPE: dict[str, Any] = {
    "mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.9, "mixup_switch_prob": 0.4, "ema": 0.9, "ema_warmup": True,
    "layer_decay": 0.8, "repeated_aug": 3,
}  # fmt: skip


def test_the_recipe_is_stored_and_stays_when_resuming() -> None:
    options = TrainOptions(**RECIPE)
    assert TrainOptions(**asdict(options)) == options.resumed_with(RECIPE) == options
    for name, value in RECIPE.items():
        other = not value if isinstance(value, bool) else 1 if name == "repeated_aug" else value / 2
        with pytest.raises(OptionError, match=f"^{name} = {other}: accepted is {value} when resuming"):
            options.resumed_with({name: other})


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ({"mixup_prob": 0.5}, "with --mixup or --cutmix alone"),
        ({"mixup_switch_prob": 0.3, "mixup": 0.8}, "with both --mixup and --cutmix alone"),
        ({"ema_warmup": True}, "with --ema alone"),
        ({"repeated_aug": 3, "augment": False}, "with augmentation alone"),
        ({"mixup": 0.8, "data": "photos", "tokens_per_batch": 400}, "0 beside --tokens-per-batch"),
        ({"cutmix": 1.0, "data": "photos", "tokens_per_batch": 400}, "0 beside --tokens-per-batch"),
    ],
)
def test_what_of_the_recipe_does_not_go_together(given: dict[str, Any], accepted: str) -> None:
    with pytest.raises(OptionError, match=f"^{next(iter(given))} = .*: accepted is {accepted}"):
        TrainOptions(**given)


def test_a_missing_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name} is not there")

    monkeypatch.setattr("fastvit.training.options.import_peer", missing)
    message = r"accepted is the default \(leave it out\) without timm; `pip install timm` adds it \(timm"
    with pytest.raises(OptionError, match=f"^cutmix = 1.0: {message}"):
        Mixing(TrainOptions(cutmix=1.0), 10)
    with pytest.raises(OptionError, match=f"^layer_decay = 0.5: {message}"):
        make_optimizer(nn.Linear(2, 2), lr=1.0, weight_decay=0.1, layer_decay=0.5)


@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_rates_by_depth_are_timms(reg_tokens: int) -> None:
    timm = peer("timm")
    from timm.optim import param_groups_layer_decay

    arguments: dict[str, Any] = {
        "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 3, "num_heads": 2,
        "reg_tokens": reg_tokens, "init_values": 1e-5,
    }  # fmt: skip
    ours = fastvit.VisionTransformer(**arguments)
    theirs = timm.models.vision_transformer.VisionTransformer(**arguments)
    exempt = theirs.no_weight_decay()
    expected = by_name(theirs, param_groups_layer_decay(theirs, 0.05, exempt, layer_decay=0.7))
    found = by_name(ours, make_optimizer(ours, lr=1.0, weight_decay=0.05, layer_decay=0.7).param_groups)
    assert found == expected
    plain = by_name(ours, make_optimizer(ours, lr=1.0, weight_decay=0.05).param_groups)
    assert {name: decay for name, (decay, _) in found.items()} == {name: decay for name, (decay, _) in plain.items()}
    # By hand: the norm at the end is counted with the last block or the head, the stem is the deepest.
    scales = {name: scale for name, (_, scale) in found.items()}
    assert scales["head.weight"] == 1
    for deeper, nearer in (("pos_embed", "blocks.0."), ("blocks.0.", "blocks.1."), ("blocks.1.", "blocks.2.")):
        one, other = (next(s for name, s in scales.items() if name.startswith(start)) for start in (deeper, nearer))
        assert one == pytest.approx(0.7 * other)


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Weight decay and scale of the learning rate of each parameter."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in groups
        for parameter in group["params"]
    }


def test_another_way_of_sharding_may_go_on() -> None:
    hybrid = TrainOptions(shard="hybrid", shard_size=2)
    assert hybrid.resumed_with({}).shard_size == 2
    assert hybrid.resumed_with({"shard": "full"}).shard_size == 0
    assert hybrid.resumed_with({"shard": "hybrid", "shard_size": 4}).shard_size == 4
    with pytest.raises(OptionError, match="shard_size = 2: accepted is with --shard hybrid alone"):
        TrainOptions(shard="full", shard_size=2)
    assert TrainOptions(shard="full", keep=9).resumed_with({"shard": "none"}).keep == 0
    with pytest.raises(OptionError, match="keep = 9: accepted is with --shard alone"):
        TrainOptions(keep=9)
    with pytest.raises(OptionError, match="shard = 'some': accepted is one of none, full, hybrid"):
        TrainOptions(shard="some")
