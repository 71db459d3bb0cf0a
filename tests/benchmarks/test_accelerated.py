"""The suites of accelerated models: both do the same work on the same images, and a wrong one is not timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.benchmarks import accelerated, models
from fastvit.benchmarks.problem import Contender, Problem, Unavailable
from fastvit.benchmarks.runner import run_suites
from fastvit.interop.measuring import GRADIENTS, LOGITS, TOKENS
from fastvit.validation.faults import planted
from fastvit.validation.tolerance import relative_error

CPU = torch.device("cpu")


def _problems() -> Iterator[Problem]:
    for plan in (accelerated.plan_tokens, accelerated.plan_model):
        for _, problems in plan("tiny", CPU):
            yield from problems()


def _built(contender: Contender) -> object:
    try:
        return contender.build()()
    except Unavailable as error:
        pytest.skip(str(error))


def test_both_compute_the_same() -> None:
    """The same weights, and images that differ by the loader alone."""
    seen = 0
    for problem in _problems():
        if problem.mode == LOGITS:
            ours, original, *_ = (_built(contender) for contender in problem.contenders)
            assert isinstance(ours, Tensor) and isinstance(original, Tensor)
            assert ours.std() > 0 and relative_error(ours, original.double()) < 1e-5
            seen += 1
    assert seen == 3


def test_originals_are_made_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def build(model: str, residual: None) -> nn.Module:
        seen.append(torch.empty(1).device.type)
        return nn.Linear(1, 1)

    monkeypatch.setitem(models.RIVALS, "timm", build)
    accelerated.Setup("Ti", 1, torch.device("meta")).original()
    assert seen == ["meta"]


@pytest.mark.parametrize("task", [TOKENS, LOGITS, GRADIENTS])
def test_ours_runs_the_op_once_and_the_original_never(task: str) -> None:
    for problem in _problems():
        if problem.mode == task:
            for contender in problem.contenders:
                reset_launch_counts()
                _built(contender)
                expected = {("patch_embed", "cpu"): 1} if contender.is_ours else {}
                if contender.is_ours and task == GRADIENTS:
                    expected["patch_embed_backward", "cpu"] = 1
                assert launch_counts() == expected, (problem.shape, contender.provider)


@pytest.mark.parametrize("fault", ["bias dropped", "dPos off by a batch"])
def test_a_wrong_backend_is_not_timed(fault: str) -> None:
    with planted(fault):
        rows = run_suites(["accelerated"], "tiny", "cpu", threads=1)
    ours = [row for row in rows if row.is_ours]
    assert ours and all(row.median_us is None and row.reason for row in ours)
    assert any("out of tolerance" in row.reason for row in ours)
