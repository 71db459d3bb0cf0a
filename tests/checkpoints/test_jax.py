"""Google's JAX files: random ones, loaded by timm and by us, give the same tensors and compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvit.checkpoints import CheckpointError, convert, load_pretrained
from fastvit.checkpoints.files import read_checkpoint
from fastvit.checkpoints.recognition import recognise
from tests.checkpoints.conftest import CLASSES, DEPTH, HEADS, HIDDEN, IMAGE, PATCH, WIDTH, agree, same_bits

GRID = IMAGE // PATCH


def arrays(big_vision: bool, class_token: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a tiny model, in the original ViT's or big_vision's names, with random numbers."""
    attention, mlp, norm2 = (0, 0, 1) if big_vision else (1, 3, 2)
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, WIDTH)} if class_token else {}
    if big_vision:
        shapes["pos_embedding"] = (1, GRID * GRID, WIDTH)
    else:
        shapes["Transformer/posembed_input/pos_embedding"] = (1, GRID * GRID + class_token, WIDTH)

    def norm(name: str) -> None:
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (WIDTH,)

    def layer(name: str, kernel: tuple[int, ...], bias: tuple[int, ...] = (WIDTH,)) -> None:
        shapes[f"{name}/kernel"], shapes[f"{name}/bias"] = kernel, bias

    layer("embedding", (PATCH, PATCH, 3, WIDTH))
    for index in range(DEPTH):
        block = f"Transformer/encoderblock_{index}"
        norm(f"{block}/LayerNorm_0")
        attended = f"{block}/MultiHeadDotProductAttention_{attention}"
        for part in ("query", "key", "value"):
            layer(f"{attended}/{part}", (WIDTH, HEADS, WIDTH // HEADS), (HEADS, WIDTH // HEADS))
        layer(f"{attended}/out", (HEADS, WIDTH // HEADS, WIDTH))
        norm(f"{block}/LayerNorm_{norm2}")
        layer(f"{block}/MlpBlock_{mlp}/Dense_0", (WIDTH, HIDDEN), (HIDDEN,))
        layer(f"{block}/MlpBlock_{mlp}/Dense_1", (HIDDEN, WIDTH))
    norm("Transformer/encoder_norm")
    layer("head", (WIDTH, CLASSES), (CLASSES,))
    drawn = {name: torch.randn(shape) * (0.1 if name.endswith("kernel") else 1.0) for name, shape in shapes.items()}
    return {name: tensor.numpy() for name, tensor in drawn.items()}


def scanned(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The blocks stacked into one."""
    first = "Transformer/encoderblock_0/"
    stacked = {
        name.replace("encoderblock_0", "encoderblock"): np.stack(
            [found[name.replace("encoderblock_0", f"encoderblock_{index}")] for index in range(DEPTH)]
        )
        for name in found
        if name.startswith(first)
    }
    return {name: array for name, array in found.items() if "encoderblock_" not in name} | stacked


CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "original": ({"big_vision": False}, "", {}),
    "optimiser": ({"big_vision": False}, "opt/target/", {}),
    "big_vision": ({"big_vision": True}, "params/", {"no_embed_class": True}),
    "two_towers": ({"big_vision": True}, "params/img/", {"no_embed_class": True}),
    "gap": (
        {"big_vision": True, "class_token": False},
        "params/",
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
}


@pytest.fixture
def written(tmp_path: Path):
    def write(found: dict[str, np.ndarray], prefix: str = "") -> Path:
        np.savez(tmp_path / "vit.npz", **{prefix + name: array for name, array in found.items()})
        return tmp_path / "vit.npz"

    return write


@pytest.mark.parametrize(
    ("case", "scan"), [*((case, False) for case in CASES), ("big_vision", True), ("two_towers", True), ("gap", True)]
)
def test_as_timm_loads_it(case, scan, written, timm_vit, images):
    """JAX's GELU is the tanh approximation, which timm does not know from the file."""
    made, prefix, arguments = CASES[case]
    found = arrays(**made)
    path = written(scanned(found) if scan else found, prefix)
    theirs = timm_vit(act_layer="gelu_tanh", **arguments)
    theirs.load_pretrained(str(path))
    ours = load_pretrained(path)
    same_bits(ours.state_dict(), theirs.state_dict())
    agree(ours(images), theirs(images))
    checked = recognise(read_checkpoint(path))
    assert checked.schema == ("big_vision" if made["big_vision"] else "jax")
    assert checked.arguments["num_heads"] == HEADS
    assert not any("num_heads" in line for line in checked.assumed)


ADAPTED = {
    "size": {"img_size": 48},
    "channels": {"in_chans": 1},
    "size_and_channels": {"img_size": (24, 40), "in_chans": 1},
    "smaller_patch": {"img_size": 40, "patch_size": 4},
    "larger_patch": {"img_size": 32, "patch_size": 16},
    "same_grid": {"img_size": 48, "patch_size": 12},
    "rectangular_patch": {"img_size": (36, 20), "patch_size": (6, 10)},
}


@pytest.mark.parametrize("size", ADAPTED)
@pytest.mark.parametrize("case", CASES)
def test_another_size(case, size, written, timm_vit):
    """Positions and the patch weight are resampled as timm resamples JAX's, bilinearly, without a filter."""
    made, prefix, arguments = CASES[case]
    path = written(arrays(**made), prefix)
    theirs = timm_vit(act_layer="gelu_tanh", **ADAPTED[size], **arguments)
    theirs.load_pretrained(str(path))
    # told, since 16 rows may also be a class token's and those of a rectangle
    ours = load_pretrained(path, **ADAPTED[size], **({"no_embed_class": "no_embed_class" in arguments}))
    state, truth = ours.state_dict(), theirs.state_dict()
    for name in {"pos_embed", "patch_embed.proj.weight"} & state.keys():  # to the rounding of sums
        agree(state.pop(name), truth.pop(name))
    assert [name for name in truth if not state[name].equal(truth[name])] == []
    pixels = torch.randn(2, ours.in_chans, *ours.patch_embed.img_size)
    agree(ours(pixels), theirs(pixels))


def test_map_head(written, timm_vit, images):
    found = arrays(big_vision=True, class_token=False) | {"MAPHead_0/probe": np.ones((1, 1, WIDTH), np.float32)}
    path = written(found, "params/")
    with pytest.raises(CheckpointError, match="MAPHead_0/probe: FastViT has no attention pooling"):
        load_pretrained(path)
    with pytest.warns(UserWarning, match="head/kernel: reads what was refused"):
        encoder = load_pretrained(path, strict=False)
    assert encoder.num_classes == 0
    del found["MAPHead_0/probe"]
    agree(encoder.forward_features(images), load_pretrained(written(found, "params/")).forward_features(images))


def test_representation_layer(written):
    path = written(arrays(big_vision=False) | {"pre_logits/kernel": np.ones((WIDTH, WIDTH), np.float32)})
    with pytest.raises(CheckpointError, match="pre_logits/kernel: FastViT has no layer between pooling and head"):
        load_pretrained(path)
    assert load_pretrained(path, num_classes=0).num_classes == 0


def test_wrong_shapes(written):
    found = arrays(big_vision=False)
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"
    found[name] = found[name].reshape(WIDTH * HEADS, -1)
    with pytest.raises(CheckpointError, match=f"{name} .*not the shape of blocks.1.attn.qkv.weight"):
        load_pretrained(written(found))
    del found[name]
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load_pretrained(written(found))


def test_convert(written, torchvision_vit, tmp_path, images):
    """torchvision's GELU is the exact one, so that the difference has to be asked for."""
    path = written(arrays(big_vision=False))
    with pytest.raises(CheckpointError, match=r"torchvision's ViT can't express act_layer='gelu_tanh'"):
        convert(path, tmp_path / "vit.pth", "torchvision")
    convert(path, tmp_path / "vit.pth", "torchvision", act_layer="gelu")
    target = torchvision_vit()
    target.load_state_dict(torch.load(tmp_path / "vit.pth"), strict=True)
    agree(target(images), load_pretrained(path, act_layer="gelu")(images))
