"""The sweep finds every variant of a kernel by itself, runs each, and times none that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastvit.benchmarks import patch_embed_packed
from fastvit.benchmarks import sweep as sweeper
from fastvit.benchmarks.rows import Row
from fastvit.benchmarks.timing import Timing
from fastvit.kernels import patch_embed_forward as forward
from fastvit.kernels.manifest import Entry

USUAL = (forward.KERNEL, "wide", "medium", "u8", "bf16", "bf16", "ieee")
SIZES: dict[str, Any] = dict(batch=2, image=32, width=64, checked=2, precisions=sweeper.PRECISIONS[:1])


class Broken:
    """In the place of a jitted kernel: it runs the real one, and writes another token."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**arguments: Any) -> None:
            forward.aligned[grid](**arguments)
            arguments["tokens_ptr"][-1, -1] += 1

        return run


class Refused:
    """One that can't be launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        raise RuntimeError("out of resource: shared memory\nmore words")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Entry]]:
    """Variants of the forward kernel that the package does not have, by the names of their tiles."""
    usual = forward.ENTRIES[USUAL]
    added = {
        "medium4": replace(usual, num_stages=4),
        "broken": replace(usual, function="broken"),
        "refused": replace(usual, function="refused"),
    }
    monkeypatch.setattr(forward, "broken", Broken(), raising=False)
    monkeypatch.setattr(forward, "refused", Refused(), raising=False)
    for name, entry in added.items():
        key = (usual.key[0], name, *usual.key[2:])
        added[name] = replace(entry, key=key)
        monkeypatch.setitem(forward.ENTRIES, (usual.kernel, *key), added[name])
    yield added


def test_what_is_declared_is_a_variant_unless_it_is_for_another_problem(
    planted: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = forward.ENTRIES[USUAL]
    for difference in (
        {"constants": (*usual.constants, ("MASKED", True))},
        {"pointers": (("images_ptr", "bf16"), *usual.pointers[1:])},
        {"compute": "fp16"},
        {"kernel": "another"},
    ):
        assert not sweeper._is_variant(usual, replace(usual, **difference))  # type: ignore[arg-type]
    kept, all_of_them = (replace(usual, constants=(*usual.constants, ("HAS_KEEP", flag))) for flag in (True, False))
    assert not sweeper._is_variant(kept, all_of_them) and sweeper._is_variant(kept, kept)
    names = [sweeper.name_of(entry) for entry in sweeper.variants(usual)]
    assert set(planted) < {name.split()[0] for name in names} and "medium4 128x128 8w 4s" in names


def test_every_variant_is_run_and_what_is_wrong_is_said(planted: dict[str, Entry]) -> None:
    told: list[list[Row]] = []
    rows = sweeper.sweep(_device(), told.append, limit=500, command="this", **SIZES)
    assert [row for found in told for row in found] == rows and {row.command for row in rows} == {"this"}
    assert all(row.op == "sweep" and row.device and "width 64" in row.shape for row in rows)
    kernels = list(dict.fromkeys(row.mode for row in rows))
    assert set(kernels[:2]) == {"patch_embed_forward", "patch_embed_weight_gradient"}, "products first"
    assert {"prepare_weight", "reduce_weight_gradient"} < set(kernels[2:])
    found = {row.provider.split()[0]: row for row in rows if row.mode == forward.KERNEL}
    assert set(planted) | {"large", "medium", "small"} <= set(found)
    assert "out of tolerance: forward" in found.pop("broken").reason
    assert found.pop("refused").reason.endswith("RuntimeError: out of resource: shared memory more words")
    rest = [*found.values(), *(row for row in rows if row.mode != forward.KERNEL)]
    for row in rest:
        assert (row.median_us or 0) > 0 if _device() == "cuda" else (row.median_us, row.reason) == (
            None, sweeper.NOT_TIMED
        ), row  # fmt: skip
    assert [(row.mode, row.provider) for row in rows[-2:]] == [
        ("forward", "product alone"), ("forward+backward", "product alone"),
    ]  # fmt: skip


def test_images_of_any_sizes_are_swept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose launches are told of tensors that they find by address. A row says how many images there were."""
    monkeypatch.setattr(patch_embed_packed, "NUMBER", 1)
    rows = sweeper.sweep(_device(), op="patch_embed_packed", limit=500, **SIZES)
    assert {"packed_forward", "packed_weight_gradient", "place_rows", "sum_positions"} < {row.mode for row in rows}
    for row in rows:
        assert "4 patches, batch 1, width 64" in row.shape
        assert row.median_us or (_device() == "cpu" and row.reason == sweeper.NOT_TIMED), row


