"""Kernels against the reference in float64: in Triton's interpreter on a CPU, for real where there is a GPU.

Triton decides when it is imported whether it interprets, so these tests have a process of their own:

    TRITON_INTERPRET=1 pytest tests/kernels

The launchers are called directly, with dtypes that `fastvit.functional` never combines; cases, yardstick, truth and the
rule are the validator's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit.backend import multiplies_at_tf32, triton_is_interpreted
from fastvit.validation import Inputs, PatchEmbedCase, PatchEmbedInputs, make_inputs, poisoned, relative_error
from fastvit.validation.cases import DTYPES
from fastvit.validation.ops import Tensors, truth
from fastvit.validation.report import FAILED
from fastvit.validation.runner import Candidate, check_inputs

HERE = Path(__file__).parent
NAMES = {torch.uint8: "uint8", **{dtype: name for name, dtype in DTYPES.items()}}


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


def inputs_of(
    device: str,
    image: torch.dtype = torch.uint8,
    weight: torch.dtype = torch.float32,
    compute: torch.dtype = torch.bfloat16,
    out: torch.dtype | None = None,
    **changes: Any,
) -> PatchEmbedInputs:
    """Those of a small case with masters, `changes` made to it; kept patches repeat."""
    small: dict[str, Any] = {"channels": 1, "grid": (2, 3), "positions": "patches", "normalise": True, **changes}
    case = PatchEmbedCase(
        "kernels", images=NAMES[image], out=NAMES[out] if out else None, parameters="masters", repeat_keep=True, **small
    )
    inputs = make_inputs(case, compute, device)
    inputs.tensors["weight"] = inputs["weight"].to(weight)
    return inputs


def run_forward(inputs: PatchEmbedInputs, compute: torch.dtype, out: torch.dtype) -> Tensor:
    from fastvit.kernels import patch_embed

    with poisoned():
        return patch_embed.forward(
            **inputs.tensors, mean=inputs.mean, std=inputs.std, keep=inputs.keep, compute_dtype=compute, dtype=out
        )


def run_backward(
    grad: Tensor, inputs: PatchEmbedInputs, compute: torch.dtype, needs: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    from fastvit.kernels import patch_embed

    images, weight = inputs["images"], inputs["weight"]
    normalisation = inputs.mean, inputs.std
    with poisoned():
        return patch_embed.backward(grad, images, weight, inputs.keep, *normalisation, compute, inputs.copied, needs)


def check_patch_embed(inputs: PatchEmbedInputs) -> None:
    """Forward and backward against float64, by the tolerance rule."""
    images, weight = inputs["images"], inputs["weight"]

    def forward(op: str, inputs: Any, tensors: Tensors) -> Tensor:
        return run_forward(inputs, inputs.compute, inputs.out)

    def backward(grad: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        assert isinstance(inputs, PatchEmbedInputs)
        d_images, d_weight, d_bias, d_rows = run_backward(grad, inputs, inputs.compute, (not raw, True, True, True))
        patches = images[0, 0].numel() // weight[0, 0].numel()
        assert d_rows.shape == (inputs.copied + patches, weight.shape[0])
        positions = inputs.tensors["pos_embed"]
        if raw and inputs.out == inputs.compute and weight.dtype == torch.float32:
            # Centred pixels are exact and products are added in fp32: only the gradient itself was ever rounded.
            limit = 2**-11 if multiplies_at_tf32(inputs.compute) else 1e-5
            assert relative_error(d_weight, _true_weight_gradient(inputs)) < limit
        found = {"images": d_images, "weight": d_weight, "bias": d_bias, "prefix": d_rows[: inputs.copied]}
        return found | ({} if positions is None else {"pos_embed": d_rows[-positions.shape[0] :]})

    raw = not images.is_floating_point()
    rows = check_inputs(Candidate("triton", images.device, forward, backward), "patch_embed", inputs)
    assert rows and not [row for row in rows if row.status == FAILED], "\n".join(map(str, rows))


def _true_weight_gradient(inputs: PatchEmbedInputs) -> Tensor:
    weight = inputs["weight"].double().requires_grad_()
    wide = {name: None if t is None else t.double() for name, t in inputs.tensors.items() if name != "images"}
    tokens = truth("patch_embed", inputs, {**wide, "images": inputs["images"], "weight": weight})
    return torch.autograd.grad(tokens, weight, inputs.grad.double())[0]


@pytest.fixture
def check(device: str) -> Callable[..., None]:
    """check(**changes): a case forward and backward against the truth."""
    return lambda **changes: check_patch_embed(inputs_of(device, **changes))


@pytest.fixture
def make(device: str) -> Callable[..., PatchEmbedInputs]:
    """make(**changes): the inputs of a case."""
    return lambda **changes: inputs_of(device, **changes)


@pytest.fixture
def forward() -> Callable[..., Tensor]:
    return run_forward


@pytest.fixture
def backward() -> Callable[..., tuple[Tensor, ...]]:
    return run_backward


@pytest.fixture
def big_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that only large inputs get, for inputs of a size the interpreter can handle."""
    from fastvit.kernels import patch_embed_forward

    monkeypatch.setattr(patch_embed_forward, "MINIMUM_WAVE", 1)
