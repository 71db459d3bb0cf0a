"""A CPU that runs the backends of a GPU, for what is to be seen of several backends in one table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastvit import backend
from fastvit.benchmarks import problem

FOR_GPUS = ("triton", "cuda")


@pytest.fixture
def gpu_backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The backends of a GPU run on the CPU, by the functions of the CPU backend, and count as quick."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in FOR_GPUS:
        monkeypatch.setitem(backend._REASONS, name, lambda device_type: "")
        monkeypatch.setitem(backend._PACKAGES, name, "fastvit.cpu")
    monkeypatch.setattr(problem, "is_interpreted", lambda name, device: name == "emulated")
    backend.implementation.cache_clear()
    yield FOR_GPUS
    backend.implementation.cache_clear()
