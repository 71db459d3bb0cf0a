"""The state of a run: how it starts, what its checkpoints hold, and how it comes back from one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvit.backend import resolve
from fastvit.checkpoints.errors import CheckpointError
from fastvit.checkpoints.loading import load_pretrained

from .checkpoint import load_checkpoint, load_weights, save_checkpoint
from .distributed import Team
from .errors import UserError
from .image_set import ImageData
from .models import build_model, model_arguments
from .options import TrainOptions
from .schedule import make_optimizer
from .sharding import spread

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"


@dataclass
class Run:
    """A run in this process: what `train` works on and gives back.

    Attributes:
        forward: the model as the loop calls it: in DDP, in shards, compiled.
        arguments: those that `model` was built with.
        planned_world: for how many processes its steps were made, which are the same on another number of them.
        epoch, step: how many are finished; of the steps, in the current epoch, whose losses add up to `epoch_loss`.
        history: a row an epoch: epoch, train_loss (the mean over its steps), test_loss, test_accuracy, lr.
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
    epoch: int = 0
    step: int = 0
    epoch_loss: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.history[-1]["test_accuracy"]


def start(options: TrainOptions, data: ImageData, team: Team) -> Run:
    """A run before its first step."""
    _check_backend(team.device)
    torch.manual_seed(options.seed)  # the same weights in every process
    arguments = model_arguments(options.model, {**data.arguments, "drop_path_rate": options.drop_path})
    model = build_model(options.model, arguments)
    if options.init_from:
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
        optimizer=make_optimizer(model, lr=options.lr, weight_decay=options.weight_decay),
        scaler=torch.amp.GradScaler(team.device.type, enabled=options.amp == "fp16"),
        planned_world=team.world,
    )


def _check_backend(device: torch.device) -> None:
    """Refuse a forced backend that can't run here before anything is built."""
    try:
        resolve(None, device.type, False, "patch_embed")
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def save(run: Run, *, is_best: bool = False) -> None:
    """Write last.pt (and best.pt) and metrics.jsonl. Every process must call; the first one writes."""
    device = run.team.device
    # The sum of losses is each process's own: all are stored, so that the mean of the epoch comes out the same.
    own: dict[str, Any] = {"torch": torch.get_rng_state(), "epoch_loss": run.epoch_loss}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    processes = run.team.gather(own)
    if run.team.is_first:
        contents = {
            "options": asdict(run.options),
            "data": {"fingerprint": run.data.fingerprint, "classes": list(run.data.classes)},
            "config": {"fastvit": _plain(run.arguments)},
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "epoch": run.epoch,
            "step": run.step,
            "planned_world": run.planned_world,
            "processes": processes,
            "history": run.history,
        }
        for name in (BEST, LAST) if is_best else (LAST,):
            save_checkpoint(run.output / name, contents)
        lines = "".join(json.dumps(row) + "\n" for row in run.history)
        (run.output / METRICS).write_text(lines, encoding="utf-8")
    run.team.wait()


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `load_pretrained` can't see in the tensors, such as the number of heads. It sees classes of layers there."""
    held = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str, tuple))}
    return {name: value for name, value in held.items() if name != "drop_path_rate"}


def restore(run: Run, contents: dict[str, Any]) -> None:
    """Put the state of a checkpoint into a run that `start` made from the checkpoint's options."""
    stored = contents["data"]
    if stored["fingerprint"] != run.data.fingerprint:
        raise CheckpointError(
            f"--resume: the images of {run.options.data} are not those the checkpoint was trained on "
            f"({len(stored['classes'])} classes then, {len(run.data.classes)} now, or other files)"
        )
    load_weights(run.model, contents["model"], "--resume")
    try:
        run.optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:
            run.scaler.load_state_dict(contents["scaler"])
        run.epoch, run.step = int(contents["epoch"]), int(contents["step"])
        run.planned_world = int(contents["planned_world"])
        run.history = [dict(row) for row in contents["history"]]
        _restore_process(run, contents["processes"])
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"--resume: the state in the checkpoint does not fit the run ({error})") from error


def _restore_process(run: Run, processes: list[dict[str, Any]]) -> None:
    """The running sum, and random numbers where the run has as many processes as the checkpoint's had."""
    run.epoch_loss = sum(float(one["epoch_loss"]) for one in processes) / len(processes)
    if len(processes) != run.team.world:
        return  # dropout and stochastic depth draw from the seeds of a new run
    own = processes[run.team.rank]
    run.epoch_loss = float(own["epoch_loss"])
    torch.set_rng_state(own["torch"])
    if run.team.device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], run.team.device)


def resume_options(path: str | Path, given: dict[str, Any]) -> tuple[TrainOptions, dict[str, Any]]:
    """The options and contents of the checkpoint at `path`, with what was `given` on top.

    The run goes on writing where the checkpoint lies, unless `given` names another output.
    """
    contents = load_checkpoint(path)
    stored = TrainOptions(**{**contents["options"], "output": str(Path(path).resolve().parent)})
    options = stored.resumed_with(given)
    if contents["epoch"] >= options.epochs:
        raise CheckpointError(f"{path}: this run is complete ({options.epochs} epochs); nothing is left to do")
    return options, contents
