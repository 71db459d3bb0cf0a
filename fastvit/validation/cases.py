"""The cases every backend is held to: awkward widths, patches, strides, dtypes and prefix counts.

A case says everything about one input except the compute dtype, which the runner varies; those of an op are in its
file in `fastvit.validation.ops`. `make_inputs` turns a case into tensors: random numbers or crops of real photographs,
never zeros or ones, from the case's own seed.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastvit.validation.ops import OPS

__all__ = ["DTYPES", "OPS", "SHORT_NAMES", "Case", "Draw", "InputUnavailable", "Inputs", "cases_for", "make_inputs"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


class InputUnavailable(RuntimeError):
    """A case's input can't be made on this machine; the message says why. Counted as skipped, with that reason."""


@dataclass
class Inputs:
    """The tensors of one case. `grad` is the upstream gradient, in the dtype and shape of the result.

    A call takes what it needs from here by name: a tensor, or a field. An op with arguments of its own adds fields.
    """

    tensors: dict[str, Tensor | None]
    grad: Tensor
    compute: torch.dtype
    # The argument `dtype` of the call; None where the default is what the case is about.
    dtype: torch.dtype | None = None
    autocast: bool = False
    copied: int = 0  # first rows of each sample that are copied and no sums: everybody rounds them alike
    more_grads: dict[str, Tensor] = field(default_factory=dict)  # by the names of further results
    data: tuple[str, ...] = ()  # tensors that are no parameters: what is trained has no need of their gradients

    @property
    def out(self) -> torch.dtype:
        """Of the result."""
        return self.grad.dtype

    @property
    def grads(self) -> dict[str, Tensor]:
        """The upstream gradient of each result, by the name that the result has in a report."""
        return {"forward": self.grad, **self.more_grads}

    @property
    def rows(self) -> int:
        """B·N: what a tuning table goes by."""
        return self.grad[:, self.copied :].shape[:-1].numel()

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that the case is known to have."""
        tensor = self.tensors[name]
        assert tensor is not None, name
        return tensor

    def exact(self) -> Inputs:
        """Without the dtypes that results are rounded to."""
        return replace(self, dtype=None)

    def differentiable(self) -> list[str]:
        """Names of the tensors that have a gradient."""
        return [name for name, tensor in self.tensors.items() if tensor is not None and tensor.is_floating_point()]


Made = TypeVar("Made", bound=Inputs, covariant=True)


@dataclass(frozen=True)
class Case(Generic[Made]):
    """One input of an op, all but the compute dtype.

    `parameters` is "same" (the compute dtype), "masters" (fp32 weights under autocast) or "mixed" (tables in fp32
    beside a weight in the compute dtype); `out` is None for the default or the name of a float dtype.
    """

    name: str
    batch: int = 2
    width: int = 64
    parameters: str = "same"
    out: str | None = None

    @property
    def op(self) -> str:
        """The op in whose file the class is."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def dtype(self) -> torch.dtype | None:
        """The argument of the call."""
        return DTYPES[self.out] if self.out else None

    def table_dtype(self, compute: torch.dtype) -> torch.dtype:
        """Of bias, positions and prefix."""
        return torch.float32 if self.parameters in ("masters", "mixed") else compute

    @property
    def scatters(self) -> bool:
        """Whether a gradient is summed in an order that the values of an input set: bit by bit, it must not vary."""
        return False

    def make(self, draw: Draw) -> Made:
        """Its tensors."""
        raise NotImplementedError


@dataclass(frozen=True)
class Draw:
    """Where the numbers of a case come from, in order, and where they go to."""

    compute: torch.dtype
    device: torch.device
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Of unit scale, unless it is said otherwise: no term of a sum can hide behind another."""
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, dtype)

    def laid_out(
        self, shape: tuple[int, ...], layout: str, dtype: torch.dtype | None = None, photo: bool = False
    ) -> Tensor:
        """Random numbers, or photographs, of a shape, whose memory is laid out as LAYOUTS says."""
        stored, view = LAYOUTS[layout]
        dtype, where = dtype or self.compute, stored(shape)
        if photo:
            values = _photo_crops(where, self.generator)
            values = values if dtype is torch.uint8 else values.float() / 255
        elif dtype is torch.uint8:
            values = torch.randint(256, where, dtype=torch.uint8, generator=self.generator)
        else:
            values = torch.randn(where, generator=self.generator)
        values = values.to(self.device, dtype)
        seen = view(values, shape)
        # Who reads what is not part of it, even to multiply it by zero, is seen.
        if seen.numel() < values.numel() and dtype is not torch.uint8:
            inside = seen.clone()
            values.fill_(torch.nan)
            seen.copy_(inside)
        return seen


