"""A CPU that runs the backends of a GPU, for what is to be seen of several backends in one table; and some rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastvit import backend
from fastvit.benchmarks import problem
from fastvit.benchmarks.rows import Row

FOR_GPUS = ("triton", "cuda")


@pytest.fixture(autouse=True)
def one_backend_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What suites, tuner and campaign do with a backend is the same for another, and takes as long again."""
    monkeypatch.setitem(backend._REASONS, "native", lambda device_type: "left out of this test")


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


@pytest.fixture
def four_rows() -> list[Row]:
    """A case of ours that one rival wins and one loses, and that a third could not run."""
    case = ("patch_embed", "ViT-S", "float32", "NCHW")
    ratios = {"ratios": {"timm": 1.5, "conv2d": 0.8}, "best_rival": "conv2d", "headline": 0.8}
    return [
        Row(*case, "fastvit:cpu", "forward", 1500.0, 1400.0, 1600.0, 9, **ratios),  # type: ignore[arg-type]
        Row(*case, "timm", "forward", 2250.0, 2200.0, 2300.0, 9, rival="timm"),
        Row(*case, "conv2d", "forward", 1200.0, 1100.0, 1300.0, 9, rival="conv2d"),
        Row(*case, "linear", "forward", reason="not installed", rival="linear"),
    ]
