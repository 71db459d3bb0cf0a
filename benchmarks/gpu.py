"""Everything that only a GPU can tell, in one command and under nine minutes: what `make gpu` runs.

    python -m fastvit.benchmarks.gpu [--out FOLDER] [--stage NAME ...] [--budget SECONDS] [--dry-run]

Stages, the most important first, so that a cut-off costs the least: warm (compile every kernel of the manifest with a
pool of processes), tests (ops, kernels and model on the GPU, CUDA graphs, streams), validate, bench (patch_embed). Each
runs in a process of its own with a time limit, since a kernel that goes wrong can take its CUDA context with it.

Writes to the folder, at most eight files, line by line as results come: log.jsonl (all that is printed), warm.jsonl,
tests.jsonl, tests.log, validate.jsonl, bench.jsonl, summary.jsonl. Exits with 1 if a stage failed or was cut off.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 520  # seconds for all stages together
NO_DEVICE = "no CUDA device"
TEST_FOLDERS = ("tests/gpu", "tests/ops", "tests/kernels", "tests/model")


@dataclass(frozen=True)
class Stage:
    """A step of the campaign: its time limit in seconds, and the function its own process runs."""

    name: str
    limit: int
    run: Callable[[Path], int]


class Log:
    """Prints, and keeps what was printed as JSON lines."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._start = time.monotonic()

    def __call__(self, stage: str, text: str) -> None:
        for line in text.splitlines():
            print(line if stage == "summary" else f"[{stage}] {line}", flush=True)
            self.record(stage, text=line)

    def record(self, stage: str, **values: Any) -> None:
        """A line of the file alone."""
        entry = {"seconds": round(time.monotonic() - self._start, 1), "stage": stage, **values}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


class Lines:
    """A file of JSON lines that grows as results come."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("w", encoding="utf-8")

    def write(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._file.write(line.rstrip("\n") + "\n")
        self._file.flush()


# Stage: warm


def warm(out: Path) -> int:
    """Compile every entry of the manifest for this GPU, so that no later stage waits for the compiler."""
    from fastvit.kernels import manifest

    lines = Lines(out / "warm.jsonl")
    started = time.monotonic()
    failed = 0
    entries = manifest.entries()
    workers = min(len(os.sched_getaffinity(0)), 16)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_warm_entry, index): entry for index, entry in enumerate(entries)}
        for future in as_completed(waiting):
            error = future.exception()
            failed += error is not None
            row: dict[str, Any] = {
                "kernel": waiting[future].name,
                "seconds": None,
                "error": f"{error}" if error else "",
            }
            if error is None:
                row["seconds"] = round(future.result(), 2)
            else:
                print(f"{waiting[future].name}: {error}", flush=True)
            lines.write([json.dumps(row)])
    seconds = time.monotonic() - started
    print(f"{len(entries) - failed} of {len(entries)} kernels compiled in {seconds:.0f} s by {workers} processes")
    return int(failed > 0)


def _warm_entry(index: int) -> float:
    from fastvit.kernels import manifest

    started = time.monotonic()
    warm_entry(manifest.entries()[index])
    return time.monotonic() - started


def warm_entry(entry: Any) -> Any:
    """Compile one entry along the very path of a launch, so that the launch finds it in the cache."""
    from triton.runtime.jit import MockTensor

    from fastvit.kernels import manifest
    from fastvit.kernels.launch import jit_function

    dtypes = {name: dtype for dtype, name in manifest.NAMES.items()}
    pointers = dict(entry.pointers)
    function = jit_function(entry)
    arguments: dict[str, Any] = {}
    for parameter in function.params:
        if parameter.is_constexpr:
            continue
        if parameter.name in pointers:
            arguments[parameter.name] = MockTensor(dtypes[pointers[parameter.name]])
        else:  # never specialised on, so that any value will do
            arguments[parameter.name] = 1.0 if "fp" in parameter.annotation_type else 64
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    return function.warmup(grid=(1,), **arguments, **entry.constants_by_name, **options)


# Stage: tests


def tests(out: Path) -> int:
    """The tests of ops, kernels and model on the GPU, with few hypothesis examples; a line for each test."""
    folders = [folder for folder in TEST_FOLDERS if (ROOT / folder).is_dir()]
    if not folders:
        print("the tests are not installed with the package: run this from a checkout")
        return 1
    report = out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *folders]
    command += ["-n", str(min(8, len(os.sched_getaffinity(0))))] if _has("xdist") else []
    environment = {**os.environ, "HYPOTHESIS_PROFILE": "gpu"}
    environment.pop("TRITON_INTERPRET", None)
    with (out / "tests.log").open("w", encoding="utf-8") as log:
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not report.exists():
        print((out / "tests.log").read_text(encoding="utf-8")[-2000:])
        return 1
    rows = list(read_junit(report))
    report.unlink()
    Lines(out / "tests.jsonl").write(json.dumps(row) for row in rows)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "skipped")}
    for row in rows:
        if row["status"] == "failed":
            print(f"failed: {row['test']}: {row['message']}")
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(run.returncode != 0 or counts["passed"] == 0)


def read_junit(path: Path) -> Iterable[dict[str, Any]]:
    """A row for each test of a JUnit file: test, status, seconds, message."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        status, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                status = "skipped" if child.tag == "skipped" else "failed"
                message = (child.get("message") or "").split("\n")[0][:300]
        name = f"{case.get('classname')}::{case.get('name')}"
        yield {"test": name, "status": status, "seconds": float(case.get("time") or 0), "message": message}


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# Stage: validate