def _as_it_is(tensor: Any, *_: Any) -> Any:
    return tensor


_TURNED: tuple[Callable[..., Any], Callable[..., Any]] = (
    lambda shape: (*shape[:-2], shape[-1], shape[-2]),
    lambda tensor, _: tensor.transpose(-2, -1),
)
# name → the shape that is stored, and what of it is seen, given the shape that is wanted
LAYOUTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "contiguous": (_as_it_is, _as_it_is),
    "nchw": (_as_it_is, _as_it_is),
    "channels_last": (_as_it_is, lambda tensor, _: tensor.contiguous(memory_format=torch.channels_last)),
    "sliced_batch": (lambda shape: (2 * shape[0], *shape[1:]), lambda tensor, _: tensor[::2]),
    "sliced_rows": (
        lambda shape: (shape[0], shape[1] + 3, *shape[2:]),
        lambda tensor, shape: tensor[:, 2 : 2 + shape[1]],
    ),
    "cropped": (
        lambda shape: (*shape[:-2], shape[-2] + 3, shape[-1] + 5),
        lambda tensor, shape: tensor[..., 2 : 2 + shape[-2], 3 : 3 + shape[-1]],
    ),
    "strided_channels": (lambda shape: (shape[0], 2 * shape[1], *shape[2:]), lambda tensor, _: tensor[:, ::2]),
    "transposed": _TURNED,
    "from_nchw": _TURNED,
}


def cases_for(op: str, *, large: bool, quick: bool = False) -> tuple[Case, ...]:
    """The cases of one op: tiny ones always, real sizes too where `large`; with `quick`, only the first few of each."""
    known = OPS[op]
    tiny, real = (known.tiny[: known.quick], known.large[:1]) if quick else (known.tiny, known.large)
    return (*tiny, *(real if large else ()))


def make_inputs(case: Case[Made], compute: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Made:
    """Tensors for a case, already rounded to the dtypes they are passed in. Same seed, same numbers, on any device."""
    # A stable hash: Python's own is salted per process, and a failure must be repeatable.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(case.name.encode()))
    return case.make(Draw(compute, torch.device(device), generator))


@functools.lru_cache(maxsize=1)
def _photographs() -> tuple[torch.Tensor, ...]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise InputUnavailable(f"real photographs need scikit-learn ({error})") from error
    return tuple(torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)


def photographs(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """`batch` crops, `[batch, 3, height, width]` uint8, of scikit-learn's two bundled photographs (427 x 640).

    Raises InputUnavailable where scikit-learn is missing.
    """
    return _photo_crops((batch, 3, height, width), torch.Generator().manual_seed(seed))


def _photo_crops(shape: tuple[int, int, int, int], generator: torch.Generator) -> torch.Tensor:
    batch, channels, height, width = shape
    photos = _photographs()
    crops = torch.empty(shape, dtype=torch.uint8)
    for index in range(batch):
        photo = photos[index % len(photos)]
        top = int(torch.randint(photo.shape[1] - height + 1, (), generator=generator))
        left = int(torch.randint(photo.shape[2] - width + 1, (), generator=generator))
        crops[index] = photo[:channels, top : top + height, left : left + width]
    return crops
