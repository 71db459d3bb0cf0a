"""Image to finished token sequence: ours against timm, torchvision, Hugging Face, Conv2d and rearrange + linear.

Every contender starts from the same images and ends with [B, 1+N, D], class token and positions included; see
rivals.py. The linear layer alone, on patches unfolded beforehand, is a yardstick for the product, not a rival.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastvit.benchmarks import rivals
from fastvit.benchmarks.problem import (
    BOTH,
    CHANNELS_LAST,
    COMPILED,
    FORWARD,
    MAX_AUTOTUNE,
    Contender,
    Plan,
    Problem,
    Unavailable,
    compiled,
    our_backends,
)
from fastvit.benchmarks.rivals import Solution, parameters_of, tensor_of
from fastvit.benchmarks.rows import OURS
from fastvit.benchmarks.timing import Call
from fastvit.validation import plain
from fastvit.validation.cases import Inputs, PatchEmbedCase, make_inputs
from fastvit.validation.report import FAILED
from fastvit.validation.runner import backend_candidate, check_inputs
from fastvit.validation.tolerance import relative_error

WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024}
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
Make = Callable[[Inputs], Solution]
TrueError = Callable[[], tuple[Tensor, float]]
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
        return [Shape(model, 256 if on_gpu else 16) for model in ("B", "S")]
    return [Shape(model, batch) for model in WIDTHS for batch in _batches(on_gpu)]


def _batches(on_gpu: bool) -> tuple[int, ...]:
    return (64, 256, 1024) if on_gpu else (1, 16)


def _published(on_gpu: bool) -> Iterator[Shape]:
    for model in WIDTHS:
        for patch, images in ((16, (224, 384)), (14, (224, 378))):  # 14 does not divide 384
            for image in images:
                for batch in _batches(on_gpu):
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
    inputs = inputs_of(shape, precision, device, layout)
    contenders = functools.partial(_contenders, compile_what=compile_what)
    return embedding_problems("patch_embed", str(shape), precision, layout, inputs, device, contenders)


class Contend(Protocol):
    """Makes the contenders of a problem, in one mode."""

    def __call__(
        self, inputs: Inputs, mode: str, device: torch.device, true_error: TrueError
    ) -> Iterator[Contender]: ...


def embedding_problems(
    op: str, name: str, precision: str, layout: str, inputs: Inputs, device: torch.device, contenders: Contend
) -> Iterator[Problem]:
    """Forward, and forward + backward of all parameters, from images to tokens."""
    check = functools.lru_cache(lambda backend: check_backend(backend, "patch_embed", inputs, device))
    true_error = functools.lru_cache(lambda: yardstick(inputs))
    for mode in (FORWARD, BOTH):
        flops, moved = _work(inputs, mode)
        yield Problem(
            op=op,
            shape=name,
            dtype=precision,
            layout=layout,
            mode=mode,
            contenders=list(contenders(inputs, mode, device, true_error)),
            check=check,
            compute=inputs.compute,
            batch=inputs.grad.shape[0],
            flops=flops,
            moved=moved,
        )


def inputs_of(shape: Shape, precision: str, device: torch.device, layout: str = "NCHW", kept: float = 1.0) -> Inputs:
    """Random tensors of a case; the parameters require gradients, the images do not."""
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
    inputs = make_inputs(case, compute, device)
    for parameter in parameters_of(inputs):
        parameter.requires_grad_()
    return inputs


def check_backend(backend: str, op: str, inputs: Inputs, device: torch.device) -> str:
    """Why a backend must not be timed on these inputs: what of its own output and gradients is out of tolerance."""
    rows = check_inputs(backend_candidate(backend, device), op, inputs)
    wrong = [row for row in rows if row.status == FAILED]
    if not wrong:
        return ""
    found = [f"{r.quantity}: {r.reason or f'error {r.error:.3g} > {r.bound:.3g} ({r.where})'}" for r in wrong]
    return "not timed, out of tolerance: " + "; ".join(found)


def yardstick(inputs: Inputs) -> tuple[Tensor, float]:
    """The float64 truth and plain PyTorch's error, to see that a rival computes the same thing."""
    with torch.no_grad():
        wide = {name: None if t is None else t if t.dtype is torch.uint8 else t.double()
                for name, t in inputs.tensors.items()}  # fmt: skip
        truth = plain.true_patch_embed(inputs, wide)
        return truth, relative_error(plain.plain_patch_embed(inputs, inputs.tensors), truth)


