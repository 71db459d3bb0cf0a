"""How fast images are read, how fast they are trained on, and how fast both together: which of the two waits."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice, repeat
from typing import Any

import torch
from torch import Tensor

from .any_size import ImageList
from .batches import Part, parts_of
from .distributed import join_team
from .image_set import Batch, iterate
from .loop import epoch_steps, limited_threads, load_data, train_step
from .options import DIGITS, TrainOptions
from .run import Run, start

ROUNDS = 5
WARM_UP = 3  # steps before each time that is taken, at the least
TRIAL = 4  # steps from which it is reckoned how many fill the time
UNNOTICED = 0.05  # of the time that the step may wait for images, which is within the spread
SPARE = 1.1  # images from the loader for each that the step takes, where it is called fast enough

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Rate:
    """Images a second: the median over the rounds, the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, found: list[float]) -> Rate:
        return cls(statistics.median(found), min(found), max(found))


@dataclass(frozen=True)
class InputSpeed:
    """What was measured, and where.

    Attributes:
        loader, step, both: reading batches alone, a step on a batch on the device alone, and as a run does them.
        data: as the option names it.
        images, reads: in the training set, and how many were read from it; more than it has, where it was repeated.
        steps: in each time that was taken.
        processors: that this process may use.
    """

    loader: Rate
    step: Rate
    both: Rate
    data: str
    images: int
    reads: int
    steps: int
    workers: int
    processors: int
    device: str

    @property
    def waiting(self) -> float:
        """The share of the time that the step waits."""
        return max(0.0, 1 - self.both.median / self.step.median)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "waiting": self.waiting}


@contextmanager
def prepared(options: TrainOptions) -> Iterator[Run]:
    """A run by `options` before its first step; nothing is written. Raises UserError as `train` does."""
    with join_team(options.device) as team, limited_threads(options.threads):
        yield start(options, load_data(options), team)


