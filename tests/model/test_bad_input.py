"""Errors name the argument, its value and what is accepted, and nothing is half done."""

from __future__ import annotations

import pytest
import torch

MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"img_size": 30}, ("img_size", "(30, 30)", "(8, 8)", "dynamic_img_pad")),
        ({"img_size": (24, 30)}, ("img_size", "(24, 30)")),
        ({"img_size": 4}, ("img_size", "smaller", "(4, 4)")),
        ({"img_size": (32, 32, 32)}, ("img_size", "(32, 32, 32)")),
        ({"img_size": None}, ("img_size", "None")),
        ({"img_size": 32.0}, ("img_size", "32.0")),
        ({"patch_size": 0}, ("patch_size", "0")),
        ({"patch_size": "16"}, ("patch_size", "'16'")),
        ({"in_chans": 0}, ("in_chans", "0")),
        ({"num_classes": -1}, ("num_classes", "-1")),
        ({"depth": -1}, ("depth", "-1")),
        ({"depth": 1.5}, ("depth", "1.5")),
        ({"reg_tokens": -1}, ("reg_tokens", "-1")),
        ({"num_heads": 5}, ("num_heads", "5", "48")),
        ({"num_heads": 0}, ("num_heads", "0")),
        ({"mlp_ratio": 0.0}, ("mlp_ratio", "0.0")),
        ({"global_pool": "mean"}, ("global_pool", "'mean'", "'avg'")),
        ({"global_pool": "prr"}, ("global_pool", "'prr'", "'map'")),
        ({"class_token": False}, ("global_pool", "class_token")),
        ({"pos_embed": "learned"}, ("pos_embed", "'learned'", "'sincos'")),
        ({"pos_embed": "sincos", "embed_dim": 18}, ("embed_dim", "18", "4")),
        ({"weight_init": "xavier"}, ("weight_init", "'xavier'", "'jax'")),
        ({"drop_rate": 1.0}, ("drop_rate", "1.0")),
        ({"patch_drop_rate": -0.1}, ("patch_drop_rate", "-0.1")),
        ({"drop_path_rate": 1.5}, ("drop_path_rate", "1.5")),
        ({"residual_dtype": torch.int8}, ("residual_dtype", "int8", "bfloat16")),
        ({"norm_layer": "batchnorm"}, ("norm_layer", "'batchnorm'", "layernorm")),
        ({"embed_norm_layer": "batchnorm"}, ("embed_norm_layer", "'batchnorm'")),
        ({"act_layer": "swish"}, ("act_layer", "'swish'", "silu")),
        ({"act_layer": 3}, ("act_layer", "3")),
        ({"attn_layer": "diff"}, ("attn_layer", "'diff'")),
        ({"mean": MEAN}, ("mean", "std")),
        ({"std": STD}, ("mean", "std")),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, ("std", "0.0")),
        ({"mean": (0.5,), "std": (0.2,)}, ("mean", "3")),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, ("mean", "0..1", "123.7", "divide by 255")),
        ({"mean": MEAN, "std": (58.4, 57.1, 57.4)}, ("std", "0..1", "58.4", "divide by 255")),
    ],
)
def test_constructor(arguments, parts, tiny):
    with pytest.raises(ValueError) as raised:
        tiny(**arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "images", "parts"),
    [
        ({}, torch.zeros(3, 24, 32), ("images", "4 dimensions", "[3, 24, 32]")),
        ({}, torch.zeros(1, 1, 24, 32), ("images", "1 channels", "3")),
        ({"mean": MEAN, "std": STD}, torch.zeros(1, 4, 24, 32, dtype=torch.uint8), ("images", "4 channels", "3")),
        ({}, torch.zeros(1, 3, 32, 24), ("images", "32 x 24", "24 x 32", "dynamic_img_size")),
        ({"dynamic_img_size": True}, torch.zeros(1, 3, 25, 32), ("images", "25 x 32", "8 x 8", "dynamic_img_pad")),
        ({"dynamic_img_pad": True}, torch.zeros(1, 3, 20, 32), ("images", "20 x 32", "24 x 32")),
    ],
)
def test_images(arguments, images, parts, tiny):
    model = tiny(**arguments)
    for call in (model, model.forward_features, model.forward_intermediates, model.get_attention_maps):
        with pytest.raises(ValueError) as raised:
            call(images)
        for part in parts:
            assert part in str(raised.value)