def test_launchers_find_what_is_substituted_and_nothing_of_it_stays(planted: dict[str, Entry]) -> None:
    before = dict(forward.ENTRIES)
    with sweeper.substituted(planted["medium4"]):
        for rows in (10, 10**6):
            entry = forward.entry_for("wide", torch.uint8, torch.bfloat16, torch.bfloat16, "ieee", rows, 768)
            assert entry is planted["medium4"]
        other = forward.entry_for("wide", torch.bfloat16, torch.bfloat16, torch.bfloat16, "ieee", 10, 768)
        assert other is not None and other.key[2] == "bf16", "of another problem"
    assert dict(forward.ENTRIES) == before


def test_what_the_time_is_over_for_is_named() -> None:
    rows = sweeper.sweep(_device(), limit=0.0, **SIZES)
    assert {row.reason for row in rows} == {sweeper.NOT_REACHED} and forward.KERNEL in {row.mode for row in rows}
    with pytest.raises(ValueError, match="op: 'conv' has nothing to sweep; known: .*patch_embed"):
        sweeper.sweep(_device(), op="conv")


def test_a_time_is_that_of_one_set_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    candidates = [
        sweeper.Candidate("good", [lambda: called.append("first"), lambda: called.append("second")]),
        sweeper.Candidate("wrong", [], "out of tolerance"),
        sweeper.Candidate("waits", [lambda: called.append("never")]),
    ]

    def capture(call: Any, device: torch.device) -> Any:
        before = len(called)
        call()
        if "never" in called[before:]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    monkeypatch.setattr(sweeper, "captured", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(sweeper, "interleave", lambda calls, *_: [Timing(60.0, 54.0, 66.0, 9)] * len(calls))
    good, wrong, waits = sweeper._measured(Row("sweep", "", "", "", "", "kernel"), candidates, torch.device("cuda"), 3)
    assert (good.median_us, good.p20_us, good.p80_us, good.repeats) == (20.0, 18.0, 22.0, 9) and not good.reason
    assert (wrong.median_us, wrong.reason) == (None, "out of tolerance")
    assert waits.median_us is None and "not permitted" in waits.reason and called[:2] == ["first", "second"]


def test_the_table_is_short_and_has_the_fastest() -> None:
    def rows(kernel: str, times: list[float | None]) -> list[Row]:
        return [Row("sweep", "", "bfloat16", "", f"{kernel}{i}", kernel, time) for i, time in enumerate(times)]

    found = [*rows("a", [3.0, 1.0, None, 2.0]), *rows("b", [5.0])]
    assert [line.split()[-1] for line in sweeper.format_lines(found)] == ["a1", "a3", "a0", "a2", "b0"]
    assert "3.00x" in sweeper.format_lines(found)[2] and "1.00x" in sweeper.format_lines(found)[4]
    lines = sweeper.format_lines(found, most=4)
    assert [line.split()[-1] for line in lines[:3]] == ["a1", "a3", "b0"]
    assert lines[3] == "and 2 more, slower or not timed"
    assert len(sweeper.format_lines([*rows("a", [1.0] * 40), *rows("b", [1.0] * 20)])) == sweeper.LINES


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
