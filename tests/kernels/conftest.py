"""Kernels against the reference in float64: in Triton's interpreter on a CPU, for real where there is a GPU.

Triton decides when it is imported whether it interprets, so these tests have a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import reference
from fastvit.backend import multiplies_at_tf32, triton_is_interpreted
from fastvit.validation.plain import tf32_conv2d
from fastvit.validation.tolerance import compare

HERE = Path(__file__).parent


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not triton_is_interpreted() and not torch.cuda.is_available():
        return "no GPU: run these tests apart, as TRITON_INTERPRET=1 pytest tests/kernels"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if triton_is_interpreted() else "cuda"


@dataclass(frozen=True)
class Case:
    """One call of patch_embed."""

    batch: int = 2
    channels: int = 1
    grid: tuple[int, int] = (2, 3)
    patch: tuple[int, int] = (16, 16)
    width: int = 64
    prefix: int = 1
    positions: str = "patches"  # "patches", "all" (prefix rows too) or "" (none)
    image: torch.dtype = torch.uint8
    weight: torch.dtype = torch.float32
    compute: torch.dtype = torch.bfloat16
    out: torch.dtype | None = None  # default: the compute dtype
    strides: str = "nchw"  # or "channels_last", "sliced", "cropped", "transposed"
    normalised: bool = True
    bias: bool = True
    keep: int | None = None  # patches kept of each image
    seed: int = 0


@dataclass
class Inputs:
    images: Tensor
    weight: Tensor
    bias: Tensor | None
    pos_embed: Tensor | None
    prefix: Tensor | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    keep: Tensor | None
    leaves: list[str] = field(default_factory=list)


def make_inputs(case: Case, device: str) -> Inputs:
    """Random inputs: bias, positions and prefix have unit scale, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(case.seed)
    patches = case.grid[0] * case.grid[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    images = _strided_images(case, generator, device)
    weight = (
        normal(case.width, case.channels, *case.patch) / (case.channels * case.patch[0] * case.patch[1]) ** 0.5
    ).to(case.weight)
    rows = {"patches": patches, "all": patches + case.prefix}.get(case.positions)
    keep = None
    if case.keep is not None:  # with repeats
        keep = torch.randint(0, patches, (case.batch, case.keep), generator=generator)
    mean = tuple(0.485 - 0.04 * channel for channel in range(case.channels))
    std = tuple(0.229 + 0.01 * channel for channel in range(case.channels))
    return Inputs(
        images=images,
        weight=weight.to(device),
        bias=normal(case.width).to(device) if case.bias else None,
        pos_embed=normal(rows, case.width).to(device) if rows is not None else None,
        prefix=normal(case.prefix, case.width).to(device) if case.prefix else None,
        mean=mean if case.normalised else None,
        std=std if case.normalised else None,
        keep=keep.to(device) if keep is not None else None,
    )


def _strided_images(case: Case, generator: torch.Generator, device: str) -> Tensor:
    batch, channels = case.batch, case.channels
    height, width = case.grid[0] * case.patch[0], case.grid[1] * case.patch[1]
    shape = {
        "sliced": (2 * batch, channels, height, width),
        "cropped": (batch, channels, height + 3, width + 5),
        "transposed": (batch, channels, width, height),
    }.get(case.strides, (batch, channels, height, width))
    if case.image == torch.uint8:
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    else:
        images = torch.rand(shape, generator=generator).to(case.image)
    images = images.to(device)
    if case.strides == "channels_last":
        return images.to(memory_format=torch.channels_last)
    if case.strides == "sliced":
        return images[::2]
    if case.strides == "cropped":
        inside = images[:, :, 2 : 2 + height, 3 : 3 + width]
        if images.is_floating_point():  # a kernel that reads past a patch, even to multiply with 0, is seen
            pixels = inside.clone()
            images.fill_(float("nan"))
            inside.copy_(pixels)
        return inside
    return images.transpose(2, 3) if case.strides == "transposed" else images


def plain(inputs: Inputs, compute: torch.dtype, out: torch.dtype, leaves: dict[str, Tensor]) -> Tensor:
    """Eager PyTorch at the same precision: what a kernel's error is measured against."""
    x = leaves["images"]
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    if inputs.mean is not None and inputs.std is not None:
        x = (x.float() - x.new_tensor(inputs.mean).float().view(-1, 1, 1)) / x.new_tensor(inputs.std).float().view(
            -1, 1, 1
        )
    weight, bias = leaves["weight"], leaves.get("bias")
    convolution = tf32_conv2d if multiplies_at_tf32(compute) else F.conv2d
    tokens = convolution(
        x.to(compute), weight.to(compute), None if bias is None else bias.to(compute), stride=weight.shape[2:]
    )
    tokens = tokens.flatten(2).transpose(1, 2)
    patches, prefix = tokens.shape[1], leaves.get("prefix")
    if "pos_embed" in leaves:
        tokens = tokens + leaves["pos_embed"][-patches:]
    if inputs.keep is not None:
        tokens = tokens.gather(1, inputs.keep[:, :, None].expand(-1, -1, tokens.shape[2]))
    if prefix is not None:
        if "pos_embed" in leaves and leaves["pos_embed"].shape[0] > patches:
            prefix = prefix + leaves["pos_embed"][: prefix.shape[0]]
        tokens = torch.cat((prefix.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens), dim=1)
    return tokens.to(out)


def truth(inputs: Inputs, leaves: dict[str, Tensor]) -> Tensor:
    images = leaves["images"]
    return reference.patch_embed(
        images,
        leaves["weight"],
        leaves.get("bias"),
        pos_embed=leaves.get("pos_embed"),
        prefix=leaves.get("prefix"),
        mean=inputs.mean,
        std=inputs.std,
        keep=inputs.keep,
        dtype=torch.float64,
    )


def _leaves(inputs: Inputs, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The differentiable inputs as leaves, in dtype or their own; uint8 images stay as they are."""
    leaves = {}
    for name in ("images", "weight", "bias", "pos_embed", "prefix"):
        value = getattr(inputs, name)
        if value is not None and value.is_floating_point():
            leaves[name] = value.detach().to(dtype or value.dtype).clone().requires_grad_()
        elif value is not None:
            leaves[name] = value
    return leaves


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that a value that is never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _gradients(result: Tensor, grad: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(result, list(wanted.values()), grad.to(result.dtype), allow_unused=True)
    zeros = (
        torch.zeros_like(leaf) if value is None else value for leaf, value in zip(wanted.values(), found, strict=True)
    )
    return dict(zip(wanted, zeros, strict=True))


def run_forward(inputs: Inputs, compute: torch.dtype, out: torch.dtype) -> Tensor:
    from fastvit.kernels import patch_embed

    with poisoned():
        return patch_embed.forward(
            inputs.images,
            inputs.weight,
            inputs.bias,
            inputs.pos_embed,
            inputs.prefix,
            inputs.mean,
            inputs.std,
            inputs.keep,
            compute,
            out,
        )


def run_backward(grad: Tensor, inputs: Inputs, compute: torch.dtype, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    from fastvit.kernels import patch_embed

    prefix = inputs.prefix.shape[0] if inputs.prefix is not None else 0
    with poisoned():
        return patch_embed.backward(
            grad, inputs.images, inputs.weight, inputs.mean, inputs.std, inputs.keep, compute, prefix, needs
        )


def check_patch_embed(case: Case, device: str) -> dict[str, Any]:
    """Forward and backward of a case against float64, by the tolerance rule; returns the results."""
    inputs = make_inputs(case, device)
    out = case.out or case.compute
    exact, eager = _leaves(inputs, torch.float64), _leaves(inputs, None)
    expected, yardstick = truth(inputs, exact), plain(inputs, case.compute, out, eager)
    tokens = run_forward(inputs, case.compute, out)
    assert tokens.dtype == out
    results = [compare(tokens, yardstick, expected, "tokens")]

    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, out)
    exact_gradients, eager_gradients = _gradients(expected, grad, exact), _gradients(yardstick, grad, eager)
    needs = (inputs.images.is_floating_point(), True, True, True)
    d_images, d_weight, d_bias, d_rows = run_backward(grad, inputs, case.compute, needs)
    assert d_rows.shape == (case.prefix + case.grid[0] * case.grid[1], case.width)
    assert d_bias.dtype == d_rows.dtype == torch.float32
    assert d_weight.dtype == inputs.weight.dtype and d_images.dtype == inputs.images.dtype
    ours = {"images": d_images, "weight": d_weight, "bias": d_bias, "prefix": d_rows[: case.prefix]}
    if inputs.pos_embed is not None:
        ours["pos_embed"] = d_rows[-inputs.pos_embed.shape[0] :]
    for name, gradient in exact_gradients.items():
        results.append(compare(ours[name], eager_gradients[name], gradient, f"d_{name}"))
    if case.image == torch.uint8 and out == case.compute and inputs.weight.dtype == torch.float32:
        # Centred pixels are exact and products are added in fp32: only the gradient itself was ever rounded.
        error = (d_weight.double() - exact_gradients["weight"]).norm() / exact_gradients["weight"].norm()
        limit = 2**-11 if multiplies_at_tf32(case.compute) else 1e-5
        assert error < limit, f"d_weight of uint8 images: error {error:.2g}"
    failures = [str(result) for result in results if not result.passed]
    assert not failures, f"{case}: " + "; ".join(failures)
    return {"tokens": tokens, "grad": grad, "inputs": inputs, **{f"d_{name}": value for name, value in ours.items()}}


@pytest.fixture
def check(device: str) -> Callable[..., dict[str, Any]]:
    """check(**changes to Case): a case forward and backward against the truth."""
    return lambda **changes: check_patch_embed(Case(**changes), device)


@pytest.fixture
def make(device: str) -> Callable[..., Inputs]:
    """make(**changes to Case): its inputs."""
    return lambda **changes: make_inputs(Case(**changes), device)


@pytest.fixture
def forward() -> Callable[..., Tensor]:
    return run_forward


@pytest.fixture
def backward() -> Callable[..., tuple[Tensor, ...]]:
    return run_backward


@pytest.fixture
def big_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that only large inputs get, for inputs of a size the interpreter can handle."""
    from fastvit.kernels import manifest

    monkeypatch.setattr(manifest, "MINIMUM_WAVE", 1)
