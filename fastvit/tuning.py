"""What was fastest on this machine: tables that `fastvit tune` measures, and the look-up at run time.

A table belongs to one device and to the versions it was measured with. It is read once a process and never measured
at run time, so that the same call takes the same path throughout. Looked for are, in this order:

1. the user's file: $FASTVIT_TUNING (a path; "off" or "0" switches tables off altogether), else
   $XDG_CACHE_HOME/fastvit/tuning-<device>.json, XDG_CACHE_HOME being ~/.cache by default;
2. a table that ships with the package for this device;
3. neither: the defaults of `fastvit.backend` and of the launchers.

A file that can't be read, or was measured elsewhere, is ignored with one warning.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvit._version import __version__
from fastvit.files import written_whole

FORMAT = 2
FORWARD, TRAINING = "forward", "training"
REFERENCE = "reference"  # PyTorch's own path, which nothing that is chosen may be slower than
OFF = ("0", "off")
MOST_PROGRAMS = 2**15

_DTYPES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_SHIPPED = Path(__file__).with_name("tables")


class Problem(NamedTuple):
    """What a call is, its batch apart. Calls build it as a plain tuple, which is equal and quicker."""

    op: str
    mode: str  # FORWARD, or TRAINING: gradients will be wanted
    image: torch.dtype  # of the first tensor
    compute: torch.dtype  # of the product, or of the parameters where there is none
    out: torch.dtype
    shape: tuple[int, ...]  # of the weight, such as [D, C, P_h, P_w]; [D] where there is none
    keep: bool


@dataclass(frozen=True)
class Configuration:
    """What a Triton launcher is told. None leaves it to the launcher's own rule.

    Raises:
        ValueError: a number of programs that is no such number.
    """

    tile: str | None = None  # of the forward GEMM: a name that its kernel's file knows
    programs: int | None = None  # that share the weight gradient
    weight_tile: str | None = None  # of the weight gradient

    def __post_init__(self) -> None:
        for name in ("tile", "weight_tile"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}: expected a name, got {value!r}")
        whole = type(self.programs) is int and 1 <= self.programs <= MOST_PROGRAMS
        if self.programs is not None and not whole:
            raise ValueError(f"programs: expected a whole number from 1 to {MOST_PROGRAMS}, got {self.programs!r}")

    def __str__(self) -> str:
        programs = f"{self.programs} programs" if self.programs else ""
        weight = f"weight {self.weight_tile}" if self.weight_tile else ""
        return " ".join(part for part in (self.tile or "", weight, programs) if part)


DEFAULT = Configuration()


@dataclass(frozen=True)
class Choice:
    """The result of one measurement. The fastest candidate's backend, and never one slower than PyTorch's own path.

    `configuration` is the best one of Triton, whoever won. `times_us` has the median of every candidate, called
    "backend" or "backend, configuration"; `excluded` why a candidate was not timed.

    Raises:
        ValueError: not such a result: PyTorch's time is missing, or below that of the backend.
    """

    backend: str
    times_us: Mapping[str, float]
    configuration: Configuration = DEFAULT
    excluded: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, time in self.times_us.items():
            number = isinstance(time, int | float) and not isinstance(time, bool)
            if not number or not math.isfinite(time) or time <= 0:
                raise ValueError(f"times_us: {name} has {time!r}, expected microseconds")
        if REFERENCE not in self.times_us:
            raise ValueError(f"times_us: {REFERENCE} is missing, PyTorch's own path")
        if not self._times():
            raise ValueError(f"backend: {self.backend!r} has no time among {', '.join(self.times_us)}")
        if self.time_us > self.reference_us:
            raise ValueError(f"backend: {self.backend} at {self.time_us} µs is slower than {self.reference_us} µs")

    def _times(self) -> dict[str, float]:
        return {name: time for name, time in self.times_us.items() if name.split(", ")[0] == self.backend}

    @property
    def name(self) -> str:
        """The fastest candidate, its configuration included."""
        times = self._times()
        return min(times, key=times.__getitem__)

    @property
    def time_us(self) -> float:
        """Of the fastest candidate."""
        return self.times_us[self.name]

    @property
    def reference_us(self) -> float:
        """Of PyTorch's own path."""
        return self.times_us[REFERENCE]


