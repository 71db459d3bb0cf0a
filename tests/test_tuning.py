"""Tuning tables: their files, which of them is in force, and how calls follow them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvit import backend as backends
from fastvit import functional, tuning
from fastvit.backend import launch_counts, reset_launch_counts, triton_is_interpreted, use_backend
from fastvit.tuning import FORWARD, TRAINING, Choice, Configuration, Problem, Table

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
OURS, PYTORCH = Choice("cpu", {"cpu": 1.0, "reference": 2.0}), Choice("reference", {"cpu": 2.0, "reference": 1.0})
SHAPE = (8, 3, 4, 4)


def problem(mode: str = FORWARD, **changes: Any) -> Problem:
    """That of `embed`."""
    return Problem("patch_embed", mode, F32, F32, F32, SHAPE, False)._replace(**changes)


def default(**changes: Any) -> str:
    """The backend of `embed` where no table names one."""
    call = problem(**changes)
    return backends._automatic("cpu", call.op, backends._suited(CPU, call, 8))


def table_with(choices: tuning.Choices) -> Table:
    return Table(tuning.device_name(CPU), tuning.current_versions(), choices)


def embed(batch: int, weight: Tensor | None = None, **keywords: Any) -> str:
    """Run patch_embed on 4 patches an image; the backend that did it."""
    reset_launch_counts()
    weight = torch.randn(SHAPE) if weight is None else weight
    functional.patch_embed(torch.randn(batch, 3, 8, 8), weight, **keywords)
    return next((backend for op, backend in launch_counts() if op == "patch_embed"), "reference")


Use = Callable[[Table | str | bytes], Path]


# Files

FULL = Table(
    "NVIDIA H200",
    {"torch": "2.11.0", "triton": "3.6.0", "fastvit": "0.1.0"},
    {
        Problem("patch_embed", TRAINING, torch.uint8, BF16, BF16, (768, 3, 16, 16), True): {
            1024: Choice(
                "triton",
                {"triton, large 132 programs": 2.5, "triton, large 264 programs": 2.0, "reference": 30.25},
                Configuration("large", 264),
                {"triton, large 528 programs": 'wrong: "error" 3 > 2'},
            ),
            65536: PYTORCH,
        },
        Problem("add_position", FORWARD, torch.float16, F32, torch.float16, (384,), False): {8: OURS},
    },
)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "table.json"
    FULL.save(path)
    assert Table.load(path) == FULL
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]
    choice = FULL.choices[next(iter(FULL.choices))][1024]
    assert (choice.name, choice.time_us, choice.reference_us) == ("triton, large 264 programs", 2.0, 30.25)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    FULL.save(path)

    def full_disk(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        table_with({}).save(path)
    assert Table.load(path) == FULL and list(tmp_path.iterdir()) == [path]


def test_merging_keeps_what_was_not_measured_again() -> None:
    old = table_with({problem(): {8: OURS, 64: OURS}, problem(TRAINING): {8: OURS}})
    merged = old.merged(table_with({problem(): {64: PYTORCH, 512: PYTORCH}}))
    assert merged.choices == {problem(): {8: OURS, 64: PYTORCH, 512: PYTORCH}, problem(TRAINING): {8: OURS}}
    assert old.choices[problem()] == {8: OURS, 64: OURS}


@pytest.mark.parametrize(
    ("winner", "times", "message"),
    [
        ("cpu", {"cpu": 1.0}, "reference is missing"),
        ("cpu", {"cpu": 1.1, "reference": 1.0}, "slower"),
        ("triton", {"cpu": 1.0, "reference": 2.0}, "'triton' has no time"),
        ("cpu", {"cpu": float("nan"), "reference": 2.0}, "nan"),
        ("cpu", {"cpu": 0.0, "reference": 2.0}, "expected microseconds"),
        ("cpu", {"cpu": True, "reference": 2.0}, "True"),
    ],
)
def test_a_choice_slower_than_pytorch_can_not_be_made(winner: str, times: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice(winner, times)


def good() -> str:
    return table_with({problem(): {8: PYTORCH}}).to_json()


BAD_FILES: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "empty": (lambda: "", "not a tuning table"),
    "cut off": (lambda: good()[:-20], "not a tuning table"),
    "bytes": (lambda: b"\xff\xfe\x00", "not a tuning table|decode"),
    "a list": (lambda: "[]", "not a tuning table"),
    "nested": (lambda: "[" * 100_000, "not a tuning table"),
    "another format": (lambda: good().replace('"format": 2', '"format": 1'), "format 1, read here is 2"),
    "no format": (lambda: good().replace('"format"', '"form"'), "not a tuning table"),
    "dtype": (lambda: good().replace('"image": "float32"', '"image": "float8"'), "float8"),
    "shape": (lambda: good().replace("[8, 3, 4, 4]", "[8, 3, -4, 4]"), "-4"),
    "programs": (lambda: good().replace('"programs": null', '"programs": 1000000000'), "programs"),
    "a lie": (lambda: good().replace('"backend": "reference"', '"backend": "cpu"'), "slower"),
    "device": (lambda: replace(table_with({}), device="NVIDIA H200").to_json(), "its device is NVIDIA H200, here "),
    "torch": (
        lambda: Table(tuning.device_name(CPU), {**tuning.current_versions(), "torch": "1.0"}).to_json(),
        "its torch is 1.0, here ",
    ),
    "fastvit": (lambda: Table(tuning.device_name(CPU), {}).to_json(), "its fastvit is none, here "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_warning_and_the_default(name: str, use: Use) -> None:
    make, message = BAD_FILES[name]
    path = use(make())
    with pytest.warns(UserWarning, match="tuning table ignored") as caught:
        assert [embed(2) for _ in range(3)] == [default()] * 3
        functional.add_position(torch.randn(2, 4, 8), torch.randn(4, 8))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(path) in text and "fastvit tune" in text
    assert re.search(message, text), text
    assert str(path) in tuning.describe(CPU) and "ignored" in tuning.describe(CPU)


def test_a_file_that_is_named_and_missing_is_a_warning(use: Use) -> None:
    with pytest.warns(UserWarning, match=r"table.json: no such file"):
        assert embed(2) == default()


def test_a_folder_in_place_of_the_file_is_a_warning(use: Use, tmp_path: Path) -> None:
    (tmp_path / "table.json").mkdir()
    with pytest.warns(UserWarning, match=r"table.json: Is a directory"):
        assert embed(2) == default()


# Where tables are looked for


def test_default_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> None:
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA H100 80GB (HBM3), 2 threads")
    name = "tuning-nvidia-h100-80gb-hbm3-2-threads.json"
    for value in ("off", "OFF", "0", ""):
        monkeypatch.setenv("FASTVIT_TUNING", value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert tuning.default_path(CPU) == tmp_path / "fastvit" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.default_path(CPU) == tmp_path / ".cache" / "fastvit" / name
    monkeypatch.setenv("FASTVIT_TUNING", "/some/table.json")
    assert tuning.default_path(CPU) == Path("/some/table.json")


def test_without_any_file_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> None:
    monkeypatch.delenv("FASTVIT_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert embed(2) == default() and tuning.describe(CPU) == "none"
        tuning.reset()
        table_with({problem(): {8: PYTORCH}}).save(tuning.default_path(CPU))
        assert embed(2) == "reference"


def test_the_users_file_comes_before_a_shipped_table(use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path)
    shipped = tmp_path / f"{tuning._slug(CPU)}.json"
    # Made with other versions, as a table that ships is.
    replace(table_with({problem(): {8: PYTORCH}}), versions={"torch": "2.11.0"}).save(shipped)
    with pytest.warns(UserWarning, match="no such file"):
        assert embed(2) == "reference"
    assert tuning.source(CPU).path == shipped
    use(table_with({problem(): {8: OURS}}))
    assert embed(2) == "cpu"
    use("nonsense")
    with pytest.warns(UserWarning, match="ignored"):
        assert embed(2) == "reference"
    replace(table_with({problem(): {8: PYTORCH}}), device="another").save(shipped)
    tuning.reset()
    with pytest.warns(UserWarning, match="ignored"):
        assert embed(2) == default()


def test_off_switches_tables_off(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use(table_with({problem(): {8: PYTORCH}}))
    assert embed(2) == "reference"
    monkeypatch.setenv("FASTVIT_TUNING", "off")
    tuning.reset()
    assert embed(2) == default() and tuning.describe(CPU) == "off (FASTVIT_TUNING=off)"


@pytest.mark.parametrize(
    ("value", "expected"), [("", "reference"), ("{path}", "reference"), ("off", "ours"), ("0", "ours")]
)
def test_a_process_of_its_own_follows_the_file(tmp_path: Path, value: str, expected: str) -> None:
    program = """
