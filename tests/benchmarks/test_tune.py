"""Tuning measures every candidate that is right, keeps the fastest, and writes what calls look up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvit import backend as backends
from fastvit import functional, tuning
from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.benchmarks import timing, tune
from fastvit.benchmarks.timing import Call
from fastvit.benchmarks.tune import Candidate, Scope
from fastvit.tuning import FORWARD, TRAINING, Configuration, Table
from fastvit.validation.faults import planted

TINY = Scope((2,), ("uint8 to bfloat16", "float32"), 0.01, with_keep=True)
CPU = torch.device("cpu")


def run(scope: Scope = TINY) -> Table:
    return tune.tune("cpu", ("Ti",), scope=scope, threads=1, backends=["cpu"], image=32, patch=16)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)


@pytest.fixture(autouse=True)
def _two_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that multiplies and one that does not, whatever else there is."""
    monkeypatch.setattr(tune, "TUNED", {name: tune.TUNED[name] for name in ("patch_embed", "add_position")})


def test_every_case_is_measured_in_both_modes() -> None:
    seen: list[tuple[int, int, str]] = []
    table = tune.tune(
        "cpu", ("Ti", "S"), scope=TINY, threads=1, backends=["cpu"], image=32, progress=lambda *step: seen.append(step)
    )
    assert len(seen) == 13 and seen[-1] == (12, 12, "done") and [step[0] for step in seen] == list(range(13))
    ops = [title.split()[0] for _, _, title in seen[:6]]  # of the first model
    assert ops == sorted(ops, key=lambda op: op != "patch_embed"), "what multiplies comes first"
    for mode in (FORWARD, TRAINING):
        found = {p for p in table.choices if p.mode == mode}
        assert {(p.shape, p.image, p.compute, p.keep) for p in found if p.op == "patch_embed"} == {
            ((width, 3, 16, 16), image, compute, keep)
            for width in (192, 384)
            for image, compute in ((torch.uint8, torch.bfloat16), (torch.float32, torch.float32))
            for keep in (False, True)
        }
        assert {(p.shape, p.image) for p in found if p.op == "add_position"} == {
            ((width,), dtype) for width in (192, 384) for dtype in (torch.bfloat16, torch.float32)
        }
    for problem, measured in table.choices.items():
        assert set(measured) == {2 if problem.keep else 8}
        for choice in measured.values():
            assert set(choice.times_us) == {"cpu", "reference"} and choice.excluded == {}
            assert choice.time_us == min(choice.times_us.values())
    with tune.steady(CPU, 1):
        assert table.mismatch(CPU) == ""


@pytest.fixture
def one_thread() -> Iterator[None]:
    with tune.steady(CPU, 1):
        yield


