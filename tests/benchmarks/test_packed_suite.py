"""patch_embed_packed in its suite, also as a GPU measures it, and in the tuner, whose table its calls look up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvit import functional, tuning
from fastvit.benchmarks import packed, patch_embed_packed, timing, tune
from fastvit.benchmarks.contenders import Make
from fastvit.benchmarks.patch_embed_packed import NUMBER, Photographs, grids
from fastvit.benchmarks.problem import Unavailable
from fastvit.benchmarks.runner import run_suites
from fastvit.tuning import FORWARD, TRAINING
from fastvit.validation import make_inputs, relative_error
from fastvit.validation.faults import planted
from fastvit.validation.ops import tensors_of
from fastvit.validation.ops.patch_embed_packed import PackedCase

OP = "patch_embed_packed"
SCOPE = tune.Scope((2, 5), ("uint8 to bfloat16", "float32"), 0.01)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)


def test_everybody_computes_the_same_in_the_precisions_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "ON_CPU", packed.ON_GPU)
    rows = run_suites(["packed"], "tiny", "cpu", threads=1)
    assert all(row.median_us or (row.rival and "can't be imported" in row.reason) for row in rows), rows
    assert {row.rival for row in rows} - {""} == {
        "loop", "pad", "group by size", "timm", "huggingface", "linear, positions by size"
    }  # fmt: skip
    assert {row.dtype for row in rows} == set(packed.ON_GPU) and all(row.batch == 3 for row in rows)


RAW = Photographs("raw", batch=2, most=4, grid=(16, 16), patch=(16, 16), width=32, images="uint8", normalise=True)
CUT = replace(RAW, images="float32", normalise=False, **packed._CUT)


@pytest.mark.parametrize(
    ("make", "case"),
    [(packed._loop, RAW), (packed._pad, RAW), (packed._group, RAW),
     (packed._linear, CUT), (packed._timm, CUT), (packed._huggingface, CUT)],
)  # fmt: skip
def test_rivals_run_under_autocast_where_we_do(make: Make, case: Photographs) -> None:
    inputs = make_inputs(replace(case, parameters="masters"), torch.bfloat16)
    try:
        half, single = (make(replace(inputs, autocast=autocast)).tokens() for autocast in (True, False))
    except Unavailable as error:
        pytest.skip(str(error))
    assert 1e-4 < relative_error(half, single.double()) < 2e-2


def test_a_wrong_backend_is_not_timed() -> None:
    with planted("packed: positions of the neighbour image"):
        rows = run_suites(["packed"], "tiny", "cpu", threads=1, only=lambda problem: problem.layout == "images")
    assert rows and all("out of tolerance" in row.reason for row in rows if row.is_ours)


def test_a_gpu_has_cases_of_every_kind() -> None:
    titles = [title for title, _ in packed.plan("small", torch.device("cuda"))]
    assert titles == [title for title, _ in packed.plan("small", torch.device("cpu"))] and len(titles) == 6


@pytest.mark.parametrize("most", [1, 4, 196, 256])
def test_photographs_have_at_most_so_many_patches(most: int) -> None:
    found = grids(NUMBER, most)
    assert len(found) == 64 and max(rows * columns for rows, columns in found) <= most
    assert Photographs("some", batch=3, most=most).sizes == found[:3]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("layout", ["nchw", "packed"])
def test_rows_are_patches(layout: str, prefix: int) -> None:
    inputs = make_inputs(PackedCase("rows", sizes=((2, 3), (1, 1)), layout=layout, prefix=prefix), torch.float32)
    assert inputs.rows == 7 and len(inputs.grad) == 7 + 2 * prefix


def test_calls_follow_what_was_measured(use: Callable[[tuning.Table], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The problems and buckets of the table are those that calls look up, and what they find there is what runs."""
    monkeypatch.setattr(tune, "TUNED", {OP: tune.TUNED[OP]})
    with tune.steady(torch.device("cpu"), 1):
        measured = tune.tune("cpu", ("Ti",), scope=SCOPE, threads=1, backends=["cpu"], image=32)
        assert {(problem.mode, problem.image) for problem in measured.choices} == {
            (mode, image) for mode in (FORWARD, TRAINING) for image in (torch.uint8, torch.float32)
        }
        choice = tuning.Choice("reference", {"reference": 1.0, "cpu": 2.0})
        choices = {problem: dict.fromkeys(rows, choice) for problem, rows in measured.choices.items()}
        use(tuning.Table(measured.device, measured.versions, choices))
        for problem, rows in choices.items():
            patches = {batch: sum(height * width for height, width in grids(batch, 4)) for batch in SCOPE.batches}
            assert set(rows) == {tuning.bucket(number) for number in patches.values()} and len(rows) == 2
            for batch, number in patches.items():
                seen: list[tuple[object, int]] = []
                with monkeypatch.context() as spied:
                    spied.setattr(
                        tuning, "find", lambda *a, find=tuning.find, seen=seen: (seen.append(a[1:]), find(*a))[1]
                    )
                    call(problem, batch)
                assert seen == [(problem, number)]


def call(problem: tuning.Problem, batch: int) -> None:
    """As a user would make it, for so many photographs of at most four patches."""
    training = problem.mode == TRAINING
    masters = training and problem.compute != torch.float32
    weight = torch.randn(problem.shape, dtype=torch.float32 if masters else problem.compute, requires_grad=training)
    prefix = torch.zeros(3, problem.shape[0], dtype=weight.dtype)
    images = [torch.randint(256, (3, 16 * rows, 16 * columns)).to(problem.image) for rows, columns in grids(batch, 4)]
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=masters):
        functional.patch_embed_packed(images, weight, prefix=prefix)


def test_more_images_than_there_are_photographs_are_those() -> None:
    """Each row of the table is of a number of rows, and PyTorch's own path takes long for many."""
    size = tune.Size("Ti", 256, 2, 16)
    for measurement in patch_embed_packed._measurements(size, SCOPE):
        assert measurement.title.startswith("patch_embed_packed ViT-Ti/16, 4 patches, batch 64, ")
        assert all(case.batch == NUMBER for case in measurement.cases.values())


@pytest.mark.parametrize("images", ["uint8", "same"])
def test_the_yardstick_is_the_product_of_the_same_patches(images: str) -> None:
    case = Photographs("product", batch=3, most=4, patch=(16, 16), images=images, normalise=images == "uint8")
    inputs = make_inputs(case, torch.float32)
    alone = patch_embed_packed._product_alone(inputs)
    listed, normalisation = tensors_of("images", inputs.tensors), {"mean": inputs.mean, "std": inputs.std}
    whole, _ = functional.patch_embed_packed(listed, inputs["weight"], inputs["bias"], **normalisation)
    torch.testing.assert_close(alone.tokens(), whole, rtol=1e-5, atol=1e-5)
    assert [tensor.shape for tensor in alone.parameters] == [inputs["weight"].shape, inputs["bias"].shape]
