"""The training loop: one run from options or from a checkpoint, in one process or several."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvit.backend import resolve

from .checkpoint import load_checkpoint, load_weights, read_weights, save_checkpoint
from .data import Batch, ImageData, evaluation_batches, iterate, load_data, training_batches
from .distributed import Team, join_team
from .errors import CheckpointError, OptionError, TrainingError, UserError
from .models import build_model, model_arguments
from .observers import Observer
from .options import TrainOptions
from .schedule import learning_rate, make_optimizer

LAST, BEST, METRICS = "last.pt", "best.pt", "metrics.jsonl"
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the GPU


@dataclass
class TrainResult:
    """What a run gave. `losses` has each step of this process's run (from where it resumed)."""

    test_accuracy: float
    history: list[dict[str, float]]
    losses: list[float]
    model: nn.Module
    data: ImageData
    output: Path
    seconds: float


@dataclass
class Run:
    """The state of a run: all that a checkpoint stores and restores."""

    options: TrainOptions
    data: ImageData
    team: Team
    model: nn.Module
    arguments: dict[str, Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    epoch_loss: float = 0.0  # sum over those steps
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return Path(self.options.output)

    @property
    def best(self) -> float:
        return max((row["test_accuracy"] for row in self.history), default=-1.0)


def train(
    options: TrainOptions, *, resume: dict[str, Any] | None = None, observers: Sequence[Observer] = ()
) -> TrainResult:
    """Train by `options`; with `resume`, go on from that checkpoint's contents.

    Writes last.pt, best.pt and metrics.jsonl to `options.output`. Raises UserError for what the user can mend.
    """
    started = time.perf_counter()
    with join_team(options.device) as team, _threads(options.threads):
        if resume is None and (Path(options.output) / LAST).exists():
            raise OptionError(
                "output", options.output, f"a folder without a run; go on with --resume {options.output}/{LAST}"
            )
        run = start(options, load_data(options), team)
        if resume is not None:
            restore(run, resume)
        watching = list(observers) if team.is_first else []
        _each(watching, "on_start", run)
        try:
            forward = _forward(run)
            while run.epoch < options.epochs:
                train_epoch(run, forward, watching)
                finish_epoch(run, watching)
        finally:
            _each(watching, "on_end", run)
    return TrainResult(
        test_accuracy=run.history[-1]["test_accuracy"],
        history=run.history,
        losses=run.losses,
        model=run.model,
        data=run.data,
        output=run.output,
        seconds=time.perf_counter() - started,
    )


def start(options: TrainOptions, data: ImageData, team: Team) -> Run:
    """A run before its first step."""
    _check_backend(team.device)
    random.seed(options.seed)
    torch.manual_seed(options.seed)  # the same weights in every process
    arguments = model_arguments(options, data)
    model = build_model(options.model, arguments)
    if options.init_from:
        load_weights(model, read_weights(options.init_from), options.init_from)
    model.to(team.device)
    torch.manual_seed(options.seed + 7919 * team.rank)  # other dropout in each process
    return Run(
        options=options,
        data=data,
        team=team,
        model=model,
        arguments=arguments,
        optimizer=make_optimizer(model, lr=options.lr, weight_decay=options.weight_decay),
        scaler=torch.amp.GradScaler(team.device.type, enabled=options.amp == "fp16"),
    )


def _check_backend(device: torch.device) -> None:
    """Refuse a forced backend that can't run here before anything is built."""
    try:
        resolve(None, device.type, float64=False)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def _forward(run: Run) -> nn.Module:
    model = run.team.wrap(run.model)
    return torch.compile(model) if run.options.compile else model  # type: ignore[return-value]


def batches_of(run: Run, epoch: int) -> list[list[int]]:
    options = run.options
    found = training_batches(
        len(run.data.train),
        options.batch_size,
        seed=options.seed,
        epoch=epoch,
        rank=run.team.rank,
        world=run.team.world,
    )
    if not found:
        raise TrainingError(f"{len(run.data.train)} training images are too few for {run.team.world} processes")
    return found


def train_epoch(run: Run, forward: nn.Module, observers: Sequence[Observer] = ()) -> None:
    """One epoch, or the rest of one, from `run.step` on."""
    options, device = run.options, run.team.device
    forward.train()
    run.data.train.draw(options.seed, run.epoch)
    batches = batches_of(run, run.epoch)
    remaining = iterate(run.data.train, batches[run.step :], workers=options.workers, pin=device.type == "cuda")
    waiting: list[Tensor] = []  # losses still on the device
    for batch in remaining:
        rate = learning_rate(
            run.epoch * len(batches) + run.step,
            total=options.epochs * len(batches),
            warmup=round(options.warmup_epochs * len(batches)),
            lr=options.lr,
            min_lr=options.min_lr,
        )
        waiting.append(train_step(run, forward, batch, rate))
        run.step += 1
        if device.type == "cpu" or len(waiting) == CHECK_EVERY or run.step == len(batches):
            _collect(run, waiting)
        _each(observers, "on_step", run, len(batches))
        if options.save_steps and run.step % options.save_steps == 0 and run.step < len(batches):
            _collect(run, waiting)
            save(run)


def train_step(run: Run, forward: nn.Module, batch: Batch, rate: float) -> Tensor:
    """One step on one batch; the loss, still on the device."""
    options, device = run.options, run.team.device
    images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    with autocast(options, device):
        loss = F.cross_entropy(forward(images), labels, label_smoothing=options.label_smoothing)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    if options.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), options.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach()


def autocast(options: TrainOptions, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES.get(options.amp), enabled=options.amp != "off")