def bucket(rows: int) -> int:
    """The power of two that stands for a number of rows: the next one at or above it."""
    return 1 << (rows - 1).bit_length()


Choices = dict[Problem, dict[int, Choice]]
"""By problem, and by bucket of rows."""


@dataclass(frozen=True)
class Table:
    """All measurements on one device with one set of versions."""

    device: str
    versions: Mapping[str, str]
    choices: Choices = field(default_factory=dict)

    def lookup(self, problem: Problem, rows: int | None) -> Choice | None:
        """The choice for the bucket of `rows`, else for the nearest that was measured; None if none was.

        Args:
            problem: all but the batch.
            rows: B·N; None for a choice that must hold for every batch: that of the largest bucket.
        """
        measured = self.choices.get(problem)
        if not measured:
            return None
        if rows is None:
            return measured[max(measured)]
        wanted = bucket(rows)
        return measured[min(measured, key=lambda found: (abs(found.bit_length() - wanted.bit_length()), found))]

    def merged(self, newer: Table) -> Table:
        """This table with the measurements of a newer one of the same device in addition, or in place of its own."""
        choices = {problem: dict(measured) for problem, measured in self.choices.items()}
        for problem, measured in newer.choices.items():
            choices.setdefault(problem, {}).update(measured)
        return Table(newer.device, newer.versions, choices)

    def mismatch(self, device: torch.device, *, versions: bool = True) -> str:
        """In what this table differs from the device, and the versions, here; "" if in nothing."""
        pairs = {"device": (self.device, device_name(device))}
        if versions:
            pairs |= {name: (self.versions.get(name, ""), ours) for name, ours in current_versions().items()}
        differing = [(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]
        return "; ".join(f"its {name} is {theirs or 'none'}, here {ours or 'none'}" for name, theirs, ours in differing)

    def to_json(self) -> str:
        """The contents of a file."""
        lines = [
            json.dumps(_to_dict(problem, rows, choice))
            for problem, measured in self.choices.items()
            for rows, choice in measured.items()
        ]
        head = {"format": FORMAT, "device": self.device, "versions": dict(self.versions)}
        return json.dumps(head)[:-1] + ', "choices": [\n' + ",\n".join(lines) + "\n]}\n"

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The inverse of `to_json`.

        Raises:
            ValueError: not a table, or one of another format.
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, read here is {FORMAT}")
            table = cls(_text(found["device"]), {_text(k): _text(v) for k, v in found["versions"].items()})
            for entry in found["choices"]:
                problem, rows, choice = _from_dict(entry)
                table.choices.setdefault(problem, {})[rows] = choice
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a tuning table: {type(error).__name__}: {error}") from error
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table; the file appears whole or not at all, and folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as fresh:
            fresh.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Table:
        """Read what `save` wrote.

        Raises:
            OSError: the file can't be read.
            ValueError: it is not a table, or one of another format; the message says why.
        """
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _to_dict(problem: Problem, rows: int, choice: Choice) -> dict[str, Any]:
    entry: dict[str, Any] = {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in problem._asdict().items()
    }
    entry |= {"rows": rows, "backend": choice.backend}
    entry |= asdict(choice.configuration)
    return entry | {"times_us": dict(choice.times_us), "excluded": dict(choice.excluded)}


def _from_dict(entry: dict[str, Any]) -> tuple[Problem, int, Choice]:
    shape = tuple(_count(size) for size in entry["shape"])
    image, compute, out = (_DTYPES[entry[name]] for name in ("image", "compute", "out"))
    problem = Problem(_text(entry["op"]), _text(entry["mode"]), image, compute, out, shape, bool(entry["keep"]))
    configuration = Configuration(entry["tile"], entry["programs"], entry["weight_tile"])
    excluded = {name: _text(reason) for name, reason in entry["excluded"].items()}
    choice = Choice(_text(entry["backend"]), dict(entry["times_us"]), configuration, excluded)
    return problem, bucket(_count(entry["rows"])), choice


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a whole number of at least 1, got {value!r}")
    return value


# Where tables are


def device_name(device: torch.device) -> str:
    """The processor's own name, on a CPU with the threads in use: another number of them may have another winner."""
    from fastvit.benchmarks.rows import device_name as name_of

    return name_of(device)


@lru_cache
def current_versions() -> dict[str, str]:
    """Versions that a table depends on; "" for what is not installed."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {"fastvit": __version__, "torch": torch.__version__, "triton": triton}


def is_off() -> bool:
    """Whether $FASTVIT_TUNING switches tables off."""
    return os.environ.get("FASTVIT_TUNING", "").lower() in OFF


def default_path(device: torch.device) -> Path:
    """The user's file for a device: $FASTVIT_TUNING, else in the user's cache folder."""
    named = os.environ.get("FASTVIT_TUNING", "")
    if named and not is_off():
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fastvit" / f"tuning-{_slug(device)}.json"


def _slug(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


class Source(NamedTuple):
    """The table in force for a device and the file it is from; None and None if there is none.

    `ignored` says which file was passed over, and why.
    """

    table: Table | None
    path: Path | None
    ignored: str


@lru_cache
def source(device: torch.device) -> Source:
    """Look for the table of a device, once a process."""
    if is_off() or device.type not in ("cpu", "cuda"):
        return Source(None, None, "")
    path = default_path(device)
    table, ignored = _read(path, device, versions=True)
    if table is None:
        path = _SHIPPED / f"{_slug(device)}.json"
        # Measured with the versions of its day: the nearest there is to a measurement on this machine.
        table, _ = _read(path, device, versions=False)
    return Source(table, path if table else None, ignored)


def _read(path: Path, device: torch.device, *, versions: bool) -> tuple[Table | None, str]:
    """The table of a file; where the file is there, or was named, and is of no use, the reason why."""
    try:
        table = Table.load(path)
    except FileNotFoundError:
        return None, f"{path}: no such file" if os.environ.get("FASTVIT_TUNING") else ""
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    except ValueError as error:
        return None, f"{path}: {error}"
    reason = table.mismatch(device, versions=versions)
    return (None, f"{path}: {reason}") if reason else (table, "")


@lru_cache
def table_of(device: torch.device) -> Table | None:
    """The table in force for a device; the first call warns of a file that is ignored."""
    found = source(device)
    if found.ignored:
        warnings.warn(f"tuning table ignored: {found.ignored}; `fastvit tune` measures anew", stacklevel=2)
    return found.table


def describe(device: torch.device) -> str:
    """One line for people: the table in force, or why there is none."""
    if is_off():
        return f"off (FASTVIT_TUNING={os.environ['FASTVIT_TUNING']})"
    found = source(device)
    words = str(found.path) if found.path else "none"
    return f"{words} (ignored: {found.ignored})" if found.ignored else words


# At run time

_found: dict[tuple[torch.device, tuple[Any, ...], int], Choice | None] = {}
_forced: Configuration | None = None  # a plain global: backward may run in another thread


def find(device: torch.device, problem: tuple[Any, ...], rows: int) -> Choice | None:
    """What was measured for a call of B·N = `rows` rows, None if nothing was: one look-up in a dictionary.

    `problem` has the fields of :class:`Problem`.
    """
    try:
        place = device, problem, (rows - 1).bit_length()
        return _found[place]
    except KeyError:
        table = table_of(device)
        choice = _found[place] = table.lookup(Problem(*problem), rows) if table else None
        return choice
    except (AttributeError, TypeError):  # sizes that are symbols, where a graph is traced without torch.compile
        return None


def configuration(device: torch.device, problem: tuple[Any, ...], rows: int) -> Configuration:
    """What a Triton launcher is told about a call: what is forced, else what was measured to be the best."""
    if _forced is not None:
        return _forced
    choice = find(device, problem, rows)
    return DEFAULT if choice is None else choice.configuration


@contextmanager
def forced_configuration(
    tile: str | None = None, programs: int | None = None, weight_tile: str | None = None
) -> Iterator[None]:
    """Inside the `with` block launchers are told this and no table; None leaves them to their own rule."""
    global _forced
    previous, _forced = _forced, Configuration(tile, programs, weight_tile)
    try:
        yield
    finally:
        _forced = previous


_resets = 0


def resets() -> int:
    """How often :func:`reset` was called: what was chosen before holds no longer."""
    return _resets


def reset() -> None:
    """Forget what was read, so that the next call looks for tables again (code that is compiled already does not)."""
    global _resets
    _resets += 1
    _found.clear()
    source.cache_clear()
    table_of.cache_clear()
