"""Against the libraries themselves: what they make is recognised, computes the same, and goes back bit by bit."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastvit
from fastvit.checkpoints import CheckpointError, load_pretrained
from fastvit.checkpoints.arguments import mlp_ratio_of
from fastvit.checkpoints.files import read_checkpoint
from fastvit.checkpoints.recognition import Recognised, recognise
from fastvit.checkpoints.targets import SCHEMAS, to_schema
from tests.checkpoints.conftest import CLASSES, HEADS, WIDTH, agree, recognised, same_bits, scrambled
from tests.libraries import peer


def again(found: Recognised, schema: str, **known: Any) -> Recognised:
    """There and back."""
    state, config = to_schema(found, schema)
    config = None if config is None else json.loads(json.dumps(config))
    return recognised(state, config, **known)


# ---- timm --------------------------------------------------------------------------------------------------------

TIMM = {
    "plain": {},
    "avg": {"global_pool": "avg"},
    "gap": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "deit3": {"no_embed_class": True, "init_values": 0.1},
    "dinov2": {"init_values": 0.1, "num_classes": 0},
    "dinov2_registers": {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True, "num_classes": 0},
    "registers_with_positions": {"reg_tokens": 4},
    "clip": {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "gap_registers": {
        "class_token": False, "reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "init_values": 0.1,
    },
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "no_final_norm": {"final_norm": False},
    "rmsnorm": {"norm_layer": "rmsnorm"},
    "odd_mlp": {"mlp_ratio": 64 / 13},
}  # fmt: skip


@pytest.mark.parametrize("case", TIMM)
def test_timm(case, timm_vit, images):
    theirs = timm_vit(**TIMM[case])
    state = theirs.state_dict()
    found = recognised(state, num_heads=HEADS)
    assert (found.schema, found.problems) == ("timm", [])
    same_bits(found.state, state)
    same_bits(to_schema(found, "timm")[0], state)
    agree(load_pretrained(state, num_heads=HEADS)(images), theirs(images))
    same_bits(again(found, "fastvit").state, state)
    assert again(found, "fastvit").arguments == found.arguments


def test_gated_mlp(timm_vit, images):
    layers = peer("timm.layers")
    theirs = timm_vit(mlp_layer=layers.SwiGLUPacked, act_layer=nn.SiLU, init_values=0.1, num_classes=0)
    ours = load_pretrained(theirs.state_dict(), num_heads=HEADS)
    agree(ours(images), theirs(images))
    # the names of DINOv2's own files
    state = {name.replace("fc1", "w12").replace("fc2", "w3"): tensor for name, tensor in theirs.state_dict().items()}
    agree(load_pretrained({**state, "mask_token": torch.randn(1, WIDTH)}, num_heads=HEADS)(images), theirs(images))


def test_timm_folder_is_timms(timm_vit, images, tmp_path):
    """timm builds and loads the folder that goes with its names."""
    from fastvit.checkpoints import convert

    theirs = timm_vit(init_values=0.1, reg_tokens=4, no_embed_class=True, act_layer="gelu_tanh", in_chans=1)
    convert(theirs.state_dict(), tmp_path / "vit", "timm", num_heads=HEADS, act_layer="gelu_tanh")
    loaded = peer("timm").create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    assert loaded.state_dict().keys() == theirs.state_dict().keys()
    agree(loaded(images[:, :1]), theirs(images[:, :1]))
    ours = load_pretrained(tmp_path / "vit")
    agree(ours(images[:, :1]), theirs(images[:, :1]))
    assert not [line for line in recognise(read_checkpoint(tmp_path / "vit")).assumed if "img_size" not in line]


def test_timm_distilled(images):
    """Two tokens and two heads: the second head is refused, and the rest is DeiT's class token's side."""
    deit = peer("timm.models.deit")
    theirs = scrambled(
        deit.VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, num_classes=CLASSES
        )
    )
    found = recognised(theirs.state_dict())
    assert found.family == "deit-distilled"
    assert sorted(found.refused) == ["head_dist.bias", "head_dist.weight"]
    with pytest.raises(CheckpointError, match=r"head_dist\.weight: FastViT has one head"):
        load_pretrained(theirs.state_dict())
    with pytest.warns(UserWarning, match=r"left out: head_dist\.weight"):
        ours = load_pretrained(theirs.state_dict(), strict=False, num_heads=HEADS)
    agree(ours(images), theirs.head(theirs.forward_features(images)[:, 0]))
    encoder = load_pretrained(theirs.state_dict(), num_classes=0, global_pool="", num_heads=HEADS)
    agree(encoder(images), theirs.forward_features(images))


# ---- torchvision -------------------------------------------------------------------------------------------------


def test_torchvision(torchvision_vit, images):
    theirs = torchvision_vit()
    state = theirs.state_dict()
    found = recognised(state, num_heads=HEADS)
    assert (found.schema, found.family, found.problems) == ("torchvision", "vit", [])
    agree(load_pretrained(state, num_heads=HEADS)(images), theirs(images))
    same_bits(to_schema(found, "torchvision")[0], state)
    for schema in SCHEMAS:
        same_bits(to_schema(again(found, schema), "torchvision")[0], state)


def test_torchvision_before_0_12(torchvision_vit, images):
    theirs = torchvision_vit()
    state = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    agree(load_pretrained(state, num_heads=HEADS)(images), theirs(images))


def test_torchvision_representation(torchvision_vit):
    state = torchvision_vit(representation_size=20).state_dict()
    found = recognised(state)
    assert {"heads.pre_logits.weight", "heads.head.weight"} <= found.refused.keys()
    assert found.arguments["num_classes"] == 0


# ---- what a library can't express --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "arguments", "named"),
    [
        *((schema, arguments, f"can't express .*{named}") for schema in ("torchvision", "huggingface")
          for arguments, named in (
              ({"reg_tokens": 2}, "reg_tokens=2"),
              ({"global_pool": "avg"}, "fc_norm=True"),
              ({"global_pool": "avg", "fc_norm": False}, "global_pool='avg' before the head"),
              ({"class_token": False, "global_pool": "avg"}, "class_token=False"),
              ({"qk_norm": True}, "qk_norm=True"),
              ({"pre_norm": True, "init_values": 0.1}, "init_values"),
          )),
        ("torchvision", {"pre_norm": True}, "torchvision's ViT can't express .*pre_norm=True"),
        ("torchvision", {"qkv_bias": False}, "qkv_bias=False"),
        ("huggingface", {"pre_norm": True}, "head.bias"),
        ("huggingface", {"init_values": 0.1, "mlp_ratio": 2.5}, "mlp_ratio"),
        ("huggingface", {"init_values": 0.1, "reg_tokens": 4}, "no_embed_class=False"),
        ("huggingface", {"init_values": 0.1, "img_size": (16, 24)}, "img_size"),
        ("huggingface", {"pre_norm": True, "img_size": (16, 24), "num_classes": 0}, "img_size"),
    ],
)  # fmt: skip
def test_cannot(schema, arguments, named, timm_vit):
    config = {"fastvit": {"global_pool": arguments.get("global_pool", "token")}}
    found = recognised(timm_vit(**arguments).state_dict(), config, size_hint=arguments.get("img_size"))
    with pytest.raises(CheckpointError, match=named):
        to_schema(found, schema)


@pytest.mark.parametrize("schema", ["timm", "torchvision", "huggingface"])
def test_rotary_positions_are_ours_alone(schema):
    """A file of them has no tensor for positions: in another library the model would have none."""
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    model = fastvit.VisionTransformer(**small, pos_embed="rotary", qkv_bias=True)
    found = recognised(model.state_dict(), {"fastvit": {**small, "pos_embed": "rotary", "global_pool": "token"}})
    assert found.arguments["pos_embed"] == "rotary" and not found.problems
    assert to_schema(found, "fastvit")[1]["fastvit"]["pos_embed"] == "rotary"
    with pytest.raises(CheckpointError, match="can't express .*pos_embed='rotary'"):
        to_schema(found, schema)


# ---- what is no ViT, or not a whole one --------------------------------------------------------------------------


def names(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, 2) for name in names}


def timm_state(name: str, **arguments: Any) -> dict[str, torch.Tensor]:
    return peer("timm").create_model(name, **arguments).state_dict()


FOREIGN = {
    "Swin": lambda: timm_state("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "BEiT": lambda: timm_state("beit_base_patch16_224", depth=1),
    "ResNet": lambda: peer("torchvision.models.resnet").resnet18().state_dict(),
    "hybrid": lambda: timm_state("vit_tiny_r_s16_p8_224", depth=1),
    "rotary": lambda: timm_state("vit_small_patch16_rope_224", depth=1) | names("blocks.0.attn.rope.freqs"),
    "SigLIP": lambda: names(
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_model.head.probe",
    ),
    "BEiT.*layers.0.lambda_1": lambda: names(
        "embeddings.patch_embeddings.projection.weight", "layers.0.attention.q_proj.weight", "layers.0.lambda_1"
    ),
    "text": lambda: names("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
    # blocks in the names of a ViT's and of CLIP's image tower
    "text.*word_embeddings": lambda: names(
        "embeddings.word_embeddings.weight", "encoder.layer.0.attention.output.dense.weight"
    ),
    "text.*token_embedding": lambda: names(
        "embeddings.token_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"
    ),
    "DINOv3": lambda: names("embeddings.patch_embeddings.weight", "model.layer.0.attention.q_proj.weight"),
    "ConvNeXt": lambda: names("stages.0.blocks.0.conv_dw.weight", "stem.0.weight"),
    "OpenAI": lambda: names("visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight"),
}


@pytest.mark.parametrize("model", FOREIGN)
def test_another_architecture(model):
    with pytest.raises(CheckpointError, match=f"state_dict: seems to be .*{model}.*: ") as raised:
        load_pretrained(FOREIGN[model](), strict=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_no_patches(name, transformers):
    """A ViT that lacks its patch weight is not taken for another model."""
    state = transformers(name).state_dict()
    del state["embeddings.patch_embeddings.projection.weight"]
    with pytest.raises(CheckpointError, match="names of a ViT, but no embeddings.patch_embeddings.projection.weight"):
        load_pretrained(state)


def test_nothing_known():
    with pytest.raises(CheckpointError, match="no names of a Vision Transformer's patches and blocks; it has a, b"):
        load_pretrained(names("a", "b"))


def test_attention_pooling(timm_vit, images):
    """timm's SigLIP: refused, or its encoder alone."""
    theirs = timm_vit(class_token=False, global_pool="map")
    with pytest.raises(CheckpointError, match="attn_pool.latent: FastViT has no attention pooling"):
        load_pretrained(theirs.state_dict(), num_heads=HEADS)
    encoder = load_pretrained(theirs.state_dict(), num_heads=HEADS, num_classes=0, global_pool="")
    agree(encoder(images), theirs.forward_features(images))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s | {"extra.weight": torch.randn(2)}, "extra.weight: unknown"),
        (lambda s: {k: v for k, v in s.items() if k != "blocks.1.norm2.bias"}, "blocks.1.norm2.bias: missing"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("norm.")} | {"norm.weight": s["norm.weight"]},
         "norm.bias: missing"),
        (lambda s: s | {"blocks.0.mlp.fc2.weight": torch.randn(48, 95)},
         "blocks.0.mlp.fc2.weight: shape [48, 95], expected [48, 96]"),
        (lambda s: s | {"blocks.0.attn.qkv.weight": s["blocks.0.attn.qkv.weight"].char()},
         "blocks.0.attn.qkv.weight: torch.int8, expected floating point"),
        (lambda s: s | {"blocks.0.attn.q_norm.weight": torch.randn(16)}, "blocks.0.attn.k_norm.weight: missing"),
        (lambda s: s | {"blocks.0.mlp.fc1.weight": torch.ones(())}, "blocks.0.mlp.fc1.weight: shape [], expected"),
        (lambda s: s | {"head.weight": torch.ones(())}, "head.weight: shape [], expected"),
        (lambda s: s | {"pos_embed": torch.ones(17, 48)}, "pos_embed: shape [17, 48], expected"),
        (lambda s: s | {"cls_token": torch.ones(48)}, "cls_token: shape [48], expected [1, 1, 48]"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(change, line, timm_vit):
    state = change(timm_vit().state_dict())
    with pytest.raises(CheckpointError) as raised:
        load_pretrained(state, num_heads=HEADS)
    assert line in str(raised.value)
    assert "strict=False" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("patch_embed.proj.weight", torch.ones(48, 192), "patch_embed.proj.weight: expected 4 dimensions"),
        ("blocks.987654321.norm1.weight", torch.ones(48), "depth: 987654322 blocks in a checkpoint of 33 tensors"),
    ],
)
def test_no_model_can_have_these(name, tensor, message, timm_vit):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(timm_vit().state_dict() | {name: tensor}, strict=False)


