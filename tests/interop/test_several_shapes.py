"""Images of several shapes, padded or packed: what masks, sizes and grids may be, beside what the zoo gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.interop import Unsupported, huggingface
from fastvit.peers import import_peer
from tests.interop.subjects import (
    MEAN,
    STD,
    build,
    entry,
    error,
    expect_close,
    expect_same_gradients,
    gradients,
    launched,
    pair,
    raw_images,
)
from tests.interop.zoo import PATCH, SIZE, randomise, tensors

ROWS = SIZE // PATCH


def outcome(call: Callable[[], Any]) -> list[Tensor] | str:
    try:
        return tensors(call())
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"


def expect_the_same(model: Any, untouched: Any, launches: int, **arguments: Any) -> None:
    """Outputs and gradients, or the same error."""
    launched()
    got = outcome(lambda: model(**arguments))
    assert launched() == launches
    want = outcome(lambda: untouched(**arguments))
    if isinstance(want, str) or isinstance(got, str):
        assert got == want
        return
    expect_close(got, want)
    expect_same_gradients(gradients(model, got), gradients(untouched, want))


def masks() -> dict[str, tuple[Tensor, int]]:
    """Masks of two images, and how often our op runs for them."""
    every = torch.ones(2, ROWS, ROWS, dtype=torch.bool)
    fewer = torch.arange(ROWS) < ROWS - 1
    return {
        "alike, with padding": (every & fewer, 1),
        "of several shapes": (every & torch.stack([fewer[:, None].expand(-1, ROWS), fewer.expand(ROWS, -1)]), 1),
        "one for both": (every[:1], 0),
        "of fewer patches": (every[:, :-1], 0),
        "no truth values": (every.long(), 0),
    }


@pytest.mark.parametrize("case", masks())
def test_masks(case: str):
    """Any mask that the library takes, by one call of ours; its error for another."""
    mask, launches = masks()[case]
    model, untouched = pair("transformers-idefics3")
    images = entry("transformers-idefics3").images()
    expect_the_same(model, untouched, launches, pixel_values=images, patch_attention_mask=mask)


def test_gradients_by_how_often_a_row_is_read():
    """Which depends on how many images look it up: the library's own code."""
    model, untouched = pair("transformers-smolvlm")
    for side in (model, untouched):
        side.embeddings.position_embedding.scale_grad_by_freq = True
    images = entry("transformers-smolvlm").images()
    expect_the_same(model, untouched, 0, pixel_values=images)


SIZES = {
    "a tensor": torch.tensor([[SIZE, SIZE - PATCH], [PATCH, SIZE]]),
    "a list": [(SIZE - 1, SIZE), (PATCH, PATCH + 3)],
    "larger than the batch": [(2 * SIZE, SIZE), (SIZE, 2 * SIZE)],
    "of fewer images": [(SIZE, PATCH)],
    "of floats": torch.tensor([[32.0, 32.0], [8.0, 8.0]]),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case: str):
    model, untouched = pair("transformers-pixtral")
    images = entry("transformers-pixtral").images()
    expect_the_same(model, untouched, 1, pixel_values=images, image_sizes=SIZES[case])


COORDINATES: dict[str, Callable[[Tensor], Tensor]] = {
    "of floats": lambda coordinates: coordinates.float(),
    "with a third": lambda coordinates: torch.cat([coordinates, coordinates[..., :1]], -1),
    "of no images": lambda coordinates: coordinates[:0],
}


