"""DDP and FSDP2 in two processes over gloo: gradients are those of the untouched model in the same wrapping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from fastvit.peers import import_peer
from tests.interop.subjects import LIBRARIES

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(tmp_path):
    names = [name for name in LIBRARIES if not missing(name)]
    if not names:
        pytest.skip("none of the libraries is installed")
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(tmp_path), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert [line for line in output.splitlines() if line.endswith("is done")] == [
            f"{name} is done" for name in names
        ]


def missing(name: str) -> str:
    """Why a library can't be used here, "" if it can."""
    try:
        import_peer(name.partition("-")[0])
    except ImportError as error:
        return str(error)
    return ""
