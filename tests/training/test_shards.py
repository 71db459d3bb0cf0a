"""Tar shards: the images and labels of class folders, an order of their own, resumption, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvit.training import CheckpointError, DataError, TrainOptions, resume_options, tars, train
from fastvit.training.decoding import upright_size
from fastvit.training.image_set import ImageSet, iterate
from fastvit.training.loop import load_data
from fastvit.training.shards import WINDOW, part_of, samples_of, shuffled
from tests.training.runs import StopAt, assert_same, in_two_processes

pytestmark = pytest.mark.usefixtures("tiny")

Members = dict[str, bytes]
LONG = "a directory whose name is too long for the header of a tar, " * 3


def picture(seed: int, size: tuple[int, int] = (20, 26), format: str = "png") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: Members | list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, contents in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def samples(start: int, count: int, classes: int = 2) -> Members:
    """`count` samples from number `start` on, of the classes in turn."""
    found: Members = {}
    for index in range(start, start + count):
        found |= {f"{index:04}.png": picture(index), f"{index:04}.cls": f"{index % classes}\n".encode()}
    return found


def write_shards(root: Path, prefix: str = "", shards: int = 4, each: int = 5) -> Path:
    for shard in range(shards):
        write_tar(root / f"{prefix}{shard:03}.tar", samples(shard * each, each))
    return root


def options(root: Path, **more: Any) -> TrainOptions:
    given = {"image_size": 16, "model": "vit_digits", "device": "cpu", "workers": 0, "threads": 1, **more}
    return TrainOptions(data=str(root), **{"tensorboard": False, "output": str(root.parent / "run"), **given})


def pictures(images: ImageSet) -> list[tuple[bytes, int]]:
    """What is in the set, whatever the order."""
    pixels, labels = images[list(range(len(images)))]
    parts = pixels.to(torch.device("cpu")) if hasattr(pixels, "shapes") else pixels
    return sorted((part.numpy().tobytes(), label) for part, label in zip(parts, labels.tolist(), strict=True))


# ---- what is in them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [{}, {"tokens_per_batch": 40, "max_tokens": 12}], ids=["squares", "any size"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels_are_those_of_class_folders(tmp_path: Path, format: int, tokens: dict[str, int]) -> None:
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    sizes, ends = [(20, 26), (40, 9), (3, 3)], ("jpg", "png", "webp")
    for part in ("train", "val"):
        for shard in range(3):
            members: Members = {"README": b"no sample", "notes.txt": b"none either", "._0.png": b"\0\5"}
            for index in range(4):
                number, label = 100 * shard + 10 * index + (part == "val"), (shard + index) % 2
                end = ends[index % 3]
                contents = picture(number, sizes[index % 3], {"jpg": "jpeg"}.get(end, end))
                name = "" if format == tarfile.USTAR_FORMAT else f"{LONG}/ümläut/"
                members[f"{name}v1.5/{number}.{end.upper()}"] = contents
                members[f"{name}v1.5/{number}.seg.png"] = b"another part of the sample"
                as_json = json.dumps({"url": "…", "label" if index else "cls": label}).encode()
                members |= (
                    {f"{name}v1.5/{number}.json": as_json} if shard else {f"{name}v1.5/{number}.cls": b" %d\n" % label}
                )
                (folder / part / "ab"[label]).mkdir(parents=True, exist_ok=True)
                (folder / part / "ab"[label] / f"{number}.{end}").write_bytes(contents)
            write_tar(shards / f"food-{part}-{shard}.tar", members, format)
    (shards / "classes.txt").write_text("a\nb\n")
    found, expected = (load_data(options(root, augment=False, **tokens)) for root in (shards, folder))
    assert found.classes == expected.classes == ("a", "b") and found.arguments == expected.arguments
    for one, other in ((found.train, expected.train), (found.test, expected.test)):
        assert len(one) == 12 and pictures(one) == pictures(other)
        assert sorted(one.tokens) == sorted(other.tokens)


def test_a_header_is_all_that_is_read_for_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = picture(0, (200, 300))
    write_tar(tmp_path / "a.tar", {"0.cls": b"0", "0.png": noise})
    ((member, _),) = samples_of(tmp_path / "a.tar", ())
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, place: read.append(count) or pread(file, count, place))
    assert upright_size(member) == (200, 300) and sum(read) < len(noise) / 10
    with member.open() as file:
        assert file.read() == noise and file.seek(-3, os.SEEK_END) and file.read(9) == noise[-3:]
        assert file.seek(len(noise) + 5) and file.read(1) == b""


def test_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    data = load_data(options(write_shards(tmp_path / "shards", shards=3, each=10), validation_share=0.2))
    assert (len(data.train), len(data.test), data.classes) == (24, 6, ("0", "1"))
    assert torch.bincount(data.test.labels).tolist() == [3, 3]
    assert not set(pictures(data.test)) & {(pixels, label) for pixels, label in pictures(data.train)}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-000000.tar", "train"),
        ("imagenet1k-validation-63.tar", "validation"),
        ("Val_1.tar", "val"),
        ("0001.tar", ""),
        ("trained-latest.tar", ""),
        ("val-of-train.tar", "val"),
    ],
)
def test_the_part_of_a_split_is_a_word_of_the_name(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("train_prefix", "test_prefix"), [("train-", "val-"), ("Training_", "x-test-"), ("train/", "valid/")]
)
def test_splits_by_names_and_by_folders(tmp_path: Path, train_prefix: str, test_prefix: str) -> None:
    write_shards(tmp_path, train_prefix, shards=2)
    write_shards(tmp_path, test_prefix, shards=1)
    data = load_data(options(tmp_path))
    assert (len(data.train), len(data.test)) == (10, 5)
    moved = shutil.move(tmp_path, tmp_path.with_name("moved"))
    assert load_data(options(Path(moved))).fingerprint == data.fingerprint


def test_tars_beside_class_folders_are_left_alone(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    """As the archives that the images came in."""
    write_images(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    write_shards(tmp_path, "train-")
    (tmp_path / "all.tar.gz").touch()
    assert load_data(options(tmp_path)).classes == ("a", "b")
    (tmp_path / "all.tar.gz").unlink()
    write_shards(tmp_path, "val-")
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / part)
    (tmp_path / "logs").mkdir()
    assert load_data(options(tmp_path)).classes == ("0", "1")


# ---- order and resumption --------------------------------------------------------------------------------------------


def test_an_order_has_every_image_once_and_is_local() -> None:
    lengths = [3 + index % 5 for index in range(2 * WINDOW + 5)]
    shard_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = shuffled(lengths, torch.Generator().manual_seed(1))
    assert order.sort().values.equal(torch.arange(sum(lengths)))
    places = [torch.where(shard_of[order] == shard)[0] for shard in range(len(lengths))]
    windows = {(int(found.min()) * 3 // len(order), int(found.max()) * 3 // len(order)) for found in places}
    most = max(int(found.max() - found.min()) for found in places)
    assert most < 1.3 * len(order) / 3, "no shard is read in more than its window"
    assert len(windows) >= 3 and any(int(found.max() - found.min()) > 2 * len(found) for found in places)
    again, other = (shuffled(lengths, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert order.equal(again) and not order.equal(other)
    firsts = [int(shard_of[shuffled(lengths, torch.Generator().manual_seed(seed))][0]) for seed in range(20)]
    assert len(set(firsts)) > 10, "other shards come first"
    assert shuffled([7], torch.Generator().manual_seed(0)).sort().values.equal(torch.arange(7))


def test_the_order_is_drawn_from_seed_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvit.training.shards.WINDOW", 2)
    images = load_data(options(write_shards(tmp_path / "shards", shards=6, each=10))).train
    shard_of = [member.shard.path.name for member in images.read.args[0]]

    def order(seed: int, epoch: int) -> list[int]:
        images.draw(seed, epoch)
        return images.order.tolist()

    first = order(0, 0)
    assert first == order(0, 0) != order(0, 1) and first != order(1, 0)
    for start in range(0, 48, 16):
        assert len({shard_of[index] for index in first[start : start + 16]}) <= 3  # of unequal lengths: 2, and an edge


def test_workers_read_what_one_process_reads(tmp_path: Path) -> None:
    """Even with handles that were open before the workers were forked."""
    images = load_data(options(write_shards(tmp_path / "shards", shards=3, each=40), augment=True)).train
    batches = [list(range(start, start + 4)) for start in range(0, len(images), 4)]
    images.draw(0, 3)

    def pixels(images: ImageSet, workers: int) -> torch.Tensor:
        return torch.cat([images for images, _ in iterate(images, batches, workers=workers)])

    here = pixels(images, 0)
    assert torch.equal(here, pixels(images, 2))
    assert torch.equal(here, pixels(pickle.loads(pickle.dumps(images)), 0)), "as for workers that are no forks"
    images.draw(0, 4)
    assert not torch.equal(here, pixels(images, 0))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files can't be counted here")
@pytest.mark.filterwarnings("error")
def test_open_shards_are_few_and_are_closed(tmp_path: Path) -> None:
    data = load_data(options(write_shards(tmp_path / "shards", shards=tars.OPEN_AT_MOST + 9, each=2)))
    tars._opened.cache_clear()
    before = open_files()
    first = data.train[list(range(len(data.train)))][0]
    assert open_files() - before == tars.OPEN_AT_MOST
    assert torch.equal(first, data.train[list(range(len(data.train)))][0])
    tars._opened.cache_clear()
    assert open_files() == before


@pytest.mark.parametrize(
    "given", [{"batch_size": 3}, {"tokens_per_batch": 40, "max_tokens": 12}], ids=["squares", "any size"]
)
@pytest.mark.parametrize(("workers", "later"), [(0, 2), (2, 0)])
def test_resuming_inside_an_epoch_is_bit_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, later: int, given: dict[str, int]
) -> None:
    monkeypatch.setattr("fastvit.training.shards.WINDOW", 2)
    root = write_shards(tmp_path / "shards", shards=5, each=6)
    common = {"save_steps": 1, "drop_path": 0.1, "epochs": 3, "workers": workers, **given}
    straight = train(options(root, output=str(tmp_path / "straight"), **common))
    steps = len(straight.losses) // 3
    with pytest.raises(KeyboardInterrupt):
        train(options(root, output=str(tmp_path / "broken"), **common), observers=[StopAt(steps + steps // 2)])
    torch.manual_seed(12345)
    resumed, contents = resume_options(tmp_path / "broken" / "last.pt", {"workers": later})
    assert contents["step"]
    result = train(resumed, resume=contents)
    assert result.history == straight.history
    assert result.losses == straight.losses[-len(result.losses) :] and len(result.losses) < len(straight.losses)
    one, other = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("straight", "broken"))
    for key in ("model", "optimizer", "processes", "history"):
        assert_same(one[key], other[key], key)


def test_resuming_on_other_shards(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    with pytest.raises(KeyboardInterrupt):
        train(options(root, batch_size=4, save_steps=1), observers=[StopAt(2)])
    (root / "003.tar").rename(root / "004.tar")
    resumed, contents = resume_options(tmp_path / "run" / "last.pt", {})
    with pytest.raises(CheckpointError, match="not those the checkpoint was trained on"):
        train(resumed, resume=contents)


def test_two_processes_train_on_shards(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    given = {"data": str(root), "model": "vit_digits", "image_size": 16, "batch_size": 4, "workers": 0}
    one, other = in_two_processes(tmp_path / "run", epochs=1, **given)
    assert one["history"] == other["history"] and one["sum"] == other["sum"] and one["losses"] != other["losses"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(root: Path, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load_data(options(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"7.png": picture(7)}, r"b\.tar: 7\.png: an image without a label; expected 7\.cls or 7\.json"),
        ({"x/7.cls": b"1"}, r"b\.tar: x/7: a label without an image"),
        ({"7.png": picture(7), "7.jpg": picture(7), "7.cls": b"1"}, r"b\.tar: 7\.jpg: a second image of the sample 7"),
        ({"7.png": picture(7), "7.cls": b"cat"}, r"b\.tar: 7\.cls: no label, but b'cat'; expected a whole number"),
        ({"7.png": picture(7), "7.cls": b"1.0"}, r"7\.cls: no label, but b'1\.0'"),
        ({"7.png": picture(7), "7.cls": b""}, r"7\.cls: no label, but b''"),
        ({"7.png": picture(7), "7.cls": b"\xff"}, r"7\.cls: no label"),
        ({"7.png": picture(7), "7.json": b'{"label": true}'}, r"""7\.json: no label, but b'{"label": true}'"""),
        ({"7.png": picture(7), "7.json": b'{"name": 1}'}, r"7\.json: no label"),
        ({"7.png": picture(7), "7.json": b"{" * 9999}, r"7\.json: no label, but b'{{{{{{{{{{"),
        ({"7.png": picture(7), "7.json": b"[" * 99999}, r"7\.json: no label, but b'\[\[\["),
        ({"7.png": picture(7), "7.cls": b"-1"}, r"7\.cls: the label -1; accepted is 0 or more"),
        ({"7.png": picture(7), "7.cls": b"9" * 30}, r"no images of class 2, though the labels are from 0 to 9{30}"),
        ({"7.png": picture(7), "7.cls": b"3"}, r"no images of class 2, though the labels are from 0 to 3"),
        ({"7.png": picture(7), "7.cls": b"2"}, r"class 2: one image only; a class needs two"),
        ({"notes.txt": b""}, r"b\.tar: no images in this shard"),
        ({}, r"b\.tar: no images in this shard"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, members: Members, said: str) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 4))
    write_tar(tmp_path / "b.tar", members)
    refused(tmp_path, said)


def test_a_key_twice_in_a_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [*samples(0, 4).items(), *samples(3, 1).items()])
    refused(tmp_path, r"a\.tar: 0003\.png: a second image of the sample 0003$")
    write_tar(tmp_path / "a.tar", [*samples(0, 4).items(), ("0003.cls", b"0")])
    refused(tmp_path, r"a\.tar: 0003\.cls: a second cls of the sample 0003$")
    write_tar(tmp_path / "a.tar", samples(0, 4))
    write_tar(tmp_path / "b.tar", samples(0, 4))
    assert len(load_data(options(tmp_path)).train) == 6, "in two shards they are two samples"


@pytest.mark.parametrize("cut", [1, 3, 512, 700, 1024, 1500, 2048, 2600])
def test_a_shard_that_was_cut_off_is_named(tmp_path: Path, cut: int) -> None:
    """In the end of the tar, in a member's bytes, in what fills its block up, and in a header."""
    path = write_shards(tmp_path, shards=2) / "001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512  # of the last label's block
    os.truncate(path, end + 512 - cut)
    refused(tmp_path, r"001\.tar: cut off, damaged or compressed after 000\d\.(png|cls) .*; expected a whole \.tar")


