"""The cases cover what they claim to, and make the same numbers every time."""

from __future__ import annotations

import builtins

import pytest
import torch

from fastvit.validation import PatchEmbedCase, cases_for, make_inputs, photographs
from fastvit.validation import cases as module
from fastvit.validation.cases import OPS, InputUnavailable

EMBED = [case for case in cases_for("patch_embed", large=True) if isinstance(case, PatchEmbedCase)]


def test_the_awkward_is_covered() -> None:
    assert {1, 63, 193, 1023} <= {case.width for case in EMBED}
    assert {2, 4, 7, 8, 14, 16, 32} <= {case.patch[0] for case in EMBED}
    assert any(case.patch[0] != case.patch[1] for case in EMBED) and any(case.grid[0] != case.grid[1] for case in EMBED)
    assert {0, 1, 5} <= {case.prefix for case in EMBED} and {0, 1} <= {case.batch for case in EMBED}
    assert {"nchw", "channels_last", "sliced_batch", "cropped", "transposed"} <= {case.layout for case in EMBED}
    assert {"uint8", "same", "float32", "bfloat16"} <= {case.images for case in EMBED}
    assert {"none", "patches", "all"} == {case.positions for case in EMBED}
    assert any(case.keep and case.repeat_keep for case in EMBED) and not all(case.bias for case in EMBED)


def test_names_are_unique() -> None:
    for op in OPS:
        names = [case.name for case in cases_for(op, large=True)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "case", [case for op in OPS for case in cases_for(op, large=False)], ids=lambda case: case.name
)
def test_inputs_repeat_and_are_neither_zeros_nor_ones(case: module.Case) -> None:
    first, second = (make_inputs(case, torch.bfloat16) for _ in range(2))
    for name, tensor in first.tensors.items():
        other = second.tensors[name]
        if tensor is None or other is None:
            assert tensor is other
            continue
        assert torch.equal(tensor, other) and tensor.stride() == other.stride()
        if tensor.numel() > 4:
            assert len(tensor.unique()) > 2
    assert not torch.equal(first.grad, make_inputs(case, torch.bfloat16, seed=1).grad) or case.batch == 0


def test_layouts_are_what_they_say() -> None:
    by_layout: dict[str, torch.Tensor] = {}
    for case in EMBED:
        images = make_inputs(case, torch.float32).tensors["images"]
        if case.batch > 1 and images is not None:
            by_layout[case.layout] = images
    assert by_layout["nchw"].is_contiguous()
    assert by_layout["channels_last"].is_contiguous(memory_format=torch.channels_last)
    for layout in ("sliced_batch", "cropped", "transposed", "strided_channels"):
        images = by_layout[layout]
        assert not images.is_contiguous() and not images.is_contiguous(memory_format=torch.channels_last)
    assert by_layout["sliced_batch"].stride(0) == 2 * by_layout["sliced_batch"][0].numel()


def test_photographs_are_real_and_missing_ones_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    crops = photographs(3, 224, 160)
    assert crops.shape == (3, 3, 224, 160) and crops.dtype == torch.uint8 and len(crops.unique()) > 200
    module._photographs.cache_clear()
    real_import = builtins.__import__

    def without_sklearn(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError("no sklearn here")
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(InputUnavailable, match="scikit-learn"):
        photographs(1, 16, 16)
    monkeypatch.undo()
    module._photographs.cache_clear()
