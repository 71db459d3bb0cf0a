"""The training loop: one run from options or from a checkpoint, in one process or several."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvit._version import __version__

from .batches import (
    Part,
    Step,
    evaluation_parts,
    packed_evaluation_parts,
    packed_training_steps,
    parts_of,
    training_steps,
)
from .digits import load_digits
from .distributed import join_team
from .errors import OptionError, TrainingError
from .failures import check_agreement, told_by_the_first
from .folder import load_folder
from .image_set import Batch, ImageData, iterate
from .observers import Observer
from .options import TrainOptions
from .run import Run, start
from .saving import is_of, last_of, progress_of, restore, save
from .schedule import learning_rate
from .sharding import gather_nothing
from .shards import holds_shards, load_shards
from .throughput import tokens_of

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the GPU


def train(
    options: TrainOptions,
    *,
    resume: dict[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    describe: Callable[[Exception], str] = str,
) -> Run:
    """Train by `options`; with `resume`, go on from that checkpoint's contents.

    Writes checkpoints and metrics.jsonl to `options.output`. Raises UserError or CheckpointError for what the user can
    mend: in several processes the first one has them all, in lines that `describe` makes, and the others end.
    """
    started = time.perf_counter()
    with (
        join_team(options.device, always=options.shard != "none") as team,
        told_by_the_first(team, describe),
        limited_threads(options.threads),
    ):
        goes_on_here = resume is not None and is_of(resume, options.output)
        if not goes_on_here and (last := last_of(options.output)):
            raise OptionError("output", options.output, f"a folder without a run; go on with --resume {last}")
        data = load_data(options)
        check_agreement(team, {**versions(), **progress_of(resume), "data": data.fingerprint, **options.trained()})
        run = start(options, data, team, resumed=resume is not None)
        if resume is not None:
            restore(run, resume)
        watching = list(observers) if team.is_first else []
        _each(watching, "on_start", run)
        try:
            while run.epoch < options.epochs:
                train_epoch(run, watching)
                finish_epoch(run, watching)
            if run.writer is not None:
                run.writer.finish()
        finally:
            _each(watching, "on_end", run)
            if run.writer is not None:
                run.writer.settle()
    run.seconds = time.perf_counter() - started
    return run


def versions() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:2]))
    return {"fastvit": __version__, "torch": torch.__version__, "Python": python}


def load_data(options: TrainOptions) -> ImageData:
    """The images that `options.data` names. Raises DataError or OptionError where they cannot be used."""
    if options.is_digits:
        return load_digits(options)
    return load_shards(options) if holds_shards(Path(options.data).expanduser()) else load_folder(options)


def train_epoch(run: Run, observers: Sequence[Observer] = ()) -> None:
    """One epoch, or the rest of one, from `run.step` on."""
    options, team, images = run.options, run.team, run.data.train
    run.forward.train()
    images.draw(options.seed, run.epoch, options.repeated_aug)
    steps = epoch_steps(run)
    parts = [parts_of(step, team.rank, team.world) for step in steps[run.step :]]
    places = [part.places for step in parts for part in step]
    speed, tokens = run.throughput, images.tokens or [tokens_of(run.model)] * len(images)
    batches = speed.watched(iterate(images, places, workers=options.workers, pin=team.device.type == "cuda"))
    speed.pause()
    waiting: list[Tensor] = []  # losses still on the device
    for whole, step in zip(steps[run.step :], parts, strict=True):
        rate = learning_rate(run.epoch * len(steps) + run.step, len(steps), options)
        waiting.append(train_step(run, step, batches, rate))
        run.step += 1
        to_be_saved = options.save_steps and run.step % options.save_steps == 0 and run.step < len(steps)
        if team.device.type == "cpu" or len(waiting) == CHECK_EVERY or run.step == len(steps) or to_be_saved:
            _collect(run, waiting)
        speed.count(sum(map(len, whole)), [tokens[place] for part in step for place in part.places if part.share])
        _each(observers, "on_step", run, len(steps))
        if to_be_saved:
            save(run)


def epoch_steps(run: Run) -> list[Step]:
    """Of the epoch that the training set has drawn."""
    options, images = run.options, run.data.train
    ways = run.planned_world * options.accumulate_steps
    if options.tokens_per_batch:
        return packed_training_steps(images.tokens, options.tokens_per_batch, ways)
    return training_steps(len(images), options.batch_size, ways)


def train_step(run: Run, parts: Sequence[Part], batches: Iterator[Batch], rate: float) -> Tensor:
    """One step on the next batches, one for each of `parts`; this process's share of the loss, still on the device.

    The mean of these shares over all processes is the mean loss over the images of the step, and the gradient is that
    of this mean, whoever has how many of the images.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1)
    run.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=run.team.device)
    for index, (part, batch) in enumerate(zip(parts, batches, strict=False)):
        with run.team.gradients(run.forward, are_last=index == len(parts) - 1):
            loss = batch_loss(run, batch, index) * (part.share * run.team.world)
            run.scaler.scale(loss).backward()
        total += loss.detach()
    if run.options.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), run.options.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema:
        run.ema.update(run.model)
    return total


