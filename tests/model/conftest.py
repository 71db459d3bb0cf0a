"""Shared by the model's tests: timm as the peer, and the error bound that outputs and gradients are held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from tests.libraries import peer

# Small enough for a test, large enough to show a mistake: two blocks, three heads, a non-square grid of patches.
TINY: dict[str, Any] = {
    "img_size": (24, 32),
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
}


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    """On a GPU every model and tensor of these tests is made there."""
    torch.manual_seed(20)
    if device == "cpu":
        yield
        return
    with torch.device(device):
        yield


@pytest.fixture
def tiny() -> Callable[..., fastvit.VisionTransformer]:
    """Build a tiny model; the arguments replace those of TINY."""

    def build(**overrides: Any) -> fastvit.VisionTransformer:
        return fastvit.VisionTransformer(**{**TINY, **overrides})

    return build


@pytest.fixture(scope="session")
def timm() -> Any:
    return peer("timm")


@pytest.fixture
def pair_with_timm(timm: Any) -> Callable[..., tuple[fastvit.VisionTransformer, nn.Module]]:
    """Our tiny model and timm's of the same arguments, with the same unit-scale weights."""
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    def build(**overrides: Any) -> tuple[fastvit.VisionTransformer, nn.Module]:
        arguments = {**TINY, **overrides}
        theirs = TimmVisionTransformer(**arguments)
        ours = fastvit.VisionTransformer(**arguments)
        roughen(theirs)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return ours, theirs

    return build


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Give tokens, positions, biases and scales unit size: near zero, as they start, they would hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or name in ("cls_token", "reg_token", "pos_embed"):
            parameter.copy_(torch.randn_like(parameter))


def error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖, in float64."""
    truth = truth.double()
    return float((got.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def cancellation(name: str, gradients: dict[str, Tensor]) -> float:
    """How much larger the terms of a gradient are than their sum, whose rounding they set.

    The gradients of q_norm and k_norm all but vanish (that of k_norm's bias is exactly zero, since softmax does not see
    what all keys share), so that float32 leaves noise of them; those of the projection before them do not.
    """
    block, _, inside = name.partition(".attn.")
    if not inside.startswith(("q_norm.", "k_norm.")):
        return 1.0
    terms = gradients[f"{block}.attn.qkv.weight"].norm()
    return max(1.0, float(terms / gradients[name].norm().clamp_min(1e-30)))


# Of attention pooling's query. All scores of one query are much alike, and what they share cancels in its gradient: it
# is a ten-thousandth of its keys' and values' and less, of which float32 leaves noise, in timm's own run as in ours.
CANCELLED = ("attn_pool.latent", "attn_pool.q.")
DRAWS = 8

Side = dict[str, Tensor]  # the output and every gradient, by name


def sides_of(
    ours: nn.Module, theirs: nn.Module, images: Tensor, seed: int = 3, **inputs: Any
) -> tuple[Side, Side, Side]:
    """Ours, timm's and, in float64, timm's once more as the truth."""
    sides: list[Side] = []
    probe: Tensor | None = None
    for model, dtype in ((copy.deepcopy(theirs).double(), torch.float64), (theirs, images.dtype), (ours, images.dtype)):
        pixels = images.to(dtype).clone().requires_grad_()
        model.zero_grad()
        torch.manual_seed(seed)  # the same dropout on every side
        output = model(pixels, **inputs)
        probe = torch.randn_like(output) if probe is None else probe
        (output * probe.to(output.dtype)).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        sides.append({"output": output.detach(), "images": pixels.grad, **found})  # type: ignore[dict-item]
    truth, timms, mine = sides
    return mine, timms, truth


def redrawn(ours: nn.Module, theirs: nn.Module, images: Tensor, seed: int, **inputs: Any) -> tuple[Side, Side, Side]:
    """`sides_of` another draw of weights, images and gradients of the output."""
    torch.manual_seed(seed)
    roughen(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return sides_of(ours, theirs, torch.randn_like(images), 100 + seed, **inputs)


def misses(mine: Side, timms: Side, truth: Side) -> dict[str, str]:
    """What is over the bound, by name: twice timm's own error, and four roundings."""
    found = {}
    for name, value in truth.items():
        floor = 4 * torch.finfo(torch.float32).eps * cancellation(name, truth)
        measured, bound = error(mine[name], value), 2 * error(timms[name], value) + floor
        if not measured <= bound:
            found[name] = f"{name}: error {measured:.2e}, allowed {bound:.2e}"
    return found


def side_by_side(draws: list[tuple[Side, Side, Side]], names: Iterable[str]) -> list[Side]:
    """Ours, timm's and the truth of all draws, as one value for each name."""
    return [{name: torch.cat([draw[i][name].flatten() for draw in draws]) for name in names} for i in range(3)]


@pytest.fixture
def agree() -> Callable[..., None]:
    """Both models on the same images: output and every gradient as close to float64 as timm's.

    Truth is timm in float64. Our error may be twice timm's own, plus four roundings. Where timm's own may be small by
    luck, a miss is judged again by the same rule on DRAWS draws of the images, the missed one among them.
    """

    def check(ours: nn.Module, theirs: nn.Module, images: Tensor, **inputs: Any) -> None:
        sides = sides_of(ours, theirs, images, **inputs)
        assert sides[0].keys() == sides[2].keys()
        missed = misses(*sides)
        if missed and all(name.startswith(CANCELLED) for name in missed):
            draws = [sides, *(redrawn(ours, theirs, images, seed, **inputs) for seed in range(1, DRAWS))]
            missed = misses(*side_by_side(draws, missed))
        assert not missed, "; ".join(missed.values())

    return check
