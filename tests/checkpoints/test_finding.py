"""Models inside the checkpoints of trainings: found behind any wrapper, and named where there are several."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.checkpoints import CheckpointError, convert, inspect, load_pretrained
from fastvit.checkpoints.files import Checkpoint, read_checkpoint
from fastvit.checkpoints.recognition import Recognised, recognise
from tests.checkpoints.conftest import same_bits

State = dict[str, Tensor]


@pytest.fixture
def vit(timm_vit: Callable[..., Any]) -> Callable[..., State]:
    return lambda **arguments: dict(timm_vit(**arguments).state_dict())


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def found(contents: Any, **arguments: Any) -> Recognised:
    return recognise(read_checkpoint(contents), num_heads=3, **arguments)


def refusal(contents: Any, **arguments: Any) -> str:
    """An error, also where what does not fit may be left out."""
    for strict in (True, False):
        with pytest.raises(CheckpointError) as error:
            load_pretrained(contents, strict=strict, **arguments)
    return str(error.value)


PREFIXES = (
    "module.",
    "model.",
    "net.",
    "backbone.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_prefixes_in_every_order(count: int, vit: Any) -> None:
    state = vit()
    for prefixes in itertools.permutations(PREFIXES, count):
        same_bits(found(under("".join(prefixes), state)).state, state)


@pytest.mark.parametrize("prefix", ["visual.trunk.", "a.b.c.", "student_net.", "x", "encoder.0."])
def test_any_prefix(prefix: str, vit: Any) -> None:
    state = vit()
    if prefix == "x":  # which is no module's
        with pytest.raises(CheckpointError, match="no names of a Vision Transformer"):
            found(under(prefix, state))
        return
    model = found({"state_dict": under(prefix, state) | {"logit_scale": torch.ones(()), "text.x": torch.ones(2)}})
    same_bits(model.state, state)
    assert model.notes == (f"weights under 'state_dict.{prefix[:-1]}', beside state_dict.logit_scale, state_dict.text",)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_wrappers_inside_a_model(wrapper: str, vit: Any) -> None:
    state = vit()
    wrapped = {name.replace("blocks.1.", f"blocks.1.{wrapper}"): tensor for name, tensor in state.items()}
    wrapped = {name.replace(".attn.", f".attn.{wrapper}"): tensor for name, tensor in wrapped.items()}
    same_bits(found(under(f"{wrapper}module.", wrapped)).state, state)
    assert wrapped.keys() != state.keys()
    # both by one name: neither is taken for the other
    extra = f"blocks.0.{wrapper}norm1.weight"
    assert found(state | {extra: torch.randn(48)}).unknown == [extra]


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2Model", "CLIPVisionModelWithProjection"])
def test_prefixes_of_transformers_models(name: str, transformers: Any, images: Tensor) -> None:
    """Their classifier stands outside of the encoder's own prefix."""
    theirs = transformers(name)
    whole = under("module.model.", theirs.state_dict())
    config = theirs.config.to_dict()
    one, other = (recognise(Checkpoint(dict(s), config, "state_dict", "x")) for s in (theirs.state_dict(), whole))
    assert one.problems == other.problems == []
    assert (one.arguments, one.schema) == (other.arguments, other.schema)
    same_bits(one.state, other.state)


BESIDE = {
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "loss weight": lambda s: {"state_dict": {**under("model.", s), "criterion.weight": torch.ones(7)}, "epoch": 3},
    "metrics": lambda s: {**under("net.", s), "train_acc.correct": torch.ones(1), "val_loss": torch.ones(1)},
    "metrics at the root": lambda s: {**s, "train_acc.correct": torch.ones(1), "criterion.weight": torch.ones(7)},
    "projection head": lambda s: {"teacher": {**under("backbone.", s), "head.mlp.0.weight": torch.ones(8, 48)}},
    "predictor": lambda s: {**under("encoder.", s), "predictor.0.weight": torch.ones(8, 8), "queue": torch.ones(8, 9)},
    "decoder": lambda s: {**s, "decoder_embed.weight": torch.ones(9, 48), "mask_token": torch.ones(1, 1, 48)},
    "optimizer": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "rng": torch.ones(3)},
    "numbers": lambda s: {**s, "epoch": 3, "name": "vit", "step": torch.tensor(3)},
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_is_beside_a_model_does_not_hide_it(case: str, vit: Any) -> None:
    state = vit()
    model = found(BESIDE[case](state))
    same_bits(model.state, state)
    assert model.problems == []