def _collect(run: Run, waiting: list[Tensor]) -> None:
    """Move the waiting losses to the run; stop where one is not finite."""
    if not waiting:
        return
    for value in torch.stack(waiting).float().tolist():
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {run.epoch + 1}, step {run.step}; "
                f"try a lower --lr (now {run.options.lr:g}), --clip-grad or --amp off"
            )
        run.losses.append(value)
        run.epoch_loss += value
    waiting.clear()


def finish_epoch(run: Run, observers: Sequence[Observer] = ()) -> None:
    """Measure on the test set, note it, save."""
    test_loss, test_accuracy = evaluate(run)
    steps = torch.tensor([run.epoch_loss, run.step], dtype=torch.float64)
    if run.team.device.type == "cuda":
        steps = steps.to(run.team.device)
    loss_sum, count = run.team.total(steps).tolist()
    best_before = run.best
    run.epoch += 1
    run.history.append(
        {
            "epoch": run.epoch,
            "train_loss": loss_sum / count,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": run.optimizer.param_groups[0]["lr"],
        }
    )
    run.step, run.epoch_loss = 0, 0.0
    save(run, is_best=test_accuracy > best_before)
    _each(observers, "on_epoch", run)


@torch.no_grad()
def evaluate(run: Run) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the whole test set, every image once over all processes."""
    options, device = run.options, run.team.device
    run.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, hits, images
    batches = evaluation_batches(len(run.data.test), 4 * options.batch_size, rank=run.team.rank, world=run.team.world)
    for images, labels in iterate(run.data.test, batches, workers=options.workers):
        images, labels = images.to(device), labels.to(device)
        with autocast(options, device):
            logits = run.model(images)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        hits = (logits.argmax(-1) == labels).sum()
        sums += torch.stack([loss.double(), hits.double(), torch.tensor(len(labels), device=device).double()])
    loss_sum, hit_count, count = run.team.total(sums).tolist()
    return loss_sum / count, hit_count / count


def save(run: Run, *, is_best: bool = False) -> None:
    """Write last.pt (and best.pt) and metrics.jsonl. Every process must call; the first one writes."""
    random_states = run.team.gather_bytes(torch.get_rng_state())
    gpu_states = (
        run.team.gather_bytes(torch.cuda.get_rng_state(run.team.device)) if run.team.device.type == "cuda" else []
    )
    # Each process has its own running sum: store all, so that the mean of the epoch comes out the same.
    sums = run.team.gather_bytes(torch.tensor([run.epoch_loss], dtype=torch.float64).view(torch.uint8))
    if run.team.is_first:
        contents = {
            "options": run.options.to_dict(),
            "data": {"fingerprint": run.data.fingerprint, "classes": list(run.data.classes)},
            "arguments": run.arguments,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "epoch": run.epoch,
            "step": run.step,
            "epoch_losses": [part.view(torch.float64).item() for part in sums],
            "random": {"torch": random_states, "cuda": gpu_states, "python": random.getstate()},
            "history": run.history,
        }
        if is_best:
            save_checkpoint(run.output / BEST, contents)
        save_checkpoint(run.output / LAST, contents)
        lines = "".join(json.dumps(row) + "\n" for row in run.history)
        (run.output / METRICS).write_text(lines, encoding="utf-8")
    run.team.wait()


def restore(run: Run, contents: dict[str, Any]) -> None:
    """Put the state of a checkpoint into a run that `start` made from the checkpoint's options."""
    source = "--resume"
    stored = contents["data"]
    if stored["fingerprint"] != run.data.fingerprint:
        raise CheckpointError(
            f"{source}: the images of {run.options.data} are not those the checkpoint was trained on "
            f"({len(stored['classes'])} classes then, {len(run.data.classes)} now, or other files)"
        )
    load_weights(run.model, contents["model"], source)
    try:
        run.optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:
            run.scaler.load_state_dict(contents["scaler"])
        run.epoch, run.step = int(contents["epoch"]), int(contents["step"])
        run.history = [dict(row) for row in contents["history"]]
        _restore_random(run, contents)
    except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{source}: the state in the checkpoint does not fit the run ({error})") from error


def _restore_random(run: Run, contents: dict[str, Any]) -> None:
    """Random numbers and the running sum, where the run has as many processes as the checkpoint's had."""
    states, rank = contents["random"], run.team.rank
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    if len(states["torch"]) != run.team.world:
        if run.step:
            raise CheckpointError(
                f"--resume: the checkpoint was saved inside an epoch by {len(states['torch'])} processes; "
                f"accepted is that number, not {run.team.world}"
            )
        return
    run.epoch_loss = float(contents["epoch_losses"][rank])
    torch.set_rng_state(states["torch"][rank])
    if run.team.device.type == "cuda" and states["cuda"]:
        torch.cuda.set_rng_state(states["cuda"][rank], run.team.device)


def resume_options(path: str | Path, given: dict[str, Any]) -> tuple[TrainOptions, dict[str, Any]]:
    """The options and contents of the checkpoint at `path`, with what was `given` on top.

    The run goes on writing where the checkpoint lies, unless `given` names another output.
    """
    contents = load_checkpoint(path)
    stored = TrainOptions.from_dict({**contents["options"], "output": str(Path(path).resolve().parent)})
    options = stored.resumed_with(given)
    if contents["epoch"] >= options.epochs:
        raise CheckpointError(f"{path}: this run is complete ({options.epochs} epochs); nothing is left to do")
    return options, contents


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _each(observers: Sequence[Observer], event: str, *arguments: Any) -> None:
    for observer in observers:
        getattr(observer, event)(*arguments)
