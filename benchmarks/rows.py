"""A benchmark row stands alone: what was measured, on what, with which versions, by which command."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from fastvit.files import written_whole

if TYPE_CHECKING:
    from rich.console import RenderableType

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
OURS = "fastvit:"  # our providers are called fastvit:<backend>


@dataclass(frozen=True)
class Row:
    """One provider in one case. `median_us` is None where it did not run; `reason` then says why.

    `provider` is who ran: fastvit:<backend>, or a rival and its setting ("timm channels_last compiled"); `rival` is
    the rival alone, "" on our rows; `whole` is False for a yardstick, which does only a part of the job. `ratios`, on
    our rows: rival → the median of its best setting over ours; above 1 we are faster. `best_rival`, on our rows: the
    fastest provider that does the whole job, and `headline` the ratio to it. `floor_share`: the time that `ceilings`
    (the machine's own GEMM rate and copy bandwidth, measured in the same run) would allow for `flops` and
    `moved_bytes`, over the median. `peak_bytes`: memory allocated during one call, beyond what was there before.
    """

    op: str
    shape: str
    dtype: str
    layout: str
    provider: str
    mode: str
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    floor_share: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    command: str = ""
    reason: str = ""
    rival: str = ""
    whole: bool = True
    best_rival: str = ""
    headline: float | None = None
    batch: int = 0
    flops: float = 0.0
    moved_bytes: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict)  # flops_per_us, bytes_per_us

    @property
    def is_ours(self) -> bool:
        return self.provider.startswith(OURS)

    @property
    def case(self) -> tuple[str, str, str, str, str]:
        """What rows must share to be compared."""
        return self.op, self.shape, self.dtype, self.layout, self.mode

    @property
    def label(self) -> str:
        """The case of a mode, in words."""
        return f"{self.shape}, {self.dtype}, {self.layout}"

    @property
    def about(self) -> str:
        """The device, the versions and the commit, in words."""
        known = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        return f"{self.device}; {known}; commit {self.commit or 'unknown'}"

    def spread_text(self, between: str) -> str:
        """The 20th and the 80th percentile for people, "" where it did not run."""
        return "" if self.p20_us is None else f"{time_text(self.p20_us)}{between}{time_text(self.p80_us)}"

    def floor_text(self) -> str:
        """The share of the floor for people, "" where it is not known."""
        return "" if self.floor_share is None else f"{self.floor_share:.0%}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Line(Protocol):
    """What has a line in a file of rows."""

    def to_json(self) -> str: ...


def write_json_lines(rows: Iterable[Line], path: str | os.PathLike[str]) -> None:
    """Write rows, a line of JSON each; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as fresh:
        fresh.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def read_json_lines(path: str | os.PathLike[str]) -> list[Row]:
    """Rows written by `write_json_lines`.

    Raises:
        ValueError: a line is not such a row; the message names file and line.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(Row(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a benchmark row: {error}") from error
    return rows


def processor(information: str | os.PathLike[str] = "/proc/cpuinfo") -> str:
    """The name of this machine's processor; with family and model where a cloud's name hides which it is, as "AMD EPYC"
    does, whose generations differ by a factor of two and more."""
    try:
        lines = Path(information).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())  # the first processor's
    name = facts.get("model name") or platform.processor() or platform.machine()
    # A number names the product, but for that of the clock.
    if "cpu family" in facts and not re.search(r"\d", name.partition("@")[0]):
        name += f" family {facts['cpu family']} model {facts.get('model', 'unknown')}"
    return name


def device_name(device: torch.device) -> str:
    """The processor's own name; on a CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of packages, none of which is imported; "" for what is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


@functools.lru_cache
def versions(device_type: str) -> dict[str, str]:
    """Versions of everything that shapes a timing; "" for what is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= installed_versions(("fastvit", "triton", "timm", "torchvision", "transformers"))
    if device_type == "cuda":
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = str(torch.backends.cudnn.version() or "")
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.partition("\n")[0]
        found["nvcc"] = _compiler_of_extension()
    else:
        # The processor may have been told to do with less than it has.
        by_setting = any(os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "FASTVIT_CPU_ISA"))
        found["capability"] = torch.backends.cpu.get_cpu_capability() + (" by setting" if by_setting else "")
    return found


def _compiler_of_extension() -> str:
    """The nvcc that compiled the C++/CUDA extension; "" where there is no extension."""
    from fastvit import cuda

    compilers = cuda.build_info().get("versions")
    return "" if cuda.why_missing() or not compilers else str(compilers[-1])


@functools.lru_cache
def commit() -> str:
    """The checkout's commit, with "-dirty" where the code differs from it; "" outside a checkout.

    The environment variable FASTVIT_COMMIT says it of a copy that has no history.
    """
    if os.environ.get("FASTVIT_COMMIT"):
        return os.environ["FASTVIT_COMMIT"]
    root = str(Path(__file__).resolve().parents[1])
    revision = _output_of("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    if not revision:
        return ""
    changed = _output_of("git", "-C", root, "status", "--porcelain", "--", "*.py", "csrc")
    return f"{revision}-dirty" if changed else revision


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def command_line() -> str:
    """The command of this process, without the folder of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def circumstances(device: torch.device, **about: str) -> dict[str, Any]:
    """What a row says of the run that it comes from: device, versions, commit, and what else is known."""
    return {"device": device_name(device), "versions": versions(device.type), "commit": commit(), **about}


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, both in the order of their first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def format_table(rows: Sequence[Row]) -> RenderableType:
    """Tables for the terminal, one an op: our rows with the ratio to each rival first, losses in red.

    A ratio is the rival's median over ours. Below each table, what every rival took, and why some did not run.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for op, mine in grouped(rows, lambda row: row.op).items():
        parts += [_ratio_table(op, mine), time_table(mine)]
        reasons = dict.fromkeys((row.provider, row.mode, row.reason) for row in mine if row.reason)
        parts += [Text(f"  {provider}, {mode}: {reason}") for provider, mode, reason in reasons]
    if not parts:
        return Text("no rows")
    parts.append(Text(f"{rows[0].about}. Ratio: the rival's median over ours."))
    return Group(*parts)


def rivals_of(rows: Sequence[Row]) -> list[str]:
    """The rivals in their order, each once whatever its settings."""
    return list(dict.fromkeys(row.rival for row in rows if row.rival))


def _ratio_table(op: str, rows: Sequence[Row]) -> Any:
    from rich.table import Column, Table

    rivals = rivals_of(rows)
    numbers = [Column(name, justify="right") for name in ("best rival", *rivals, "median", "p20..p80", "of floor")]
    title = f"{op}: how many times faster than ..."
    table = Table("shape", "dtype", "layout", "mode", "provider", *numbers, title=title)
    for row in rows:
        if row.is_ours:
            best = f"{_ratio_text(row.headline)} {row.best_rival}".rstrip()
            ratios = [_ratio_text(row.ratios.get(rival)) for rival in rivals]
            times = (time_text(row.median_us), row.spread_text(".."), row.floor_text())
            table.add_row(*row.case[1:], row.provider, best, *ratios, *times)
    return table


def time_table(rows: Sequence[Row]) -> Any:
    """The median of every provider, a line for each case."""
    from rich.table import Column, Table

    providers = list(dict.fromkeys(row.provider for row in rows))
    times_of = [Column(provider, justify="right") for provider in providers]
    table = Table("shape", "dtype", "layout", "mode", *times_of, title="medians")
    for case, mine in grouped(rows, lambda row: row.case).items():
        times = {row.provider: row.median_us for row in mine}
        table.add_row(*case[1:], *[time_text(times.get(provider)) for provider in providers])
    return table


def _ratio_text(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"[red]{ratio:.2f}x[/red]" if ratio < 1 else f"{ratio:.2f}x"


def time_text(microseconds: float | None) -> str:
    """A time for people: "-", "12.3 µs" or "4.56 ms"."""
    if microseconds is None:
        return "-"
    return f"{microseconds / 1000:.2f} ms" if microseconds >= 1000 else f"{microseconds:.1f} µs"
