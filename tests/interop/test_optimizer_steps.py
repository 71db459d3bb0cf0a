"""Training an accelerated model is training the library's: ten steps of AdamW, by an optimizer that was there before.

Truth is the library's model trained in float64. In float32 the accelerated model stays as near to it as the library's:
its error is at most twice the library's own, plus the floor of the tolerance rule.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.validation.tolerance import FACTOR, FLOOR_EPS, relative_error
from tests.interop.comparing import Pair, normalisation, normalised
from tests.interop.subjects import LIBRARIES, entry, launched
from tests.interop.zoo import Entry

STEPS = 10
ROUNDING = FLOOR_EPS * torch.finfo(torch.float32).eps
NAMES = [
    *LIBRARIES,
    "timm-eva-patch-dropout",
    "timm-naflexvit-linear",
    "timm-swin",
    "transformers-dinov2",
    "transformers-vit-mae",
    "transformers-clip",
]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    # A gradient that is nothing but rounding, such as a key bias's, is divided by eps, and does not make a full step.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, eps=1e-6)


def trained(entry: Entry, model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> Tensor:
    """Train, one batch a step. Returns the losses, [steps]."""
    losses = []
    for images in batches:
        optimizer.zero_grad()
        loss = torch.stack([output.square().mean() for output in entry.outputs(model, images)]).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps(name: str, raw: bool) -> None:
    pair = Pair.of(entry(name))
    pair.train(True)
    plain, truth = pair.untouched, copy.deepcopy(pair.untouched).double()
    ours = copy.deepcopy(plain)
    start = parameters(plain)
    optimizer = optimizer_of(ours)
    mean, std = normalisation(pair.entry) if raw else (None, None)
    fastvit.accelerate(ours, mean=mean, std=std)

    pixels = torch.randint(0, 256, (STEPS, 2, 3, 32, 32), dtype=torch.uint8)
    exact = [normalised(images, pair.entry) for images in pixels]
    floats = [images.float() for images in exact]
    launched()
    losses = trained(pair.entry, ours, optimizer, list(pixels) if raw else floats)
    assert launched() == STEPS
    plain_losses = trained(pair.entry, plain, optimizer_of(plain), floats)
    true_losses = trained(pair.entry, truth, optimizer_of(truth), exact)

    got, own = relative_error(losses, true_losses), relative_error(plain_losses, true_losses)
    assert got <= FACTOR * own + ROUNDING, f"losses: error {got:.2e}, the library's own {own:.2e}"
    moved = parameters(truth) - start
    scale = float(start.norm() / moved.norm())  # what was learned is a small difference of large parameters
    assert scale < 100, "nothing was learned"
    got, own = (relative_error(parameters(model) - start, moved) for model in (ours, plain))
    assert got <= FACTOR * own + ROUNDING * scale, f"what was learned: error {got:.2e}, the library's own {own:.2e}"
