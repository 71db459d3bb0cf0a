"""From raw images in host memory to tokens on the device: ours moves bytes, and normalises where it multiplies.

On a GPU the images lie in pinned memory and every contender copies what it needs without waiting; its time runs from
the first work on the host to the last token. On a CPU nothing is copied. Copying over the bus is no part of the
machine's measured ceilings, so these rows have no floor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastvit.benchmarks import rivals
from fastvit.benchmarks.contenders import Make, Task, ours
from fastvit.benchmarks.patch_embed import Shape, task_of, usual_shapes
from fastvit.benchmarks.problem import COMPILED, FORWARD, Contender, Plan, Problem
from fastvit.benchmarks.rivals import Solution
from fastvit.validation import PatchEmbedInputs as Inputs

HOST, ON_DEVICE = "normalise on host", "normalise on device"


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    on_gpu = device.type == "cuda"
    precision = "uint8 to bfloat16, autocast" if on_gpu else "uint8 to float32"
    compile_it = size != "tiny"
    return [
        (f"input {shape} {precision}", functools.partial(_problems_of, shape, precision, device, compile_it))
        for shape in usual_shapes(size, on_gpu)
    ]


def _problems_of(shape: Shape, precision: str, device: torch.device, compile_it: bool) -> Iterator[Problem]:
    task = task_of(shape, precision, device)
    contenders = functools.partial(_contenders, how=(COMPILED,) if compile_it else ())
    return task.problems("input", str(shape), precision, "NCHW", contenders, modes=(FORWARD,))


def _contenders(task: Task, mode: str, how: tuple[str, ...]) -> Iterator[Contender]:
    host = task.inputs["images"].cpu()
    host = host.pin_memory() if task.device.type == "cuda" else host
    yield from task.ours(
        mode, lambda backend: functools.partial(_after_copy, functools.partial(ours, task.op, backend=backend), host)
    )
    embeddings: tuple[tuple[str, Make], ...] = (("conv2d", rivals.conv2d), ("linear", rivals.linear))
    for name, way in ((ON_DEVICE, _after_copy), (HOST, _normalised_on_host)):
        for setting, make in embeddings:
            yield from task.rival(mode, name, setting, functools.partial(way, make, host), how)


def _after_copy(make: Make, host: Tensor, inputs: Inputs) -> Solution:
    """Copy the raw images, then all that `make` does with them."""
    images = torch.empty_like(inputs["images"])  # [B, C, H, W] on the device
    solution = make(replace(inputs, tensors={**inputs.tensors, "images": images}))
    copy = _copier(host, images)
    return _in_turn(copy, solution)


def _normalised_on_host(make: Make, host: Tensor, inputs: Inputs) -> Solution:
    """To float, subtract and divide on the host, into pinned memory where there is a bus to cross; then embed."""
    assert inputs.mean is not None and inputs.std is not None
    images = torch.empty_like(inputs["images"], dtype=torch.float32)
    raw = replace(inputs, tensors={**inputs.tensors, "images": images}, mean=None, std=None)
    buffer = torch.empty_like(host, dtype=torch.float32, pin_memory=host.is_pinned()) if images.is_cuda else images
    mean, std = (torch.tensor(values).mul_(255).view(-1, 1, 1) for values in (inputs.mean, inputs.std))
    copy = _copier(buffer, images)

    def normalise() -> None:
        buffer.copy_(host).sub_(mean).div_(std)
        copy()

    return _in_turn(normalise, make(raw))


def _copier(source: Tensor, target: Tensor) -> Callable[[], object]:
    """On a CPU the images are where they are needed already."""
    if target.is_cuda:
        return lambda: target.copy_(source, non_blocking=True)
    target.copy_(source)
    return lambda: None


def _in_turn(first: Callable[[], object], solution: Solution) -> Solution:
    def tokens() -> Tensor:
        first()
        return solution.tokens()

    return Solution(tokens, solution.parameters)
