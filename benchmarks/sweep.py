"""Every kernel of an op in every variant that could take its place, each held to float64 and timed by CUDA graphs.

    make gpu STAGE=warm,sweep

Nothing here lists kernels or variants. A training step by the Triton backend is watched: what it launches are the
kernels. Those entries of the manifest that a launch of one could have used as well (the same kernel on the same types,
in another tile, with more stages, ...) are its variants, and take its place while the step is watched again; so are
the op's configurations, such as other splits of a sum. What is launched again, in a graph and on several sets of inputs
in turn, which no cache holds together, is the one kernel. The product alone, by torch, stands beside them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastvit import tuning
from fastvit.benchmarks.contenders import check_backend, ours, timed_call, trained
from fastvit.benchmarks.problem import BOTH, FORWARD, filled, steady
from fastvit.benchmarks.rows import Row, circumstances, grouped, time_text
from fastvit.benchmarks.timing import Call, Timing, captured, interleave
from fastvit.benchmarks.tune import TUNED, Scope, Size
from fastvit.discovery import Declared
from fastvit.tuning import Configuration
from fastvit.validation import Case, make_inputs
from fastvit.validation.ops import heaviest_first

__all__ = ["SWEEP", "format_lines", "noted", "substituted", "sweep", "variants"]

SWEEP = "sweep"  # the op of its rows
PRECISIONS = ("uint8 to bfloat16", "bfloat16")
SETS = 3  # of inputs: of the default size together several times what the L2 cache of a GPU holds
SECONDS = 0.25  # of timing for all variants of a kernel together
LINES = 30  # of the table
NOT_TIMED = "right, and not timed: there is no GPU"
NOT_REACHED = "the time was over before it was reached"
_FIELDS = tuple(field.name for field in fields(Configuration))
FACTS = ("RUN", "ROWS", "ALIGN", "WIDTH_ALIGN", "MASKED", "PRECISION")  # constants that describe the problem


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what `fastvit.kernels.launch.launch` was given."""

    entry: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(hash=False)

    @property
    def identity(self) -> tuple[Any, ...]:
        """All but the tensors."""
        others = {name: value for name, value in self.arguments.items() if name != "reads"}
        return self.entry, self.grid, *(value for value in others.values() if not isinstance(value, Tensor))


