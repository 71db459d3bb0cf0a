"""`fastvit inspect` and `fastvit convert`: what they say, what they write, one-line errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.checkpoints import inspect
from fastvit.checkpoints.files import read_checkpoint
from fastvit.checkpoints.writing import write_checkpoint
from fastvit.cli.convert import convert as convert_command
from fastvit.cli.inspect import inspect as inspect_command
from tests.checkpoints.conftest import scrambled
from tests.checkpoints.test_jax import arrays as jax_arrays

Cli = Callable[..., tuple[int, str, str]]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


@pytest.fixture
def vit() -> Callable[..., dict[str, Tensor]]:
    """The state_dict of a tiny model, every parameter random."""

    def build(**arguments: Any) -> dict[str, Tensor]:
        return dict(scrambled(fastvit.VisionTransformer(**{**TINY, **arguments})).state_dict())

    return build


@pytest.fixture
def path(tmp_path: Path, vit: Callable[..., dict[str, Tensor]]) -> Path:
    torch.save({"model": vit(), "epoch": 3}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


# inspect


def test_inspect_says_what_it_is_and_as_json_everything(run: Cli, path: Path) -> None:
    code, out, err = run("inspect", path)
    assert code == 0 and err == ""
    parameters = sum(tensor.numel() for tensor in read_checkpoint(path).state.values())
    for part in (
        f"{path} (torch.save)",
        "weights under 'model', beside epoch",
        "timm (family vit)",
        f"timm.models.VisionTransformer, {parameters:,} parameters",
        "width 48, depth 2, 1 heads, MLP 192",
        "32 x 32, patches 8 x 8, 3 channels; 7 classes",
        "layernorm, eps 1e-06 (assumed)",
        "num_heads=1 (48 a head)",
        "loads it: fastvit.load_pretrained",
        "converts it to timm, torchvision, huggingface, huggingface-v5, fastvit",
    ):
        assert part in out, part

    code, out, _ = run("inspect", path, "--json")
    found = json.loads(out)
    state = read_checkpoint(path).state
    numbers = sum(tensor.numel() for tensor in state.values())
    assert code == 0 and found["loads"] is True and found["problems"] == []
    assert (found["kind"], found["schema"], found["family"]) == ("torch", "timm", "vit")
    assert (found["tensors"], found["values"], found["parameters"]) == (len(state), numbers, numbers)
    assert found["dtypes"] == {"float32": numbers} and found["bytes"] == 4 * numbers
    expected = {**TINY, "num_heads": 1}
    assert {name: found["arguments"][name] for name in TINY} == expected
    assert set(found["targets"].values()) == {""}
    assert any(line.startswith("norm_eps") for line in found["assumed"])


def test_inspect_names_the_nearest_variant_and_what_differs() -> None:
    model = fastvit.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, weight_init="skip")
    found = inspect({name: tensor.half() for name, tensor in model.state_dict().items()})
    assert found.variant == "vit_tiny_patch16_224" and found.dtypes.keys() == {"float16"}
    assert found.differences == {"in_chans": (1, 3), "num_classes": (10, 1000)}
    assert "with num_classes=10 instead of 1000" in str(found) and found.source == "state_dict"
    whole = fastvit.create_model("vit_tiny_patch16_224", weight_init="skip").state_dict()
    assert inspect(whole).differences == {}


@pytest.mark.parametrize("library", ["huggingface", "huggingface-v5", "torchvision", "fastvit"])
def test_inspect_tells_the_libraries_apart(
    run: Cli, tmp_path: Path, vit: Callable[..., dict[str, Tensor]], library: str
) -> None:
    write_checkpoint(tmp_path / "vit.safetensors", vit())
    target = tmp_path / ("out.pth" if library == "torchvision" else "out")
    schema = ["--schema", "v5"] if library.endswith("v5") else []
    to = library.removesuffix("-v5")
    assert run("convert", tmp_path / "vit.safetensors", target, "--to", to, *schema, "--norm-eps", "1e-5")[0] == 0
    found = json.loads(run("inspect", target, "--json")[1])
    classes = {
        "huggingface": "transformers.ViTForImageClassification",
        "huggingface-v5": "transformers.ViTForImageClassification",
        "torchvision": "torchvision.models.VisionTransformer",
        "fastvit": "fastvit.VisionTransformer",
    }
    assert (found["schema"], found["library_class"]) == (library, classes[library])
    text = run("inspect", target)[1]
    if library == "torchvision":  # a file of it has no place for the epsilon
        assert "eps 1e-06 (assumed)" in text
    else:
        assert "eps 1e-05 (as the config says)" in text
        assert found["arguments"]["norm_eps"] == 1e-5 and found["assumed"] == []


def test_inspect_says_what_a_library_can_not_express(vit: Callable[..., dict[str, Tensor]]) -> None:
    found = inspect(vit(reg_tokens=4, init_values=1e-5, no_embed_class=True))
    assert found.loads and "reg_tokens=4" in found.targets["torchvision"]
    assert [schema for schema, reason in found.targets.items() if reason] == ["torchvision"]
    assert "not to torchvision: " in str(found) and "4 registers" in str(found)


def test_inspect_of_what_does_not_fit(run: Cli, tmp_path: Path, vit: Callable[..., dict[str, Tensor]]) -> None:
    state = vit()
    del state["blocks.1.attn.proj.bias"]
    state["blocks.1.norm1.weight"] = torch.randn(5)
    state["extra.weight"] = torch.randn(5)
    write_checkpoint(tmp_path / "odd.pth", state)
    code, out, err = run("inspect", tmp_path / "odd.pth")
    assert code == 1 and err == ""
    assert all(name in out for name in ("blocks.1.attn.proj.bias", "blocks.1.norm1.weight", "extra.weight"))
    assert "does not load it as it is; load_pretrained(..., strict=False)" in out and "converts" not in out
    found = json.loads(run("inspect", tmp_path / "odd.pth", "--json")[1])
    assert found["loads"] is False and len(found["problems"]) == 3


def test_inspect_of_another_architecture(run: Cli, tmp_path: Path) -> None:
    state = {"conv1.weight": torch.randn(8, 3, 7, 7), "layer1.0.conv1.weight": torch.randn(8, 8, 1, 1)}
    write_checkpoint(tmp_path / "resnet.safetensors", {**state, "fc.weight": torch.randn(10, 8)})
    code, out, err = run("inspect", tmp_path / "resnet.safetensors")
    assert code == 1 and err == "" and "3 tensors" in out and "ResNet" in out
    assert out.rstrip().endswith("does not load it")


def test_inspect_of_jax_files(run: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "vit.npz", **jax_arrays(big_vision=False))
    code, out, _ = run("inspect", tmp_path / "vit.npz")
    assert code == 0 and "JAX's .npz" in out and "jax (family vit)" in out and "3 heads, MLP 96" in out
    assert "num_heads" not in out.partition("assumed ")[2], "a file of Flax says how many heads there are"


# convert


def test_convert_says_what_it_read_and_assumed(run: Cli, tmp_path: Path, path: Path) -> None:
    code, out, err = run("convert", path, tmp_path / "hf", "--to", "huggingface")
    assert code == 0 and err == "" and f"Wrote {tmp_path / 'hf'}: huggingface\n" in out
    assert "weights under 'model', beside epoch" in out and "assumed: num_heads=1" in out
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "vit" and config["num_attention_heads"] == 1


def test_convert_adapts(run: Cli, tmp_path: Path, path: Path) -> None:
    target = tmp_path / "adapted.safetensors"
    options = ("--img-size", "48x64", "--patch-size", "16", "--in-chans", 1, "--no-head", "--num-heads", 3)
    code, out, _ = run("convert", path, target, "--to", "fastvit", *options, "--norm-eps", 1e-5, "--act-layer", "relu")
    assert code == 0 and "assumed: num_heads" not in out
    found = inspect(target).arguments
    assert (found["img_size"], found["patch_size"], found["in_chans"]) == ([48, 64], 16, 1)
    assert (found["num_classes"], found["num_heads"]) == (0, 3)
    assert (found["norm_eps"], found["act_layer"]) == (1e-5, "relu")
    assert read_checkpoint(target).state["pos_embed"].shape == (1, 13, 48)


def test_convert_keeps_what_exists(run: Cli, tmp_path: Path, path: Path) -> None:
    target = tmp_path / "out.pth"
    target.write_text("mine")
    code, _, err = run("convert", path, target, "--to", "timm")
    assert code == 2 and "exists already" in err and target.read_text() == "mine"
    for there in (target, path):  # the file that it reads too
        assert run("convert", path, there, "--to", "torchvision", "--overwrite")[0] == 0
        assert inspect(there).schema == "torchvision"


def test_convert_leaves_out_only_when_asked(run: Cli, tmp_path: Path, vit: Callable[..., dict[str, Tensor]]) -> None:
    odd, target = {"extra.weight": torch.randn(5), "head_dist.weight": torch.randn(7, 48)}, tmp_path / "out.pth"
    write_checkpoint(tmp_path / "odd.pth", {**vit(), **odd})
    code, _, err = run("convert", tmp_path / "odd.pth", target, "--to", "timm")
    assert code == 2 and err.count("\n") == 1 and "extra.weight: unknown" in err and not target.exists()
    code, out, _ = run("convert", tmp_path / "odd.pth", target, "--to", "timm", "--no-strict")
    assert code == 0 and "left out: extra.weight: unknown" in out
    assert "left out: head_dist.weight: FastViT has one head" in out
    assert not odd.keys() & read_checkpoint(target).state.keys()


def test_the_examples_run(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vit: Callable[..., dict[str, Tensor]], path: Path
) -> None:
    """Those of the page and of `--help`, on files of the kind that their names say."""
    page = (Path(fastvit.__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    texts = [page, str(convert_command.__doc__), str(inspect_command.__doc__)]
    found = [re.findall(r"^ *(fastvit (?:inspect|convert) [^#\n]*)", text, re.MULTILINE) for text in texts]
    assert [len(commands) for commands in found] == [7, 5, 3]
    monkeypatch.chdir(tmp_path)
    np.savez("B_16.npz", **jax_arrays(big_vision=False))
    hub = tmp_path / "google" / "vit-base-patch16-224"  # a folder of that name comes before the hub
    assert run("convert", path, hub, "--to", "huggingface")[0] == 0
    torch.save({"student": vit(), "teacher": {"backbone": vit()}}, "dino.pth")
    for command in sum(found, []):
        code, _, err = run(*command.split()[1:], *(["--overwrite"] if "convert" in command else []))
        assert (code, err) == (0, ""), command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert vit.pth out --to keras", "--to keras: accepted is one of timm, torchvision, huggingface, fastvit"),
        ("convert vit.pth out --to huggingface --schema v6", "--schema v6: accepted is one of v4, v5"),
        ("convert vit.pth out.pth --to timm --schema v5", "--schema v5: accepted with --to huggingface only"),
        ("convert vit.pth out --to timm --img-size big", "--img-size big: accepted is a whole number"),
        ("convert vit.pth out.pth --to timm --img-size 1x2x3", "--img-size 1x2x3: accepted is"),
        ("convert vit.pth out.pth --to timm --patch-size 0", "--patch-size 0: accepted is"),
        ("convert vit.pth out.pth --to timm --num-heads 5", "num_heads"),
        ("convert vit.pth out.pth --to timm --act-layer tanhh", "tanhh"),
        ("convert vit.pth out.pth --to timm --in-chans 0", "--in-chans"),
        ("convert vit.pth out.pth", "--to"),
        ("convert vit.pth out.npz --to timm", "unknown kind of file '.npz'"),
        ("convert vit.pth out.pth --to huggingface", "Hugging Face's format is a folder"),
        ("convert vit.pth out --to torchvision", "torchvision has files alone"),
        ("convert nowhere.pth out.pth --to timm", "nowhere.pth: no such file or folder"),
        ("convert cut.pth out.pth --to timm", "cut.pth: truncated or damaged"),
        ("convert code.pth out.pth --to timm", "code.pth: a whole pickled model (torch.nn.modules.linear.Linear)"),
        ("convert other.pth out.pth --to timm", "other.pth: "),
        ("convert registers.pth out.pth --to torchvision", "reg_tokens=2"),
        *((f"inspect {name}", name) for name in ("cut.pth", "code.pth", "nowhere.pth", "empty")),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    run: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vit: Callable[..., dict[str, Tensor]],
    path: Path,
    arguments: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:5000])
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    torch.save({"embed.weight": torch.randn(2, 2)}, tmp_path / "other.pth")
    torch.save(vit(reg_tokens=2), tmp_path / "registers.pth")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    (tmp_path / "empty").mkdir()
    code, out, err = run(*arguments.split())
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    (tmp_path / "empty").rmdir()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