def _contenders(
    inputs: Inputs, mode: str, device: torch.device, true_error: TrueError, compile_what: str
) -> Iterator[Contender]:
    """Ours, every rival in every setting, and the yardstick."""
    yield from our_contenders(inputs, mode, device)
    for name, setting, make in EAGER:
        hows = {"none": (), "some": () if setting else (COMPILED,), "all": (COMPILED, MAX_AUTOTUNE)}[compile_what]
        yield from contender(
            name, setting, make, inputs, mode, device, true_error, hows if name in COMPILED_RIVALS[compile_what] else ()
        )
    yield Contender(YARDSTICK, functools.partial(_build_yardstick, inputs, mode), whole=False)


def our_contenders(inputs: Inputs, mode: str, device: torch.device) -> Iterator[Contender]:
    """Ours, by every backend that runs at full speed."""
    for backend in our_backends(device):
        make = functools.partial(rivals.ours, backend=backend)
        yield from contender(f"{OURS}{backend}", "", make, inputs, mode, device)


def contender(
    name: str,
    setting: str,
    make: Make,
    inputs: Inputs,
    mode: str,
    device: torch.device,
    true_error: TrueError | None = None,
    compile_settings: Sequence[str] = (),
) -> Iterator[Contender]:
    """A contender in one setting, eager and compiled as asked for; without `true_error` it is not checked here."""
    for how in ("", *compile_settings):
        build = functools.partial(_build, make, inputs, mode, device, true_error, how)
        yield Contender(name, build, f"{setting} {how}".strip())


def _build(
    make: Make, inputs: Inputs, mode: str, device: torch.device, true_error: TrueError | None, how: str = ""
) -> Call:
    """The timed call of one contender. A rival must compute the same; ours is checked more strictly elsewhere."""
    solution = make(inputs)
    if true_error is not None:
        _require_same(solution.tokens, true_error)
    tokens = solution.tokens
    if how:
        with torch.set_grad_enabled(mode == BOTH):
            tokens = compiled(tokens, device, how)
    return timed_call(Solution(tokens, solution.parameters), inputs.grad, mode)


def _build_yardstick(inputs: Inputs, mode: str) -> Call:
    solution = rivals.product_alone(inputs)
    rows = inputs.grad.shape[1] - tensor_of(inputs, "prefix").shape[0]
    return timed_call(solution, inputs.grad[:, :rows].contiguous(), mode)


def timed_call(solution: Solution, grad: Tensor, mode: str) -> Call:
    """What is timed: the tokens alone, or the tokens and the gradients of all parameters."""

    def forward() -> object:
        with torch.no_grad():
            return solution.tokens()

    def forward_and_backward() -> object:
        out = solution.tokens()
        return torch.autograd.grad(out, solution.parameters, grad.to(out.dtype))

    return forward if mode == FORWARD else forward_and_backward


def _require_same(tokens: Callable[[], Tensor], true_error: TrueError) -> None:
    truth, plain_error = true_error()
    with torch.no_grad():
        error = relative_error(tokens(), truth)
    if error > 3 * plain_error + 4 * torch.finfo(torch.float32).eps:
        raise Unavailable(f"does not compute the same: error {error:.3g}, plain PyTorch's {plain_error:.3g}")


def _work(inputs: Inputs, mode: str) -> tuple[float, float]:
    """Arithmetic and unavoidable memory traffic: pixels in and tokens out; backward reads pixels and gradient again."""
    images, weight, grad = tensor_of(inputs, "images"), tensor_of(inputs, "weight"), inputs.grad
    patches = images.shape[0] * (grad.shape[1] - tensor_of(inputs, "prefix").shape[0])
    pixels = patches * weight[0].numel() * images.element_size()
    flops = 2.0 * patches * weight.numel()
    moved = float(pixels + sum(tensor.numel() * tensor.element_size() for tensor in (weight, grad)))
    return (flops, moved) if mode == FORWARD else (2 * flops, 2 * moved)