def test_damaged_and_compressed_shards_are_named(tmp_path: Path) -> None:
    path = write_shards(tmp_path, shards=2) / "001.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    contents = bytearray(path.read_bytes())
    contents[third.offset : third.offset + 9] = b"\xff" * 9
    path.write_bytes(contents)
    refused(tmp_path, rf"001\.tar: cut off, damaged .*after 0005\.cls \(no member .* at byte {third.offset:,}\)")
    path.write_bytes(b"")
    refused(tmp_path, r"001\.tar: cut off, damaged or compressed \(empty file\)")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "000.tar", "0.png")
    refused(tmp_path, r"001\.tar: cut off, damaged or compressed \(")
    path.rename(tmp_path / "001.tar.gz")
    refused(tmp_path, r"001\.tar\.gz: compressed; .* unpack it to a \.tar")
    (tmp_path / "000.tar").unlink()
    refused(tmp_path, r"001\.tar\.gz: compressed")


def test_a_damaged_image_is_named_with_its_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {**samples(0, 5), "0004.png": picture(4)[:300]})
    data = load_data(options(tmp_path, validation_share=0.01))
    with pytest.raises(DataError, match=r"a\.tar: 0004\.png: the image cannot be decoded \(.*\); mend or remove it"):
        [*iterate(data.train, [[i] for i in range(len(data.train))]), *iterate(data.test, [[0], [1]])]