@pytest.mark.parametrize("case", COORDINATES)
def test_coordinates_that_only_the_library_knows(case: str):
    model, untouched = pair("timm-naflexvit-patches")
    places = torch.arange(6)
    coordinates = COORDINATES[case](torch.stack([places // 3, places % 3], -1).expand(2, -1, -1))
    batch = len(coordinates)
    patches = torch.randn(batch, 6, 3 * PATCH * PATCH, generator=torch.Generator().manual_seed(4))
    valid = torch.ones(batch, 6, dtype=torch.bool)
    given = {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}
    launched()
    expect_close(tensors(model(given)), tensors(untouched(given)))
    assert launched() == 0


def around(family: str) -> Any:
    """The whole model, with a text tower."""
    transformers: Any = build("transformers-idefics3") and import_peer("transformers")
    tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config={"image_size": SIZE, "patch_size": PATCH, **tower},
        image_token_id=60,
        scale_factor=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("family", ["Idefics3", "SmolVLM"])
def test_model_around_a_tower(family: str):
    """It leaves out images of zeros, which are padding: those of normalised floats, so that raw pixels are refused."""
    untouched = around(family)
    model = fastvit.accelerate(copy.deepcopy(untouched), mean=MEAN, std=STD)
    words = torch.full((2, 12), 7)
    words[0, :8] = words[1, :4] = 60
    images = torch.stack([entry("transformers-idefics3").images(), entry("transformers-idefics3").images()])
    images[1, 1] = 0
    mask = torch.ones(2, 2, SIZE, SIZE, dtype=torch.long)
    mask[0, 1, SIZE // 2 :] = 0
    expect_the_same(model, untouched, 1, input_ids=words, pixel_values=images, pixel_attention_mask=mask)
    with pytest.raises(RuntimeError, match="raw pixels"):
        model(input_ids=words, pixel_values=torch.stack([raw_images()] * 2), pixel_attention_mask=mask)


def patches(count: int = 48) -> Tensor:
    """[N, C·T·P·P]"""
    return torch.randn(count, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(4))


GRIDS = {
    "one image": [[1, 6, 8]],
    "a grid that is the table's": [[1, 6, 6], [3, 2, 2]],
    "several clips of one shape": [[2, 2, 4], [3, 2, 4], [1, 4, 2]],
    "of fewer patches": [[1, 4, 8]],
}
NO_GRIDS = {"of rows that are not merged": [[1, 3, 16]], "none": []}  # the library's error, before it projects


@pytest.mark.parametrize("case", [*GRIDS, *NO_GRIDS])
def test_grids(case: str):
    model, untouched = pair("transformers-qwen3-vl")
    grids = torch.tensor((GRIDS | NO_GRIDS)[case]).reshape(-1, 3)
    expect_the_same(model, untouched, int(case in GRIDS), hidden_states=patches(), grid_thw=grids)


def test_rows_that_are_not_merged():
    """With what the library would fail at given to it: the projection is ours, the positions its own."""
    model, untouched = pair("transformers-qwen3-vl")
    places = torch.arange(96).reshape(48, 2)
    grids = torch.tensor([[1, 3, 16]])
    expect_the_same(model, untouched, 1, hidden_states=patches(), grid_thw=grids, position_ids=places)


def given_taps(model: Any, arguments: dict[str, Any]) -> None:
    arguments |= {"interp_indices": torch.arange(48)[:, None] % 36, "interp_weights": torch.full((48, 1), 0.5)}


def padded_table(model: Any, _: Any) -> None:
    model.pos_embed.padding_idx = 0


def larger_table(model: Any, _: Any) -> None:
    torch.manual_seed(6)
    model.pos_embed = torch.nn.Embedding(49, 48)


def hooked_table(model: Any, _: Any) -> None:
    model.pos_embed.register_forward_hook(lambda module, inputs, output: 2 * output)


def half_pixels(model: Any, _: Any) -> None:
    model.interpolation_align_corners = False


@pytest.mark.parametrize("change", [given_taps, padded_table, larger_table, hooked_table, half_pixels])
def test_other_positions(change: Callable[[Any, Any], None]):
    """Found by the library's own code, or by ours as by it; the projection is ours in any case."""
    model, untouched = pair("transformers-qwen3-vl")
    arguments = {"hidden_states": patches(), "grid_thw": torch.tensor([[1, 6, 8]])}
    for side in (model, untouched):
        change(side, arguments)
    expect_the_same(model, untouched, 1, **arguments)


def test_taps_that_are_found_otherwise_are_the_library_s(monkeypatch: pytest.MonkeyPatch):
    """By a function of its own that is not the one that is known."""
    model, untouched = pair("transformers-qwen3-vl")
    host = import_peer("transformers.models.qwen3_vl.modeling_qwen3_vl")
    shipped = host.get_vision_interpolation_indices_and_weights

    def doubled(*given: Any, **options: Any) -> Any:
        indices, weights = shipped(*given, **options)
        return indices, 2 * weights

    monkeypatch.setattr(host, "get_vision_interpolation_indices_and_weights", doubled)
    expect_the_same(model, untouched, 1, hidden_states=patches(), grid_thw=torch.tensor([[1, 6, 8]]))


def test_positions_in_float64_are_the_library_s():
    """Which finds out what to read in float32."""
    model, untouched = (side.double() for side in pair("transformers-qwen3-vl"))
    arguments = {"hidden_states": patches().double(), "grid_thw": torch.tensor([[1, 6, 8]])}
    for got, want in zip(tensors(model(**arguments)), tensors(untouched(**arguments)), strict=True):
        assert error(got, want) < 1e-13


@pytest.mark.parametrize("name", ["Idefics3Embeddings", "PixtralVisionModel"])
def test_refused_in_another_version(name: str, monkeypatch: pytest.MonkeyPatch):
    """Whose forward may do what a stand-in for images can't."""
    model = build("transformers-smolvlm" if name == "Idefics3Embeddings" else "transformers-pixtral")
    monkeypatch.setattr(getattr(huggingface, name), "known", ())
    with pytest.raises(Unsupported, match="its forward is not one that is known"):
        fastvit.accelerate(model)


def test_forward_of_another_version(monkeypatch: pytest.MonkeyPatch):
    """The projection alone, with the reason."""
    untouched = build("transformers-qwen3-vl")
    monkeypatch.setattr(huggingface.Qwen3VLVisionModel, "known", ())
    model = fastvit.accelerate(copy.deepcopy(untouched))
    found = fastvit.report(model)
    assert [change.fuses for change in found.changes] == ["the projection of patches"]
    assert "its forward is not one that is known" in str(found)
    expect_the_same(model, untouched, 1, hidden_states=patches(), grid_thw=torch.tensor([[1, 6, 8]]))