@dataclass
class Candidate:
    """A kernel in one variant: its launches on each set of inputs, or the reason why it is not timed."""

    name: str
    calls: list[Call]
    reason: str = ""


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """The launches inside the block, as they are made."""
    from fastvit.kernels import launch

    found: list[Launch] = []
    real = launch.launch

    def note(entry: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        found.append(Launch(entry, grid, arguments))
        real(entry, grid, **arguments)

    with mock.patch.object(launch, "launch", note):
        yield found


def variants(entry: Any) -> list[Any]:
    """The entries of the manifest that could take the place of one, itself among them."""
    from fastvit.kernels import manifest

    return [other for other in manifest.entries() if _is_variant(entry, other)]


def _is_variant(one: Any, other: Any) -> bool:
    if (one.kernel, one.pointers, one.compute) != (other.kernel, other.pointers, other.compute):
        return False
    ours, theirs = one.constants_by_name, other.constants_by_name
    facts = [name for name in ours if name in FACTS or name.startswith("HAS_")]
    return all(ours[name] == theirs.get(name, ours[name]) for name in facts)


@contextmanager
def substituted(chosen: Any) -> Iterator[None]:
    """Inside the block launchers find this entry wherever they look for one of its variants."""
    declared: Declared[Any] = Declared("fastvit.kernels", "ENTRIES")
    entries = declared[chosen.module]
    with mock.patch.dict(entries, {place: chosen for place, entry in entries.items() if _is_variant(chosen, entry)}):
        yield


def name_of(entry: Any) -> str:
    """What tells it from its variants, and its tile, warps and stages."""
    others = [other.key for other in variants(entry)]
    own = [part for part in entry.key if not all(part in key for key in others)]
    tile = "x".join(map(str, entry.tile))
    return " ".join([*own, *([tile] if tile else []), f"{entry.num_warps}w {entry.num_stages}s"])


def sweep(
    device: str | torch.device = "cuda",
    on_rows: Callable[[list[Row]], None] | None = None,
    *,
    op: str | None = None,
    model: str = "B",
    batch: int = 256,
    image: int = 224,
    width: int | None = None,
    checked: int = 33,
    precisions: Sequence[str] = PRECISIONS,
    limit: float = 38.0,
    **about: str,
) -> list[Row]:
    """A row for each kernel in each variant and precision, and for the product alone.

    Args:
        device: a CUDA device. On a CPU the same is run once each, in Triton's interpreter, and nothing is timed.
        on_rows: called with the rows of each kernel as they come.
        op: default: the one that multiplies.
        model, batch, image: of the step; patches have a side of 16 pixels.
        width: default: the model's.
        checked: the batch that is held to float64, no multiple of a tile, with work for every multiprocessor.
        precisions: of `tune.PRECISIONS`.
        limit: seconds, after which the kernels that are left are named and not measured.
        about: more fields of the rows.

    Raises:
        ValueError: an op that declares nothing to tune.
    """
    op = heaviest_first()[0] if op is None else op
    if op not in TUNED:
        raise ValueError(f"op: {op!r} has nothing to sweep; known: {', '.join(TUNED)}")
    where, deadline = torch.device(device), time.monotonic() + limit
    size = Size(model, batch, image // 16, 16)
    rows: list[Row] = []
    stamp = circumstances(where, **about)
    with steady(where):
        for measurement in TUNED[op].measurements(size, Scope((batch,), precisions, SECONDS)):
            case = measurement.cases[tuning.TRAINING]
            case = replace(case, width=width or case.width)
            step = Step(op, case, measurement.compute, where, checked)
            for part, make in step.parts():
                precision = measurement.title.rpartition(", ")[2]
                blank = Row(SWEEP, f"{case.name}, width {case.width}", precision, "", "", part, **stamp)
                if time.monotonic() > deadline:
                    found = [replace(blank, reason=NOT_REACHED)]
                else:
                    found = _measured(blank, list(make()), where, len(step.sets))
                rows += found
                if on_rows:
                    on_rows(found)
    return rows


class Step:
    """A training step on several sets of inputs, and the same on a batch that is held to float64.

    The kernels are those of the launcher's own choice for the first; the others run in the same variants.
    """

    def __init__(self, op: str, case: Case, compute: torch.dtype, device: torch.device, checked: int) -> None:
        self.op, self.device, self.checked = op, device, checked
        on_gpu = device.type == "cuda"
        inputs = make_inputs(case, compute, device)
        self.sets = [trained(copy.deepcopy(inputs)) for _ in range(SETS if on_gpu else 1)]
        self.small = make_inputs(replace(case, batch=checked), compute, device)
        self.yardstick: Any = TUNED[op].yardstick
        configurations = list(TUNED[op].configurations(tuning.TRAINING, inputs, None))
        configurations = configurations[: None if on_gpu else 1]
        self.verdict = functools.cache(self._verdict)
        self.kernels: dict[str, Any] = {}  # by name, the entry that is used
        first = self._watched(configurations[0])
        self.kernels = {launch.entry.kernel: launch.entry for launch in reversed(first)}
        self.usual = {configurations[0]: first} | {chosen: self._watched(chosen) for chosen in configurations[1:]}

    def parts(self) -> Iterator[tuple[str, Callable[[], Iterator[Candidate]]]]:
        """What is measured together: a title, and what makes its candidates. Products come first."""
        for kernel in sorted(self.kernels, key=lambda name: not self.kernels[name].compute):
            yield kernel, functools.partial(self._variants, kernel)
        for mode in (FORWARD, BOTH) if self.yardstick else ():
            yield mode, functools.partial(self._product, mode)

    def _variants(self, kernel: str) -> Iterator[Candidate]:
        """A kernel in every variant, in each configuration that makes a difference to it."""
        usual = self.kernels[kernel]
        # The first of those that launch the same: it is the variant that is chosen here, whatever a tile is called.
        differing = {_identity(launches, kernel): chosen for chosen, launches in reversed(self.usual.items())}
        values = {name: {getattr(one, name) for one in differing.values()} for name in _FIELDS}
        for chosen, configuration in itertools.product(variants(usual), reversed(differing.values())):
            words = [f"{getattr(configuration, name)} {name}" for name in _FIELDS if len(values[name]) > 1]
            name = ", ".join([name_of(chosen), *words])
            calls: list[Call] = []
            try:
                reason = self.verdict(configuration, None if chosen == usual else chosen)
                for place in range(len(self.sets)) if not reason else ():
                    launches = self._watched(configuration, place, chosen)
                    calls += [functools.partial(_relaunch, one) for one in launches if one.entry == chosen]
            except Exception as error:  # a variant that can't be launched is a finding
                reason = f"{type(error).__name__}: {error}"
            yield Candidate(name, calls, reason)

    def _watched(self, configuration: Configuration, place: int = 0, chosen: Any = None) -> list[Launch]:
        """What a step launches."""
        inputs = self.sets[place]
        step = timed_call(ours(self.op, inputs, "triton"), inputs.grads.values(), BOTH)
        with self._forced(configuration, chosen), noted() as found:
            step()
        return found

    def _verdict(self, configuration: Configuration, chosen: Any) -> str:
        """Why an entry, or with None all that are used, must not be timed; "" if it may."""
        with self._forced(configuration, chosen), noted() as found:
            reason = check_backend("triton", self.op, self.small, self.device)
        launched = {launch.entry for launch in found}
        missing = {chosen} - launched if chosen else set(self.kernels.values()) - launched
        return reason or ("" if not missing else f"not launched on {self.checked} samples, and so not checked")

    @contextmanager
    def _forced(self, configuration: Configuration, chosen: Any) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(tuning.forced_configuration(**asdict(configuration)))
            for entry in (*self.kernels.values(), *([chosen] if chosen else [])):
                stack.enter_context(substituted(entry))
            yield

    def _product(self, mode: str) -> Iterator[Candidate]:
        """The op's yardstick."""
        calls = []
        for inputs in self.sets:
            solution = self.yardstick(inputs)
            with torch.no_grad():
                calls.append(timed_call(solution, [torch.randn_like(solution.tokens())], mode))
        yield Candidate("product alone", calls)


def _measured(blank: Row, candidates: Sequence[Candidate], device: torch.device, sets: int) -> list[Row]:
    """A row for each candidate; those that may be timed take turns."""
    rows = {
        found.name: replace(blank, provider=found.name, reason=" ".join(found.reason.split())) for found in candidates
    }
    ready: dict[str, Call] = {}
    for candidate in candidates:
        name = candidate.name
        if candidate.reason:
            continue
        try:
            in_turn = functools.partial(_in_turn, candidate.calls)
            ready[name] = captured(in_turn, device) if device.type == "cuda" else in_turn
        except Exception as error:
            torch.cuda.synchronize(device)
            rows[name] = replace(rows[name], reason=f"can't be captured: {type(error).__name__}: {error}")
    if device.type != "cuda":
        for name, call in ready.items():
            call()
            rows[name] = replace(rows[name], reason=NOT_TIMED)
        return list(rows.values())
    for name, timing in zip(ready, interleave(list(ready.values()), device, SECONDS), strict=True):
        each = (timing.median_us / sets, timing.p20_us / sets, timing.p80_us / sets)
        rows[name] = filled(rows[name], Timing(*each, timing.repeats))
    return list(rows.values())


def format_lines(rows: Sequence[Row], most: int = LINES) -> list[str]:
    """A table of at most so many lines: a line for each row, the fastest of each kernel first. Where there are more,
    the slowest of the kernels with the most lines are left out, and counted."""
    parts = grouped(rows, lambda row: (row.dtype, row.mode))
    groups = {part: sorted(mine, key=lambda row: row.median_us or float("inf")) for part, mine in parts.items()}
    left_out = 0
    while sum(map(len, groups.values())) + bool(left_out) > most:
        max(groups.values(), key=len).pop()
        left_out += 1
    lines = []
    for (dtype, part), mine in groups.items():
        for row in mine:
            ratio = row.median_us / mine[0].median_us if row.median_us and mine[0].median_us else None
            times = f"{time_text(row.median_us):>10} {f'{ratio:.2f}x' if ratio else '':>6}"
            lines.append(f"{dtype:17} {part:28} {times}  {row.provider}  {row.reason[:80]}".rstrip())
    return [*lines, *([f"and {left_out} more, slower or not timed"] if left_out else [])]


def _identity(launches: Sequence[Launch], kernel: str) -> tuple[Any, ...]:
    return tuple(launch.identity for launch in launches if launch.entry.kernel == kernel)


def _relaunch(noted: Launch) -> None:
    from fastvit.kernels import launch

    launch.launch(noted.entry, noted.grid, **noted.arguments)


def _in_turn(calls: Sequence[Call]) -> None:
    for call in calls:
        call()
