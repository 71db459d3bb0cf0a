"""Two processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.two_processes import needs_gloo, run_in_two_processes

WORKER = Path(__file__).with_name("distributed_worker.py")


@needs_gloo
@pytest.mark.parametrize("check", ["ddp", "fsdp", "packed"])
def test_two_processes_train_as_one(check, tmp_path):
    run_in_two_processes(WORKER, [check, "{rank}", str(tmp_path)])