def test_positions_of_no_square(timm_vit, images):
    theirs = timm_vit(img_size=(16, 40))
    with pytest.raises(CheckpointError, match=r"11 rows, 1 of them .*img_size=\(height, width\)"):
        recognised(theirs.state_dict())
    images = torch.randn(2, 3, 16, 40)
    agree(load_pretrained(theirs.state_dict(), img_size=(16, 40), num_heads=HEADS)(images), theirs(images))


def test_ratio_gives_the_width_of_the_mlp():
    for width in range(16, 1700, 16):
        for hidden in range(width, 6 * width, 7):
            assert int(width * mlp_ratio_of(hidden, width)) == hidden


def test_one_tensor_by_two_names(torchvision_vit):
    state = torchvision_vit().state_dict()
    layer = "encoder.layers.encoder_layer_1.mlp"
    state[f"{layer}.linear_1.weight"] = torch.randn(96, 48)
    with pytest.raises(CheckpointError, match=rf"{layer}\.linear_1\.weight: {layer}\.0\.weight is the same tensor by"):
        load_pretrained(state, num_heads=HEADS)


def test_heads_are_named_models(timm_vit):
    for width, depth, heads in ((192, 12, 3), (384, 12, 6)):
        found = recognised(timm_vit(embed_dim=width, depth=depth, num_heads=heads).state_dict())
        assert found.arguments["num_heads"] == heads
        assert any(line.startswith(f"num_heads={heads} (as ") for line in found.assumed)
    found = recognised(timm_vit(embed_dim=128, num_heads=4).state_dict())
    assert found.arguments["num_heads"] == 2
    assert "num_heads=2 (64 a head)" in found.assumed
    assert recognised(timm_vit(embed_dim=128, num_heads=4, qk_norm=True).state_dict()).arguments["num_heads"] == 4


def test_config_of_timm(timm_vit):
    state = timm_vit(embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0).state_dict()
    found = recognised(state, {"architecture": "vit_tiny_patch16_224.augreg", "num_classes": CLASSES})
    assert found.assumed == ["img_size=32"]
    found = recognised(state, {"architecture": "vit_base_patch16_clip_quickgelu_224", "model_args": {"num_heads": 12}})
    assert (found.arguments["act_layer"], found.arguments["num_heads"]) == ("quick_gelu", 12)