def validate(out: Path) -> int:
    """Every backend of the GPU against float64."""
    from fastvit.validation import validate as run

    report = run(device="cuda")
    Lines(out / "validate.jsonl").write(report.to_json_lines().splitlines())
    _print_table(report.table)
    print(report.summary())
    return int(not report.ok)


# Stage: bench


def bench(out: Path) -> int:
    """A first benchmark: ViT-B and ViT-S patch embedding, batch 256, rows written as they come."""
    import torch

    from fastvit.benchmarks.patch_embed import Shape, problems_of
    from fastvit.benchmarks.problem import Plan
    from fastvit.benchmarks.rows import format_table
    from fastvit.benchmarks.runner import run_plan

    device = torch.device("cuda")
    plan: Plan = [
        (f"patch_embed {shape} {precision}", functools.partial(problems_of, shape, precision, device, True))
        for shape in (Shape("B", 256), Shape("S", 256))
        for precision in ("uint8 to bfloat16", "bfloat16", "uint8 to bfloat16, autocast")
    ]
    lines = Lines(out / "bench.jsonl")
    rows = run_plan(
        plan,
        device,
        1.0,
        lambda done, total, title: print(f"{done}/{total} {title}", flush=True),
        on_rows=lambda found: lines.write(row.to_json() for row in found),
    )
    _print_table(lambda: format_table(rows))
    return int(not any(row.median_us for row in rows if row.is_ours))


def _print_table(make: Callable[[], Any]) -> None:
    try:
        from rich.console import Console
    except ImportError:
        print("(no table: rich is not installed; the rows are in the folder)")
        return
    Console(width=200).print(make())


# The campaign

STAGES = (
    Stage("warm", 150, warm),
    Stage("tests", 200, tests),
    Stage("validate", 90, validate),
    Stage("bench", 240, bench),
)


def run_stage(stage: Stage, out: Path, limit: float, log: Log) -> dict[str, Any]:
    """Run a stage in its own process, pass on what it prints, and end it at its limit."""
    command = [sys.executable, "-u", "-m", "fastvit.benchmarks.gpu", "--inside", stage.name, "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    status = _follow(process, stage.name, started + limit, log)
    return {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - started, 1)}


def _follow(process: subprocess.Popen[str], name: str, deadline: float, log: Log) -> str:
    assert process.stdout is not None
    cut_off = threading.Event()

    def end() -> None:
        cut_off.set()
        # The stage leads a session of its own: its pool and its pytest go with it.
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), end)
    timer.start()
    try:
        for line in process.stdout:
            log(name, line.rstrip("\n"))
        code = process.wait()
    finally:
        timer.cancel()
    return "cut off" if cut_off.is_set() else "passed" if code == 0 else "failed"


def describe_device() -> dict[str, Any]:
    """GPU, driver and versions; raises RuntimeError where there is no GPU."""
    import torch

    from fastvit.backend import available_backends
    from fastvit.benchmarks.rows import commit, device_name, versions

    if not torch.cuda.is_available():
        raise RuntimeError(NO_DEVICE)
    return {
        "device": device_name(torch.device("cuda")),
        "versions": versions("cuda"),
        "commit": commit(),
        "backends": available_backends("cuda"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = [stage.name for stage in STAGES]
    about_this = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.gpu", description=about_this)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu"), help="folder of results")
    parser.add_argument("--stage", action="append", choices=names, help="only this stage (may be repeated)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages together")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and look for a device, nothing more")
    parser.add_argument("--inside", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    stages = [stage for stage in STAGES if not options.stage or stage.name in options.stage]
    if options.inside:
        return next(stage for stage in STAGES if stage.name == options.inside).run(options.out)
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name} (at most {stage.limit} s): {(stage.run.__doc__ or '').strip()}")
    try:
        about = describe_device()
    except RuntimeError as error:
        print(f"{error}: this command needs a GPU; on a CPU there are `make test` and `fastvit bench`", file=sys.stderr)
        return 1
    return 0 if options.dry_run else campaign(stages, options.out.resolve(), options.budget, about)


def campaign(stages: Sequence[Stage], out: Path, budget: float, about: dict[str, Any]) -> int:
    """Run stages in order within the budget; the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.jsonl")
    summary = Lines(out / "summary.jsonl")
    summary.write([json.dumps(about)])
    log("device", json.dumps(about))
    deadline = time.monotonic() + budget
    results = []
    for stage in stages:
        left = deadline - time.monotonic()
        if left < 5:
            results.append({"stage": stage.name, "status": "no time left", "seconds": 0.0})
        else:
            results.append(run_stage(stage, out, min(stage.limit, left), log))
        summary.write([json.dumps(results[-1])])
    log("summary", "\n".join(f"{r['stage']:10} {r['status']:12} {r['seconds']:6.1f} s" for r in results))
    log("summary", f"Results: {out}")
    return int(any(result["status"] != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
