"""An accelerated model against an untouched one: in float32 by fixed bars, in bfloat16 by the tolerance rule."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import fastvit
from fastvit.validation.tolerance import FACTOR, FEW_VALUES, Comparison, compare, relative_error
from tests.interop.subjects import GRADIENTS, MEAN, OUTPUTS, STD, error, gradients, launched
from tests.interop.zoo import Entry
from tests.libraries import skipped_without_library

# A gradient below this share of all gradients together is held to that share: those of attention's key biases are
# zero in exact arithmetic, and what is left of them is rounding.
NEXT_TO_NOTHING = 1e-3

Gradients = Mapping[str, Tensor]
Triple = tuple[tuple[nn.Module, list[Tensor]], ...]


@dataclass(frozen=True)
class Pair:
    """A model as its library runs it, and an accelerated copy."""

    entry: Entry
    untouched: nn.Module
    accelerated: nn.Module

    @classmethod
    def of(cls, entry: Entry, raw: bool = False, residual_dtype: torch.dtype | None = None) -> Pair:
        """Skips the test where the library is missing; `raw` takes uint8 images."""
        untouched = copy.deepcopy(built(entry))
        mean, std = normalisation(entry) if raw else (None, None)
        accelerated = copy.deepcopy(untouched)
        fastvit.accelerate(accelerated, mean=mean, std=std, residual_dtype=residual_dtype)
        return cls(entry, untouched, accelerated)

    def train(self, mode: bool) -> None:
        for model in (self.untouched, self.accelerated):
            model.train(mode)

    def want(self, images: Tensor) -> list[Tensor]:
        """What the library computes."""
        return self.entry.outputs(self.untouched, images)

    def got(self, images: Tensor) -> list[Tensor]:
        """What the accelerated model computes, in exactly one call of our op."""
        launched()
        outputs = self.entry.outputs(self.accelerated, images)
        count = launched()
        assert count == 1, f"patch_embed ran {count} times in one forward"
        return outputs


@lru_cache(maxsize=4)
def built(entry: Entry) -> nn.Module:
    """The entry's model, to be copied."""
    with skipped_without_library():
        return entry.model()


def normalisation(entry: Entry) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, one a channel."""
    return MEAN[: entry.channels], STD[: entry.channels]


def normalised(images: Tensor, entry: Entry) -> Tensor:
    """uint8 [B, C, H, W] as its loader would hand them over, in float64."""
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in normalisation(entry))
    return (images.double() / 255 - mean) / std


def worst_output(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest ‖got − want‖ / ‖want‖; raises AssertionError over the bar, or where shapes or dtypes differ."""
    assert len(got) == len(want) > 0
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype, f"output {number}: {one.dtype} {one.shape}"
    errors = [error(one, other) for one, other in zip(got, want, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    assert errors[worst] <= OUTPUTS, f"output {worst}: error {errors[worst]:.2e}, allowed {OUTPUTS:.0e}"
    return errors[worst]


def worst_gradient(got: Gradients, want: Gradients) -> float:
    """The same for gradients; those that are None must be None in both."""
    assert got.keys() == want.keys(), f"gradients of one alone: {sorted(got.keys() ^ want.keys())}"
    floor = NEXT_TO_NOTHING * norm(want.values())
    errors = {name: float((got[name] - g).norm()) / max(float(g.norm()), floor) for name, g in want.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENTS, f"{worst}: error {errors[worst]:.2e}, allowed {GRADIENTS:.0e}"
    return errors[worst]


def float32_errors(pair: Pair, images: Tensor, raw: Tensor | None = None) -> tuple[float, float]:
    """Worst error of outputs and of gradients; with `raw` the accelerated model gets those images instead."""
    want, got = pair.want(images), pair.got(images if raw is None else raw)
    output = worst_output(got, want)
    return output, worst_gradient(gradients(pair.accelerated, got), gradients(pair.untouched, want))


def bfloat16_outputs(pair: Pair, images: Tensor, raw: Tensor | None = None) -> tuple[Comparison, Triple]:
    """Outputs under autocast, by the tolerance rule, slice by slice. Truth is the library's model in float64.

    Args:
        images: normalised, float64, as the truth gets them.
        raw: what the accelerated model gets instead.

    Returns:
        The comparison that came closest to its bound; models and their outputs: ours, the library's, the truth's.
    """
    truth = copy.deepcopy(pair.untouched).double()
    floats = images.float()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = pair.want(floats), pair.got(floats if raw is None else raw)
    exact = pair.entry.outputs(truth, images)
    assert [output.dtype for output in got] == [output.dtype for output in want]
    outputs = [expect(compare(*three, f"output {i}")) for i, three in enumerate(zip(got, want, exact, strict=True))]
    return max(outputs, key=ratio), ((pair.accelerated, got), (pair.untouched, want), (truth, exact))


def bfloat16_gradients(found: Triple) -> Comparison:
    """The same for gradients of what :func:`bfloat16_outputs` returned.

    Their slices are handfuls of values, so that a gradient counts as a whole, and those that are small or next to
    nothing count together.
    """
    ours, theirs, true = (gradients(model, outputs) for model, outputs in found)
    assert ours.keys() == theirs.keys() == true.keys()
    kinds = [[name] for name in true if is_yardstick(true[name], norm(true.values()))]
    others = [name for name in true if [name] not in kinds]
    kinds += [others] if others else []
    return max((expect(whole(ours, theirs, true, names)) for names in kinds), key=ratio)


def whole(ours: Gradients, theirs: Gradients, true: Gradients, names: Sequence[str]) -> Comparison:
    """The tolerance rule for all values of some gradients together."""
    got, plain, truth = (joined(grads, names) for grads in (ours, theirs, true))
    found, bound = relative_error(got, truth), FACTOR * relative_error(plain, truth)
    name = names[0] if len(names) == 1 else "all small gradients"
    return Comparison(f"gradient of {name}", found <= bound, found, bound, "all values")


def joined(found: Gradients, names: Sequence[str]) -> Tensor:
    return torch.cat([found[name].flatten().double() for name in names])


def is_yardstick(gradient: Tensor, together: float) -> bool:
    """Whether the error of plain PyTorch in it means something."""
    return gradient.numel() >= FEW_VALUES and float(gradient.norm()) >= NEXT_TO_NOTHING * together


def norm(values: Iterable[Tensor]) -> float:
    """Of several tensors as if they were one."""
    return float(torch.stack([value.double().norm() for value in values]).norm())


def expect(comparison: Comparison) -> Comparison:
    assert comparison.passed, str(comparison)
    return comparison


def ratio(comparison: Comparison) -> float:
    """Our error over plain PyTorch's; more than two is a failure."""
    return FACTOR * comparison.error / comparison.bound if comparison.error else 0.0
