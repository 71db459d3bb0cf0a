"""Stages tests, primitives, limits_* and validate_*: what is right on this GPU, and what is wrong.

Tests and cases are the same as everywhere. The limits are batches whose offsets pass 2^31 values, and every even patch
from 2 to 32 and an odd one; their numbers are new ones each time: a case's name holds the seed of the run, and its
numbers come from the name, so that a failure can be repeated.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvit.benchmarks.campaign import deadline
from fastvit.benchmarks.campaign.output import append, keep_verdicts, progress, report, skipped, why_not
from fastvit.validation import (
    AddPositionCase,
    Case,
    Inputs,
    PatchEmbedCase,
    PatchEmbedInputs,
    check_primitives,
    make_inputs,
)
from fastvit.validation import validate as validate_backends
from fastvit.validation.cases import DTYPES
from fastvit.validation.ops import heaviest_first
from fastvit.validation.report import FAILED, PASSED, SKIPPED, Report, Row
from fastvit.validation.runner import Candidate, Tensors, backend_candidate, check_case, check_inputs

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/gpu", "tests/cuda/test_on_gpu.py", "tests/ops", "tests/kernels", "tests/model")
ON_THE_CPU = ("tests/ops/test_cpu.py", "tests/model/test_distributed.py")  # whose time a GPU would wait for
WORKERS = 8
ONE_TEST = 25  # seconds after which a test counts as hung
STARTED = "started"  # the status of a test that has not ended
PATCHES = (*range(2, 33, 2), 7)
THRESHOLD = 2**31  # values; what 32 bits can't count
EDGE = 2  # samples at either end of a large batch that are compared
TOO_LITTLE_MEMORY = "OutOfMemoryError"
GIVEN = {"patch_embed": "images", "add_position": "tokens"}  # what comes in batches


def tests(out: Path, paths: Sequence[str] = TESTS) -> str:
    """The tests of ops, kernels and model, by pytest in this process; what it prints is for a file of its own."""
    present = [path for path in paths if (ROOT / path).exists()]
    if not present:
        print("the tests are not installed with the package: run this from a checkout")
        return FAILED
    import pytest

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # as `python -m pytest` does, for what tests import of each other
    rows = TestRows(out / "tests.jsonl")
    with (out / "tests.log").open("w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        code = pytest.main([*_pytest_arguments(), *present], plugins=[rows])
    if code and not rows.counts[FAILED]:  # pytest itself went wrong
        print((out / "tests.log").read_text(encoding="utf-8", errors="replace")[-2000:])
    return PASSED if code == 0 and rows.counts[PASSED] else FAILED


def _pytest_arguments() -> list[str]:
    arguments = ["-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    arguments += ["-p", deadline.__name__, deadline.OPTION, str(ONE_TEST)]
    arguments += [f"--ignore={path}" for path in ON_THE_CPU]
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(WORKERS, len(os.sched_getaffinity(0))))]
    return arguments


class TestRows:
    """A plugin of the process that collects the results: a line for each test as it starts and as it ends.

    A cut-off leaves what was found, and the names of the tests that it came in.
    """

    __test__ = False  # for pytest: this is none of the tests

    def __init__(self, path: Path) -> None:
        self._path, self._stdout = path, sys.stdout  # the campaign's, whatever becomes of sys.stdout
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test that hangs has no other row."""
        self._write(nodeid, STARTED)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up and tear-down count where something went wrong in them; a crashed worker's report has no phase."""
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.duration, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file or a module that can't be imported is a failure; one that skips itself says why."""
        if report.outcome != "passed":
            self._write(report.nodeid, report.outcome, 0.0, report.longrepr)

    def _write(self, test: str, status: str, seconds: float = 0.0, details: Any = None) -> None:
        row = {"test": test, "status": status, "seconds": round(seconds, 3), "message": message_of(details)}
        append(self._path, [json.dumps(row)])
        if status == STARTED:
            return
        self.counts[status] += 1
        with contextlib.redirect_stdout(self._stdout):
            if status == FAILED:
                print(f"failed: {test}: {row['message']}")
            report(figure=", ".join(f"{self.counts[status]} {status}" for status in (PASSED, FAILED, SKIPPED)))


def message_of(details: Any) -> str:
    """One line of what pytest has to say of a test: the reason of a skip, the place and the error of a failure."""
    if isinstance(details, tuple):  # a skip: file, line, reason
        return str(details[2])[:300]
    text = str(getattr(details, "reprcrash", None) or details or "")
    return text.strip().rpartition("\n")[2][:300]


def primitives(out: Path, device: str = "cuda") -> str:
    """`fastvit validate --primitives`: what the CUDA C++ kernels are made of, against the emulation of it."""
    found = check_primitives(device)
    status = keep_verdicts(out, [found])
    if found.passed + found.failed:
        return status
    return skipped("; ".join(reason for _, reason in found.skip_reasons()))


def validate(
    out: Path, backend: str, device: str = "cuda", quick: bool = False, dtypes: Iterable[str] = tuple(DTYPES)
) -> str:
    """One backend against float64, an op and a dtype at a time; skipped where it can't run.

    A backend has a process of its own, since a kernel that goes wrong breaks CUDA for all that run in the same one.
    """

    def parts() -> Iterator[Report]:
        for op, dtype in itertools.product(heaviest_first(), dtypes):
            yield validate_backends([backend], [op], [dtype], quick, device, progress)
            with contextlib.suppress(RuntimeError):  # where CUDA is broken, the rows say so
                torch.cuda.empty_cache()

    reason = why_not(backend, device)
    return skipped(f"without {backend}: {reason}") if reason else keep_verdicts(out, parts())


