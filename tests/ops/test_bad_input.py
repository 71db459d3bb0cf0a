"""Every wrong argument gets an error that names it, its value and what is accepted, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastvit import checks, functional
from fastvit.backend import launch_counts

B, C, D, N = 2, 3, 16, 6


def good(device: str) -> dict[str, Any]:
    return {
        "images": torch.randn(B, C, 8, 12, device=device),
        "weight": torch.randn(D, C, 4, 4, device=device),
        "bias": torch.randn(D, device=device),
        "pos_embed": torch.randn(N + 1, D, device=device),
        "prefix": torch.randn(1, D, device=device),
    }


def keep(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [

        ({"images": torch.randn(C, 8, 12)}, ValueError,
     r"images: expected 4 dimensions \[B, C, H, W\], got 3: \[3, 8, 12\]"),
    ({"images": [[1.0]]}, TypeError, "images: expected a torch.Tensor, got list"),
    ({"images": torch.randn(B, 4, 8, 12)}, ValueError, "images: 4 channels, but weight expects 3"),
    ({"images": torch.randn(B, C, 9, 12)}, ValueError,
     "images: height 9 is not a positive multiple of the patch height 4"),
    ({"images": torch.randn(B, C, 8, 13)}, ValueError, "images: width 13 is not a positive multiple"),
    ({"images": torch.zeros(B, C, 8, 12, dtype=torch.int32)}, TypeError,
     "images: dtype torch.int32 is not supported; accepted: torch.uint8"),
    ({"images": torch.randn(B, C, 8, 12, device="meta")}, ValueError, "images: on device meta, but weight is on"),
    ({"weight": torch.randn(D, 48)}, ValueError, r"weight: expected 4 dimensions \[D, C, P_h, P_w\], got 2"),
    ({"weight": torch.zeros(D, C, 4, 4, dtype=torch.int8)}, TypeError, "weight: dtype torch.int8"),
    ({"weight": torch.zeros(0, C, 4, 4)}, ValueError, r"weight: every size must be at least 1, got \[0, 3, 4, 4\]"),
    ({"bias": torch.randn(D + 1)}, ValueError, r"bias: expected shape \[16\], got \[17\]"),

        ({"pos_embed": torch.randn(5, D)}, ValueError,
     r"pos_embed: 5 rows, expected 6 \(patches\) or 7 \(prefix and patches\)"),
    ({"pos_embed": torch.randn(7, D), "prefix": None}, ValueError, "pos_embed: 7 rows, expected 6 .* no prefix"),
    ({"pos_embed": torch.randn(7, D + 1)}, ValueError, "pos_embed: width 17, but weight has width 16"),

        ({"pos_embed": torch.randn(2, 7, D)}, ValueError,
     r"pos_embed: expected shape \[rows, 16\] or \[1, rows, 16\], got \[2, 7, 16\]"),
    ({"prefix": torch.randn(1, D - 1)}, ValueError, "prefix: width 15, but weight has width 16"),
    ({"prefix": torch.randn(B, 1, D)}, ValueError, r"prefix: expected shape \[rows, 16\] or \[1, rows, 16\]"),
    ({"keep": keep(B, 2, dtype=torch.int32)}, TypeError,
     "keep: dtype torch.int32 is not supported; accepted: torch.int64"),
    ({"keep": keep(B + 1, 2)}, ValueError, r"keep: expected shape \[2, N_keep\], got \[3, 2\]"),
    ({"keep": keep(2)}, ValueError, r"keep: expected shape \[2, N_keep\], got \[2\]"),
    ({"mean": (0.5,) * 3}, ValueError, "mean, std: give both or neither"),
    ({"std": (0.5,) * 3}, ValueError, "mean, std: give both or neither"),
    ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, ValueError, "std: 0.0 of channel 1 must be greater than zero"),
    ({"mean": (0.5,) * 3, "std": (0.5, 0.5, -1)}, ValueError, "std: -1.0 of channel 2 must be greater than zero"),
    ({"mean": (0.5,) * 2, "std": (0.5,) * 3}, ValueError, "mean: 2 values, expected 3"),
    ({"mean": (0.5,) * 3, "std": (0.5, float("nan"), 0.5)}, ValueError, "std: nan of channel 1 must be finite"),
    ({"mean": (0.5, 0.5, -float("inf")), "std": (0.5,) * 3}, ValueError, "mean: -inf of channel 2 must be finite"),
    ({"mean": ("0.5", 0.5, 0.5), "std": (0.5,) * 3}, TypeError, "mean: '0.5' of channel 0 is no number"),
    ({"mean": (0.5, None, 0.5), "std": (0.5,) * 3}, TypeError, "mean: None of channel 1 is no number"),
    ({"mean": (0.5,) * 3, "std": (0.5, True, 0.5)}, TypeError, "std: True of channel 1 is no number"),
    ({"mean": (0.5,) * 3, "std": (torch.ones(2), 0.5, 0.5)}, TypeError, "std: tensor.* of channel 0 is no number"),
    ({"mean": (0.5,) * 3, "std": (0.5, np.bool_(True), 0.5)}, TypeError, "std: .*True.* of channel 1 is no number"),
    ({"mean": 0.5, "std": 0.5}, TypeError, "mean: expected 3 floats, one a channel, got 0.5"),
    ({"dtype": torch.int64}, TypeError, "dtype: dtype torch.int64 is not supported; accepted"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), WRONG, ids=[message[:48] for _, _, message in WRONG])
def test_patch_embed(change: dict[str, Any], kind: type[Exception], message: str, device: str) -> None:
    change = {
        name: value.to(device) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for name, value in change.items()
    }
    arguments = {**good(device), **change}
    with pytest.raises(kind, match=message):
        functional.patch_embed(arguments.pop("images"), arguments.pop("weight"), **arguments)
    assert launch_counts() == {}


@pytest.mark.parametrize("index", [-1, N])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_keep_out_of_range_on_a_cpu(index: int, name: str) -> None:
    arguments = good("cpu")
    bad = torch.tensor([[0, 1], [2, index]])
    with pytest.raises(ValueError, match=f"keep: index {index} is out of range; accepted: 0 to {N - 1}"):
        functional.patch_embed(arguments.pop("images"), arguments.pop("weight"), **arguments, keep=bad, backend=name)


@pytest.mark.parametrize(
    "of",
    [np.float32, np.float64, torch.tensor, int, lambda value: value],
    ids=["float32", "float64", "tensor", "int", "float"],
)
@pytest.mark.parametrize("container", [list, tuple, np.array], ids=lambda container: container.__name__)
def test_numbers_of_all_kinds(of: Callable[[float], Any], container: Callable[[list[Any]], Any]) -> None:
    means, stds = checks.normalisation(container([of(0.5)] * 3), container([of(2.5)] * 3), 3)
    assert means == [float(of(0.5))] * 3 and stds == [float(of(2.5))] * 3
    assert {type(value) for value in (*means, *stds)} == {float}


def test_mean_as_a_tensor_is_read_outside_graphs_only() -> None:
    arguments = good("cpu")
    images, weight = arguments["images"], arguments["weight"]
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    out = functional.patch_embed(images, weight, mean=mean, std=std)
    assert torch.allclose(out, functional.patch_embed(images, weight, mean=mean.tolist(), std=std.tolist()))
    with pytest.raises(Exception, match="mean: inside torch.compile or torch.export give Python floats"):
        torch.compile(lambda x: functional.patch_embed(x, weight, mean=mean, std=std), fullgraph=True, backend="eager")(
            images
        )


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"tokens": torch.randn(6, D)}, ValueError, r"tokens: expected 3 dimensions \[B, N, D\], got 2"),
        ({"tokens": torch.zeros(B, N, D, dtype=torch.uint8)}, TypeError, "tokens: dtype torch.uint8"),
        ({"pos_embed": torch.randn(4, D)}, ValueError, "pos_embed: 4 rows, expected 6"),
        ({"pos_embed": None}, TypeError, "pos_embed: expected a torch.Tensor, got NoneType"),
        ({"prefix": torch.randn(1, D + 2)}, ValueError, "prefix: width 18, but tokens has width 16"),
    ],
)
def test_add_position(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"tokens": torch.randn(B, N, D), "pos_embed": torch.randn(N, D), "prefix": torch.randn(1, D), **change}
    with pytest.raises(kind, match=message):
        functional.add_position(arguments.pop("tokens"), arguments.pop("pos_embed"), **arguments)
    assert launch_counts() == {}
