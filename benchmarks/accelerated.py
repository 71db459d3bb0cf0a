"""Models of other libraries, accelerated, beside themselves: from raw uint8 images to tokens, logits and gradients.

Two suites: what is accelerated, up to the first block, and the model that it is a part of.

The original gets its images as a loader leaves them on the device: to float, then subtract and divide in place, which
is a part of its time. Both have the same weights; on a GPU both run under bfloat16 autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.benchmarks import model, models
from fastvit.benchmarks.patch_embed import YARDSTICK
from fastvit.benchmarks.problem import Contender, Plan, Problem, our_backends
from fastvit.benchmarks.rivals import loader, patches_of
from fastvit.benchmarks.rows import OURS
from fastvit.benchmarks.timing import Call
from fastvit.interop.acceleration import accelerate, settings_of
from fastvit.interop.measuring import GRADIENTS, LOGITS, TOKENS, task_of
from fastvit.interop.verification import verify_acceleration

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORIGINAL = "original"


@dataclass(frozen=True)
class Setup(model.Setup):
    """One model of one library on one batch."""

    library: str = "timm"

    def original(self) -> nn.Module:
        """The library's own, from seed 0."""
        return self.make(models.RIVALS[self.library])

    def accelerated(self, backend: str) -> nn.Module:
        """The same model, accelerated."""
        # A backend that is named is the blocks' too, which a CPU with plain PyTorch leaves to the library's code.
        trunk = self.device.type == "cuda" or backend == "native"
        return accelerate(self.original(), mean=MEAN, std=STD, backend=backend, trunk=trunk)

    def images(self) -> Tensor:
        """Random raw images [B, 3, 224, 224]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (self.batch, 3, 224, 224), dtype=torch.uint8, generator=generator).to(self.device)

    def __str__(self) -> str:
        return f"{self.library} {self.shape}"


def plan_tokens(size: str, device: torch.device) -> Plan:
    """The cases of the suite `accelerated`."""
    batch = 256 if device.type == "cuda" else 16
    return _plan((TOKENS,), size, device, ("S", "B"), batch, depth=2)  # of the blocks, none is run


def plan_model(size: str, device: torch.device) -> Plan:
    """The cases of the suite `accelerated_model`."""
    full = size == "full"
    if device.type == "cuda":
        return _plan((LOGITS, GRADIENTS), size, device, ("S", "B", "L") if full else ("B",), 256)
    return _plan((LOGITS, GRADIENTS), size, device, ("Ti", "S"), 8)


def _plan(
    tasks: tuple[str, ...], size: str, device: torch.device, names: tuple[str, ...], batch: int, depth: int = 0
) -> Plan:
    if size == "tiny":
        names, batch, depth = ("Ti",), 1, 2
    residual = torch.float32 if device.type == "cuda" else None  # autocast on a GPU alone
    overrides = {"depth": depth} if depth else {}
    cases = [Setup(name, batch, device, residual, overrides, library) for library in models.RIVALS for name in names]
    return [(f"accelerated {setup}", functools.partial(_problems_of, setup, tasks)) for setup in cases]


def _problems_of(setup: Setup, tasks: tuple[str, ...]) -> Iterator[Problem]:
    check = functools.lru_cache(lambda backend: _check(setup, backend))
    for task in tasks:
        contenders = [
            Contender(f"{OURS}{backend}", functools.partial(_ours, setup, task, backend))
            for backend in our_backends(setup.device)
        ]
        contenders.append(Contender(ORIGINAL, functools.partial(_original, setup, task)))
        if task == TOKENS:
            contenders.append(Contender(YARDSTICK, functools.partial(_product, setup), whole=False))
        on_gpu = setup.device.type == "cuda"
        op = "accelerated" if task == TOKENS else "accelerated_model"
        dtype = "uint8 to bfloat16, autocast" if on_gpu else "uint8 to float32"
        yield Problem(op, str(setup), dtype, "NCHW", task, contenders, check, batch=setup.batch)


def _ours(setup: Setup, task: str, backend: str) -> Call:
    return _under(setup, task_of(setup.accelerated(backend), task, setup.images()))


def _original(setup: Setup, task: str) -> Call:
    return _under(setup, task_of(setup.original(), task, setup.images(), loader(MEAN, STD, setup.device)))


def _product(setup: Setup) -> Call:
    """Only the linear layer, on patches that were normalised and unfolded before."""
    weight = next(p for p in setup.original().parameters() if p.dim() == 4).detach()
    patches = patches_of(loader(MEAN, STD, setup.device)(setup.images()), *weight.shape[2:])
    return _under(setup, lambda: F.linear(patches, weight.flatten(1)))


def _under(setup: Setup, call: Callable[[], object]) -> Call:
    def run() -> object:
        with setup.autocast():
            return call()

    return run


def _check(setup: Setup, backend: str) -> str:
    """Why ours must not be timed: its outputs and gradients against float64, held to twice the original's error."""
    subject = setup.accelerated(backend)
    found = verify_acceleration(subject, settings_of(subject), check=False)
    return f"not timed, out of tolerance: {found.verdict}" if found.failures else ""