import sys, torch
from pathlib import Path
from fastvit import functional, tuning
from fastvit.backend import launch_counts
from fastvit.tuning import Choice, Problem, Table
here, f = torch.device("cpu"), torch.float32
choice = Choice("reference", {"reference": 1.0})
table = Table(tuning.device_name(here), tuning.current_versions(),
              {Problem("patch_embed", "forward", f, f, f, (8, 3, 4, 4), False): {8: choice}})
table.save(tuning.default_path(here))
functional.patch_embed(torch.randn(2, 3, 8, 8), torch.randn(8, 3, 4, 4))
print("ours" if launch_counts() else "reference", tuning.default_path(here))
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["FASTVIT_TUNING"] = value.format(path=tmp_path / "mine.json")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    backend, path = done.stdout.split()
    assert backend == expected and Path(path).is_relative_to(tmp_path)


def test_the_suite_itself_uses_no_table() -> None:
    assert os.environ["FASTVIT_TUNING"] == "off" and tuning.table_of(CPU) is None


# What a call follows


@given(rows=st.integers(0, 2**40))
def test_buckets_are_powers_of_two(rows: int) -> None:
    found = tuning.bucket(rows)
    assert found & (found - 1) == 0 and found >= rows
    assert rows < 2 or found < 2 * rows


