"""Two processes that run the same script, as DDP and FSDP2 want it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


def ended(started: Sequence[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    """What each process wrote to the one stream that is piped, once all have ended, or in so many seconds."""
    try:
        found = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [out if out is not None else errors for out, errors in found]


def run_in_two_processes(worker: Path, arguments: Sequence[str]) -> list[str]:
    """Run `worker *arguments` with "{rank}" in them replaced by 0 and 1; what each printed. Both must succeed."""
    workers = [
        subprocess.Popen(
            [sys.executable, str(worker), *(argument.replace("{rank}", str(rank)) for argument in arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = ended(workers)
    for process, output in zip(workers, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
