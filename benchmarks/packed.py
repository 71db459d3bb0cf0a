"""Images of any size to one packed sequence: ours in one call; others pad, loop, group, or take patches that are cut.

Two kinds of input: raw images of 64 sizes of photographs, at most 256 patches each with the aspect ratio kept, and the
padded patches that NaFlexViT's and SigLIP 2's processors make of them. Positions are resampled to every image's grid.
What cuts, pads or groups the images on the way is a part of the time; what a rival writes behind an image's own tokens,
and does not pack, is left out of the comparison of values and not of its time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.benchmarks.contenders import Make, Task, largest_error, timed_call
from fastvit.benchmarks.patch_embed import PRECISIONS
from fastvit.benchmarks.patch_embed_packed import NUMBER, Photographs
from fastvit.benchmarks.problem import BOTH, COMPILED, FORWARD, WIDTHS, Contender, Plan, Problem, Unavailable, compiled
from fastvit.benchmarks.rivals import Solution, autocast, imported, loader
from fastvit.benchmarks.timing import Call
from fastvit.validation import make_inputs
from fastvit.validation.ops import tensors_of
from fastvit.validation.ops.patch_embed_packed import PackedInputs

PATCH, GRID = 16, 16
# Of raw images and of cut patches, of patch_embed's PRECISIONS: on a GPU as a model is trained.
ON_CPU = ("uint8 to float32", "float32")
ON_GPU = ("uint8 to bfloat16, autocast", "float32 to bfloat16, autocast")


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    models, images = (("Ti",), 3) if size == "tiny" else (("S", "B"), NUMBER)
    hows = () if size == "tiny" else (COMPILED,)
    raw, cut = ON_GPU if device.type == "cuda" else ON_CPU
    kinds = (("raw images", _images, raw), ("NaFlexViT's patches", _naflex, cut), ("SigLIP 2's patches", _siglip2, cut))
    return [
        (f"packed ViT-{model}, {kind}", functools.partial(problems, model, images, precision, device, hows))
        for kind, problems, precision in kinds
        for model in models
    ]


def _images(model: str, images: int, precision: str, device: torch.device, hows: Sequence[str]) -> Iterator[Problem]:
    def contenders(task: Task, mode: str) -> Iterator[Contender]:
        yield from task.ours(mode)
        # Compiled, what goes through images one by one becomes code for each of them, and a hundred times slower.
        yield from task.rival(mode, "loop", "", _loop)
        yield from task.rival(mode, "pad", "", _pad)
        yield from task.rival(mode, "group by size", "", _group, hows)

    return _problems(model, images, precision, device, "images", contenders, normalise=True)


def _naflex(model: str, images: int, precision: str, device: torch.device, hows: Sequence[str]) -> Iterator[Problem]:
    contenders = _of_patches("timm", _timm, hows)
    return _problems(model, images, precision, device, "NaFlexViT's", contenders, **_CUT)


def _siglip2(model: str, images: int, precision: str, device: torch.device, hows: Sequence[str]) -> Iterator[Problem]:
    contenders, bilinear = _of_patches("huggingface", _huggingface, hows), ("bilinear", True, None)
    return _problems(model, images, precision, device, "SigLIP 2's", contenders, **_CUT, filter=bilinear)


_CUT: dict[str, Any] = {"layout": "padded", "order": "PPC", "prefix": 0}


def _of_patches(name: str, make: Make, hows: Sequence[str]) -> Callable[[Task, str], Iterator[Contender]]:
    def contenders(task: Task, mode: str) -> Iterator[Contender]:
        yield from task.ours(mode)
        for how in ("", *hows):
            yield Contender(name, functools.partial(_build_padded, task, make, mode, how), how)
        yield from task.rival(mode, "linear, positions by size", "", _linear, hows)

    return contenders


def _problems(
    model: str,
    number: int,
    precision: str,
    device: torch.device,
    kind: str,
    contenders: Callable[[Task, str], Iterator[Contender]],
    **rest: Any,
) -> Iterator[Problem]:
    compute, images, parameters = PRECISIONS[precision]
    case = Photographs(
        f"ViT-{model}/{PATCH}, {number} images",
        batch=number,
        grid=(GRID, GRID),
        patch=(PATCH, PATCH),
        width=WIDTHS[model],
        images=images,
        parameters=parameters,
        **rest,
    )
    task = Task("patch_embed_packed", make_inputs(case, compute, device), device)
    for problem in task.problems("packed", case.name, precision, kind, contenders, _work):
        yield replace(problem, batch=number)


def _work(inputs: PackedInputs, mode: str) -> tuple[float, float]:
    """A product, of the backward one more; pixels are read and tokens written, then pixels and gradient read."""
    images = tensors_of("images", inputs.tensors)
    pixels = sum(image.numel() * image.element_size() for image in images)
    channels, height, width = inputs["weight"].shape[1:]
    patches = sum(image.numel() for image in images) // (channels * height * width)
    if inputs.sizes is not None:
        patches = sum(rows * columns for rows, columns in inputs.sizes)
    product = 2.0 * patches * inputs["weight"].numel()
    moved = float(pixels + inputs.grad.numel() * inputs.grad.element_size())
    return (product, moved) if mode == FORWARD else (2 * product, 2 * moved)


def _under_autocast(make: Make) -> Make:
    """A rival whose calls are made under autocast, where the case is about that."""

    @functools.wraps(make)
    def made(inputs: PackedInputs) -> Solution:
        solution = make(inputs)

        def tokens() -> Tensor:
            with autocast(inputs):
                return solution.tokens()

        return Solution(tokens, solution.parameters)

    return made


# ---- raw images --------------------------------------------------------------------------------------------------


def _parameters(inputs: PackedInputs) -> list[Tensor]:
    """weight [D, C, P, P], bias [D], pos_embed [G, G, D], and prefix [R, D] where there is one."""
    return [inputs[name] for name in ("weight", "bias", "pos_embed", "prefix") if inputs.tensors[name] is not None]


def _resampled(inputs: PackedInputs, size: tuple[int, int]) -> Tensor:
    """The positions of one grid, [rows · columns, D]."""
    grid = inputs["pos_embed"].permute(2, 0, 1)[None]
    options: dict[str, Any] = {"mode": inputs.interpolation, "antialias": inputs.antialias}
    return F.interpolate(grid, size, **options)[0].flatten(1).t()


@_under_autocast
def _loop(inputs: PackedInputs) -> Solution:
    """An image at a time: convolution, positions resampled."""
    weight, bias, _, prefix = parameters = _parameters(inputs)
    images, normalise = tensors_of("images", inputs.tensors), loader(inputs.mean, inputs.std, inputs.grad.device)

    def tokens() -> Tensor:
        parts = []
        for image in images:
            x = F.conv2d(normalise(image)[None], weight, bias, stride=PATCH)
            parts += [prefix, x[0].flatten(1).t() + _resampled(inputs, (x.shape[2], x.shape[3]))]
        return torch.cat(parts)

    return Solution(tokens, parameters)


@_under_autocast
def _pad(inputs: PackedInputs) -> Solution:
    """A batch padded to the largest height and width, of which each image's own patches are taken."""
    weight, bias, _, prefix = parameters = _parameters(inputs)
    images, normalise = tensors_of("images", inputs.tensors), loader(inputs.mean, inputs.std, inputs.grad.device)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))

    def tokens() -> Tensor:
        batch = images[0].new_zeros((len(images), images[0].shape[0], height, width))
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        x = F.conv2d(normalise(batch), weight, bias, stride=PATCH)
        sizes = [(image.shape[1] // PATCH, image.shape[2] // PATCH) for image in images]
        tables = {size: _resampled(inputs, size) for size in set(sizes)}
        parts = []
        for own, (rows, columns) in zip(x, sizes, strict=True):
            parts += [prefix, own[:, :rows, :columns].flatten(1).t() + tables[rows, columns]]
        return torch.cat(parts)

    return Solution(tokens, parameters)


@_under_autocast
def _group(inputs: PackedInputs) -> Solution:
    """Images of one size as a batch, with their positions resampled once."""
    weight, bias, _, prefix = parameters = _parameters(inputs)
    images, normalise = tensors_of("images", inputs.tensors), loader(inputs.mean, inputs.std, inputs.grad.device)

    def tokens() -> Tensor:
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault((image.shape[1], image.shape[2]), []).append(i)
        own: dict[int, Tensor] = {}
        for places in by_size.values():
            x = F.conv2d(normalise(torch.stack([images[i] for i in places])), weight, bias, stride=PATCH)
            x = x.flatten(2).transpose(1, 2) + _resampled(inputs, (x.shape[2], x.shape[3]))
            own.update(zip(places, x, strict=True))
        return torch.cat([part for i in range(len(images)) for part in (prefix, own[i])])

    return Solution(tokens, parameters)


# ---- patches that are cut ----------------------------------------------------------------------------------------


def _counts(inputs: PackedInputs) -> list[int]:
    assert inputs.sizes is not None
    return [rows * columns for rows, columns in inputs.sizes]


def _build_padded(task: Task, make: Make, mode: str, how: str) -> Call:
    """A rival whose result is padded: what is behind an image's own tokens counts for nothing, and has no gradient."""
    solution, counts = make(task.inputs), _counts(task.inputs)
    exact, plain_error = task.yardstick()
    with torch.no_grad():
        padded = solution.tokens()
        packed = torch.cat([own[:count] for own, count in zip(padded, counts, strict=True)])
    error = largest_error(packed, exact)
    if error > 3 * plain_error + 4 * torch.finfo(torch.float32).eps:
        raise Unavailable(f"does not compute the same: error {error:.3g}, plain PyTorch's {plain_error:.3g}")
    grad = torch.zeros_like(padded)
    for place, own in zip(grad, task.inputs.grad.split(counts), strict=True):
        place[: len(own)] = own
    tokens = solution.tokens
    if how:
        with torch.set_grad_enabled(mode == BOTH):
            tokens = compiled(tokens, task.device, how)
    return timed_call(Solution(tokens, solution.parameters), [grad], mode)


@_under_autocast
def _linear(inputs: PackedInputs) -> Solution:
    """A linear layer on each image's own patches, and positions resampled once a size: what is left without padding."""
    weight, bias, *_ = parameters = _parameters(inputs)
    patches, counts, sizes = inputs["images"], _counts(inputs), inputs.sizes or ()

    def tokens() -> Tensor:
        rows = torch.cat([own[:count] for own, count in zip(patches, counts, strict=True)])
        tables = {size: _resampled(inputs, size) for size in set(sizes)}
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(rows, matrix, bias) + torch.cat([tables[size] for size in sizes])

    return Solution(tokens, parameters)


def _copied(inputs: PackedInputs, weight: Tensor, bias: Tensor, table: Tensor) -> list[Tensor]:
    """The case's parameters, in a rival's own."""
    given, offset, positions = _parameters(inputs)
    with torch.no_grad():
        weight.copy_(given.permute(0, 2, 3, 1).flatten(1))
        bias.copy_(offset)
        table.copy_(positions.reshape(table.shape))
    return [weight, bias, table]


@_under_autocast
def _timm(inputs: PackedInputs) -> Solution:
    """timm's NaFlexEmbeds, which takes the coordinates of each patch: on the host, where it looks at them."""
    naflex = imported("timm.models.naflexvit")
    width, patches, sizes = inputs["weight"].shape[0], inputs["images"], inputs.sizes or ()
    options = {"proj_type": "linear", "class_token": False, "pos_embed_grid_size": (GRID, GRID)}
    model = naflex.NaFlexEmbeds(patch_size=PATCH, embed_dim=width, **options).to(patches.device)
    coordinates = torch.zeros(*patches.shape[:2], 2, dtype=torch.int64)
    for place, (rows, columns) in zip(coordinates, sizes, strict=True):
        place[: rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    parameters = _copied(inputs, model.proj.weight, model.proj.bias, model.pos_embed)
    return Solution(lambda: model(patches, coordinates)[0], parameters)


@_under_autocast
def _huggingface(inputs: PackedInputs) -> Solution:
    """The embedding of transformers' SigLIP 2, which takes the size of each image."""
    siglip2 = imported("transformers.models.siglip2.modeling_siglip2")
    width, patches = inputs["weight"].shape[0], inputs["images"]
    config = siglip2.Siglip2VisionConfig(hidden_size=width, patch_size=PATCH, num_patches=GRID * GRID)
    model = siglip2.Siglip2VisionEmbeddings(config).to(patches.device)
    shapes = torch.tensor(inputs.sizes, device=patches.device)
    layer = model.patch_embedding
    parameters = _copied(inputs, layer.weight, layer.bias, model.position_embedding.weight)
    return Solution(lambda: model(patches, shapes), parameters)
