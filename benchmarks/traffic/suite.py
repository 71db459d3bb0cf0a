"""The suite `traffic`: what a training step of a whole model reads, writes and launches, counted and never timed.

A step is forward and backward from the gradient of the logits to those of all parameters, under bfloat16 autocast, in
training mode, without the optimizer. It is counted four ways: eager, compiled (the code that inductor writes for an
H200), and both once more after `fastvit.accelerate`. No GPU is needed and none is used.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastvit.benchmarks.problem import WIDTHS, Unavailable
from fastvit.benchmarks.rows import command_line, commit, grouped, versions
from fastvit.benchmarks.traffic.hosts import DEPTHS, HOSTS, SETTINGS, LeftOut, build
from fastvit.interop import Unsupported

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fastvit.benchmarks.traffic.counting import Count

STREAMS = ("float32", "bfloat16")
WAYS = ("eager", "compiled", "accelerated", "accelerated compiled")
TOKENS = 1 + (224 // 16) ** 2
Progress = Callable[[int, int, str], None]
SHALLOW = 2  # blocks of the model that is taken off a whole one, so that the ends fall out

GPU, TB_PER_S, TFLOP_PER_S = "H200", 4.8, 989.5
BYTES_PER_US, FLOPS_PER_US = 1e6 * TB_PER_S, 1e6 * TFLOP_PER_S


@dataclass(frozen=True)
class Case:
    """A model, and how its training step is run. `depth`: blocks; None: as many as the model has."""

    host: str
    model: str
    setting: str
    stream: str
    compiled: bool
    accelerated: bool
    batch: int = 256
    depth: int | None = None

    @property
    def shape(self) -> str:
        blocks = "" if self.depth is None else f", depth {self.depth}"
        return f"ViT-{self.model}/16 224, batch {self.batch}{blocks}"

    @property
    def way(self) -> str:
        return WAYS[self.compiled + 2 * self.accelerated]

    def __str__(self) -> str:
        return f"{self.host} {self.shape}, {self.setting}, {self.stream} stream, {self.way}"


@dataclass(frozen=True)
class TrafficRow:
    """A training step, counted; `reason` says why where it could not be, and all counts are None then.

    `..._step` is of the whole step, products (convolutions and linear layers) and attention (PyTorch's) included, whose
    part in the bytes stands beside; `flops_step` are theirs. `..._per_value` are bytes per token value and block, one
    of B·T·D: of all but products and attention, of products, of attention. `launches_per_block` are all, products and
    attention included. Both are of a block in the midst of the model: its step less that of one with two blocks, over
    the number of blocks in between (as inductor treats not all of them alike, a mean).
    """

    host: str
    setting: str
    stream: str
    shape: str
    compiled: bool
    accelerated: bool
    bytes_per_value: float | None = None
    launches_per_block: float | None = None
    products_bytes_per_value: float | None = None
    attention_bytes_per_value: float | None = None
    bytes_step: int | None = None
    launches_step: int | None = None
    products_bytes_step: int | None = None
    attention_bytes_step: int | None = None
    flops_step: int | None = None
    method: str = "counted"
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    command: str = ""

    @property
    def way(self) -> str:
        return WAYS[self.compiled + 2 * self.accelerated]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def floor_us(self, bytes_per_us: float = BYTES_PER_US, flops_per_us: float = FLOPS_PER_US) -> float:
        """The least time of the step on a GPU, in µs: products and attention at its rate or its bandwidth, whichever
        takes longer, and then all other bytes at its bandwidth. Launches take none of it.

        Args:
            bytes_per_us, flops_per_us: default: of an H200, from NVIDIA's data sheet of it (SXM): 4.8 TB/s, and in
                bfloat16 1,979 TFLOP/s with sparsity, which is half of that without.
        """
        assert self.bytes_step is not None and self.flops_step is not None
        multiplied = (self.products_bytes_step or 0) + (self.attention_bytes_step or 0)
        return (self.bytes_step - multiplied) / bytes_per_us + max(
            multiplied / bytes_per_us, self.flops_step / flops_per_us
        )


def cases(
    hosts: Sequence[str] = tuple(HOSTS),
    models: Sequence[str] = ("S",),
    settings: Sequence[str] = SETTINGS,
    streams: Sequence[str] = STREAMS,
    ways: Sequence[str] = WAYS,
    batch: int = 256,
    depth: int | None = None,
) -> list[Case]:
    """Every combination."""
    return [
        Case(host, model, setting, stream, "compiled" in way, "accelerated" in way, batch, depth)
        for model, setting, stream, host, way in itertools.product(models, settings, streams, hosts, ways)
    ]


def run(
    plan: Sequence[Case],
    progress: Progress | None = None,
    on_row: Callable[[TrafficRow], None] | None = None,
) -> list[TrafficRow]:
    """Count each case, in a process of its own: what torch keeps of a GPU that is not there stays in it.

    Args:
        progress: called as progress(done, total, description) before each case and at the end.
        on_row: called with each row as it comes.
    """
    shaping = {name: version for name, version in versions("cpu").items() if name != "capability"}
    about: dict[str, Any] = {"versions": shaping, "commit": commit(), "command": command_line()}
    rows: list[TrafficRow] = []
    for row in _counted(plan, progress or (lambda done, total, description: None)):
        rows.append(replace(row, **about))
        if on_row:
            on_row(rows[-1])
    return rows


def _counted(plan: Sequence[Case], progress: Progress) -> Iterator[TrafficRow]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for done, case in enumerate(plan):
            progress(done, len(plan), str(case))
            yield pool.submit(count, case).result()
    progress(len(plan), len(plan), "done")


def count(case: Case) -> TrafficRow:
    """The row of a case, counted in this process, which should do nothing else; `run` sees to it."""
    from fastvit.benchmarks.traffic.lowered import NotWhole

    row = TrafficRow(case.host, case.setting, case.stream, case.shape, case.compiled, case.accelerated)
    depth = case.depth or DEPTHS[case.model]
    try:
        whole, shallow = _step_of(case, depth), _step_of(case, SHALLOW)
    except (Unavailable, LeftOut, NotWhole, Unsupported) as error:
        return replace(row, reason=str(error))
    values = case.batch * TOKENS * WIDTHS[case.model]

    def per_block(what: str, *kinds: str) -> float:
        return (whole.total(what, *kinds) - shallow.total(what, *kinds)) / (depth - SHALLOW)

    return replace(
        row,
        bytes_per_value=round(per_block("bytes", "rest") / values, 3),
        products_bytes_per_value=round(per_block("bytes", "products") / values, 3),
        attention_bytes_per_value=round(per_block("bytes", "attention") / values, 3),
        launches_per_block=round(per_block("launches"), 2),
        bytes_step=whole.total("bytes"),
        products_bytes_step=whole.total("bytes", "products"),
        attention_bytes_step=whole.total("bytes", "attention"),
        launches_step=whole.total("launches"),
        flops_step=whole.total("flops"),
    )


def _step_of(case: Case, depth: int) -> Count:
    from fastvit.benchmarks.traffic.step import count_step

    stream = getattr(torch, case.stream)
    module = build(case.host, case.model, case.setting, stream, depth, case.accelerated)
    return count_step(module, case.batch, compiled=case.compiled, stream=stream)


def read_json_lines(path: Path) -> list[TrafficRow]:
    """Rows as `TrafficRow.to_json` has written them, a line each."""
    return [TrafficRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def format_table(
    rows: Iterable[TrafficRow],
    bytes_per_us: float = BYTES_PER_US,
    flops_per_us: float = FLOPS_PER_US,
    gpu: str = GPU,
) -> RenderableType:
    """For the terminal: what was counted, the floors, and why some rows are left out."""
    from rich.console import Group
    from rich.text import Text

    rows = list(rows)
    parts: list[Any] = []
    counted = [row for row in rows if not row.reason]
    if counted:
        parts += [_counts_table(counted), _floors_table(counted, bytes_per_us, flops_per_us, gpu)]
    why = grouped((row for row in rows if row.reason), lambda row: (row.host, row.setting, row.stream, row.reason))
    for (host, setting, stream, reason), same in why.items():
        ways = ", ".join(dict.fromkeys(row.way for row in same))
        parts.append(Text(f"  left out: {host}, {setting}, {stream} stream, {ways}: {reason}"))
    if rows:
        found = ", ".join(f"{name} {version}" for name, version in rows[0].versions.items() if version)
        parts.append(Text(f"Counted, not timed; {found}; commit {rows[0].commit or 'unknown'}."))
    return Group(*parts) if parts else Text("no rows")


def cells(rows: Iterable[TrafficRow]) -> list[tuple[str, ...]]:
    """Lines of a table: shape, setting, stream and host, then bytes a value and launches a block for each of WAYS."""
    lines = []
    counted = (row for row in rows if not row.reason)
    for case, mine in grouped(counted, lambda row: (row.shape, row.setting, row.stream, row.host)).items():
        texts = {row.way: f"{row.bytes_per_value:.1f} ({row.launches_per_block:g})" for row in mine}
        lines.append((*case, *(texts.get(way, "-") for way in WAYS)))
    return lines


def _counts_table(rows: Sequence[TrafficRow]) -> Any:
    from rich.table import Column, Table

    table = Table(
        "shape", "setting", "stream", "host", *(Column(name, justify="right") for name in WAYS),
        title="counted: bytes per token value and block, without products and attention (launches a block, with them)",
    )  # fmt: skip
    for line in cells(rows):
        table.add_row(*line)
    return table


def _floors_table(rows: Sequence[TrafficRow], bytes_per_us: float, flops_per_us: float, gpu: str) -> Any:
    from rich.table import Column, Table

    numbers = [Column(name, justify="right") for name in ("GB", "of products, attention", "launches", "TFLOP", "floor")]
    title = f"floor of a training step on {gpu}: {bytes_per_us / 1e6:g} TB/s, {flops_per_us / 1e6:g} TFLOP/s"
    table = Table("shape", "setting", "stream", "host", "way", *numbers, title=title)
    for row in rows:
        multiplied = (row.products_bytes_step or 0) + (row.attention_bytes_step or 0)
        table.add_row(
            row.shape, row.setting, row.stream, row.host, row.way,
            f"{(row.bytes_step or 0) / 1e9:.1f}", f"{multiplied / 1e9:.1f}", f"{row.launches_step}",
            f"{(row.flops_step or 0) / 1e12:.2f}", f"{row.floor_us(bytes_per_us, flops_per_us) / 1000:.2f} ms",
        )  # fmt: skip
    return table
