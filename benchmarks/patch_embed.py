"""Image to finished token sequence, against timm, Conv2d and rearrange + linear.

Every contender starts from the same images and ends with [B, 1+N, D], class token and positions included. For raw
uint8 images the rivals normalise as timm's loader does: to float, then subtract and divide in place. Nothing of ours
is prepared outside the timed call; the rivals' channels_last images and weights are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import functional, peers
from fastvit.benchmarks.problem import (
    BOTH,
    CHANNELS_LAST,
    COMPILED,
    FORWARD,
    Contender,
    Plan,
    Problem,
    Unavailable,
    compiled,
    our_backends,
)
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
}
Tokens = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """One size of the problem."""

    model: str
    batch: int
    image: int = 224
    patch: int = 16

    def __str__(self) -> str:
        return f"ViT-{self.model}/{self.patch} {self.image}, batch {self.batch}"


def _shapes(size: str, device: torch.device) -> Iterator[tuple[Shape, str]]:
    on_gpu = device.type == "cuda"
    if size == "tiny":
        shapes = [Shape("Ti", 2, image=32)]
    elif size == "small":
        shapes = [Shape("S", 256 if on_gpu else 16), Shape("B", 256 if on_gpu else 16)]
    else:
        batches = (64, 256, 1024) if on_gpu else (1, 16)
        shapes = [Shape(model, batch) for model in WIDTHS for batch in batches]
        shapes += [Shape("B", batches[-2], patch=14), Shape("B", batches[-2], image=384)]
    gpu_precisions = ("bfloat16", "uint8 to bfloat16", "uint8 to bfloat16, autocast", "float32")
    for shape in shapes:
        for precision in gpu_precisions if on_gpu else ("float32", "uint8 to float32", "bfloat16"):
            yield shape, precision


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite; the problems of each are made when its turn comes, to keep memory low."""
    with_compiled = device.type == "cuda" or size == "full"
    return [
        (f"patch_embed {shape} {precision}", functools.partial(problems_of, shape, precision, device, with_compiled))
        for shape, precision in _shapes(size, device)
    ]


def problems_of(shape: Shape, precision: str, device: torch.device, with_compiled: bool) -> Iterator[Problem]:
    """Forward, and forward + backward of all parameters, for one shape and precision."""
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
    )
    inputs = make_inputs(case, compute, device)
    for name in inputs.differentiable():
        if name != "images":
            _tensor(inputs, name).requires_grad_()
    check = functools.lru_cache(lambda backend: check_backend(backend, "patch_embed", inputs, device))
    true_error = functools.lru_cache(lambda: _yardstick(inputs))
    for mode in (FORWARD, BOTH):
        flops, moved = _work(inputs, mode)
        yield Problem(
            op="patch_embed",
            shape=str(shape),
            dtype=precision,
            layout="NCHW",
            mode=mode,
            contenders=list(_contenders(inputs, mode, device, with_compiled, true_error)),
            check=check,
            compute=compute,
            batch=shape.batch,
            flops=flops,
            moved=moved,
        )


def check_backend(backend: str, op: str, inputs: Inputs, device: torch.device) -> str:
    """Why a backend must not be timed on these inputs: what of its own output and gradients is out of tolerance."""
    rows = check_inputs(backend_candidate(backend, device), op, inputs)
    wrong = [row for row in rows if row.status == FAILED]
    if not wrong:
        return ""
    found = [f"{r.quantity}: {r.reason or f'error {r.error:.3g} > {r.bound:.3g} ({r.where})'}" for r in wrong]
    return "not timed, out of tolerance: " + "; ".join(found)


def _tensor(inputs: Inputs, name: str) -> Tensor:
    tensor = inputs.tensors[name]
    assert tensor is not None
    return tensor


def _yardstick(inputs: Inputs) -> tuple[Tensor, float]:
    """The float64 truth and plain PyTorch's error, to see that a rival computes the same thing."""
    with torch.no_grad():
        wide = {name: None if t is None else t if t.dtype is torch.uint8 else t.double()
                for name, t in inputs.tensors.items()}  # fmt: skip
        truth = plain.true_patch_embed(inputs, wide)
        return truth, relative_error(plain.plain_patch_embed(inputs, inputs.tensors), truth)


def _contenders(
    inputs: Inputs,
    mode: str,
    device: torch.device,
    with_compiled: bool,
    true_error: Callable[[], tuple[Tensor, float]],
) -> Iterator[Contender]:
    def contender(
        name: str, make: Callable[[Inputs], tuple[Tokens, list[Tensor]]], compile_it: bool, setting: str = ""
    ) -> Contender:
        def build() -> Call:
            tokens, parameters = make(inputs)
            if not name.startswith(OURS):
                _require_same(tokens, true_error)
            call = _timed_call(tokens, parameters, inputs.grad, mode)
            if not compile_it:
                return call
            with torch.set_grad_enabled(mode == BOTH):
                return _timed_call(cast(Tokens, compiled(tokens, device)), parameters, inputs.grad, mode)

        return Contender(name, build, f"{setting} {COMPILED}".strip() if compile_it else setting)

    for backend in our_backends(device):
        yield contender(f"{OURS}{backend}", functools.partial(_ours, backend=backend), False)
    for compile_it in (False, True) if with_compiled else (False,):
        yield contender("timm", _timm, compile_it)
        yield contender("conv2d", _conv2d, compile_it)
        yield contender("conv2d", functools.partial(_conv2d, channels_last=True), compile_it, CHANNELS_LAST)
        yield contender("rearrange + linear", _linear, compile_it)


