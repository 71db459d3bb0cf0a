"""Runs in shards, in two and four processes over gloo: they are the run of one process, and come back from each other's
checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

import fastvit
from fastvit import stream
from fastvit.checkpoints.sharded import read_sharded
from fastvit.training import TrainOptions, resume_options, train
from fastvit.training import models as models_module
from fastvit.training.checkpoint import load_checkpoint
from fastvit.training.observers import Observer
from fastvit.training.run import Run
from tests.training.runs import TINY, StopAt, assert_same, found_in, in_processes, write_photos
from tests.two_processes import needs_gloo

pytestmark = needs_gloo

# Without the bias of keys, whose gradient is zero but for rounding, which AdamW makes large.
MODEL = {**TINY, "depth": 3, "qkv_bias": False, "init_values": 0.5}
SHAPES = [
    parameter.shape for parameter in fastvit.VisionTransformer(8, in_chans=1, num_classes=10, **MODEL).parameters()
]
UNEVEN = 4 * 3 * MODEL["embed_dim"]  # bytes: the head has ten rows, a process among four has up to three of them
STEPS = 30  # of 1437 images, 48 in each
Found = dict[str, Any]


def alone(output: Path, observers: Sequence[Observer] = (), **given: Any) -> Run:
    settings = {"device": "cpu", "tensorboard": False, "threads": 1, "epochs": 1, "batch_size": 48, **given}
    return train(TrainOptions(output=str(output), **settings), observers=observers)


@pytest.fixture(scope="module")
def as_written() -> Iterator[None]:
    """The model, by its modules as they are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_module, "DIGITS_ARGUMENTS", MODEL)
        patch.setattr(stream, "LEAST_ON_A_CPU", 2**40)
        yield


