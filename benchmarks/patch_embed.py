"""Image to finished token sequence: ours against timm, torchvision, Hugging Face, Conv2d and rearrange + linear.

Every contender starts from the same images and ends with [B, 1+N, D], class token and positions included; see
rivals.py. The linear layer alone, on patches unfolded beforehand, is a yardstick for the product, not a rival.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastvit import tuning
from fastvit.benchmarks import rivals, tune
from fastvit.benchmarks.contenders import Make, Task, timed_call
from fastvit.benchmarks.problem import (
    CHANNELS_LAST,
    COMPILED,
    FORWARD,
    MAX_AUTOTUNE,
    WIDTHS,
    Contender,
    Plan,
    Problem,
    usual_batches,
)
from fastvit.benchmarks.timing import Call
from fastvit.benchmarks.tune import Measurement, Scope, Size, Tuned
from fastvit.tuning import Configuration
from fastvit.validation import Inputs, PatchEmbedCase, make_inputs

# label → (compute dtype, images, parameters)
PRECISIONS = {
    "float32": (torch.float32, "same", "same"),
    "uint8 to float32": (torch.float32, "uint8", "same"),
    "bfloat16": (torch.bfloat16, "same", "same"),
    "uint8 to bfloat16": (torch.bfloat16, "uint8", "same"),
    "uint8 to bfloat16, autocast": (torch.bfloat16, "uint8", "masters"),
    "float32 to bfloat16, autocast": (torch.bfloat16, "float32", "masters"),
}
ON_CPU = ("float32", "uint8 to float32", "bfloat16")
ON_GPU = (
    "uint8 to bfloat16, autocast",
    "uint8 to bfloat16",
    "bfloat16",
    "float32 to bfloat16, autocast",
    "float32",
)
LAYOUTS = {"NCHW": "nchw", "channels_last": "channels_last"}  # the name in a row → in a case
# rival, setting, how it is made
EAGER: tuple[tuple[str, str, Make], ...] = (
    ("timm", "", rivals.timm),
    ("timm", CHANNELS_LAST, functools.partial(rivals.timm, channels_last=True)),
    ("torchvision", "", rivals.torchvision),
    ("huggingface", "", rivals.huggingface),
    ("conv2d", "", rivals.conv2d),
    ("conv2d", CHANNELS_LAST, functools.partial(rivals.conv2d, channels_last=True)),
    ("rearrange + linear", "", rivals.linear),
)
YARDSTICK = "linear alone"
# What is compiled: "some" leaves out those whose graph is another's.
COMPILED_RIVALS = {"none": (), "some": ("timm", "rearrange + linear"), "all": tuple(name for name, _, _ in EAGER)}


@dataclass(frozen=True)
class Shape:
    """One size of the problem."""

    model: str
    batch: int
    image: int = 224
    patch: int = 16

    def __str__(self) -> str:
        return f"ViT-{self.model}/{self.patch} {self.image}, batch {self.batch}"


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite; the problems of each are made when its turn comes, to keep memory low."""
    on_gpu = device.type == "cuda"
    cases: list[tuple[Shape, str, str, str]] = []  # shape, precision, layout, what is compiled
    if size == "tiny":
        cases = [(shape, precision, "NCHW", "none") for precision in ON_CPU for shape in usual_shapes(size, on_gpu)]
    elif size == "small":
        precisions, shapes = ON_GPU if on_gpu else ON_CPU, usual_shapes(size, on_gpu)
        batch = shapes[0].batch
        for precision in precisions:
            # Compiling takes longer than all else: on a GPU for the first precision, which is the one trained with.
            what = "some" if not on_gpu or precision == ON_GPU[0] else "none"
            cases += [(shape, precision, "NCHW", what) for shape in shapes]
        if on_gpu:  # 14 does not divide the vectors of a load; channels_last is what loaders deliver
            cases.append((Shape("B", batch, patch=14), ON_GPU[0], "NCHW", "none"))
            cases.append((Shape("B", batch), ON_GPU[0], "channels_last", "none"))
        else:
            cases.append((Shape("S", batch), "uint8 to float32", "channels_last", "some"))
            alone = [Shape(shape.model, 1) for shape in shapes]
            cases += [(shape, precision, "NCHW", "some") for precision in ON_CPU[:2] for shape in alone]
    else:
        for shape in _published(on_gpu):
            for precision in ON_GPU if on_gpu else ON_CPU:
                for layout in LAYOUTS:
                    # A C++ compiler takes its time: on a CPU at the usual shape alone.
                    what = "all" if on_gpu or (shape.image, shape.patch, layout) == (224, 16, "NCHW") else "none"
                    cases.append((shape, precision, layout, what))
    return [
        (
            f"patch_embed {shape} {precision} {layout}",
            functools.partial(problems_of, shape, precision, device, layout=layout, compile_what=what),
        )
        for shape, precision, layout, what in cases
    ]


