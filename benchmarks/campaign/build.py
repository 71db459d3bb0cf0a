"""Stage build: the C++/CUDA extension, compiled for this GPU alone. Without it the later stages go on with Triton."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch

from fastvit import cuda
from fastvit.backend import available_backends
from fastvit.benchmarks.campaign.output import FAILED, PASSED, SKIPPED, report

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_extension.py"
BUILT, NOT_BUILT = "built: ", "not built: "  # how the last line of the tool starts


def build(out: Path, device: str = "cuda", tool: Path = TOOL) -> str:
    """What the compilers print goes to the log. Where a tool is missing that it takes, the stage is skipped."""
    status, words = _built(architecture_of(*torch.cuda.get_device_capability(device)), tool)
    found = available_backends(device)
    if status == PASSED and found["cuda"]:
        status, words = FAILED, f"{words}, and can't run: {found['cuda']}"
    print(words, flush=True)
    report(figure=words, backends=found)
    return status


def architecture_of(major: int, minor: int) -> str:
    """What FASTVIT_CUDA_ARCHS calls the GPUs of a compute capability: "80", and "90a" for Hopper's warpgroups."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def _built(architecture: str, tool: Path) -> tuple[str, str]:
    """Build; a status, and words for it."""
    if not tool.exists():
        return SKIPPED, f"{NOT_BUILT}there is no {tool}: run this from a checkout"
    started = time.monotonic()
    last = _run(tool, architecture)
    if last.startswith(BUILT):
        return PASSED, f"built for sm_{architecture} in {time.monotonic() - started:.0f} s"
    words = NOT_BUILT + last.removeprefix(NOT_BUILT).removeprefix("error: ")
    if cuda.is_outdated():
        words = f"{words}; what is measured is an older build"
    return SKIPPED if last.startswith(NOT_BUILT) else FAILED, words


def _run(tool: Path, architecture: str) -> str:
    """The last line that the tool prints; all of them are passed on."""
    lines: deque[str] = deque(["error: it said nothing"], maxlen=1)
    with subprocess.Popen(
        [sys.executable, "-u", str(tool)],
        env={**os.environ, "FASTVIT_CUDA_ARCHS": architecture},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.extend([line.strip()] if line.strip() else [])
    return lines[-1]