def test_what_is_in_a_model_is_not_beside_it(vit: Any) -> None:
    assert found(vit() | {"extra.weight": torch.ones(2)}).problems == ["extra.weight: unknown"]
    assert found(under("model.", vit() | {"side.weight": torch.ones(2)})).problems == ["side.weight: unknown"]
    layers = under("head.1.", {"weight": torch.ones(7, 48), "bias": torch.ones(7)})
    state = vit(num_classes=0) | layers
    assert [line.partition(":")[0] for line in found(state).problems] == list(layers)
    with pytest.raises(CheckpointError, match=r"head\.1\.weight: FastViT's head is one linear layer, this one several"):
        load_pretrained(state, num_heads=3)
    assert load_pretrained(state, num_heads=3, num_classes=0).num_classes == 0


@pytest.mark.parametrize("head", ["head.weight", "classifier.1.weight", "cls_head.weight"])
def test_a_classifier_beside_a_model_is_left_out_and_said(head: str, vit: Any) -> None:
    state = vit(num_classes=0)
    whole = {"state_dict": {**under("backbone.", state), head: torch.ones(7, 48)}}
    with pytest.warns(
        UserWarning, match=rf"assumed: num_classes=0 \(state_dict\.{head} left out, outside of the model"
    ):
        assert load_pretrained(whole, num_heads=3).num_classes == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(whole, num_heads=3, num_classes=0)
        load_pretrained({"teacher": whole["state_dict"]}, num_heads=3)
        load_pretrained({"model": under("net.", vit()), "head.weight": torch.ones(7, 48)}, num_heads=3)


# What several models are called, and which of them is meant. Of each pair the first is the one.
PAIRS = {
    "EMA": ("state_dict_ema", "state_dict"),
    "EMA of timm": ("model_ema", "model"),
    "EMA inside": ("ema_model.module", "model"),
    "DINO": ("teacher.backbone", "student.module.backbone"),
    "I-JEPA": ("target_encoder.module", "encoder.module"),
    "MoCo": ("state_dict.module.base_encoder", "state_dict.module.momentum_encoder"),
    "momentum pair": ("state_dict.backbone", "state_dict.momentum_backbone"),
    "MoCo's first": ("encoder_q", "encoder_k"),
}


def nested(path: str, state: State) -> Any:
    key, _, rest = path.partition(".")
    return {key: under(f"{rest}." if rest else "", state)}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", PAIRS)
def test_which_of_a_pair_is_meant(case: str, order: int, vit: Any) -> None:
    states = dict(zip(PAIRS[case], (vit(num_classes=0), vit(num_classes=0)), strict=True))
    contents: dict[str, Any] = {"epoch": 1}
    for path in list(states)[::order]:
        for key, value in nested(path, states[path]).items():
            contents.setdefault(key, {}).update(value)
    wanted, other = states
    model = found(contents)
    same_bits(model.state, states[wanted])
    assert model.notes[0].startswith(f"weights under '{wanted}', beside ") and other.split(".")[-1] in model.notes[0]
    for path, state in states.items():
        for key in (path, path.split(".")[0], path.split(".")[-1]):
            if sum(f".{key}." in f".{its}." for its in states) == 1:
                same_bits(found(contents, key=key).state, state)
    # of two different models, as of distillation, neither is meant
    contents = {**nested("teacher", vit(depth=3)), **nested("student", vit())}
    assert "has several Vision Transformers; say which, with key=…, on the command line --key; accepted: " in refusal(
        contents
    )


def test_the_projection_of_an_encoder_without_labels(vit: Any) -> None:
    state = vit(num_classes=0)
    pair = {**under("base_encoder.", state | {"head.0.weight": torch.ones(9, 48)}), **under("momentum_encoder.", vit())}
    for contents in (pair, {name: tensor for name, tensor in pair.items() if name.startswith("base_encoder")}):
        model = found(contents)
        same_bits(model.state, state)
        assert (model.problems, model.beside) == ([], ["head.0.weight"])


