"""The comparison of primitives, with the emulation itself in the place of a GPU, and with one that is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastvit import backend
from fastvit.emulated import build, call
from fastvit.validation import check_primitives

pytestmark = pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "it can be built")


def test_without_a_gpu_nothing_ran_and_the_reason_is_given(device: str) -> None:
    if device == "cuda":
        pytest.skip("there is a GPU")
    report = check_primitives()
    assert not report.ok and report.skipped == 1 and list(report.skip_reasons())[0][1]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("wrong_bit", [0, 1])
def test_one_wrong_bit_is_found(wrong_bit: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(which: int, given: Tensor, found: Tensor) -> None:
        call.library().run_primitive(call.device(), which, call.view(given), call.view(found))
        if which == 3:
            found[5] ^= wrong_bit

    monkeypatch.setattr(backend, "why_unavailable", lambda name, device_type: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.ops, "fastvit", SimpleNamespace(run_primitive_cuda=run))
    report = check_primitives("cpu")
    known = len(call.library().primitives())
    assert report.failed == wrong_bit and report.ok == (not wrong_bit)
    assert (report.skipped > 0) == (capability == (8, 0)) and len(report.rows) == known
    if wrong_bit:
        assert "byte 5" in report.failures[0].where