def test_image_dtype(tiny):
    with pytest.raises(TypeError, match="images: dtype torch.int32"):
        tiny()(torch.zeros(1, 3, 24, 32, dtype=torch.int32))


def test_methods(tiny):
    model = tiny()
    images = torch.zeros(1, 3, 24, 32)
    for call, parts in (
        (lambda: model.forward_intermediates(images, 3), ("indices", "3", "1 to 2")),
        (lambda: model.forward_intermediates(images, 0), ("indices", "0")),
        (lambda: model.forward_intermediates(images, [2]), ("indices", "[2]", "-2 to 1")),
        (lambda: model.forward_intermediates(images, []), ("indices", "[]")),
        (lambda: model.get_attention_maps(images, [-3]), ("indices", "[-3]")),
        (lambda: model.forward_intermediates(images, output_fmt="NHWC"), ("output_fmt", "'NHWC'", "'NCHW'")),
        (lambda: model.pool(images.flatten(2), "mean"), ("global_pool", "'mean'")),
        (lambda: model.reset_classifier(-1), ("num_classes", "-1")),
        (lambda: model.reset_classifier(3, "sum"), ("global_pool", "'sum'")),
        (lambda: model.reset_classifier(3, "map"), ("global_pool", "'map'", "built with it")),
        (lambda: model.pool(images.flatten(2), "map"), ("global_pool", "'map'", "built with it")),
        (lambda: model.set_input_size(30), ("img_size", "(30, 30)")),
        (lambda: model.set_input_size((24, 32), 5), ("img_size", "(5, 5)")),
        (lambda: model.set_input_size(patch_size=-8), ("patch_size", "-8")),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        for part in parts:
            assert part in str(raised.value)
    assert model.head.out_features == 7 and model.patch_embed.img_size == (24, 32)  # nothing was half done
    assert model(images).shape == (1, 7)


def test_another_shape_in_the_checkpoint(tiny):
    model, larger = tiny(), tiny(img_size=48, num_classes=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError) as raised:
            model.load_state_dict(larger.state_dict(), strict=strict)
        message = str(raised.value)
        for part in ("pos_embed", "[1, 37, 48]", "[1, 13, 48]", "head.weight", "[9, 48]", "[7, 48]", "head.bias"):
            assert part in message
        assert "cls_token" not in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("inside", [False, True])
def test_other_names_in_the_checkpoint(inside, tiny):
    model = tiny()
    state = tiny().state_dict()
    state["blocks.2.norm1.weight"] = state.pop("blocks.1.norm1.weight")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = torch.nn.Sequential(model) if inside else model
    with pytest.raises(RuntimeError) as raised:
        target.load_state_dict({f"0.{name}": value for name, value in state.items()} if inside else state)
    assert "blocks.2.norm1.weight" in str(raised.value) and "blocks.1.norm1.weight" in str(raised.value)
    if not inside:  # a wrapper loads before it counts names
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["blocks.1.norm1.weight"]
    assert result.unexpected_keys == ["blocks.2.norm1.weight"]


def test_a_wrapped_model_is_not_half_loaded(tiny):
    model, other = tiny(), tiny(num_classes=9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = torch.nn.ModuleDict({"encoder": model})
    with pytest.raises(RuntimeError, match=r"encoder.head.weight: shape \[9, 48\]"):
        wrapped.load_state_dict({f"encoder.{name}": value for name, value in other.state_dict().items()})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.zeros(7, dtype=torch.int64), "seven", None])
def test_no_numbers_in_the_checkpoint(value, tiny):
    model = tiny()
    with pytest.raises(RuntimeError, match="head.bias"):
        model.load_state_dict({**model.state_dict(), "head.bias": value})