def test_a_shard_that_is_replaced_while_it_is_read(tmp_path: Path) -> None:
    data = load_data(options(write_shards(tmp_path, shards=1)))
    write_tar(tmp_path / "000.tar", samples(3, 6))
    with pytest.raises(DataError, match=r"000\.tar: .*the shard has changed since the run began"):
        data.train[[0]]


def test_classes_that_do_not_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, "train-", shards=2)
    refused(tmp_path, r"train-000\.tar: a part of a split without the other")
    write_tar(tmp_path / "val-0.tar", {"0.png": picture(0), "0.cls": b"0", "1.png": picture(0), "1.cls": b"2"})
    refused(tmp_path, r"val-0\.tar: other classes than in .*train-000\.tar: without 1 and with 2$")
    (tmp_path / "classnames.txt").write_text("crane\ncrane\n")
    refused(tmp_path, r"1\.cls: the label 2; accepted is 0 to 1, as 2 classes are named")
    write_tar(tmp_path / "val-0.tar", {"0.png": picture(0), "0.cls": b"0"})
    refused(tmp_path, r"val-0\.tar: other classes than in .*: without 1 \(crane\)$")
    write_tar(tmp_path / "val-0.tar", samples(0, 2))
    assert load_data(options(tmp_path)).classes == ("crane", "crane")
    write_tar(tmp_path / "more.tar", samples(0, 2))
    refused(tmp_path, r"more\.tar: of neither train nor val by its name, as train-000\.tar is")


def test_files_of_class_names(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\ndog\r\n\r\n".encode())
    assert load_data(options(tmp_path)).classes == ("cat", "dog")
    path.write_text("cat\n\ndog\n")
    refused(tmp_path, r"classes\.txt: line 2 is empty; expected the name of a class")
    path.write_text("")
    refused(tmp_path, r"classes\.txt: line 1 is empty")
    path.write_bytes(b"caf\xe9\ndog")
    refused(tmp_path, r"classes\.txt: no text in UTF-8")
    path.write_text("cat\ndog\nbird")
    refused(tmp_path, r"no images of class 2 \(bird\), though the labels are from 0 to 2")
    path.unlink()
    for shard in tmp_path.glob("*.tar"):
        write_tar(shard, samples(0, 3, classes=1))
    refused(tmp_path, r"only one class, 0; at least two are needed")