@given(measured=st.sets(st.integers(0, 30), min_size=1), rows=st.integers(1, 2**30))
def test_the_nearest_bucket_counts(measured: set[int], rows: int) -> None:
    choices = {1 << power: Choice("reference", {"reference": float(power + 1)}) for power in measured}
    wanted = tuning.bucket(rows).bit_length() - 1
    found = table_with({problem(): choices}).lookup(problem(), rows)
    assert found is not None
    distance = abs(round(found.reference_us - 1) - wanted)
    assert distance == min(abs(power - wanted) for power in measured)
    largest = table_with({problem(): choices}).lookup(problem(), None)
    assert largest is choices[1 << max(measured)]


def test_calls_follow_batch_and_mode(use: Use) -> None:
    use(table_with({problem(): {8: OURS, 1024: PYTORCH}, problem(TRAINING): {8: PYTORCH}}))
    assert [embed(batch) for batch in (0, 1, 2, 8, 256, 1000)] == ["cpu"] * 4 + ["reference"] * 2
    weight = torch.randn(SHAPE, requires_grad=True)
    assert embed(2, weight) == "reference"
    assert embed(2, bias=torch.randn(8, requires_grad=True)) == "reference"
    with torch.no_grad():
        assert embed(2, weight) == "cpu"


def test_calls_of_another_problem_take_the_default(use: Use) -> None:
    use(table_with({problem(): {8: PYTORCH}}))
    assert embed(2) == "reference"
    assert embed(2, torch.randn(9, 3, 4, 4)) == default()
    assert embed(2, torch.randn(8, 3, 4, 8)) == default()
    assert embed(2, torch.randn(SHAPE, dtype=BF16)) == default(compute=BF16, out=BF16)
    assert embed(2, dtype=BF16) == default()
    assert embed(2, keep=torch.tensor([[0, 3], [1, 1]])) == default()
    with torch.autocast("cpu", BF16):
        assert embed(2) == default(compute=BF16, out=BF16)


