"""What the tests of runs share: one that is broken off, two that must be the same, and one in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastvit.training.observers import Observer
from fastvit.training.run import Run

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}


class StopAt(Observer):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, run: Run, steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def assert_same(one: Any, other: Any, name: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{name}.{index}")
    else:
        assert one == other, name


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


WORKER = """
import json, os, sys
import torch
from fastvit.training import TrainOptions, models, train
output, given = sys.argv[1], json.loads(sys.argv[2])
models.DIGITS_ARGUMENTS = given.pop("model_arguments")
result = train(TrainOptions(device="cpu", tensorboard=False, output=output, **given))
weights = torch.cat([p.detach().flatten() for p in result.model.parameters()])
record = {"history": result.history, "losses": result.losses, "sum": weights.double().sum().item()}
open(f"{output}.{os.environ['RANK']}.json", "w").write(json.dumps(record))
"""


def in_two_processes(output: Path, **given: Any) -> list[Any]:
    """Train the TINY model by these options, as torchrun starts it; history, losses and sum of weights of each."""
    arguments = [sys.executable, "-c", WORKER, str(output), json.dumps({"model_arguments": TINY, **given})]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            arguments,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(2)]