@pytest.fixture(scope="module")
def one(as_written: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process that the others must be."""
    return alone(tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def half(as_written: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of that run, broken off."""
    output = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(KeyboardInterrupt):
        alone(output, observers=[StopAt(SAVED + 2)], save_steps=SAVED)
    return output / "last.pt"


def check_losses(found: list[Found], one: Run) -> None:
    losses = torch.tensor([process["losses"] for process in found], dtype=torch.float64).mean(0)
    assert len(losses) == STEPS == len(one.losses)
    torch.testing.assert_close(losses, torch.tensor(one.losses, dtype=torch.float64), rtol=0, atol=2e-6)
    for process in found:
        got, want = process["history"][-1], one.history[-1]
        assert got.keys() == want.keys() and all(got[key] == pytest.approx(want[key], rel=1e-5) for key in want)


def check_weights(checkpoint: Path, one: Run) -> None:
    model = fastvit.load_pretrained(checkpoint)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def check_optimizer(checkpoint: Path, one: Run) -> None:
    found = read_sharded(checkpoint, leave_out="model.")
    names = {parameter: name for name, parameter in one.model.named_parameters()}
    for parameter, state in one.optimizer.state.items():
        for key, value in state.items():
            torch.testing.assert_close(found[f"optimizer.{names[parameter]}.{key}"], value, rtol=1e-3, atol=1e-6)


def check_memory(found: list[Found], ways: int) -> None:
    """Parameters, gradients and AdamW's averages fall as one over the processes that share a model."""
    whole = 4 * sum(math.prod(shape) for shape in SHAPES)
    for process in found:
        held = process["memory"]
        assert process["states"] == held["optimizer"] == 2 * held["parameters"] == 2 * held["gradients"]
        # Of a parameter that is not as long as a multiple of the processes, the last one has less.
        assert held["parameters"] <= 4 * sum(-(-math.prod(shape) // ways) for shape in SHAPES) + UNEVEN
        assert held["parameters"] >= whole / ways - UNEVEN
        assert held["gathered"] < whole
    assert sum(process["memory"]["parameters"] for process in found) == whole * len(found) // ways


COMMON = {"epochs": 1, "threads": 1}
ANY_SIZE = {"model": "vit_digits", "image_size": 16, "tokens_per_batch": 40, "max_tokens": 12, "epochs": 3}
IN_TWO = {
    "ddp": {"batch_size": 24},
    "full": {"batch_size": 24, "shard": "full", "save_steps": 10, "keep": 9},
    "trunk": {"batch_size": 24, "shard": "full", "trunk": True},
    "accumulated": {"batch_size": 12, "accumulate_steps": 2, "shard": "full", "counted": True},
    "recomputed": {"batch_size": 24, "shard": "full", "trunk": True, "checkpoint_blocks": 2},
}
PAIRS = {  # of two processes: the first without shards, the others in them
    "bf16": ({"amp": "bf16"}, {"amp": "bf16", "shard": "full"}),
    "bf16, trunk": ({"amp": "bf16", "trunk": True}, {"amp": "bf16", "shard": "full", "trunk": True}),
    "fp16": ({"amp": "fp16"}, {"amp": "fp16", "shard": "full"}),
    "compiled": ({}, {"shard": "full", "compile": True}),
    "any size": (ANY_SIZE, {**ANY_SIZE, "shard": "full"}),
    "any size, trunk": ({**ANY_SIZE, "trunk": True}, {**ANY_SIZE, "trunk": True, "shard": "full"}),
}
IN_FOUR = {
    "full": {"batch_size": 12, "shard": "full", "trunk": True},
    "hybrid": {"batch_size": 12, "shard": "hybrid", "shard_size": 2, "trunk": True},
    "hybrid accumulated": {"batch_size": 6, "accumulate_steps": 2, "shard": "hybrid", "shard_size": 2},
}
DRAWING = {"drop_path": 0.2, "mixup": 0.3, "ema": 0.9, "repeated_aug": 2}
SAVED = 10  # steps
AT_TEN = f"epoch-0000-step-{SAVED:06}"
Results = dict[str, tuple[Path, list[Found]]]


def run_all(world: int, folder: Path, kinds: dict[str, Found]) -> Results:
    """In `world` processes, once for all of pytest's."""
    jobs = [(folder / name, given if "resume" in given else {**COMMON, **given}) for name, given in kinds.items()]
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            in_processes(world, *jobs, model=MODEL)
            (folder / "done").touch()
    return {name: (output, found_in(world, output)) for name, (output, _) in zip(kinds, jobs, strict=True)}


def shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that pytest's workers have in common."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, half: Path) -> Results:
    folder = shared(tmp_path_factory, "two")
    resumed = {
        "drawing": {"batch_size": 24, "shard": "full", "save_steps": 10, "keep": 9, **DRAWING},
        "again": {"resume": str(folder / "drawing" / AT_TEN)},
        "from a file": {"resume": str(half), "shard": "full"},
        "unsharded": {"resume": str(folder / "full" / AT_TEN), "shard": "none"},
    }
    return run_all(2, folder, {**IN_TWO, **resumed})


@pytest.fixture(scope="module")
def four(two: Results, tmp_path_factory: pytest.TempPathFactory) -> Results:
    resumed = {"from two": {"resume": str(two["full"][0] / AT_TEN), "shard": "hybrid", "shard_size": 2}}
    return run_all(4, shared(tmp_path_factory, "four"), {**IN_FOUR, **resumed})


@pytest.mark.parametrize(("world", "name"), [*((2, name) for name in IN_TWO), *((4, name) for name in IN_FOUR)])
def test_every_kind_is_the_run_of_one_process(one: Run, world: int, name: str, request: pytest.FixtureRequest) -> None:
    output, found = request.getfixturevalue({2: "two", 4: "four"}[world])[name]
    given = {2: IN_TWO, 4: IN_FOUR}[world][name]
    check_losses(found, one)
    check_weights(output / ("epoch-0001" if "shard" in given else "last.pt"), one)
    if "shard" not in given:
        return
    check_optimizer(output / "epoch-0001", one)
    check_memory(found, given.get("shard_size", world))
    if given.get("counted"):  # one for each block and one for the rest, a step
        assert found[0]["messages"]["reduce_scatter_base"] == STEPS * (MODEL["depth"] + 1)
    saved = [f"epoch-0000-step-{step:06}" for step in (10, 20)] * ("save_steps" in given)
    assert {path.name for path in output.iterdir()} == {"epoch-0001", "metrics.jsonl", *saved}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert rows == found[0]["history"]


def test_shards_have_the_numbers_of_whole_models(tmp_path: Path) -> None:
    """To the last bit, without a norm of gradients, which is summed in another order: in two processes, no sum is."""
    photos = {"data": str(write_photos(tmp_path / "photos")), "workers": 0}
    jobs = {}
    for name, kinds in PAIRS.items():
        data = photos if "any size" in name else {"batch_size": 24}
        for index, given in enumerate(kinds):
            jobs[name, index] = (tmp_path / f"{name} {index}", {**COMMON, **data, "clip_grad": 0.0, **given})
    found = dict(zip(jobs, in_processes(2, *jobs.values(), model=MODEL), strict=True))
    for name in PAIRS:
        for whole, sharded in zip(found[name, 0], found[name, 1], strict=True):
            assert len(whole["losses"]) >= 9
            # Between packed blocks a stream goes on as a pair, and between sharded ones as a sum: other roundings.
            atol = 2e-6 if name == "any size, trunk" else 0.0
            torch.testing.assert_close(sharded["losses"], whole["losses"], rtol=0, atol=atol, msg=name)
            assert atol or whole["history"] == sharded["history"], name


def test_resuming_in_shards_is_bit_exact(two: Results) -> None:
    """With stochastic depth, for which each process has random numbers of its own, and all that has a state."""
    (straight, first), (again, second) = two["drawing"], two["again"]
    for one, other in zip(first, second, strict=True):
        assert one["history"] == other["history"]
        assert one["losses"][SAVED:] == other["losses"]
    assert_same(read_sharded(straight / "epoch-0001", ""), read_sharded(again / "epoch-0001", ""), "tensors")
    notes = [load_checkpoint(output / "epoch-0001" / "run.pt") for output in (straight, again)]
    for key in ("groups", "scaler", "processes", "history", "planned_world"):
        assert_same(notes[0][key], notes[1][key], key)


@pytest.mark.parametrize("name", ["from a file", "unsharded"])
def test_resuming_from_the_other_kind(one: Run, two: Results, name: str) -> None:
    output, found = two[name]
    check_rest(found, one)
    check_weights(output / ("epoch-0001" if name == "from a file" else "last.pt"), one)


def test_resuming_on_more_processes(one: Run, four: Results) -> None:
    output, found = four["from two"]
    check_rest(found, one)
    check_weights(output / "epoch-0001", one)
    check_optimizer(output / "epoch-0001", one)


def test_resuming_in_one_process(one: Run, two: Results, tmp_path: Path) -> None:
    for shard, last in (("none", "last.pt"), ("full", "epoch-0001")):
        output = tmp_path / shard
        options, contents = resume_options(two["full"][0] / AT_TEN, {"output": str(output), "shard": shard})
        result = train(options, resume=contents)
        check_rest([{"losses": result.losses, "history": result.history}], one)
        check_weights(output / last, one)


def check_rest(found: list[Found], one: Run) -> None:
    losses = torch.tensor([process["losses"] for process in found], dtype=torch.float64).mean(0)
    torch.testing.assert_close(losses, torch.tensor(one.losses[SAVED:], dtype=torch.float64), rtol=0, atol=2e-6)
    for key, value in one.history[-1].items():  # the loss of the epoch too, whose first steps others took
        assert found[0]["history"][-1][key] == pytest.approx(value, rel=1e-5)