def test_rows_are_those_that_are_kept(use: Use) -> None:
    use(table_with({problem(keep=True): {4: PYTORCH, 64: OURS}}))
    for kept, expected in ((1, "reference"), (4, "reference"), (100, "cpu")):
        assert embed(1, keep=torch.zeros(1, kept, dtype=torch.int64)) == expected


def test_add_position_follows_its_own_entries(use: Use) -> None:
    own = Problem("add_position", FORWARD, BF16, F32, BF16, (8,), False)
    use(table_with({own: {16: PYTORCH, 4096: OURS}}))
    for batch, expected in ((2, {}), (1000, {("add_position", "cpu"): 1})):
        reset_launch_counts()
        functional.add_position(torch.randn(batch, 4, 8, dtype=BF16), torch.randn(4, 8))
        assert launch_counts() == expected


def test_what_is_forced_comes_before_the_table(use: Use) -> None:
    use(table_with({problem(): {8: PYTORCH}}))
    assert embed(2, backend="cpu") == "cpu"
    with use_backend("cpu"):
        assert embed(2) == "cpu"
    assert embed(2) == "reference"
    use(table_with({problem(): {8: OURS}}))
    assert embed(2, backend="reference") == "reference"


def test_float64_is_not_looked_up(use: Use) -> None:
    use(table_with({problem(): {8: OURS}}))
    assert embed(2, dtype=torch.float64) == "reference"


@pytest.mark.parametrize("winner", ["cuda", "triton", "tpu"])
def test_a_winner_that_can_not_run_here_is_passed_over(use: Use, winner: str) -> None:
    if winner == "triton" and triton_is_interpreted():
        pytest.skip("it can run here: TRITON_INTERPRET is set")
    use(table_with({problem(): {8: Choice(winner, {winner: 1.0, "reference": 2.0})}}))
    assert embed(2) == "reference", "the best of those measured that can run"
    use(table_with({problem(): {8: Choice(winner, {winner: 1.0, "reference": 2.0, "cpu": 1.5})}}))
    assert embed(2) == "cpu"


