"""What all tests share: seeds, the device, the backends that can run on it, and hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastvit import cli, tuning
from fastvit.backend import available_backends, reset_launch_counts, why_missing
from fastvit.validation.ops import OPS

# A tuning table of this machine must not choose what the tests run; processes that they start inherit this.
os.environ["FASTVIT_TUNING"] = "off"

# float32 is held to what float32 can do; tests that are about TF32 switch it on themselves. This flag, rather than that
# of convolutions alone, because `torch.backends.cudnn.flags` refuses to work where the two disagree.
torch.backends.cudnn.allow_tf32 = False

# Deadlines measure the machine, not the code. On a GPU each fresh shape may compile nothing, but costs transfers.
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": bool(os.environ.get("CI"))}
settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("gpu", max_examples=10, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    reset_launch_counts()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a `fastvit` command in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def fresh() -> Iterator[None]:
    """No tuning table was read before, and none that is read is kept."""
    tuning.reset()
    yield
    tuning.reset()


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Callable[[tuning.Table | str | bytes], Path]:
    """use(table): the user's tuning table is this, or a file of such contents."""
    path = tmp_path / "table.json"
    monkeypatch.setenv("FASTVIT_TUNING", str(path))

    def write(contents: tuning.Table | str | bytes) -> Path:
        if isinstance(contents, tuning.Table):
            contents.save(path)
        else:
            path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        tuning.reset()
        return path

    return write


def pytest_runtest_teardown() -> None:
    """End a worker of pytest-xdist in which CUDA is broken; another one takes its place.

    What a kernel does wrong stays with its process: every later call of CUDA fails, and so would every later test. By
    now the outcome of this test's call is with the process that collects it.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)  # neither Python nor CUDA could clean up


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run: the GPU if there is one."""
    return DEVICE


def runnable_backends() -> list[str]:
    """Backends to hold to the reference in this process, on this device.

    With Triton's interpreter on, that is Triton alone: the others have a process of their own.
    """
    names = [name for name, reason in available_backends(DEVICE).items() if not reason and name != "reference"]
    return ["triton"] if DEVICE == "cpu" and "triton" in names else names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `backend` runs once for every backend that can run here and has a part in its op: the one
    in the test's name, or the file's OP, or patch_embed."""
    if "backend" in metafunc.fixturenames:
        named = [op for op in OPS if op in metafunc.function.__name__]
        op = max(named, key=len) if named else getattr(metafunc.module, "OP", "patch_embed")
        names = [name for name in runnable_backends() if not why_missing(name, op)]
        metafunc.parametrize("backend", names)
