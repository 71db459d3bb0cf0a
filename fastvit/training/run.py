"""The state of a run, and how it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.backend import resolve
from fastvit.checkpoints.loading import load_pretrained

from .checkpoint import load_weights
from .distributed import Team
from .ema import Ema
from .errors import UserError
from .image_set import ImageData
from .mixing import Mixing
from .models import build_model, model_arguments
from .options import TrainOptions
from .schedule import make_optimizer
from .shard_writer import KEPT, ShardWriter
from .sharding import spread
from .throughput import Throughput, flops_of


@dataclass
class Run:
    """A run in this process: what `train` works on and gives back.

    Attributes:
        forward: the model as the loop calls it: in DDP, in shards, compiled.
        arguments: those that `model` was built with.
        writer: of checkpoints, where the model is in shards.
        planned_world: for how many processes its steps were made, which are the same on another number of them.
        epoch, step: how many are finished; of the steps, in the current epoch, whose losses add up to `epoch_loss`.
        mixing, ema: where the options ask for them.
        history: a row an epoch: epoch, train_loss (the mean over its steps), test_loss, test_accuracy, lr (the head's);
            with `ema` its ema_test_loss and ema_test_accuracy.
        losses: of each step of this process, from where it resumed.
        seconds: that `train` took.
    """

    options: TrainOptions
    data: ImageData
    team: Team
    model: nn.Module
    forward: Any
    arguments: dict[str, Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    planned_world: int
    throughput: Throughput
    writer: ShardWriter | None = None
    mixing: Mixing | None = None
    ema: Ema | None = None
    epoch: int = 0
    step: int = 0
    epoch_loss: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    @property
    def best_epoch(self) -> int:
        """The first one with the highest test accuracy, of `ema` where there is one; 0 before there is one."""
        name = "ema_test_accuracy" if self.ema else "test_accuracy"
        return max(self.history, key=lambda row: row[name], default={"epoch": 0})["epoch"]

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.history[-1]["test_accuracy"]


def start(options: TrainOptions, data: ImageData, team: Team, *, resumed: bool = False) -> Run:
    """A run before its first step; where it is `resumed`, a checkpoint's weights will come in."""
    _check_backend(team.device)
    torch.manual_seed(options.seed)  # the same weights in every process
    arguments = model_arguments(options.model, {**data.arguments, "drop_path_rate": options.drop_path})
    model = build_model(options.model, arguments)
    if options.init_from and not resumed:
        load_weights(model, load_pretrained(options.init_from).state_dict(), options.init_from)
    forward = spread(model, options, team)
    torch.manual_seed(options.seed + 7919 * team.rank)  # other dropout in each process
    return Run(
        options=options,
        data=data,
        team=team,
        model=model,
        forward=forward,
        arguments=arguments,
        optimizer=make_optimizer(
            model, lr=options.lr, weight_decay=options.weight_decay, layer_decay=options.layer_decay
        ),
        scaler=torch.amp.GradScaler(team.device.type, enabled=options.amp == "fp16"),
        planned_world=team.world,
        throughput=Throughput(flops_of(model)),
        writer=None if options.shard == "none" else ShardWriter(Path(options.output), team, options.keep or KEPT),
        mixing=Mixing(options, len(data.classes)) if options.mixes else None,
        ema=Ema(model, options.ema, warmup=options.ema_warmup) if options.ema else None,
    )


def _check_backend(device: torch.device) -> None:
    """Refuse a forced backend that can't run here before anything is built."""
    try:
        resolve(None, device.type, False, "patch_embed")
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
