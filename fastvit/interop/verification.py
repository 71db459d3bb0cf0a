"""Proof that an accelerated model computes what it did: outputs and every gradient, on the same batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.interop.host import Settings, fused
from fastvit.interop.planning import plan, put_in, restore
from fastvit.interop.raw_pixels import upright
from fastvit.ops.decompositions import normalised
from fastvit.validation.tolerance import FACTOR, FLOOR_EPS, strain

__all__ = [
    "Comparison",
    "Verification",
    "VerificationError",
    "call_with_images",
    "example_images",
    "verify_acceleration",
]

SEED = 0
BATCH = 2
# A gradient smaller than this share of all gradients together is held to that share: those of attention's key biases
# are zero in exact arithmetic, and what is left of them is rounding.
NEXT_TO_NOTHING = 1e-3

Batch = Tensor | Mapping[str, Any]


class VerificationError(RuntimeError):
    """The accelerated model differs from the original by more than rounding."""


@dataclass(frozen=True)
class Comparison:
    """One output or one gradient. Errors are relative, ‖a − b‖ / ‖b‖."""

    name: str
    difference: float  # accelerated against original
    error: float  # accelerated against float64
    bound: float  # what the error may be: twice the original's against float64, plus a floor

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    @property
    def share(self) -> float:
        """The error as a share of what it may be."""
        return strain(self.error, self.bound) if self.error == self.error else float("inf")  # NaN


@dataclass(frozen=True)
class Verification:
    """What a comparison found."""

    outputs: tuple[Comparison, ...]
    gradients: tuple[Comparison, ...]

    @property
    def failures(self) -> tuple[Comparison, ...]:
        return tuple(row for row in (*self.outputs, *self.gradients) if not row.passed)

    @property
    def verdict(self) -> str:
        """What differs, "" if nothing does."""
        if not self.failures:
            return ""
        worst = max(self.failures, key=lambda row: row.share)
        return (
            f"{len(self.failures)} of {len(self.outputs) + len(self.gradients)} outputs and gradients differ by more "
            f"than rounding; the worst is {worst.name}: error {worst.error:.2e}, allowed {worst.bound:.2e}"
        )


def verify_acceleration(
    model: nn.Module, settings: Settings, batch: Batch | None = None, check: bool = True
) -> Verification:
    """Run the original and an accelerated copy on the same batch, in eval mode, and compare them.

    Truth is a copy of the original in float64, without autocast. An output, and the gradient of every parameter that
    has one (of a fixed random weighting of all outputs), passes where its error is at most twice the original's own,
    plus four eps for float32 and float64. Where the original happens to be nearly exact, its error over all of its
    kind together is the yardstick.

    Args:
        model: accelerated or not; it is left alone.
        settings: of the acceleration that is verified.
        batch: images, or the arguments of the model by name; with `mean` and `std`, images may be uint8. None: random
            images of the model's size.
        check: raise where something differs.

    Raises:
        VerificationError: something differs; the message names the worst.
        ValueError: the model takes more than images, and no batch was given.
    """
    original = restore(copy.deepcopy(_unwrapped(model))).eval()
    accelerated = copy.deepcopy(original)
    put_in(accelerated, plan(accelerated)[0], settings)
    truth = copy.deepcopy(original).double()
    given = example_images(accelerated) if batch is None else batch
    plain = _mapped(given, lambda tensor: _as_loaded(tensor, settings))
    exact = _mapped(plain, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    ours = _outputs_and_gradients(accelerated, given)
    theirs = _outputs_and_gradients(original, plain)
    true = _outputs_and_gradients(truth, exact, autocast=False)
    found = Verification(*(_compared(*three) for three in zip(ours, theirs, true, strict=True)))
    if check and found.failures:
        raise VerificationError(f"verify: {found.verdict}; the model is unchanged")
    return found


def example_images(model: nn.Module, batch: int = BATCH) -> Tensor:
    """Random images as an accelerated model takes them: uint8 where it normalises, else normalised floats.

    Returns:
        [batch, C, H, W] on the model's device, in the dtype of its parameters.

    Raises:
        ValueError: it takes no images alone.
    """
    for module in model.modules():
        mixin: Any = fused(module)
        size = None if mixin is None or not mixin.parts(module) else mixin.example_size(module)
        if size is not None:
            break
    else:
        raise ValueError("verify: this model takes more than images; give a batch, as verify={argument: value}")
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, mixin.channels(module), *size)
    if module.fastvit_settings.mean is not None:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(parameter.device)
    return torch.randn(shape, generator=generator).to(parameter)


def call_with_images(model: Any, images: Any) -> Any:
    """The model's outputs for images, under the name that it takes them by.

    Raises:
        ValueError: images are not its main input.
    """
    main = getattr(model, "main_input_name", None)  # a convention of transformers
    if main is None:
        return model(images)
    # Not every tower keeps it: some inherit that of the text model around them.
    if "pixel_values" not in (main, next(iter(inspect.signature(model.forward).parameters))):
        raise ValueError(
            f"verify: {type(model).__name__} takes {main} too; give a batch, as verify={{argument: value}}"
        )
    return model(pixel_values=images)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers of torch.compile and DDP."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _as_loaded(images: Tensor, settings: Settings) -> Tensor:
    """Raw images as the original takes them."""
    if images.dtype != torch.uint8 or images.dim() != 4 or settings.mean is None:
        return images
    return normalised(upright(images, len(settings.mean)), settings.mean, settings.std)


Found = dict[str, Tensor]


def _outputs_and_gradients(model: nn.Module, batch: Batch, autocast: bool = True) -> tuple[Found, Found]:
    devices = [parameter.device for parameter in model.parameters()][:1]
    on_gpu = [device for device in devices if device.type == "cuda"]
    kind = devices[0].type if devices else "cpu"
    # Masks that are drawn in eval mode too (masked autoencoders) are the same for all.
    with torch.random.fork_rng(on_gpu), nullcontext() if autocast else torch.autocast(kind, enabled=False):
        torch.manual_seed(SEED)
        with torch.enable_grad():
            result = call_with_images(model, batch) if isinstance(batch, Tensor) else model(**batch)
        outputs = _tensors("output", result)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    differentiable = [output for output in outputs.values() if output.requires_grad]
    if not named or not differentiable:
        return outputs, {}
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(output.shape, generator=generator).to(output) for output in differentiable]
    gradients = torch.autograd.grad(differentiable, list(named.values()), weights, allow_unused=True)
    return outputs, {name: g for name, g in zip(named, gradients, strict=True) if g is not None}


def _tensors(name: str, value: Any) -> Found:
    """The float tensors in what a model returns, by where they are."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        items: Sequence[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return {}
    return {path: tensor for key, item in items for path, tensor in _tensors(f"{name}.{key}", item).items()}


