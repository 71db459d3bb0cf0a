"""A drop-in for timm: signature, names, initial weights, outputs and every gradient."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastvit
from fastvit.model.layers import GluMlp
from tests.model.conftest import TINY

IMAGES = (2, 3, 24, 32)

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "avg": {"global_pool": "avg"},
    "avg_norm_first": {"global_pool": "avg", "fc_norm": False},
    "max": {"global_pool": "max"},
    "avgmax": {"global_pool": "avgmax", "pool_include_prefix": True},
    "token_fc_norm": {"fc_norm": True},
    "no_pool": {"global_pool": ""},
    "no_head": {"num_classes": 0},
    "qk_norm": {"qk_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "layer_scale": {"init_values": 0.1},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "no_class_token_registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "no_embed_class": {"no_embed_class": True},
    "registers": {"reg_tokens": 4},
    "registers_no_embed_class": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "no_positions": {"pos_embed": "none"},
    "no_positions_no_prefix": {"pos_embed": "", "class_token": False, "global_pool": "avg"},
    "pre_norm": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "map": {"global_pool": "map", "mlp_ratio": 2.5, "act_layer": "gelu_tanh"},
    "map_no_class_token": {"global_pool": "map", "class_token": False},
    "map_registers_norms": {"global_pool": "map", "reg_tokens": 2, "fc_norm": True, "norm_layer": "rmsnorm"},
    "patch_norm": {"embed_norm_layer": nn.LayerNorm},
    "patch_norm_dynamic": {"embed_norm_layer": nn.LayerNorm, "dynamic_img_size": True, "reg_tokens": 1},
    "rms_quick_gelu": {"norm_layer": "rmsnorm", "act_layer": "quick_gelu"},
    "torch_layers": {"norm_layer": partial(nn.LayerNorm, eps=1e-5), "act_layer": nn.ReLU},
    "odd_patch": {"patch_size": (4, 16), "in_chans": 3, "mlp_ratio": 2.5},
    "dynamic_own_size": {"dynamic_img_size": True},
    "dynamic_padded_own_size": {"dynamic_img_size": True, "dynamic_img_pad": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_outputs_and_gradients(setting, pair_with_timm, agree):
    ours, theirs = pair_with_timm(**SETTINGS[setting])
    agree(ours, theirs, torch.randn(IMAGES))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, (24, 32)),
        ({}, (32, 24)),
        ({}, (48, 16)),
        ({"no_embed_class": True, "reg_tokens": 3}, (40, 40)),
        ({"dynamic_img_pad": True}, (29, 33)),
        ({"dynamic_img_pad": True, "pos_embed": "none"}, (7, 41)),
        ({"dynamic_img_pad": True, "img_size": (27, 30)}, (24, 32)),
    ],
)
def test_dynamic_sizes(arguments, size, pair_with_timm, agree):
    ours, theirs = pair_with_timm(dynamic_img_size=True, **arguments)
    agree(ours, theirs, torch.randn(2, 3, *size))


@pytest.mark.parametrize("inputs", ["mask", "causal"])
def test_masks(inputs, pair_with_timm, agree):
    ours, theirs = pair_with_timm()
    mask = torch.rand(13, 13) > 0.3
    agree(ours, theirs, torch.randn(IMAGES), **({"attn_mask": mask} if inputs == "mask" else {"is_causal": True}))


def test_gated_mlp(pair_with_timm, agree, tiny, timm):
    from timm.layers import GluMlp as TimmGluMlp
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    gated: Any = partial(TimmGluMlp, gate_last=False)
    torch.manual_seed(1)
    theirs = TimmVisionTransformer(**TINY, mlp_layer=gated, act_layer=nn.SiLU)
    torch.manual_seed(1)
    ours = fastvit.VisionTransformer(**TINY, mlp_layer=partial(GluMlp, gate_last=False), act_layer=nn.SiLU)
    for (name, parameter), value in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, value), name
    agree(ours, theirs, torch.randn(IMAGES))


@pytest.mark.parametrize(
    "drops",
    [
        {"drop_rate": 0.5},
        {"pos_drop_rate": 0.5},
        {"proj_drop_rate": 0.5},
        {"attn_drop_rate": 0.5},
        {"drop_path_rate": 0.6},
        {"patch_drop_rate": 0.5},
        {"patch_drop_rate": 0.99, "reg_tokens": 2},
        {"patch_drop_rate": 0.25, "class_token": False, "global_pool": "avg", "no_embed_class": True},
        {"patch_drop_rate": 0.5, "embed_norm_layer": nn.LayerNorm},
        {"patch_drop_rate": 0.5, "embed_norm_layer": nn.LayerNorm, "no_embed_class": True, "reg_tokens": 2},
        {"patch_drop_rate": 0.5, "pos_embed": "none"},
        {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.3, "patch_drop_rate": 0.3},
    ],
)
def test_drops_draw_the_same_random_numbers(drops, pair_with_timm):
    ours, theirs = pair_with_timm(depth=3, **drops)
    images = torch.randn(4, 3, 24, 32)
    gradients = []
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        output = model(images)
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        scale = gradients[1][name].abs().max() + 1e-6
        torch.testing.assert_close(gradient / scale, gradients[1][name] / scale, rtol=1e-4, atol=1e-4, msg=name)
    # They do drop: without a seed two passes differ; and nothing is dropped in evaluation.
    assert not torch.equal(ours(images), ours(images))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_drop_path_schedule(tiny, pair_with_timm):
    ours, theirs = pair_with_timm(depth=5, drop_path_rate=0.4)
    rates = [[getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks] for model in (ours, theirs)]
    assert rates[0] == rates[1]
    assert rates[0][0] == 0.0 and rates[0][-1] == pytest.approx(0.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_a_float32_residual_stream(dtype, pair_with_timm, device):
    ours, theirs = pair_with_timm(init_values=0.5)
    images = torch.randn(IMAGES)
    streams: list[list[torch.dtype]] = []
    outputs = []
    for model in (ours, theirs):
        seen: list[torch.dtype] = []
        for block in model.blocks:
            block.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.extend((inputs[0].dtype, output.dtype))
            )
        with torch.autocast(device, dtype=dtype):
            outputs.append(model(images))
        streams.append(seen)
    assert streams[0] == streams[1] == [torch.float32] * 4
    assert outputs[0].dtype == outputs[1].dtype
    truth = theirs.double()(images.double())
    errors = [float(((output.double() - truth).norm() / truth.norm()).detach()) for output in outputs]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize(
    "arguments", [{"class_token": False, "global_pool": "avg", "pos_embed": "none"}, {"pos_embed": "none"}, {}]
)
def test_autocast_promotes_as_torch_does(arguments, pair_with_timm, device):
    ours, theirs = pair_with_timm(**arguments)
    dtypes = []
    for model in (ours, theirs):
        model.blocks[0].register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
        with torch.autocast(device, dtype=torch.bfloat16):
            model(torch.randn(IMAGES))
    assert dtypes[0] == dtypes[1]


def test_half_model(pair_with_timm):
    ours, theirs = pair_with_timm()
    images = torch.randn(IMAGES)
    truth = theirs.double()(images.double())
    ours.bfloat16(), theirs.bfloat16()
    outputs = [model(images.bfloat16()) for model in (ours, theirs)]
    assert outputs[0].dtype == torch.bfloat16
    errors = [float(((output.double() - truth).norm() / truth.norm()).detach()) for output in outputs]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("indices", [None, 2, [0, 2], [-1]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": True, "output_fmt": "NLC"},
        {"return_prefix_tokens": True, "stop_early": True},
        {"intermediates_only": True, "stop_early": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ],
)
def test_forward_intermediates(indices, options, pair_with_timm):
    ours, theirs = pair_with_timm(depth=3, reg_tokens=1)
    images = torch.randn(IMAGES)
    results = [model.forward_intermediates(images, indices, **options) for model in (ours, theirs)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    ours.set_grad_checkpointing()
    torch.testing.assert_close(ours.forward_intermediates(images, indices, **options), results[0])


def test_intermediate_layers_and_pruning(pair_with_timm):
    ours, theirs = pair_with_timm(depth=3)
    images = torch.randn(IMAGES)
    layers = [model.get_intermediate_layers(images, 2, reshape=True, norm=True) for model in (ours, theirs)]
    torch.testing.assert_close(layers[0], layers[1], rtol=1e-4, atol=1e-4)
    assert ours.prune_intermediate_layers([0, 1]) == theirs.prune_intermediate_layers([0, 1]) == [0, 1]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_features_and_head(pair_with_timm):
    ours, theirs = pair_with_timm(global_pool="avg")
    images = torch.randn(IMAGES)
    features = [model.forward_features(images) for model in (ours, theirs)]
    torch.testing.assert_close(features[0], features[1], rtol=1e-4, atol=1e-4)
    for pre_logits in (False, True):
        heads = [model.forward_head(features[1], pre_logits=pre_logits) for model in (ours, theirs)]
        torch.testing.assert_close(heads[0], heads[1])
    for pool in ("", "max", "token"):
        assert torch.equal(ours.pool(features[0], pool), theirs.pool(features[0], pool))


def test_signature_and_defaults(timm):
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    ours = inspect.signature(fastvit.VisionTransformer).parameters
    theirs = inspect.signature(TimmVisionTransformer).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    classes = {"embed_layer", "block_fn", "mlp_layer", "attn_layer"}
    for name, parameter in theirs.items():
        if name in classes:
            assert ours[name].default.__name__ == parameter.default.__name__
        else:
            assert ours[name].default == parameter.default, name
    for method in (
        "forward",
        "forward_features",
        "forward_head",
        "forward_intermediates",
        "get_intermediate_layers",
        "prune_intermediate_layers",
        "init_weights",
        "set_input_size",
        "reset_classifier",
        "set_grad_checkpointing",
        "no_weight_decay",
        "group_matcher",
        "get_classifier",
        "pool",
    ):
        mine = inspect.signature(getattr(fastvit.VisionTransformer, method)).parameters
        other = inspect.signature(getattr(TimmVisionTransformer, method)).parameters
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in other.values()], method


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco", "reset", "skip"])
@pytest.mark.parametrize(
    "arguments",
    [{"global_pool": "map"}, {"fix_init": True, "reg_tokens": 2, "init_values": 0.1, "qk_norm": True}],
)
def test_the_same_seed_gives_the_same_weights(weight_init, arguments, timm, tiny):
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    models = []
    for build in (fastvit.VisionTransformer, TimmVisionTransformer):
        torch.manual_seed(7)
        models.append(
            build(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, weight_init=weight_init, **arguments)
        )
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert list(ours) == list(theirs)
    left_alone = {"pos_embed", "cls_token", "reg_token"} if weight_init == "skip" else set()
    for name in ours.keys() - left_alone:
        assert torch.equal(ours[name], theirs[name]), name
    # Once more from scratch, as after the meta device.
    for model in models:
        torch.manual_seed(8)
        model.init_weights(needs_reset=True)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("arguments", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"pos_embed": "none"}])
@pytest.mark.parametrize(
    "change",
    [{"img_size": (40, 16)}, {"img_size": (32, 24)}, {"patch_size": (4, 8)}, {"img_size": 32, "patch_size": 16}],
)
def test_set_input_size(arguments, change, pair_with_timm):
    ours, theirs = pair_with_timm(**arguments)
    ours.set_input_size(**change), theirs.set_input_size(**change)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    images = torch.randn(2, 3, *ours.patch_embed.img_size)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size


@pytest.mark.parametrize("pool", ["token", "map"])
def test_reset_classifier(pool, pair_with_timm):
    ours, theirs = pair_with_timm(global_pool=pool)
    for arguments in ((5,), (4, pool), (3, "avg"), (0, ""), (2, "max")):
        for model in (ours, theirs):
            torch.manual_seed(2)
            model.reset_classifier(*arguments)
        assert ours.num_classes == theirs.num_classes and ours.global_pool == theirs.global_pool
        images = torch.randn(IMAGES)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
        assert type(ours.get_classifier()) is type(theirs.get_classifier())


def test_helpers_for_optimisers(pair_with_timm):
    ours, theirs = pair_with_timm()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.feature_info == theirs.feature_info
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    counts = [[len(group["params"]) for group in param_groups_layer_decay(model)] for model in (ours, theirs)]
    assert counts[0] == counts[1]
    create_optimizer_v2(ours, opt="adamw", weight_decay=0.05)


def test_training_follows_timm(pair_with_timm):
    ours, theirs = pair_with_timm()
    data = [(torch.randn(8, 3, 24, 32), torch.randint(0, 7, (8,))) for _ in range(4)]
    losses: list[list[float]] = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(12):
            images, labels = data[step % 4]
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