def test_calls_follow_what_was_measured(
    one_thread: None, use: Callable[[Table], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys of the table are those that calls look up: each answers with the winner it was given."""
    measured = run()
    for backend in ("cpu", "reference"):
        times = {"reference": 2.0, backend: 1.0}
        choices = {p: {rows: tuning.Choice(backend, times) for rows in found} for p, found in measured.choices.items()}
        use(Table(measured.device, measured.versions, choices))
        used = set()
        with monkeypatch.context() as spied:
            spied.setattr(tuning, "find", lambda *a, find=tuning.find, used=used: (used.add(a[1]), find(*a))[1])
            for problem in choices:
                assert call(problem) == backend, problem
        assert used == set(choices)


def call(problem: tuning.Problem) -> str:
    """Make the call as a user would; the backend that ran it."""
    training, masters = problem.mode == TRAINING, problem.mode == TRAINING and problem.compute != torch.float32
    width = problem.shape[0]
    reset_launch_counts()
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=masters):
        if problem.op == "add_position":
            dtype = torch.float32 if training else problem.image
            positions = torch.randn(4, width, dtype=dtype, requires_grad=training)
            with torch.autocast("cpu", enabled=False):
                functional.add_position(torch.randn(2, 4, width).to(problem.image), positions)
        else:
            images = torch.randint(256, (2, 3, 32, 32)).to(problem.image)
            dtype = torch.float32 if masters else problem.compute
            weight = torch.randn(problem.shape, dtype=dtype, requires_grad=training)
            keep = torch.zeros(2, 1, dtype=torch.int64) if problem.keep else None
            functional.patch_embed(images, weight, keep=keep)
    return next((backend for op, backend in launch_counts() if op == problem.op), "reference")


@pytest.mark.parametrize("fault", ["bias dropped", "dPos off by a batch"])
def test_a_wrong_candidate_is_left_out_with_its_reason(fault: str) -> None:
    with planted(fault):
        table = run(Scope((2,), ("float32",), 0.01))
    wrong = [c for p, measured in table.choices.items() for c in measured.values() if p.op == "patch_embed"]
    assert len(wrong) == 2
    for choice in wrong:
        assert choice.backend == "reference" and set(choice.times_us) == {"reference"}
        assert "out of tolerance" in choice.excluded["cpu"]


def test_every_backend_of_a_gpu_is_a_candidate(gpu_backends: tuple[str, ...]) -> None:
    """The extension in both modes and for every op, without the tiles and programs that are Triton's."""
    pytest.importorskip("triton")
    table = tune.tune("cpu", ("Ti",), scope=TINY, threads=1, image=32)
    seen: dict[tuple[str, str], set[str]] = {}
    for problem, measured in table.choices.items():
        for choice in measured.values():
            assert choice.excluded == {}
            seen.setdefault((problem.op, problem.mode), set()).update(choice.times_us)
    for (op, _), names in seen.items():
        assert {"reference", "cpu", "cuda"} == {name for name in names if not name.startswith("triton")}
        assert ("triton" in names) == (op == "add_position")
    assert len(seen) == 4


@pytest.mark.parametrize("is_built", [True, False])
def test_calls_follow_the_extension_where_it_is_built(
    is_built: bool,
    gpu_backends: tuple[str, ...],
    one_thread: None,
    use: Callable[[Table], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table in which it won every case, used where it is there and where it is not."""
    seconds = {"cuda": 1.0, "triton": 2.0, "reference": 3.0}

    def timed(calls: list[Call], device: torch.device, _: float) -> list[timing.Timing]:
        reset_launch_counts()
        found = []
        for run in calls:
            run()
            name = next((backend for _, backend in launch_counts()), "reference")
            reset_launch_counts()
            found.append(timing.Timing(seconds[name], seconds[name], seconds[name], 1))
        return found

    monkeypatch.setattr(tune, "interleave", timed)
    pytest.importorskip("triton")
    table = tune.tune("cpu", ("Ti",), scope=TINY, threads=1, backends=["triton", "cuda"], image=32)
    choices = [choice for measured in table.choices.values() for choice in measured.values()]
    assert {choice.backend for choice in choices} == {"cuda"} == {choice.name for choice in choices}
    assert all(problem.op == "add_position" or next(iter(measured.values())).configuration != tuning.DEFAULT
               for problem, measured in table.choices.items())  # fmt: skip
    use(table)
    if not is_built:
        monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type: "it is not built")
    for problem in table.choices:
        assert call(problem) == ("cuda" if is_built else "triton"), problem


CANDIDATES = [
    Candidate("cpu"),
    Candidate("cuda"),
    *(Candidate("triton", Configuration(tile)) for tile in ("large", "medium", "small")),
    *(Candidate("triton", Configuration("large", programs)) for programs in (132, 264, 528)),
]


@given(
    reference=st.floats(0.01, 1e7),
    times=st.dictionaries(st.sampled_from(CANDIDATES), st.floats(0.01, 1e7), max_size=len(CANDIDATES)),
)
def test_a_path_slower_than_pytorchs_is_never_chosen(reference: float, times: dict[Candidate, float]) -> None:
    choice = tune.fastest({**times, Candidate("reference"): reference}, {})
    assert choice.time_us == min([reference, *times.values()]) <= choice.reference_us == reference
    if choice.time_us == reference:
        assert choice.backend == "reference"
    triton = {c.configuration: time for c, time in times.items() if c.backend == "triton"}
    assert triton.get(choice.configuration) == (min(triton.values()) if triton else None)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="models: unknown 'XL'; known: Ti, S, B, L"):
        tune.tune("cpu", ("S", "XL"))
    with pytest.raises(ValueError, match="precisions: unknown 'int8'; known: uint8 to bfloat16"):
        tune.tune("cpu", scope=Scope((1,), ("int8",), 0.1))
    with pytest.raises(ValueError, match="backends: unknown backend 'tpu'; known: reference"):
        tune.tune("cpu", backends=["tpu"])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_quick_is_a_part_of_the_whole(kind: str) -> None:
    quick, whole = (tune.scope_of(torch.device(kind), quick) for quick in (True, False))
    assert set(quick.precisions) < set(whole.precisions) <= set(tune.PRECISIONS)
    assert len(quick.batches) < len(whole.batches) or quick.seconds < whole.seconds
    assert whole.with_keep and not quick.with_keep


def test_settings_are_restored() -> None:
    threads = torch.get_num_threads()
    run(Scope((1,), ("float32",), 0.01))
    assert torch.get_num_threads() == threads and tuning._forced is None
