"""DDP and FSDP2 in two processes over gloo: gradients are those of the untouched model in the same wrapping."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvit.peers import peer_missing
from tests.interop.subjects import LIBRARIES
from tests.two_processes import needs_gloo, run_in_two_processes

WORKER = Path(__file__).with_name("distributed_worker.py")


@needs_gloo
def test_two_processes(tmp_path):
    names = [name for name in LIBRARIES if not peer_missing(name.partition("-")[0])]
    if not names:
        pytest.skip("none of the libraries is installed")
    for output in run_in_two_processes(WORKER, ["{rank}", str(tmp_path), *names]):
        assert [line for line in output.splitlines() if line.endswith("is done")] == [
            f"{name} is done" for name in names
        ]