def _compared(ours: Found, theirs: Found, true: Found) -> tuple[Comparison, ...]:
    """Every tensor of one kind. One that only one of the models has is infinitely wrong."""
    together = _norm(true.values())
    usual = _norm(theirs[name].double() - true[name] for name in true if name in theirs) / max(together, 1e-300)
    rows = []
    for name, truth in true.items():
        if name not in ours or name not in theirs or ours[name].shape != truth.shape:
            rows.append(Comparison(name, float("inf"), float("inf"), 0.0))
            continue
        scale = max(_norm([truth]), NEXT_TO_NOTHING * together, 1e-300)
        out, plain = ours[name].double(), theirs[name].double()
        exact_types = (torch.float32, torch.float64)
        floor = FLOOR_EPS * torch.finfo(theirs[name].dtype).eps if theirs[name].dtype in exact_types else 0.0
        bound = FACTOR * max(_norm([plain - truth]) / scale, usual) + floor
        rows.append(Comparison(name, _norm([out - plain]) / scale, _norm([out - truth]) / scale, bound))
    rows += [Comparison(name, float("inf"), float("inf"), 0.0) for name in ours if name not in true]
    return tuple(rows)


def _norm(tensors: Any) -> float:
    """Of several tensors as if they were one."""
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors) ** 0.5
