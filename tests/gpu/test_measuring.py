"""What the campaign measures with, on a real GPU: its figures are only as good as this."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastvit.benchmarks.campaign import correctness, launch, tiny
from fastvit.benchmarks.campaign.speed import ceilings
from fastvit.benchmarks.problem import FORWARD
from fastvit.benchmarks.profiling import Setup, profile
from fastvit.benchmarks.rows import read_json_lines
from fastvit.validation.cases import Case, make_inputs
from fastvit.validation.report import PASSED
from fastvit.validation.runner import backend_candidate, check_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_profile_has_our_kernels_and_counts_nothing_twice(mode: str, kernels: str) -> None:
    found = profile(Setup("Ti", 8, f"fastvit:{kernels}", mode), "cuda", depth=2)
    groups = found.groups()
    assert {"gemm", "patch embedding"} <= set(groups)
    # Operators, which a kernel of the extension is told from by its arguments: fastvit::sum_rows(fastvit::SumRows).
    assert not [k.name for k in found.kernels if re.match(r"aten::|Optimizer|fastvit::\w+$", k.name)]
    assert sum(kernel.share for kernel in found.kernels) == pytest.approx(1, abs=0.01)


def test_the_tiny_program_runs(kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.run("cuda", kernels)
    assert capsys.readouterr().out.splitlines()[-1] == tiny.FINISHED


def test_ceilings_are_rates_of_this_gpu(tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    assert ceilings(tmp_path, "cuda", size=1024, values=2**20, seconds=0.01) == PASSED
    rows = read_json_lines(tmp_path / "bench.jsonl")
    assert len(rows) == 4 and all(row.median_us for row in rows)
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_call_costs_more_than_an_addition(kernels: str) -> None:
    for case in launch.CASES:
        rows = launch.measure(case, FORWARD, [kernels], torch.device("cuda"), rounds=5)
        call, addition = (row.median_us for row in rows)
        assert call and addition and 1 < addition < call < 1000, rows


@pytest.mark.parametrize(("case", "what"), correctness.beyond_cases(0), ids=lambda value: getattr(value, "name", value))
def test_samples_at_the_ends_of_a_batch(case: Case, what: str, kernels: str) -> None:
    """The check of huge batches, on small ones."""
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    batch = correctness.batch_beyond(case, inputs, what, 2**21)
    rows = check_inputs(correctness.at_the_ends(backend_candidate(kernels, "cuda"), case, batch), case.op, inputs)
    assert rows and all(row.status == PASSED for row in rows), rows
