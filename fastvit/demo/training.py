"""Steps 2 and 3 of the demo: train on the digits with two seeds; the losses of an epoch beside timm's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastvit.peers import import_peer, peer_missing
from fastvit.training import Run, TrainOptions, train
from fastvit.training.digits import load_digits
from fastvit.training.distributed import Team, choose_device
from fastvit.training.loop import train_epoch
from fastvit.training.models import DIGITS_ARGUMENTS
from fastvit.training.observers import Observer
from fastvit.training.run import start
from fastvit.training.schedule import make_optimizer

SEEDS = (0, 1)
# Two implementations of the same mathematics round differently in fp32, and training multiplies the difference.
LOSS_TOLERANCE = 1e-5


def train_seeds(folder: Path, *, quick: bool, observers: Sequence[Observer]) -> list[Run]:
    """The digits with each seed, from the same options as `fastvit train --data digits`."""
    runs = []
    for seed in SEEDS:
        output = folder / f"seed{seed}"
        shutil.rmtree(output, ignore_errors=True)  # an earlier demo's run
        options = TrainOptions(seed=seed, output=str(output), epochs=2 if quick else 0, tensorboard=False)
        runs.append(train(options, observers=observers))
    return runs


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
        found = {"steps": len(self.ours), "largest_difference": self.largest_difference, "tolerance": LOSS_TOLERANCE}
        return {**asdict(self), **found, "ok": self.ok}


def compare_with_timm() -> Comparison:
    """Train ours and timm's for an epoch from the same weights, on the same batches, with the same optimiser."""
    reason = peer_missing("timm")
    if reason:
        return Comparison(skipped=reason)
    options = TrainOptions(tensorboard=False)
    data, team = load_digits(options), Team(choose_device("auto"))
    ours, theirs = start(options, data, team), start(options, data, team)
    arguments = {**DIGITS_ARGUMENTS, **ours.arguments}
    mean, std = (torch.tensor(arguments.pop(name), device=team.device).view(-1, 1, 1) for name in ("mean", "std"))
    theirs.model = import_peer("timm.models.vision_transformer").VisionTransformer(**arguments).to(team.device)
    theirs.model.load_state_dict(ours.model.state_dict())
    theirs.forward = theirs.model
    theirs.optimizer = make_optimizer(theirs.model, lr=options.lr, weight_decay=options.weight_decay)
    # timm's model takes normalised float images: what its loader makes of raw ones.
    theirs.model.register_forward_pre_hook(lambda _, images: ((images[0].float() / 255 - mean) / std,))
    for run in (ours, theirs):
        train_epoch(run)
    return Comparison(ours.losses, theirs.losses)