def _timed_call(tokens: Tokens, parameters: list[Tensor], grad: Tensor, mode: str) -> Call:
    def forward() -> object:
        with torch.no_grad():
            return tokens()

    def forward_and_backward() -> object:
        out = tokens()
        return torch.autograd.grad(out, parameters, grad.to(out.dtype))

    return forward if mode == FORWARD else forward_and_backward


def _require_same(tokens: Tokens, true_error: Callable[[], tuple[Tensor, float]]) -> None:
    truth, plain_error = true_error()
    with torch.no_grad():
        error = relative_error(tokens(), truth)
    if error > 3 * plain_error + 4 * torch.finfo(torch.float32).eps:
        raise Unavailable(f"does not compute the same: error {error:.3g}, plain PyTorch's {plain_error:.3g}")


def _parameters(inputs: Inputs) -> list[Tensor]:
    return [_tensor(inputs, name) for name in ("weight", "bias", "pos_embed", "prefix")]


def _ours(inputs: Inputs, backend: str) -> tuple[Tokens, list[Tensor]]:
    images = _tensor(inputs, "images")
    weight, bias, pos_embed, prefix = parameters = _parameters(inputs)

    def tokens() -> Tensor:
        with torch.autocast(images.device.type, inputs.compute, enabled=inputs.autocast):
            return functional.patch_embed(
                images,
                weight,
                bias,
                pos_embed=pos_embed,
                prefix=prefix,
                mean=inputs.mean,
                std=inputs.std,
                backend=backend,
            )

    return tokens, parameters


def _normaliser(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """What a loader does on the device before the model sees the images."""
    if inputs.mean is None or inputs.std is None:
        return lambda images: images
    device = inputs.grad.device
    mean, std = (torch.tensor(v, device=device).mul_(255).view(-1, 1, 1) for v in (inputs.mean, inputs.std))
    compute = torch.float32 if inputs.autocast else inputs.compute
    return lambda images: images.float().sub_(mean).div_(std).to(compute)


def _timm(inputs: Inputs) -> tuple[Tokens, list[Tensor]]:
    try:
        peers.import_timm()
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise Unavailable(str(error)) from error
    images = _tensor(inputs, "images")
    weight, bias, pos_embed, prefix = _parameters(inputs)
    model = VisionTransformer(
        img_size=(images.shape[2], images.shape[3]),
        patch_size=weight.shape[2],
        embed_dim=weight.shape[0],
        depth=1,
        num_heads=1,
        num_classes=0,
    ).to(images.device, weight.dtype)
    parameters = [model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.pos_embed, model.cls_token]
    with torch.no_grad():
        for parameter, value in zip(parameters, (weight, bias, pos_embed, prefix), strict=True):
            parameter.copy_(value.reshape(parameter.shape))
    normalise = _normaliser(inputs)

    def tokens() -> Tensor:
        x = normalise(images)
        with torch.autocast(images.device.type, inputs.compute, enabled=inputs.autocast):
            return model._pos_embed(model.patch_embed(x))

    return tokens, parameters


def _conv2d(inputs: Inputs, channels_last: bool = False) -> tuple[Tokens, list[Tensor]]:
    images = _tensor(inputs, "images")
    weight, bias, pos_embed, prefix = _parameters(inputs)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    stride = weight.shape[2:]
    normalise = _normaliser(inputs)

    def tokens() -> Tensor:
        x = normalise(images)
        with torch.autocast(images.device.type, inputs.compute, enabled=inputs.autocast):
            x = F.conv2d(x, weight, bias, stride=stride).flatten(2).transpose(1, 2)
            return torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1) + pos_embed

    return tokens, [weight, bias, pos_embed, prefix]


def _linear(inputs: Inputs) -> tuple[Tokens, list[Tensor]]:
    images = _tensor(inputs, "images")
    weight, bias, pos_embed, prefix = parameters = _parameters(inputs)
    width, _, ph, pw = weight.shape
    normalise = _normaliser(inputs)

    def tokens() -> Tensor:
        x = normalise(images)
        batch, channels, height, breadth = x.shape
        with torch.autocast(images.device.type, inputs.compute, enabled=inputs.autocast):
            x = x.reshape(batch, channels, height // ph, ph, breadth // pw, pw).permute(0, 2, 4, 1, 3, 5)
            x = F.linear(x.reshape(batch, -1, channels * ph * pw), weight.view(width, -1), bias)
            return torch.cat([prefix.expand(batch, -1, -1), x], dim=1) + pos_embed

    return tokens, parameters


def _work(inputs: Inputs, mode: str) -> tuple[float, float]:
    """Arithmetic and unavoidable memory traffic: images in and tokens out; backward reads images and gradient again."""
    images, weight, grad = _tensor(inputs, "images"), _tensor(inputs, "weight"), inputs.grad
    patches = images.shape[0] * (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    flops = 2.0 * patches * weight.numel()
    moved = sum(float(t.numel() * t.element_size()) for t in (images, weight, grad))
    return (flops, moved) if mode == FORWARD else (2 * flops, 2 * moved)