def batch_loss(run: Run, batch: Batch, index: int) -> Tensor:
    """The mean over a batch. `index`: of this process's parts of the step."""
    images, targets = (value.to(run.team.device, non_blocking=True) for value in batch)
    smoothing = run.options.label_smoothing
    if run.mixing:
        part = index * run.team.world + run.team.rank
        images, targets = run.mixing(images, targets, epoch=run.epoch, step=run.step, part=part)
        smoothing = 0.0  # it is in the targets
    with autocast(run):
        return F.cross_entropy(run.forward(images), targets, label_smoothing=smoothing)


def autocast(run: Run) -> torch.autocast:
    amp = run.options.amp
    return torch.autocast(run.team.device.type, dtype=AMP_DTYPES.get(amp), enabled=amp != "off")


def _collect(run: Run, waiting: list[Tensor]) -> None:
    """Move the waiting losses to the run; stop where one is not finite."""
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
    measured = measure(run)
    steps = torch.tensor([run.epoch_loss, run.step], dtype=torch.float64, device=run.team.device)
    loss_sum, count = run.team.total(steps).tolist()
    run.epoch += 1
    run.history.append(
        {
            "epoch": run.epoch,
            "train_loss": loss_sum / count,
            **measured,
            "lr": max(group["lr"] for group in run.optimizer.param_groups),
        }
    )
    run.step, run.epoch_loss = 0, 0.0
    save(run, is_best=run.best_epoch == run.epoch)
    _each(observers, "on_epoch", run)


def measure(run: Run) -> dict[str, float]:
    """What a row of the history says of the test set."""
    found = dict(zip(("test_loss", "test_accuracy"), evaluate(run), strict=True))
    if run.ema:
        with run.ema.in_place_of(run.model):
            found |= zip(("ema_test_loss", "ema_test_accuracy"), evaluate(run), strict=True)
    return found


@torch.no_grad()
def evaluate(run: Run) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the whole test set, every image once over all processes."""
    options, team, images = run.options, run.team, run.data.test
    run.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=team.device)  # loss, hits, images
    place = {"rank": team.rank, "world": team.world}
    if options.tokens_per_batch:
        parts = packed_evaluation_parts(images.tokens, options.tokens_per_batch, **place)
    else:
        parts = evaluation_parts(len(images), 4 * options.batch_size, **place)
    batches = iterate(images, [part.places for part in parts], workers=options.workers)
    for part, batch in zip(parts, batches, strict=False):
        pixels, labels = (value.to(team.device) for value in batch)
        with autocast(run):
            logits = run.model(pixels).float()
        if not part.share:
            continue
        hits = (logits.argmax(-1) == labels).sum()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), hits, hits.new_tensor(len(labels))])
    gather_nothing(run.model)
    loss_sum, hit_count, count = team.total(sums).tolist()
    return loss_sum / count, hit_count / count


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Give torch so many threads on a CPU inside; 0: as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _each(observers: Sequence[Observer], event: str, *arguments: Any) -> None:
    for observer in observers:
        getattr(observer, event)(*arguments)