@pytest.mark.parametrize("is_built", [True, False])
def test_the_extension_is_followed_where_it_is_built(
    use: Use, is_built: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """By the functions of the CPU backend in its place; where it is not built, the next that can run."""
    monkeypatch.setitem(backends._PACKAGES, "cuda", "fastvit.cpu")
    monkeypatch.setitem(backends._REASONS, "cuda", lambda device_type: "" if is_built else "it is not built")
    backends.implementation.cache_clear()
    request.addfinalizer(backends.implementation.cache_clear)
    choice = Choice("cuda", {"triton, large": 3.0, "reference": 2.0, "cuda": 1.0, "cpu": 1.5}, Configuration("large"))
    use(table_with({problem(): {8: choice}, problem(TRAINING): {8: choice}}))
    expected = "cuda" if is_built else "cpu"
    weight = torch.randn(SHAPE, requires_grad=True)
    assert embed(2) == embed(2, weight) == expected
    assert tuning.configuration(CPU, tuple(problem()), 8) == Configuration("large"), "it stays Triton's own"
    compiled, _ = compile_counting(lambda images: functional.patch_embed(images, weight))
    reset_launch_counts()
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    assert launch_counts() == {("patch_embed", expected): 1, ("patch_embed_backward", expected): 1}


def test_a_table_is_read_once(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call takes the same path throughout, and costs no more than a look-up."""
    path = use(table_with({problem(): {8: PYTORCH}}))
    assert embed(2) == "reference"
    table_with({problem(): {8: OURS}}).save(path)
    assert embed(2) == "reference" and embed(1000) == "reference"
    with monkeypatch.context() as without:
        without.setattr(tuning, "table_of", None)
        assert embed(2) == "reference" and embed(1000) == "reference"


# torch.compile


def compile_counting(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[list[str]]]:
    """torch.compile without graph breaks for any batch, and the calls in each graph that was compiled."""
    graphs: list[list[str]] = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=compiler), graphs


@pytest.mark.parametrize("kind", ["parameter", "tensor"])
def test_compiled_code_takes_the_winner_of_the_largest_batch(use: Use, kind: str) -> None:
    """Also where the sizes of the weight are symbols, as those of a plain tensor are."""
    weight = torch.randn(SHAPE, requires_grad=True)
    weight = torch.nn.Parameter(weight) if kind == "parameter" else weight
    use(table_with({problem(TRAINING): {8: PYTORCH, 1024: OURS}, problem(): {8: OURS, 1024: PYTORCH}}))
    compiled, graphs = compile_counting(lambda images: functional.patch_embed(images, weight))
    for batch in (2, 3, 256):
        reset_launch_counts()
        compiled(torch.randn(batch, 3, 8, 8)).sum().backward()
        assert launch_counts() == {("patch_embed", "cpu"): 1, ("patch_embed_backward", "cpu"): 1}
    assert len(graphs) == 1
    with torch.no_grad():
        for batch in (2, 3, 256):
            reset_launch_counts()
            compiled(torch.randn(batch, 3, 8, 8))
            assert launch_counts() == {}
    assert len(graphs) == 2


def test_without_an_entry_the_graph_is_the_same_as_without_a_table(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.randn(SHAPE))
    found = []
    for tables in (True, False):
        if tables:
            use(table_with({problem(shape=(9, 3, 4, 4)): {8: PYTORCH}}))
        else:
            monkeypatch.setenv("FASTVIT_TUNING", "off")
            tuning.reset()
        compiled, graphs = compile_counting(lambda images: functional.patch_embed(images, weight))
        compiled(torch.randn(2, 3, 8, 8))
        compiled(torch.randn(3, 3, 8, 8))
        found.append(graphs)
    assert found[0] == found[1] and len(found[0]) == 1
    assert [name for name in found[0][0] if "conv" in name] == []


@pytest.mark.parametrize("strict", [True, False])
def test_export_follows_the_table_for_every_batch(use: Use, strict: bool) -> None:
    class Embed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(SHAPE))

        def forward(self, images: Tensor) -> Tensor:
            return functional.patch_embed(images, self.weight)

    use(table_with({problem(TRAINING): {8: PYTORCH, 1024: OURS}}))
    module, images = Embed(), torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},), strict=strict)
    for size in (2, 5):
        reset_launch_counts()
        program.module()(torch.randn(size, 3, 8, 8))
        assert launch_counts() == {("patch_embed", "cpu"): 1}


@pytest.mark.parametrize("mode", ["symbolic", "real"])
def test_other_tracers_work_beside_a_table(use: Use, mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    use(table_with({problem(): {8: PYTORCH}}))
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(SHAPE)
    traced = make_fx(lambda images, weight: functional.patch_embed(images, weight), tracing_mode=mode)(images, weight)
    torch.testing.assert_close(traced(images, weight), functional.patch_embed(images, weight))


# Configurations


def test_configurations_are_those_of_the_table_unless_forced(use: Use) -> None:
    key = tuple(problem())
    best = Configuration("large", 528)
    use(table_with({problem(): {8: Choice("reference", {"triton, large": 3.0, "reference": 2.0}, best)}}))
    assert tuning.configuration(CPU, key, 8) == best  # also where another backend won
    with tuning.forced_configuration(tile="small"):
        assert tuning.configuration(CPU, key, 8) == Configuration("small")
        with tuning.forced_configuration():
            assert tuning.configuration(CPU, key, 8) == tuning.DEFAULT
        assert tuning.configuration(CPU, key, 8) == Configuration("small")
    assert tuning.configuration(CPU, key, 8) == best
    assert tuning.configuration(CPU, tuple(problem(TRAINING)), 8) == tuning.DEFAULT


@pytest.mark.parametrize("programs", [0, -1, 2.0, True, "264", 10**9])
def test_a_configuration_is_checked(programs: Any) -> None:
    with pytest.raises(ValueError, match="programs: expected a whole number from 1"):
        Configuration(programs=programs)
    with pytest.raises(ValueError, match="tile: expected a name"):
        Configuration(tile=programs if isinstance(programs, int) else 3)  # type: ignore[arg-type]
