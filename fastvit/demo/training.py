"""Steps 2 and 3 of the demo: train on the digits with two seeds; the first losses beside timm's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.training import TrainOptions, TrainResult, train
from fastvit.training.distributed import Team, choose_device
from fastvit.training.loop import Run, batches_of, start, train_step
from fastvit.training.models import DIGITS_ARGUMENTS
from fastvit.training.observers import Observer
from fastvit.training.schedule import learning_rate, make_optimizer

SEEDS = (0, 1)
COMPARED_STEPS = 50
# Two implementations of the same mathematics round differently in fp32, and training multiplies the difference.
LOSS_TOLERANCE = 1e-5


def train_seeds(
    folder: Path, *, quick: bool, observers: Sequence[Observer], seeds: Sequence[int] = SEEDS
) -> list[TrainResult]:
    """The digits with each seed, from the same options as `fastvit train --data digits`."""
    import shutil

    results = []
    for seed in seeds:
        output = folder / f"seed{seed}"
        shutil.rmtree(output, ignore_errors=True)  # an earlier demo's run
        options = TrainOptions(seed=seed, output=str(output), epochs=2 if quick else 0, tensorboard=False)
        results.append(train(options, observers=observers))
    return results


@dataclass
class Comparison:
    """Losses of the first steps, ours and timm's; `skipped` says why there are none."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    skipped: str = ""

    @property
    def largest_difference(self) -> float:
        return max((abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True)), default=0.0)

    @property
    def ok(self) -> bool:
        return bool(self.skipped) or self.largest_difference <= LOSS_TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "steps": len(self.ours),
            "largest_difference": self.largest_difference,
            "tolerance": LOSS_TOLERANCE,
            "ours": self.ours,
            "theirs": self.theirs,
        }


def compare_with_timm(steps: int = COMPARED_STEPS) -> Comparison:
    """Train ours and timm's for some steps from the same weights, on the same batches, with the same optimiser."""
    from fastvit.peers import import_timm, timm_missing

    reason = timm_missing()
    if reason:
        return Comparison(skipped=reason)
    import_timm()
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    from fastvit.training.data import load_data

    options = TrainOptions(tensorboard=False)
    data = load_data(options)
    team = Team(choose_device("auto"))
    ours = start(options, data, team)
    arguments = {k: v for k, v in ours.arguments.items() if k not in ("mean", "std")}
    timm_model = TimmTransformer(**{**DIGITS_ARGUMENTS, **arguments})
    timm_model.load_state_dict(ours.model.state_dict(), strict=True)
    theirs = start(options, data, team)
    theirs.model = timm_model.to(team.device)
    theirs.optimizer = make_optimizer(timm_model, lr=options.lr, weight_decay=options.weight_decay)
    # timm's model takes normalised float images: what its loader makes of raw ones.
    normalised = Normalised(timm_model, data.mean, data.std)
    return Comparison(_losses(ours, ours.model, steps), _losses(theirs, normalised, steps))


class Normalised(nn.Module):
    """A model of float images given raw ones."""

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return self.model((images.float() / 255 - mean) / std)


def _losses(run: Run, forward: nn.Module, steps: int) -> list[float]:
    options = run.options
    losses: list[float] = []
    forward.train()
    epoch = 0
    while len(losses) < steps:
        run.data.train.draw(options.seed, epoch)
        batches = batches_of(run, epoch)
        for batch in batches:
            rate = learning_rate(
                len(losses),
                total=options.epochs * len(batches),
                warmup=round(options.warmup_epochs * len(batches)),
                lr=options.lr,
                min_lr=options.min_lr,
            )
            losses.append(train_step(run, forward, run.data.train.load(batch), rate).item())
            if len(losses) == steps:
                break
        epoch += 1
    return losses
