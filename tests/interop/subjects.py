"""What the tests of this folder share: an accelerated model beside an untouched one, and how close they must be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit.backend import launch_counts, reset_launch_counts
from tests.interop.zoo import ENTRIES, Entry
from tests.libraries import skipped_without_library

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # relative errors allowed, in float32

# One model a library; the awkward ones are named where they matter.
LIBRARIES = ("timm-vit", "torchvision-vit", "transformers-vit")


def entry(name: str) -> Entry:
    """The entry of the zoo with this name."""
    return next(entry for entry in ENTRIES if str(entry) == name)


def build(name: str) -> Any:
    """Its model; the test is skipped where its library is missing."""
    with skipped_without_library():
        return entry(name).model()


def pair(name: str, **arguments: Any) -> tuple[Any, Any]:
    """An accelerated model and an untouched one with the same weights."""
    untouched = build(name)
    return fastvit.accelerate(copy.deepcopy(untouched), **arguments), untouched


def raw_images(batch: int = 2, size: int = 32) -> Tensor:
    """uint8, [B, 3, size, size]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def launched(op: str = "patch_embed") -> int:
    """How often an op ran since this was last asked."""
    count = sum(count for (name, _), count in launch_counts().items() if name == op)
    reset_launch_counts()
    return count


def error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def expect_close(got: Sequence[Any], want: Sequence[Any], bound: float = OUTPUTS) -> None:
    """As many tensors, each as near as `bound`."""
    assert len(got) == len(want) > 0
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype, number
        assert error(one, other) <= bound, f"{number}: error {error(one, other):.2e}, allowed {bound:.0e}"


def gradients(model: nn.Module, outputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Gradients of every parameter that has one, for the same random weighting of the outputs every time."""
    generator = torch.Generator().manual_seed(7)
    model.zero_grad()
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expect_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same parameters have gradients, and near ones; those that are next to nothing count against the whole."""
    assert got.keys() == want.keys()
    whole = float(torch.stack([gradient.norm() for gradient in want.values()]).norm())
    for name, gradient in want.items():
        measured = float((got[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * whole)
        assert measured <= GRADIENTS, f"{name}: error {measured:.2e}, allowed {GRADIENTS:.0e}"


def everything_agrees(name: str, model: nn.Module, untouched: nn.Module, launches: int = 1) -> None:
    """Outputs and gradients of floats, and how often our op ran for them."""
    images = entry(name).images()
    launched()
    outputs = entry(name).outputs(model, images)
    assert launched() == launches
    want = entry(name).outputs(untouched, images)
    expect_close(outputs, want)
    if outputs[0].requires_grad:
        expect_same_gradients(gradients(model, outputs), gradients(untouched, want))
