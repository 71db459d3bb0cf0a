"""Against transformers: from and to its folders and its models in memory, of versions 4 and 5."""

from __future__ import annotations

import copy
import json
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit.checkpoints import CheckpointError, load_pretrained
from fastvit.checkpoints.files import read_checkpoint
from fastvit.checkpoints.recognition import recognise
from fastvit.checkpoints.targets import to_schema
from fastvit.checkpoints.writing import write_checkpoint
from tests.checkpoints.conftest import HEADS, WIDTH, agree, recognised, same_bits, scrambled
from tests.libraries import peer

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {}),
    "vit_no_qkv_bias": ("ViTForImageClassification", {"qkv_bias": False}),
    "vit_rectangular": ("ViTForImageClassification", {"image_size": [16, 32], "patch_size": [8, 4]}),
    "vit_eps_gelu": ("ViTForImageClassification", {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"}),
    "vit_grey": ("ViTForImageClassification", {"num_channels": 1}),
    "vit_model": ("ViTModel", {}),
    "deit": ("DeiTForImageClassification", {}),
    "deit_model": ("DeiTModel", {}),
    "mae": ("ViTMAEModel", {"mask_ratio": 0.0}),
    "dinov2": ("Dinov2Model", {"mlp_ratio": 2}),
    "dinov2_swiglu": ("Dinov2Model", {"use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegistersModel", {}),
    "dinov2_registers_swiglu": ("Dinov2WithRegistersModel", {"use_swiglu_ffn": True, "num_register_tokens": 2}),
    "clip": ("CLIPVisionModel", {}),
    "clip_gelu": ("CLIPVisionModel", {"hidden_act": "gelu", "layer_norm_eps": 1e-4}),
    "clip_projection": ("CLIPVisionModelWithProjection", {"projection_dim": 20}),
}
# Models of ours, by timm's arguments, and transformers' class for each.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {}),
    "vit_model": ("ViTModel", {"num_classes": 0}),
    "no_embed_class": ("ViTForImageClassification", {"no_embed_class": True}),
    "one_register": ("DeiTForImageClassification", {"reg_tokens": 1}),
    "layer_scale": ("Dinov2ForImageClassification", {"init_values": 0.1}),
    "deit3": ("Dinov2ForImageClassification", {"init_values": 0.1, "no_embed_class": True}),
    "registers": ("Dinov2WithRegistersModel", {"init_values": 0.1, "reg_tokens": 4, "no_embed_class": True,
                                               "num_classes": 0}),
    "clip": ("CLIPVisionModel", {"pre_norm": True, "num_classes": 0}),
}  # fmt: skip


def outputs(model: Any, images: Tensor) -> Tensor:
    """What a model of transformers computes: logits, a projection, or its normed tokens."""
    if type(model).__name__ == "ViTMAEModel":  # it shuffles its patches; this noise leaves them in order
        patches = model.embeddings.patch_embeddings.num_patches
        return model(images, noise=torch.arange(patches).expand(len(images), -1).float()).last_hidden_state
    if type(model).__name__ == "CLIPVisionModel":
        return model(images).pooler_output
    out = model(images)
    return next(out[name] for name in ("logits", "image_embeds", "last_hidden_state") if name in out)


def pooling(name: str) -> dict[str, str]:
    """How a model of ours puts out the same as the class."""
    return {} if "For" in name or name.startswith("CLIP") else {"global_pool": ""}


def images_of(model: Any) -> Tensor:
    size, channels = model.config.image_size, model.config.num_channels
    return torch.randn(2, channels, *((size, size) if isinstance(size, int) else size))


@pytest.mark.parametrize("case", MODELS)
def test_read(case, transformers, saved):
    """The hub's folder and the model in memory are the same model, with nothing assumed; so are version 5's names."""
    name, config = MODELS[case]
    theirs = transformers(name, **config)
    images = images_of(theirs)
    checkpoint = read_checkpoint(saved(theirs))
    found = recognise(checkpoint)
    assert (found.problems, found.assumed) == ([], [])
    agree(load_pretrained(saved(theirs), **pooling(name))(images), outputs(theirs, images))
    in_memory = recognised(theirs.state_dict(), checkpoint.config)
    same_bits(in_memory.state, found.state)
    assert in_memory.arguments == found.arguments

    state, config_json = to_schema(found, "huggingface-v5")
    back = recognised(state, config_json)
    same_bits(back.state, found.state)
    same_bits(to_schema(back, "huggingface")[0], to_schema(found, "huggingface")[0])
    if int(metadata.version("transformers").partition(".")[0]) >= 5:  # whose models take them as they are
        same_bits(state, theirs.state_dict())


@pytest.mark.parametrize("case", MODELS)
def test_write(case, transformers, saved, tmp_path):
    """Every bit comes back, also by way of FastViT's own folder, and `from_pretrained` takes it."""
    name, config = MODELS[case]
    theirs = transformers(name, **config)
    images = images_of(theirs)
    checkpoint = read_checkpoint(saved(theirs))
    write_checkpoint(tmp_path / "ours", *to_schema(recognise(checkpoint), "fastvit"))
    found = recognise(read_checkpoint(tmp_path / "ours"))
    assert (found.schema, found.problems, found.assumed) == ("fastvit", [], [])

    state, config_json = to_schema(found, "huggingface")
    # transformers 5 saves this one class without the prefix that version 4 has
    has_prefix = any(key.startswith("vision_model.") for key in checkpoint.state)
    same_bits(state if has_prefix else {key.removeprefix("vision_model."): t for key, t in state.items()},
              checkpoint.state)  # fmt: skip
    assert config_json["architectures"] == [name]
    write_checkpoint(tmp_path / "vit", state, config_json)
    loaded, report = type(theirs).from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_bits(loaded.state_dict(), theirs.state_dict())
    agree(outputs(loaded.eval(), images), outputs(theirs, images))
    changed = {key for key, value in theirs.config.to_dict().items() if loaded.config.to_dict()[key] != value}
    assert changed <= {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@pytest.mark.parametrize("case", OURS)
def test_from_timm(case, timm_vit, images, tmp_path):
    """timm's model as transformers' class: no weight is missing, the output is the same, and so is every bit back."""
    name, arguments = OURS[case]
    theirs = timm_vit(**arguments)
    found = recognised(theirs.state_dict(), num_heads=HEADS, norm_eps=1e-6)
    state, config = to_schema(found, "huggingface")
    assert config["architectures"] == [name]
    write_checkpoint(tmp_path / "vit", state, config)
    model, report = getattr(peer("transformers"), name).from_pretrained(tmp_path / "vit", output_loading_info=True)
    assert {key.partition(".")[0] for key in report["missing_keys"]} <= {"pooler"}  # timm has no weights for it
    assert not report["unexpected_keys"]
    truth = theirs(images) if theirs.num_classes else theirs.forward_features(images)
    agree(outputs(model.eval(), images), truth[:, 0] if name.startswith("CLIP") else truth)
    for schema in ("huggingface", "huggingface-v5"):
        there = copy.deepcopy(to_schema(found, schema))
        back = recognised(there[0], json.loads(json.dumps(there[1])))
        same_bits(to_schema(back, "timm")[0], theirs.state_dict())


def test_second_heads(transformers, saved, images):
    """DeiT with a teacher averages two heads; FastViT has one."""
    theirs = transformers("DeiTForImageClassificationWithTeacher")
    with pytest.raises(CheckpointError, match=r"distillation_classifier\.weight: FastViT has one head"):
        load_pretrained(saved(theirs))
    with pytest.warns(UserWarning, match="distillation_classifier"):
        ours = load_pretrained(saved(theirs), strict=False)
    agree(ours(images), theirs(images).cls_logits)


def test_two_part_head(transformers, saved, images):
    """DINOv2's classifier reads class token and mean; without it, the encoder loads."""
    theirs = transformers("Dinov2ForImageClassification", mlp_ratio=2)
    with pytest.raises(CheckpointError, match=r"classifier\.weight: FastViT's head reads one pooled token"):
        load_pretrained(saved(theirs))
    encoder = load_pretrained(saved(theirs), num_classes=0, global_pool="")
    agree(encoder(images), theirs.dinov2(images).last_hidden_state)
    with torch.no_grad():  # where the mean does not count, it is a head of ours
        theirs.classifier.weight[:, WIDTH:] = 0
    agree(load_pretrained(saved(theirs))(images), theirs(images).logits)


def test_encoder_of_a_larger_model(transformers, saved, images):
    theirs = transformers(
        "ViTMAEForPreTraining", mask_ratio=0.0, decoder_hidden_size=24, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=20,
    )  # fmt: skip
    found = recognise(read_checkpoint(saved(theirs)))
    assert found.family == "mae"
    assert found.beside
    assert all(name.startswith("decoder.") for name in found.beside)
    agree(load_pretrained(saved(theirs), global_pool="")(images), outputs(theirs.vit, images))


def test_clip_of_two_towers(saved, images):
    clip = peer("transformers.models.clip.modeling_clip")
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 96,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "vocab_size": 50}  # fmt: skip
    theirs = scrambled(clip.CLIPModel(clip.CLIPConfig(vision_config=vision, text_config=text, projection_dim=20)))
    checkpoint = read_checkpoint(saved(theirs))
    checkpoint.state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as in early files
    found = recognise(checkpoint)
    assert (found.problems, found.assumed, found.arguments["num_classes"]) == ([], [], 20)
    found.beside.remove("vision_model.embeddings.position_ids")
    assert {name.partition(".")[0] for name in found.beside} == {"text_model", "text_projection", "logit_scale"}
    pooled = theirs.vision_model(images).pooler_output
    agree(load_pretrained(saved(theirs))(images), theirs.visual_projection(pooled))
    state, config = to_schema(found, "huggingface")
    assert (config["model_type"], config["projection_dim"]) == ("clip_vision_model", 20)
    assert all(tensor.equal(checkpoint.state[key]) for key, tensor in state.items())


def test_other_models():
    for kind in ("swin", "siglip_vision_model", "bert"):
        with pytest.raises(CheckpointError, match=f"model_type: '{kind}' is no model that FastViT reads; it reads vit"):
            recognised({"a": torch.ones(1)}, {"model_type": kind})


def test_unknown_activation(transformers):
    theirs = transformers("ViTModel", hidden_act="mish")
    with pytest.raises(CheckpointError, match="hidden_act: 'mish' is no activation of FastViT's; accepted: gelu"):
        recognised(theirs.state_dict(), theirs.config.to_dict())


def test_without_config(transformers):
    """What a config would say is assumed, and said to be."""
    found = recognised(transformers("ViTModel").state_dict())
    assert found.arguments["norm_eps"] == 1e-12
    assert {line.partition("=")[0] for line in found.assumed} == {"img_size", "norm_eps", "act_layer", "num_heads"}
    assert recognised(transformers("Dinov2Model").state_dict()).arguments["norm_eps"] == 1e-6
    clip = recognised(transformers("CLIPVisionModel").state_dict()).arguments
    assert (clip["norm_eps"], clip["act_layer"]) == (1e-5, "quick_gelu")


def test_missing_part_of_qkv(transformers):
    theirs = transformers("ViTModel")
    state = theirs.state_dict()
    lost = next(name for name in state if "key.weight" in name or "k_proj.weight" in name)
    found = recognised({name: tensor for name, tensor in state.items() if name != lost}, theirs.config.to_dict())
    assert found.missing == [lost]
    assert not found.unknown


def test_missing_last_block(transformers):
    """The config knows of a block that the weights lack."""
    theirs = transformers("ViTModel")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if ".1." not in name}
    assert len(recognised(state, theirs.config.to_dict()).missing) == 16