def usual_shapes(size: str, on_gpu: bool) -> list[Shape]:
    """Patch 16 at 224 pixels; at size full all widths and batches."""
    if size == "tiny":
        return [Shape("Ti", 2, image=32)]
    if size == "small":
        return [Shape(model, batch) for model in ("B", "S") for batch in usual_batches(size, on_gpu)]
    return [Shape(model, batch) for model in WIDTHS for batch in usual_batches(size, on_gpu)]


def _published(on_gpu: bool) -> Iterator[Shape]:
    for model in WIDTHS:
        for patch, images in ((16, (224, 384)), (14, (224, 378))):  # 14 does not divide 384
            for image in images:
                for batch in usual_batches("full", on_gpu):
                    yield Shape(model, batch, image, patch)


def problems_of(
    shape: Shape,
    precision: str,
    device: torch.device,
    *,
    layout: str = "NCHW",
    compile_what: str = "none",
) -> Iterator[Problem]:
    """The problems of one case of the suite; `compile_what` is of COMPILED_RIVALS."""
    task = task_of(shape, precision, device, layout)
    contenders = functools.partial(_contenders, compile_what=compile_what)
    return task.problems("patch_embed", str(shape), precision, layout, contenders, work)


def task_of(shape: Shape, precision: str, device: torch.device, layout: str = "NCHW", kept: float = 1.0) -> Task:
    """Random tensors of a case."""
    compute, images, parameters = PRECISIONS[precision]
    grid = shape.image // shape.patch
    case = PatchEmbedCase(
        str(shape),
        batch=shape.batch,
        grid=(grid, grid),
        patch=(shape.patch, shape.patch),
        width=WIDTHS[shape.model],
        images=images,
        normalise=images == "uint8",
        parameters=parameters,
        layout=LAYOUTS[layout],
        keep=None if kept == 1.0 else round(kept * grid * grid),
    )
    return Task("patch_embed", make_inputs(case, compute, device), device)


def _contenders(task: Task, mode: str, compile_what: str) -> Iterator[Contender]:
    """Ours, every rival in every setting, and the yardstick."""
    yield from task.ours(mode)
    for name, setting, make in EAGER:
        hows = {"none": (), "some": () if setting else (COMPILED,), "all": (COMPILED, MAX_AUTOTUNE)}[compile_what]
        yield from task.rival(mode, name, setting, make, hows if name in COMPILED_RIVALS[compile_what] else ())
    yield Contender(YARDSTICK, functools.partial(_build_yardstick, task.inputs, mode), whole=False)


def _build_yardstick(inputs: Any, mode: str) -> Call:
    return timed_call(rivals.product_alone(inputs), [inputs.grad[:, inputs.copied :].contiguous()], mode)


def work(inputs: Inputs, mode: str) -> tuple[float, float]:
    """Pixels in and tokens out; backward reads pixels and gradient again."""
    images, weight, grad = inputs["images"], inputs["weight"], inputs.grad
    patches = grad.shape[0] * (grad.shape[1] - inputs.copied)
    pixels = patches * weight[0].numel() * images.element_size()
    flops = 2.0 * patches * weight.numel()
    moved = float(pixels + weight.nbytes + grad.nbytes)
    return (flops, moved) if mode == FORWARD else (2 * flops, 2 * moved)


def _measurements(size: Size, scope: Scope) -> Iterator[Measurement]:
    for precision in scope.precisions:
        compute, images = tune.PRECISIONS[precision]
        for keep in (None, max(1, size.patches // 4)) if scope.with_keep else (None,):
            served = PatchEmbedCase(
                str(size),
                batch=size.batch,
                grid=(size.grid, size.grid),
                patch=(size.patch, size.patch),
                width=size.width,
                images=images,
                normalise=images == "uint8",
                keep=keep,
            )
            trained = replace(served, parameters="masters")
            title = f"patch_embed {size}, {precision}" + (f", keep {keep}" if keep else "")
            yield Measurement(title, {tuning.FORWARD: served, tuning.TRAINING: trained}, compute)


def _problem(mode: str, inputs: Any) -> tuning.Problem:
    images, weight, is_masked = inputs["images"], inputs["weight"], inputs.keep is not None
    shape = tuple(weight.shape)
    return tuning.Problem("patch_embed", mode, images.dtype, inputs.compute, inputs.out, shape, is_masked)


def _configurations(mode: str, inputs: Any, tile: str | None) -> Iterator[Configuration]:
    """Tiles in forward mode; in training tiles and splits of the weight gradient, with the best tile of forward."""
    from fastvit.kernels.patch_embed import forward_tiles, weight_tiles
    from fastvit.kernels.row_sums import TARGET_PROGRAMS

    images, weight = inputs["images"], inputs["weight"]
    if mode == tuning.FORWARD:
        for name in forward_tiles(images, weight, inputs.compute, inputs.out):
            yield Configuration(tile=name)
    else:
        for name in weight_tiles(images, weight, inputs.compute, inputs.keep is not None):
            for programs in (TARGET_PROGRAMS // 2, TARGET_PROGRAMS, 2 * TARGET_PROGRAMS):
                yield Configuration(tile, programs, name)


TUNED = Tuned(_measurements, _problem, _configurations, rivals.product_alone)
