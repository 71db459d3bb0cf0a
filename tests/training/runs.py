"""What the tests of runs share: one that is broken off, two that must be the same, and one in two processes."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastvit.training.observers import Observer
from fastvit.training.run import Run
from tests.two_processes import ended

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0}


SIZES = [(30, 40), (40, 9), (3, 3), (16, 16), (2, 40), (21, 34), (64, 64), (8, 12)]  # of the patches of TINY: 4 x 4


def write_photos(folder: Path) -> Path:
    """Two classes of sixteen images of all SIZES, the one darker than the other."""
    generator = np.random.default_rng(0)
    for label, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        for index in range(16):
            pixels = generator.integers(0, 160, (*SIZES[index % len(SIZES)], 3)) + 95 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02}.png")
    return folder


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
    """One that no system gives to a connection by itself, so that it is free later too."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


WORKER = """
import functools, json, os, sys
from collections import Counter
from contextlib import nullcontext
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from fastvit import stream
from fastvit.training import TrainOptions, models, resume_options, train
from fastvit.training.sharding import count_memory, local
COMPILE = torch.nn.Module.compile
class Counted(TorchDispatchMode):
    "Messages between processes, by kind."
    def __init__(self):
        super().__init__()
        self.messages = Counter()
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            self.messages[op.name().split("::")[1].split(".")[0].strip("_")] += 1
        return op(*args, **(kwargs or {}))
for output, port, given in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    models.DIGITS_ARGUMENTS = given.pop("model_arguments")
    torch.nn.Module.compile = functools.partialmethod(COMPILE, backend="eager")  # in seconds, not minutes
    stream.LEAST_ON_A_CPU = 0 if given.pop("trunk", False) else 2**18
    resumed, is_counted = given.pop("resume", None), given.pop("counted", False)
    given = {"device": "cpu", "tensorboard": False, "output": output, **given}
    contents = None
    if resumed:
        options, contents = resume_options(resumed, given)
    else:
        options = TrainOptions(**given)
    counted = Counted()
    with counted if is_counted else nullcontext():
        result = train(options, resume=contents)
    memory = count_memory(result.model)
    states = [value for state in result.optimizer.state.values() for value in state.values() if value.dim()]
    weights = torch.cat([local(p.detach()).flatten() for p in result.model.parameters()])
    record = {
        "history": result.history,
        "losses": result.losses,
        "sum": weights.double().sum().item(),
        "messages": counted.messages,
        "memory": vars(memory),
        "states": sum(local(value).nbytes for value in states),
    }
    open(f"{output}.{os.environ['RANK']}.json", "w").write(json.dumps(record))
"""


def in_processes(world: int, *jobs: tuple[Path, dict[str, Any]], model: dict[str, Any] = TINY) -> list[list[Any]]:
    """Train the model by the options of each job, one run after another in the same `world` processes, which are
    started as torchrun does it; history, losses and sum of weights of each run in each process.

    Beside options a job may have `trunk` (whether blocks are to run by the trunk's ops) and `resume`.
    """
    listed = [(str(output), free_port(), {"model_arguments": model, **given}) for output, given in jobs]
    arguments = [sys.executable, "-c", WORKER, json.dumps(listed)]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            arguments,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = ended(started)
    assert [process.returncode for process in started] == [0] * world, "\n".join(errors)
    return [found_in(world, output) for output, _ in jobs]


def found_in(world: int, output: Path) -> list[Any]:
    """What each of `world` processes found in a run that wrote to `output`."""
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(world)]


def in_two_processes(output: Path, **given: Any) -> list[Any]:
    return in_processes(2, (output, given))[0]
