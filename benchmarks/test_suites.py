"""The suites under pytest-benchmark: `pytest benchmarks`, for its storage and its `--benchmark-compare`.

Each contender of each case is a benchmark of its own, in the case's group; FASTVIT_BENCH_SIZE picks the size.
`fastvit bench` interleaves the contenders of a case instead, which compares them better.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastvit.benchmarks.problem import Plan, Problem, Unavailable, steady
from fastvit.benchmarks.rows import OURS
from fastvit.benchmarks.runner import SUITES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = os.environ.get("FASTVIT_BENCH_SIZE", "small")
Problems = Callable[[], Iterator[Problem]]


@pytest.fixture(autouse=True)
def _steady() -> Iterator[None]:
    with steady(DEVICE):
        yield


def _contenders(plan: Plan) -> list[tuple[str, str]]:
    """(mode, provider) of every contender of a suite, read off one case."""
    _, problems = plan[0]
    return [(problem.mode, contender.provider) for problem in problems() for contender in problem.contenders]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender of each case."""
    names = ("title", "problems", "mode", "provider")
    values: list[tuple[str, Problems, str, str]] = []
    if set(names) <= set(metafunc.fixturenames):
        for plan in SUITES.values():
            contenders = _contenders(plan("tiny", DEVICE))
            values += [(*case, *contender) for case in plan(SIZE, DEVICE) for contender in contenders]
        ids = [f"{title} {mode}-{provider}" for title, _, mode, provider in values]
        metafunc.parametrize(names, values, ids=ids)


def test_suite(title: str, problems: Problems, mode: str, provider: str, benchmark: Any) -> None:
    problem = next(problem for problem in problems() if problem.mode == mode)
    contender = next(contender for contender in problem.contenders if contender.provider == provider)
    if contender.is_ours:
        reason = problem.check(contender.name.removeprefix(OURS))
        assert not reason, reason
    try:
        call = contender.build()
    except Unavailable as error:
        pytest.skip(str(error))
    benchmark.group = f"{title} {mode}"
    benchmark.extra_info.update(op=problem.op, shape=problem.shape, dtype=problem.dtype, provider=provider)
    benchmark.pedantic(_synchronised(call), warmup_rounds=3, rounds=15)


def _synchronised(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run if DEVICE.type == "cuda" else call
