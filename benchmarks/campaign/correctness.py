"""Stages tests, primitives and validate_*: the same tests and the same cases as everywhere, on the GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvit.benchmarks.campaign import pytest_rows
from fastvit.benchmarks.campaign.backends import backends_of, why_not
from fastvit.benchmarks.campaign.output import FAILED, SKIPPED, Lines, passed_if, print_table, progress, report
from fastvit.validation import Report, Row, check_primitives
from fastvit.validation import validate as validate_backends
from fastvit.validation.cases import DTYPES, OPS

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/gpu", "tests/cuda/test_on_gpu.py", "tests/ops", "tests/kernels", "tests/model")
ON_THE_CPU = ("tests/ops/test_cpu.py", "tests/model/test_distributed.py")  # whose time a GPU would wait for
WORKERS = 8
ONE_TEST = 25  # seconds after which a test counts as hung
GLANCE = 10.0  # seconds between looks at what the tests have found so far


def tests(out: Path, paths: Sequence[str] = TESTS) -> str:
    """The tests of ops, kernels and model on the GPU, with few hypothesis examples; a line for each test."""
    present = [path for path in paths if (ROOT / path).exists()]
    if not present:
        print("the tests are not installed with the package: run this from a checkout")
        return FAILED
    rows, log = out / "tests.jsonl", out / "tests.log"
    # What is compiled is for graphs alone; a pool of compilers for each worker would slow the others.
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**few, **os.environ, "HYPOTHESIS_PROFILE": "gpu", pytest_rows.VARIABLE: str(rows)}
    with log.open("w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            [sys.executable, *_pytest_arguments(), *present],
            cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while process.poll() is None:
            try:
                process.wait(GLANCE)
            except subprocess.TimeoutExpired:
                found = list(_read(rows))
                report(figure=_counted(found), running=_running(found))
    found = list(_read(rows))
    for row in found:
        if row["status"] == "failed":
            print(f"failed: {row['test']}: {row['message']}")
    ran = any(row["status"] == "passed" for row in found)
    if process.returncode != 0 and not any(row["status"] == "failed" for row in found):
        print(log.read_text(encoding="utf-8", errors="replace")[-2000:])
    print(_counted(found))
    report(figure=_counted(found))
    return passed_if(process.returncode == 0 and ran)


def _pytest_arguments() -> list[str]:
    arguments = ["-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
    arguments += ["-p", "no:cacheprovider", "-p", pytest_rows.__name__]
    arguments += [f"--ignore={path}" for path in ON_THE_CPU]
    if _has("xdist"):
        arguments += ["-n", str(min(WORKERS, len(os.sched_getaffinity(0))))]
    if _has("pytest_timeout"):
        # A signal does not reach a thread that waits for the GPU; with the thread goes its process.
        arguments += ["--timeout", str(ONE_TEST), "--timeout-method", "thread"]
    return arguments


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _read(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be half written
            yield json.loads(line)


def _counted(rows: Iterable[dict[str, Any]]) -> str:
    counts = Counter(row["status"] for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped"))


def _running(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Tests that have started and not ended: where the tests are cut off, one of them hung."""
    ended = {row["test"] for row in rows if row["status"] != pytest_rows.STARTED}
    return [row["test"] for row in rows if row["test"] not in ended]


def primitives(out: Path, device: str = "cuda") -> str:
    """`fastvit validate --primitives`: what the CUDA C++ kernels are made of, against the emulation of it."""
    found = check_primitives(device)
    Lines(out / "validate.jsonl").write(found.to_json_lines().splitlines())
    print_table(found.table)
    reasons = "; ".join(reason for _, reason in found.skip_reasons())
    ran = found.passed + found.failed > 0
    report(figure=found.summary() if ran else reasons)
    return passed_if(found.ok) if ran else SKIPPED


def validate(backend: str, out: Path, device: str = "cuda", quick: bool = False) -> str:
    """One backend against float64, an op and a dtype at a time; skipped where it can't run.

    A backend has a process of its own, since a kernel that goes wrong breaks CUDA for all that run in the same one.
    """
    if backend not in backends_of(device):
        report(figure=f"without {backend}: {why_not(backend, device)}")
        return SKIPPED
    lines = Lines(out / "validate.jsonl")
    whole = Report()
    for op, dtype in itertools.product(OPS, DTYPES):
        part = _validate_part(backend, op, dtype, quick, device)
        lines.write(part.to_json_lines().splitlines())
        whole = Report(whole.rows + part.rows)
        report(figure=whole.summary())
        with contextlib.suppress(RuntimeError):  # where CUDA is broken, the rows say so
            torch.cuda.empty_cache()
    print_table(whole.table)
    print(whole.summary())
    return passed_if(whole.ok)


def _validate_part(backend: str, op: str, dtype: str, quick: bool, device: str) -> Report:
    """The cases of one op in one dtype; what ends them early is a failure of the case that it came in."""
    titles = [""]

    def note(done: int, total: int, title: str) -> None:
        progress(done, total, title)
        titles.append(title)

    try:
        return validate_backends([backend], [op], [dtype], quick, device, note)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"{titles[-1]}: {reason}", flush=True)
        return Report((Row(backend, op, dtype, titles[-1], "all", FAILED, reason=reason, device=device),))