def measure(run: Run, *, seconds: float = 20.0, steps: int = 0, progress: Progress | None = None) -> InputSpeed:
    """In rounds, in each of which all three are measured on images of their own, so that none finds them read.

    The weights stay as they are.

    Args:
        seconds: to spend in all, about, where `steps` is 0.
        steps: in each of the times that are taken, at the least.
        progress: called as progress(done, total, description).
    """
    progress = progress or (lambda *_: None)
    stream = _Stream(run)
    timers = {"loader": stream.loader, "step": stream.step, "both": stream.both}
    total = 1 + ROUNDS * len(timers)
    progress(0, total, "warming up")
    slowest = max(taken / TRIAL for _, taken in [timer(TRIAL) for timer in timers.values()])
    steps = steps or max(TRIAL, int(seconds / (ROUNDS * len(timers) * slowest)) - stream.warm_up)
    steps = -(-steps // stream.workers) * stream.workers  # batches come in groups, one of each worker
    rates: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(ROUNDS):
        for name in [*timers][number % len(timers) :] + [*timers][: number % len(timers)]:
            progress(1 + sum(map(len, rates.values())), total, name)
            images, taken = timers[name](steps)
            rates[name].append(images / taken)
    progress(total, total, "done")
    return InputSpeed(
        loader=Rate.of(rates["loader"]),
        step=Rate.of(rates["step"]),
        both=Rate.of(rates["both"]),
        data=run.options.data,
        images=len(run.data.train),
        reads=stream.reads,
        steps=steps,
        workers=run.options.workers,
        processors=processors(),
        device=str(run.team.device),
    )


class _Stream:
    """The steps of a run's first epoch, over and over. Each timer takes the next of them: images, and seconds."""

    def __init__(self, run: Run) -> None:
        self.run, self.reads = run, 0
        self.workers = max(1, run.options.workers)
        self.ahead = 2 * run.options.workers  # batches that workers read before they are asked for
        self.warm_up = max(WARM_UP, self.ahead)
        run.data.train.draw(run.options.seed, run.epoch)
        self.steps = cycle([parts_of(step, run.team.rank, run.team.world) for step in epoch_steps(run)])
        run.forward.train()

    def loader(self, steps: int) -> tuple[int, float]:
        return self._timed(*self._read(self.warm_up + steps), lambda _, batches: next(batches))

    def step(self, steps: int) -> tuple[int, float]:
        parts = next(self.steps)[:1]
        batch = placed(self.run.data.train[parts[0].places], self.run.team.device)
        self.reads += len(parts[0].places)
        return self._timed([parts] * (self.warm_up + steps), repeat(batch), self._train)

    def both(self, steps: int) -> tuple[int, float]:
        return self._timed(*self._read(self.warm_up + steps), self._train)

    def _train(self, parts: list[Part], batches: Iterator[Batch]) -> Tensor:
        return train_step(self.run, parts, batches, 0.0)

    def _read(self, count: int) -> tuple[list[list[Part]], Iterator[Batch]]:
        """The next `count` steps and their batches, with more of these behind: no worker is idle at the end."""
        chosen = list(islice(self.steps, count + self.ahead))
        self.reads += images_of(chosen)
        places = [part.places for parts in chosen for part in parts]
        pin = self.run.team.device.type == "cuda"
        batches = iterate(self.run.data.train, places, workers=self.run.options.workers, pin=pin)
        return chosen[:count], batches

    def _timed(
        self, chosen: list[list[Part]], batches: Iterator[Batch], work: Callable[[list[Part], Iterator[Batch]], object]
    ) -> tuple[int, float]:
        for parts in chosen[: self.warm_up]:
            work(parts, batches)
        started = self._now()
        for parts in chosen[self.warm_up :]:
            work(parts, batches)
        return images_of(chosen[self.warm_up :]), self._now() - started

    def _now(self) -> float:
        """When all that was launched has been done."""
        if self.run.team.device.type == "cuda":
            torch.cuda.synchronize(self.run.team.device)
        return time.perf_counter()


def images_of(steps: list[list[Part]]) -> int:
    return sum(len(part.places) for parts in steps for part in parts)


def placed(batch: Batch, device: torch.device) -> Batch:
    """`batch` on `device`, as it is taken from there by a step."""
    images, labels = batch
    if isinstance(images, ImageList):
        return images._replace(pixels=images.pixels.to(device)), labels.to(device)
    return images.to(device), labels.to(device)


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def verdict(found: InputSpeed) -> str:
    """Which of the two waits and what would help; and what the numbers do not say."""
    loader, step = found.loader.median, found.step.median
    said = f"The loader gives {loader:,.0f} images/s, the step takes {step:,.0f}"
    waits = f"the step waits {found.waiting:.0%} of the time"
    if found.waiting <= UNNOTICED:
        said += f": the loader waits for the step{_enough(found)}."
    elif loader < step:
        said += f": {waits} for the loader; {_faster_loader(found)}."
    elif found.workers == 0:
        said += f", and with --workers 0 one after the other: {waits}; {_faster_loader(found)}."
    else:
        said += f", but together they reach {found.both.median:,.0f}: {waits}; {_apart(found)}."
    if found.reads > found.images and found.data != DIGITS:
        said += (
            f" The {found.images:,} images were repeated ({found.reads:,} were read): after the first time they come "
            "from memory, which those of a larger set do not."
        )
    return said


def _faster_loader(found: InputSpeed) -> str:
    wanted = math.ceil(max(1, found.workers) * found.step.median / found.loader.median)
    if wanted <= found.processors:
        return f"--workers {wanted} may keep up"
    more = f"--workers {found.processors} and " if found.workers < found.processors else ""
    return (
        f"it takes {wanted} workers to keep up, and there are {found.processors} processors: {more}smaller files help"
    )


def _apart(found: InputSpeed) -> str:
    """What would help two that are each fast enough alone."""
    if found.device == "cpu":
        return f"both use the {found.processors} processors, so fewer --threads or other --workers may suit them better"
    return f"--workers {found.workers + 1} would read further ahead"


def _enough(found: InputSpeed) -> str:
    fewer = math.ceil(found.workers * SPARE * found.step.median / found.loader.median)
    return f"; --workers {fewer} would be enough" if fewer < found.workers else ""
