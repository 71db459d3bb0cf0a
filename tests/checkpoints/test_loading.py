"""`load_pretrained` and `convert` from end to end."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvit
from fastvit.checkpoints import CheckpointError, convert, load_pretrained
from fastvit.checkpoints.targets import SCHEMAS
from fastvit.checkpoints.writing import write_checkpoint
from tests.checkpoints.conftest import agree, same_bits, scrambled
from tests.libraries import peer

NAMES = {"timm": "a.safetensors", "torchvision": "b.pth", "huggingface": "c", "huggingface-v5": "d", "fastvit": "e"}


def test_top_level(timm_vit):
    assert fastvit.load_pretrained is load_pretrained
    assert isinstance(load_pretrained(timm_vit().state_dict()), fastvit.VisionTransformer)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(SCHEMAS, 2)))
def test_from_each_library_to_each(first, second, timm_vit, images, tmp_path):
    """Bit by bit through two libraries, with everything that matters kept where the format can hold it."""
    theirs = timm_vit()
    source, there, back = tmp_path / "source.pth", tmp_path / NAMES[first], tmp_path / "back.pth"
    write_checkpoint(source, theirs.state_dict())
    known = {"num_heads": 3, "norm_eps": 1e-6}
    convert(source, there, first, **known)
    told = known if first == "torchvision" else {}
    convert(there, tmp_path / f"x{NAMES[second]}", second, **told)
    told = known if second == "torchvision" else {}
    agree(load_pretrained(tmp_path / f"x{NAMES[second]}", **told)(images), theirs(images))
    convert(tmp_path / f"x{NAMES[second]}", back, "timm", **told)
    same_bits(torch.load(back), theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype, timm_vit, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in timm_vit().state_dict().items()}
    for schema, name in NAMES.items():
        convert(state, tmp_path / name, schema)
        convert(tmp_path / name, tmp_path / "back.pth", overwrite=True)
        same_bits(torch.load(tmp_path / "back.pth"), state)
    model = load_pretrained(tmp_path / NAMES["huggingface"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model = load_pretrained(tmp_path / NAMES["huggingface"], dtype=dtype)
    same_bits(model.state_dict(), state)


def test_overrides_of_the_model(timm_vit, images):
    theirs = timm_vit()
    state = theirs.state_dict()
    model = load_pretrained(
        state, num_heads=3, drop_path_rate=0.2, residual_dtype=torch.bfloat16, dynamic_img_size=True,
        mean=[0.5] * 3, std=[0.5] * 3, global_pool="avg",
    )  # fmt: skip
    assert (model.residual_dtype, model.dynamic_img_size, model.patch_embed.mean) == (torch.bfloat16, True, (0.5,) * 3)
    agree(load_pretrained(state, num_heads=3, norm_eps=1e-2)(images), timm_loaded(timm_vit, state, 1e-2)(images))
    layer = partial(nn.LayerNorm, eps=1e-2)
    agree(load_pretrained(state, num_heads=3, norm_layer=layer)(images), timm_loaded(timm_vit, state, 1e-2)(images))
    # the final norm stays before the pooling
    pooled = theirs.forward_features(images)[:, 1:].mean(dim=1)
    agree(load_pretrained(state, num_heads=3, global_pool="avg")(images), theirs.head(pooled))


def timm_loaded(timm_vit, state, eps):
    model = timm_vit(norm_layer=partial(nn.LayerNorm, eps=eps))
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"depth": 1}, "blocks.1.norm1.weight: not in this model"),
        ({"depth": 3}, "blocks.2.norm1.weight: the checkpoint has none"),
        ({"mlp_ratio": 4.0}, "blocks.0.mlp.fc1.weight: shape [96, 48] in the checkpoint, [192, 48] in this model"),
        ({"reg_tokens": 4}, "reg_token: the checkpoint has none"),
        ({"pos_embed": "none"}, "pos_embed: not in this model"),
    ],
)
def test_overrides_of_another_model(overrides, line, timm_vit):
    state = timm_vit().state_dict()
    with pytest.raises(CheckpointError) as raised:
        load_pretrained(state, num_heads=3, **overrides)
    assert line in str(raised.value)
    with pytest.warns(UserWarning, match="left out|fresh"):
        load_pretrained(state, num_heads=3, strict=False, **overrides)


def test_strict_is_quiet(timm_vit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(timm_vit().state_dict(), num_heads=3, img_size=48)


def test_not_strict(timm_vit):
    state = timm_vit().state_dict()
    del state["blocks.1.norm2.bias"]
    state |= {"extra": torch.randn(3), "blocks.0.mlp.fc2.bias": torch.randn(5), "norm.bias": torch.ones(48).int()}
    with pytest.warns(UserWarning) as warned:
        model = load_pretrained(state, num_heads=3, strict=False)
    text = " ".join(str(warning.message) for warning in warned)
    assert "extra: unknown" in text
    assert "blocks.0.mlp.fc2.bias: shape [5], expected [48]" in text
    assert "fresh, not from the checkpoint: blocks.0.mlp.fc2.bias, blocks.1.norm2.bias, norm.bias" in text
    assert model.blocks[1].norm2.bias.count_nonzero() == 0
    assert model.blocks[0].norm1.bias.equal(state["blocks.0.norm1.bias"])


def test_unknown_override(timm_vit, tmp_path):
    with pytest.raises(TypeError, match="widht"):
        load_pretrained(timm_vit().state_dict(), widht=3)
    with pytest.raises(TypeError, match="drop_rate: is no property of a checkpoint; accepted: img_size"):
        convert(timm_vit().state_dict(), tmp_path / "a.pth", drop_rate=0.1)
    with pytest.raises(ValueError, match="to: 'keras' is not known; accepted: timm"):
        convert(timm_vit().state_dict(), tmp_path / "a.pth", "keras")


def test_convert_says(transformers, saved, timm_vit, tmp_path):
    lines = convert(saved(transformers("ViTModel")), tmp_path / "vit.pth", "timm")
    assert lines[0].endswith("vit in huggingface's names")
    assert "left out, not used by the encoder: pooler.dense.bias, pooler.dense.weight" in lines
    assert "norm_eps=1e-12: build timm's model with norm_layer=partial(nn.LayerNorm, eps=1e-12)" in lines
    assert any(line.startswith("not in the file: num_heads=3") for line in lines)
    lines = convert(timm_vit().state_dict(), tmp_path / "vit2.pth", "torchvision")
    assert "assumed: num_heads=1 (48 a head)" in lines
    state = timm_vit(init_values=0.1, reg_tokens=4, no_embed_class=True, num_classes=0).state_dict()
    lines = convert(state, tmp_path / "dino", "huggingface")
    assert "pos_embed: the class token got a position of zeros" in lines
    assert "mask_token: zeros, since the model has one and the checkpoint has none" in lines
    lines = convert(tmp_path / "dino", tmp_path / "dino.safetensors", "timm")
    assert lines[1:] == ["left out, not used by the encoder: embeddings.mask_token"]
    registers = saved(transformers("Dinov2WithRegistersModel"))
    folded = "pos_embed: the class token's own position was added to it"
    assert folded in convert(registers, tmp_path / "registers.pth", "timm")
    assert len(convert(registers, tmp_path / "registers", "huggingface")) == 1


def test_convert_keeps_what_is_there_where_it_fails(timm_vit, tmp_path):
    path = tmp_path / "vit.pth"
    path.write_bytes(b"mine")
    broken = timm_vit().state_dict()
    del broken["norm.bias"]
    for strict in (True, False):
        with pytest.raises(
            CheckpointError, match=r"a part of a checkpoint can't be converted.*\n  norm\.bias: missing"
        ):
            convert(broken, path, "timm", overwrite=True, strict=strict)
    with pytest.raises(CheckpointError, match="num_classes=9, but its head has 7 classes"):
        convert(timm_vit().state_dict(), path, "timm", overwrite=True, num_classes=9)
    assert path.read_bytes() == b"mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["vit.pth"]
    convert(timm_vit().state_dict(), path, "timm", overwrite=True)
    assert load_pretrained(path, num_heads=3).num_classes == 7


@pytest.mark.full
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"])
def test_named_models(name, tmp_path: Path):
    """At full size, nothing needs to be said: the named model's heads are known."""
    theirs = scrambled(peer("timm").create_model(name))
    convert(theirs.state_dict(), tmp_path / "vit", "huggingface")
    convert(tmp_path / "vit", tmp_path / "back.pth", "timm")
    same_bits(torch.load(tmp_path / "back.pth"), theirs.state_dict())
    pixels = torch.randn(1, 3, *theirs.patch_embed.img_size)
    agree(load_pretrained(tmp_path / "vit")(pixels), theirs(pixels))