def test_which_of_several_has_to_be_said(tmp_path: Path, vit: Any) -> None:
    first, second = vit(), vit(num_classes=0)
    contents = {**first, "aux": under("net.", second), "epoch": 3}
    assert refusal(contents).endswith("accepted: ., aux.net")
    assert (
        refusal(contents, key="epoch")
        == "state_dict: key: 'epoch' names none of its Vision Transformers; accepted: ., aux.net"
    )
    assert "names none of its Vision Transformers; accepted: aux" in refusal({"aux": second}, key="model")
    twice = {"a": {"net": first}, "b": {"net": second}}
    assert "key: 'net' names several of its Vision Transformers; accepted: a.net, b.net" in refusal(twice, key="net")
    same_bits(found(contents, key=".").state, first)
    for key in ("aux", "net", "aux.net", "aux._orig_mod.net"):
        same_bits(found(contents, key=key).state, second)
    torch.save(contents, tmp_path / "w.pth")
    assert load_pretrained(tmp_path / "w.pth", key=".").num_classes == 7
    assert inspect(tmp_path / "w.pth", key="aux").arguments["num_classes"] == 0
    assert "accepted: ., aux.net" in inspect(tmp_path / "w.pth").problems[0]
    convert(tmp_path / "w.pth", tmp_path / "aux.pth", key="aux")
    same_bits(torch.load(tmp_path / "aux.pth"), second)
    # one model by two names
    same_bits(found({**under("model.", first), **under("net.", first)}).state, first)


def test_blocks_in_chunks(vit: Any) -> None:
    """DINOv2's own: blocks.0.3 is block 3, whichever chunk it is in."""
    state = vit(depth=4)
    chunked = {
        ".".join([name[:6], str(int(name[7]) // 2), name[7:]]) if name.startswith("blocks.") else name: tensor
        for name, tensor in state.items()
    }
    assert "blocks.1.3.norm1.weight" in chunked
    same_bits(found({"teacher": under("backbone.", chunked)}).state, state)


# Weights that are not those of a plain model


@torch.no_grad()
def lora(state: State) -> State:
    name = "blocks.0.attn.qkv"
    based = {key.replace(name, f"{name}.base_layer"): tensor for key, tensor in state.items()}
    more = {f"{name}.lora_{part}.default.weight": torch.ones(2, 2) for part in "AB"}
    return under("base_model.model.", {**based, **more})


QUANTISED = {
    "bitsandbytes": lambda s: {**s, "blocks.0.attn.qkv.weight.absmax": torch.ones(3)},
    "GPTQ": lambda s: {**s, "blocks.0.attn.qkv.qweight": torch.ones(3).int()},
    "torch": lambda s: {**s, "blocks.0.attn.qkv._packed_params": (1, 2)},
    "scaled": lambda s: {**s, "blocks.0.attn.qkv.weight_scale": torch.ones(3)},
    "int8": lambda s: {key: value.char() if value.dim() > 1 else value for key, value in s.items()},
    "qint8": lambda s: {
        key: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8) if value.dim() > 1 else value
        for key, value in s.items()
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # which files have all the same
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_named(case: str, prefix: str, vit: Any) -> None:
    assert "seems to be a model with quantised weights" in refusal(under(prefix, QUANTISED[case](vit())))


def test_an_adapter_is_merged_first_or_not_loaded(tmp_path: Path, vit: Any) -> None:
    state = lora(vit())
    for contents in (state, {key: tensor for key, tensor in state.items() if "lora_" in key}):
        message = refusal(contents)
        assert "LoRA that is not merged" in message and "merge_and_unload()" in message
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        convert(state, tmp_path / "w.pth", strict=False)
    assert not list(tmp_path.iterdir())
    assert found(under("model.", vit()) | {"text.qkv.lora_A.weight": torch.ones(2)}).problems == []


def test_real_wrappers(vit: Any) -> None:
    """What torch itself makes of names."""
    model = fastvit.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    compiled = torch.compile(nn.Sequential(model))
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for wrapped in (averaged, compiled, checkpoint_wrapper(nn.ModuleDict({"net": model}))):
        same = load_pretrained(wrapped.state_dict(), num_heads=3)
        assert all(tensor.equal(model.state_dict()[name]) for name, tensor in same.state_dict().items())
