"""Files of weights: every format read back bit by bit, nothing run from them, damage told in one line, writes whole."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvit.checkpoints import CheckpointError, files
from fastvit.checkpoints.files import read_checkpoint
from fastvit.checkpoints.writing import write_checkpoint
from tests.checkpoints.conftest import Calls, refusal, same_bits

CONFIG = {"model_type": "vit", "hidden_size": 8, "layer_norm_eps": 1e-12}


def weights() -> dict[str, Tensor]:
    return {
        "cls_token": torch.randn(1, 1, 8),
        "blocks.0.norm1.weight": torch.randn(8),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "none": torch.empty(0, 4),
    }


# Formats


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "W.PTH"])
def test_a_written_file_is_read_back_bit_by_bit(tmp_path: Path, name: str) -> None:
    state = weights()
    write_checkpoint(tmp_path / name, state)
    found = read_checkpoint(tmp_path / name)
    same_bits(found.state, state)
    assert found.kind == ("safetensors" if name.endswith("safetensors") else "torch")
    assert (found.config, found.others, found.source) == (None, (), str(tmp_path / name))
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "something was left behind"


def test_other_libraries_read_what_is_written(tmp_path: Path) -> None:
    state = weights()
    write_checkpoint(tmp_path / "w.safetensors", state)
    same_bits(load_file(tmp_path / "w.safetensors"), state)
    from safetensors import safe_open

    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    write_checkpoint(tmp_path / "w.pth", state)
    same_bits(torch.load(tmp_path / "w.pth", weights_only=True), state)


def test_a_folder_has_weights_and_config(tmp_path: Path) -> None:
    state = weights()
    for folder in (tmp_path / "model", tmp_path / "vit-v1.5"):
        write_checkpoint(folder, state, CONFIG)
        assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]
        found = read_checkpoint(folder)
        same_bits(found.state, state)
        assert (found.kind, found.config) == ("folder", CONFIG)
    # The file named by itself has its config beside it; a file with a name of its own does not.
    assert read_checkpoint(folder / "model.safetensors").config == CONFIG
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    assert read_checkpoint(folder / "mine.safetensors").config is None


def test_a_safetensors_file_keeps_its_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "w.safetensors", weights(), CONFIG)
    assert read_checkpoint(tmp_path / "w.safetensors").config == CONFIG
    for text in ("[1]", "not JSON", ""):
        save_file(weights(), tmp_path / "other.safetensors", {"config": text})
        assert read_checkpoint(tmp_path / "other.safetensors").config is None


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_gathered(tmp_path: Path, suffix: str) -> None:
    state = weights()
    names = list(state)
    base = "model" if suffix == "safetensors" else "pytorch_model"
    shards = {f"{base}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, part in shards.items():
        save = save_file if suffix == "safetensors" else torch.save
        save({name: state[name] for name in part}, tmp_path / file)
    index = tmp_path / f"{base}.{suffix}.index.json"
    table = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = read_checkpoint(tmp_path)
    same_bits(found.state, state)
    assert found.kind == "folder" and found.config == CONFIG
    assert "name its folder" in refusal(index)

    index.write_text(json.dumps({"weight_map": {**table, "head.bias": file}}))
    assert "head.bias" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: where for name, where in table.items() if name != names[0]}}))
    assert names[0] in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": {**table, "head.bias": "../outside.bin"}}))
    assert "'../outside.bin' is not a file of this folder" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": [1]}))
    assert "weight_map" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": table}))
    (tmp_path / file).unlink()
    assert f"the shard {file} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("new_format", [True, False])
def test_torch_files_of_both_formats(tmp_path: Path, new_format: bool) -> None:
    state = weights()
    torch.save(state, tmp_path / "w.anything", _use_new_zipfile_serialization=new_format)
    found = read_checkpoint(str(tmp_path / "w.anything"))
    same_bits(found.state, state)
    assert found.kind == "torch"


def test_npz_keeps_names_and_restores_bfloat16(tmp_path: Path) -> None:
    half = torch.randn(3, 4).to(torch.bfloat16)
    arrays = {
        "Transformer/encoderblock_0/LayerNorm_0/scale": np.random.default_rng(0).standard_normal(8, dtype=np.float32),
        "params/head/kernel": half.view(torch.int16).numpy().view("V2"),
        "fortran": np.asfortranarray(np.random.default_rng(1).standard_normal((3, 4))),
        "big": np.random.default_rng(2).standard_normal((2, 3)).astype(">f4"),
        "scalar": np.float32(2.5),
    }
    np.savez(tmp_path / "vit.npz", **arrays)
    found = read_checkpoint(tmp_path / "vit.npz")
    assert found.kind == "npz" and set(found.state) == set(arrays)
    assert torch.equal(found.state["params/head/kernel"], half)
    for name in ("Transformer/encoderblock_0/LayerNorm_0/scale", "fortran", "big", "scalar"):
        assert np.array_equal(found.state[name].numpy(), arrays[name]), name
        assert found.state[name].shape == arrays[name].shape


def test_a_state_dict_is_taken_as_it_is() -> None:
    module = nn.Linear(3, 2)
    found = read_checkpoint(module.state_dict())
    same_bits(found.state, dict(module.state_dict()))
    assert found.kind == found.source == "state_dict" and not any(t.requires_grad for t in found.state.values())
    parameters = read_checkpoint(dict(module.named_parameters()))
    assert not any(t.requires_grad for t in parameters.state.values())


def test_names_have_the_keys_of_the_dictionaries_that_they_are_in() -> None:
    state = weights()
    shared = {"deeper": weights()}
    found = read_checkpoint({"epoch": 3, "model": state, "more": {1: shared, "again": shared, "none": {}}})
    inside = {f"more.1.deeper.{name}": tensor for name, tensor in shared["deeper"].items()}
    same_bits(found.state, {f"model.{name}": tensor for name, tensor in state.items()} | inside)
    assert found.others == ("epoch", "more.none")
    assert "a.b is there twice" in refusal({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}})


# Hostile and damaged files


@pytest.mark.parametrize("writer", ["pickle", "npz", "folder"])
def test_code_in_a_file_is_not_run(tmp_path: Path, writer: str) -> None:
    """Beside torch's own files, whose pickles have tests of their own."""
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    hostile: Any = {"w": torch.randn(2), "x": Calls(Path.touch, marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    elif writer == "npz":
        with path.open("wb") as file:
            np.savez(file, w=np.ones(2), x=np.array([hostile["x"]], dtype=object))
    else:
        torch.save(hostile, tmp_path / "pytorch_model.bin")
        path = tmp_path
    message = refusal(path)
    assert not marker.exists(), "code in the file was run"
    assert "pickle" in message and ("not loaded" in message or "not read" in message), message


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy", "npz"])
def test_a_truncated_file_says_so_wherever_it_is_cut(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "whole"
    if kind == "safetensors":
        save_file(weights(), path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.arange(300.0), b=np.ones(3))
    else:
        torch.save(weights(), path, _use_new_zipfile_serialization=kind == "torch")
    contents = path.read_bytes()
    read_checkpoint(path)
    cuts = {1, 7, 9, 20, 60, len(contents) // 3, len(contents) // 2, len(contents) - 9, len(contents) - 1}
    for cut in sorted(cuts):
        (tmp_path / "cut").write_bytes(contents[:cut])
        message = refusal(tmp_path / "cut")
        assert "damaged" in message and str(tmp_path / "cut") in message, (cut, message)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_inside_is_an_error_or_other_numbers_but_no_crash(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("w.safetensors", "w.pth"):
        write_checkpoint(tmp_path / name, weights())
        contents = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
        for _ in range(200):
            damaged = contents.copy()
            damaged[generator.integers(len(damaged), size=3)] = generator.integers(256, size=3)
            (tmp_path / "damaged").write_bytes(damaged.tobytes())
            try:
                read_checkpoint(tmp_path / "damaged")
            except CheckpointError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "an empty file"),
        (b"hello, this is text that is longer than any header of a file", "not a checkpoint, or damaged (60 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\xef\xbb\xbf\n<HTML><body>Sign in</body>", "a web page"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "a server's answer"),
        (b'{"error": "Invalid username or password."}', "a server's answer"),
        (b"Entry not found", "a server's answer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"\x93NUMPY\x01\x00v\x00" + bytes(40), "a single NumPy array"),
        (b"GGUF" + bytes(40), "GGUF"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "w.pth").write_bytes(contents)
    assert message in refusal(tmp_path / "w.pth")


def test_contents_that_are_no_state_dict_are_named(tmp_path: Path) -> None:
    torch.save([torch.randn(2)], tmp_path / "w.pth")
    assert "expected a state_dict, found a list" in refusal(tmp_path / "w.pth")
    torch.save({"epoch": 3, "model": {"loss": 0.5}}, tmp_path / "w.pth")
    assert "no weights in it; it has epoch, model.loss" in refusal(tmp_path / "w.pth")
    torch.save({}, tmp_path / "w.pth")
    assert "it is empty" in refusal(tmp_path / "w.pth")
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "w.pth")
    assert "it is empty" in refusal(tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", name=np.array(["text"]))
    assert "name has dtype <U4; accepted are numbers" in refusal(tmp_path / "w.npz")
    with pytest.raises(TypeError, match="source: a Linear; accepted are a path, a state_dict"):
        read_checkpoint(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_folder_without_weights_or_with_a_broken_config(tmp_path: Path) -> None:
    assert "found nothing" in refusal(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert "found README.md" in refusal(tmp_path)
    save_file(weights(), tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).config is None
    for text in ("{", "[1, 2]", "\x00" * 3):
        (tmp_path / "config.json").write_text(text)
        assert "config.json" in refusal(tmp_path) and "JSON" in refusal(tmp_path)
    assert "name its folder" in refusal(tmp_path / "config.json")
    for name, message in {
        ".metadata": "truncated or damaged",
        "adapter_config.json": "merge_and_unload",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        assert message in refusal(tmp_path / name)


# Names on the hub


class FakeHub:
    """snapshot_download of a repository that has what `kind` says, into a folder."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.calls = folder, kind, 0

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls += 1
        self.asked = name, revision
        file = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}.get(self.kind)
        if file in allow_patterns:
            write_checkpoint(self.folder / "w.safetensors", weights(), overwrite=True)
            (self.folder / "w.safetensors").rename(self.folder / str(file))
        assert "config.json" in allow_patterns
        (self.folder / "config.json").write_text(json.dumps(CONFIG))
        return str(self.folder)


@pytest.mark.parametrize(("kind", "calls"), [("safetensors", 1), ("torch", 2), ("none", 2)])
@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_name_on_the_hub_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, calls: int, prefix: str
) -> None:
    fake = FakeHub(tmp_path, kind)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    if kind == "none":
        assert "no weights that can be read" in refusal(f"{prefix}timm/vit_tiny.x@v1.0")
    else:
        found = read_checkpoint(f"{prefix}timm/vit_tiny.x@v1.0")
        assert found.kind == "folder" and found.config == CONFIG and found.source == "timm/vit_tiny.x@v1.0"
        assert set(found.state) == set(weights())
    assert fake.asked == ("timm/vit_tiny.x", "v1.0") and fake.calls == calls


def test_what_exists_or_looks_like_a_file_is_no_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "download", lambda name: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    write_checkpoint("owner/name", weights(), CONFIG)
    assert read_checkpoint("owner/name").config == CONFIG
    for missing in ("runs/last.pth", "./owner/other", "../other", "/no/such", "plain_name", "a/b/c", "other/"):
        assert "no such file or folder" in refusal(missing)
    assert "source: empty" in refusal("")
    monkeypatch.undo()
    assert "owner/name or owner/name@revision" in refusal("hf-hub:plain")


_OFFLINE = """
import sys
from fastvit.checkpoints.files import read_checkpoint
sys.modules["huggingface_hub"] = None
for _ in range(2):
    try:
        read_checkpoint("nobody/no-such-model")
    except (ValueError, ImportError) as error:
        print(type(error).__name__, error)
    sys.modules.pop("huggingface_hub", None)
"""


def test_without_the_hub_a_name_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    missing, offline = done.stdout.splitlines()
    assert missing.startswith("ImportError nobody/no-such-model") and "pip install huggingface_hub" in missing
    assert offline.startswith(
        "CheckpointError nobody/no-such-model: no such file or folder, and the hub can't be reached"
    )


# Writing


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "folder"])
def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, name: str) -> None:
    path, config = tmp_path / name, CONFIG if name == "folder" else None
    first, second = weights(), weights()
    write_checkpoint(path, first, config)
    with pytest.raises(CheckpointError, match="exists already"):
        write_checkpoint(path, second, config)
    same_bits(read_checkpoint(path).state, first)
    if name == "folder":
        (path / "README.md").write_text("mine")
    write_checkpoint(path, second, config, overwrite=True)
    same_bits(read_checkpoint(path).state, second)
    if name == "folder":
        assert (path / "README.md").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_may_be_written_over_the_one_it_was_read_from(tmp_path: Path) -> None:
    state = weights()
    write_checkpoint(tmp_path / "w.safetensors", state)
    found = read_checkpoint(tmp_path / "w.safetensors")
    write_checkpoint(tmp_path / "w.safetensors", dict(reversed(found.state.items())), overwrite=True)
    same_bits(found.state, state)
    same_bits(read_checkpoint(tmp_path / "w.safetensors").state, state)


def test_shared_sliced_and_transposed_tensors_are_written_whole_and_no_larger(tmp_path: Path) -> None:
    large = torch.randn(1000, 64)
    whole = torch.randn(4, 4)
    state = {
        "f": whole,
        "g": whole,
        "a": large[:2],
        "b": large[:2],
        "c": large[:4].T,
        "d": large[0].expand(3, 64),
        "e": large[::250],
    }
    for name in ("w.safetensors", "w.pth"):
        write_checkpoint(tmp_path / name, state)
        same_bits(read_checkpoint(tmp_path / name).state, state)
        assert (tmp_path / name).stat().st_size < 8000


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("w.npz", None, "unknown kind of file '.npz'; accepted are .safetensors"),
        ("w.safetensor", CONFIG, "unknown kind of file '.safetensor'"),
        ("folder", None, "a folder can't be written without a config"),
        ("w.pth", CONFIG, "a .pth file can't hold a config"),
        ("taken.safetensors", None, "is a folder"),
        ("file", CONFIG, "is a file"),
        ("occupied", CONFIG, "would have to be replaced by a file"),
        ("dangling.pth", None, "exists already"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_target_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, config: dict[str, Any] | None, message: str, overwrite: bool
) -> None:
    (tmp_path / "taken.safetensors").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "occupied" / "config.json").mkdir(parents=True)
    (tmp_path / "dangling.pth").symlink_to(tmp_path / "nowhere")
    before = sorted(map(str, tmp_path.rglob("*")))
    if name == "dangling.pth" and overwrite:
        write_checkpoint(tmp_path / name, weights(), config, overwrite=True)
        return
    with pytest.raises(CheckpointError) as error:
        write_checkpoint(tmp_path / name, weights(), config, overwrite=overwrite)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(map(str, tmp_path.rglob("*"))) == before and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("value", [3, None, torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_what_can_not_be_written_leaves_nothing(tmp_path: Path, value: Any) -> None:
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(CheckpointError, match="'x' is no dense tensor"):
            write_checkpoint(tmp_path / name, {"w": torch.randn(2), "x": value})
    with pytest.raises(CheckpointError, match="state: empty"):
        write_checkpoint(tmp_path / "x", {}, CONFIG)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_checkpoint(tmp_path / "x", weights(), {"dtype": torch.float32})
    assert list(tmp_path.iterdir()) == []


_FULL_DISK = """
import resource, signal, sys
import torch
from fastvit.checkpoints.writing import write_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("w.safetensors", "w.pth", "folder"):
    path = f"{sys.argv[1]}/{name}"
    try:
        write_checkpoint(path, {"w": torch.randn(100_000)}, {"a": 1} if name == "folder" else None, overwrite=True)
        print("written")
    except (ValueError, OSError) as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    state = weights()
    for name in ("w.safetensors", "w.pth"):
        write_checkpoint(tmp_path / name, state)
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 3 and all("can't be written" in line for line in lines), done.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]
    for name in ("w.safetensors", "w.pth"):
        same_bits(read_checkpoint(tmp_path / name).state, state)


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    write_checkpoint(tmp_path / "w.pth", weights())
    write_checkpoint(tmp_path / "model", weights(), CONFIG)
    for file in ("w.pth", "model/config.json", "model/model.safetensors"):
        assert (tmp_path / file).stat().st_mode == expected, file


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "folder"])
def test_names_are_given_when_everything_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: bool
) -> None:
    """The contents of each file, then its name in its folder, and a new folder's name when it has both of its own."""
    config = CONFIG if name == "folder" else None
    if there:
        write_checkpoint(tmp_path / name, weights(), config)
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        order.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_checkpoint(tmp_path / name, weights(), config, overwrite=True)
    if name == "folder":
        inside = ["rename model.safetensors", "rename config.json", "folder"]
        expected = ["file", "file", *inside, *([] if there else ["rename folder"]), "folder"]
    else:
        expected = ["file", f"rename {name}", "folder"]
    assert order == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_process_makes_the_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """The second one is answered as if the folder had been there from the start."""
    replace, theirs, ours = os.replace, weights(), {"ours": torch.ones(3)}

    def renamed(source: Path, target: Path) -> None:
        if target.name == "vit":
            monkeypatch.setattr(os, "replace", replace)
            write_checkpoint(target, theirs, CONFIG)
        replace(source, target)

    monkeypatch.setattr(os, "replace", renamed)
    if overwrite:
        write_checkpoint(tmp_path / "vit", ours, CONFIG, overwrite=True)
    else:
        with pytest.raises(CheckpointError, match="vit: exists already"):
            write_checkpoint(tmp_path / "vit", ours, CONFIG)
    assert read_checkpoint(tmp_path / "vit").state.keys() == (ours if overwrite else theirs).keys()
    assert os.listdir(tmp_path) == ["vit"]
