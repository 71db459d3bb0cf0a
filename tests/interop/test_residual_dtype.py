"""The dtype of the tokens on their way through the blocks under autocast: the library's, or residual_dtype."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import fastvit
from tests.interop.comparing import Pair, bfloat16_gradients, bfloat16_outputs
from tests.interop.subjects import LIBRARIES, build, entry
from tests.interop.zoo import ENTRIES, Entry

# The outermost blocks or stages of a vision model; Twins has lists of blocks in a list.
BLOCK = re.compile(r"(?!text_model|decoder)(?:[a-z_]\w*\.)*(?:blocks|layers?|levels)\.(?:encoder_layer_)?\d+(?:\.\d+)?")
LAYER_SCALE = re.compile(r"gamma|lambda")

BF16, FP32 = torch.bfloat16, torch.float32

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if BLOCK.fullmatch(name)]


def stream(entry: Entry, model: nn.Module, images: Tensor) -> list[torch.dtype]:
    """The dtype of the tokens that each block is given."""
    dtypes: list[torch.dtype] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dtypes.append((args[0] if args else kwargs["hidden_states"]).dtype)

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks_of(model)]
    entry.outputs(model, images)
    for hook in hooks:
        hook.remove()
    return dtypes


@every_entry
def test_by_default_the_library_s(entry: Entry) -> None:
    pair = Pair.of(entry)
    with torch.autocast("cpu", BF16):
        want = stream(entry, pair.untouched, entry.images())
        assert want
        assert stream(entry, pair.accelerated, entry.images()) == want


@every_entry
def test_bfloat16(entry: Entry) -> None:
    """From the first block on; float32 again behind a block with LayerScale, whose parameters are float32."""
    pair = Pair.of(entry, residual_dtype=BF16)
    with torch.autocast("cpu", BF16):
        found = stream(entry, pair.accelerated, entry.images())
        library_s = stream(entry, pair.untouched, entry.images())
    if is_projection_alone(pair.accelerated):
        assert found == library_s
    else:
        has_layer_scale = any(LAYER_SCALE.search(name) for name, _ in pair.accelerated.named_parameters())
        assert found == [BF16, FP32 if has_layer_scale else BF16]


def is_projection_alone(model: nn.Module) -> bool:
    """What the library adds to the tokens afterwards decides their dtype."""
    return [change.fuses for change in fastvit.report(model).changes] == ["the projection of patches"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, where autocast computes norms in float32")
@pytest.mark.parametrize(
    ("name", "first"),
    [("timm-vit", BF16), ("timm-clip-vision", FP32), ("transformers-vit", BF16), ("transformers-clip", FP32)],
)
def test_a_norm_before_the_blocks_gives_float32_on_a_gpu(name: str, first: torch.dtype) -> None:
    model = fastvit.accelerate(build(name), residual_dtype=BF16).to("cuda")
    with torch.autocast("cuda", BF16):
        assert stream(entry(name), model, entry(name).images().to("cuda"))[0] == first


@pytest.mark.parametrize("name", [*LIBRARIES, "timm-dinov2", "transformers-dinov2"])
def test_bfloat16_is_one_rounding_of_the_tokens(name: str) -> None:
    """As accurate as the library's model whose tokens are rounded before the first block."""
    pair = Pair.of(entry(name), residual_dtype=BF16)
    rounding(blocks_of(pair.untouched)[0])
    _, found = bfloat16_outputs(pair, entry(name).images(batch=32).double())
    bfloat16_gradients(found)


def rounding(block: nn.Module) -> RemovableHandle:
    """Let a block round the tokens it is given to bfloat16, but for the truth in float64."""

    def rounded(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] if args[0].dtype == torch.float64 else args[0].to(BF16), *args[1:])

    return block.register_forward_pre_hook(rounded)


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_autocast_it_changes_nothing(name: str) -> None:
    images = entry(name).images()
    one, other = (Pair.of(entry(name), residual_dtype=dtype).got(images) for dtype in (None, BF16))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