def limits(
    out: Path, backend: str, device: str = "cuda", patches: Sequence[int] = PATCHES,
    dtypes: Iterable[str] = ("bfloat16", "float16", "float32"), threshold: int = THRESHOLD,
) -> str:  # fmt: skip
    """The large batches; then all patches in both layouts, raw and float images. Each backend in a process of its own,
    as in :func:`validate`."""
    reason = why_not(backend, device)
    if reason:
        return skipped(f"without {backend}: {reason}")
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}, part of every case's name")
    candidate = backend_candidate(backend, device)
    checks = _check_beyond(candidate, threshold, seed), _check_patches(candidate, patches, dtypes, seed)
    return keep_verdicts(out, (Report(tuple(rows)) for rows in itertools.chain(*checks)))


def patch_cases(patches: Sequence[int], seed: int) -> Iterator[PatchEmbedCase]:
    """A case for each patch, layout and kind of images, with all parameters."""
    for patch, layout, images in itertools.product(patches, ("nchw", "channels_last"), ("uint8", "same")):
        yield PatchEmbedCase(
            f"patch {patch}, {layout}, images {images}, seed {seed}", batch=3, grid=(3, 5), patch=(patch, patch),
            width=256, images=images, layout=layout, normalise=True,
        )  # fmt: skip


def _check_patches(
    candidate: Candidate, patches: Sequence[int], dtypes: Iterable[str], seed: int
) -> Iterator[list[Row]]:
    for dtype, case in itertools.product(dtypes, list(patch_cases(patches, seed))):
        _announce(candidate, case, dtype)
        yield check_case(candidate, case, dtype)


def _announce(candidate: Candidate, case: Case, dtype: str) -> None:
    """Where a kernel hangs, the last line of the log says which."""
    print(f"{candidate.name} {case.op} {dtype}: {case.name}", flush=True)


def beyond_cases(seed: int) -> list[tuple[Case, str]]:
    """Both ends of large batches in real shapes, images at 224 in patches of 16, and whose offsets pass the threshold:
    those of what is "given" (GIVEN), or of the "result"."""
    embed = functools.partial(PatchEmbedCase, batch=2 * EDGE, grid=(14, 14), width=256, images="uint8", normalise=True)
    cases: list[tuple[Case, str]] = [
        (embed("large batch of raw images"), "given"),
        (embed("large batch, tokens", width=1024), "result"),
        (embed("large batch, channels last", layout="channels_last"), "given"),
        (embed("large batch, masked", keep=49), "given"),
        (embed("large batch, image gradient", images="same", normalise=False), "given"),
        (AddPositionCase("large batch", batch=2 * EDGE, patches=196, width=1024), "result"),
    ]
    return [(replace(case, name=f"{case.name}, seed {seed}"), what) for case, what in cases]


def batch_beyond(case: Case, inputs: Inputs, what: str, threshold: int) -> int:
    """The batch whose last EDGE samples lie wholly beyond the threshold."""
    sample = (inputs[GIVEN[case.op]] if what == "given" else inputs.grad)[0]
    return max(2 * EDGE, -(-threshold // sample.numel()) + EDGE)


def _check_beyond(candidate: Candidate, threshold: int, seed: int) -> Iterator[list[Row]]:
    for case, what in beyond_cases(seed):
        _announce(candidate, case, "bfloat16")
        inputs = make_inputs(case, torch.bfloat16, candidate.device)
        batch = batch_beyond(case, inputs, what, threshold)
        rows = check_inputs(
            at_the_ends(candidate, case, batch), case.op, inputs, f"{case.name}, batch {batch}", "bfloat16"
        )
        yield [replace(row, status=SKIPPED) if TOO_LITTLE_MEMORY in row.reason else row for row in rows]
        with contextlib.suppress(RuntimeError):  # where CUDA is broken, the rows say so
            torch.cuda.empty_cache()


def at_the_ends(candidate: Candidate, case: Any, batch: int) -> Candidate:
    """The candidate, given a case's samples as the first and last of a batch of `batch`; the others are random."""

    def forward(op: str, inputs: Inputs, tensors: Tensors) -> Tensor:
        ends = tensors[GIVEN[op]]
        assert ends is not None
        if isinstance(inputs, PatchEmbedInputs) and (keep := inputs.keep) is not None:
            others = torch.randint(case.patches, (batch - 2 * EDGE, keep.shape[1]), device=keep.device)
            inputs = replace(inputs, keep=torch.cat([keep[:EDGE], others, keep[EDGE:]]))
        large = torch.cat([ends[:EDGE], _random_like(ends, batch - 2 * EDGE), ends[EDGE:]])
        assert large.stride()[1:] == ends.stride()[1:]
        result = candidate.forward(op, inputs, {**tensors, GIVEN[op]: large})
        if not bool(result.isfinite().all()):
            raise RuntimeError("values between the ends of the batch were never written, or are wrong")
        return torch.cat([result[:EDGE], result[-EDGE:]])

    return replace(candidate, forward=forward)


def _random_like(tensor: Tensor, batch: int) -> Tensor:
    """[batch, ...] random numbers, laid out as the tensor."""
    found = torch.empty_strided((batch, *tensor.shape[1:]), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return found.normal_() if found.is_floating_point() else found.random_(256)
