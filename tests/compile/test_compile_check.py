"""The offline compile check: its rules, its reading of PTX, and a few entries compiled for real.

The whole manifest is compiled by `make compile-check`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

ENTRY = "patch_embed_forward wide medium u8 bf16 bf16"
GOOD = {"images": "8", "weight": "16"}  # widths of copies


def find(name: str) -> Any:
    from fastvit.kernels import manifest

    return next(entry for entry in manifest.entries() if entry.name.startswith(name))


@pytest.fixture
def row() -> Any:
    from fastvit.kernels.compile_check import Row

    return Row(90, "patch_embed_forward", "", 128, 0, 65536, "wgmma m64n128k16", GOOD, 2, 3, "pixels 2, weight 3")


def test_a_good_row_has_no_problem(row: Any) -> None:
    from fastvit.kernels.compile_check import problems

    assert list(problems(find(ENTRY), row)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stack=8), "stack"),
        (dict(shared=227 * 1024 + 1), "shared"),
        (dict(target=80, shared=163 * 1024 + 1, mma="mma m16n8k16"), "shared"),
        (dict(mma="mma m16n8k16"), "wgmma"),
        (dict(copies={**GOOD, "images": "4, 8"}), "copies of images"),
        (dict(copies={**GOOD, "images": "-"}), "copies of images"),
        (dict(copies={**GOOD, "images": "ld 1"}), "copies of images"),
        (dict(copies={**GOOD, "weight": "16, 8"}), "copies of weight"),
        (dict(copies={**GOOD, "weight": "-"}), "copies of weight"),
        (dict(prefetched=0), "nothing is prefetched"),
        (dict(prefetched=None), "nothing is prefetched"),
    ],
)
def test_each_rule_fails(row: Any, changes: dict[str, Any], message: str) -> None:
    from fastvit.kernels.compile_check import problems

    found = list(problems(find(ENTRY), replace(row, **changes)))
    assert len(found) == 1 and message in found[0]


def test_float_images_need_16_bytes(row: Any) -> None:
    from fastvit.kernels.compile_check import problems

    entry = find("patch_embed_forward wide medium bf16")
    assert [*problems(entry, row)] == ["copies of images narrower than 16 bytes"]
    assert not [*problems(entry, replace(row, copies={**GOOD, "images": "16"}))]


PTX = """
 ld.param.b64 %rd1, [k_param_0];
 ld.param.b64 %rd2, [k_param_1];
 ld.param.b32 %r1, [k_param_2];
 ld.param.b64 %rd9, [k_param_3];
 mad.wide.s32 %rd3, %r1, 2, %rd1;
 add.s64 %rd4, %rd3, 64;
 @%p1 cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6; // a comment [%rd2]
 mov.b64 %rd5, %rd2;
$L__BB0_1:
 add.s64 %rd5, %rd5, %rd9;
 cp.async.ca.shared.global [ %r5 + 0 ], [ %rd5 + 0 ], 0x8, %r6;
 @%p2 ld.global.b64 { %rd6 }, [ %rd2 + 0 ];
 add.s64 %rd7, %rd1, %rd6;
 ld.global.v4.b32 { %r7, %r8, %r9, %r10 }, [ %rd7 + 0 ];
 @%p3 st.global.v2.b32 [ %rd4 + 0 ], { %r7, %r8 };
"""


def test_accesses_are_traced_to_their_tensor() -> None:
    """Through loops and sums; a loaded index does not count as where an address comes from."""
    from fastvit.kernels.compile_check import Access, global_accesses

    assert list(global_accesses(PTX, ["image", "weight"], ["image", "weight", "rows", "stride"])) == [
        Access("async", 16, "image"),
        Access("async", 8, "weight"),
        Access("ld", 8, "weight"),
        Access("ld", 16, "image"),
        Access("st", 8, "image"),
    ]


def test_generic_loops_may_load_without_copies(row: Any) -> None:
    """Where values of any address are read one by one, nothing is copied ahead that could be counted."""
    from fastvit.kernels.compile_check import problems

    entry = find("patch_embed_forward generic")
    assert not [*problems(entry, replace(row, prefetched=None))] and [*problems(entry, replace(row, prefetched=0))]


PIPELINED = """
 %pixels_70 = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xi8, #shared, #smem, mutable> loc(#loc247)
 %grad = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared1, #smem, mutable> loc(#loc248)
 %1 = scf.for %2 = %3 to %4 step %c64_i32 iter_args(%acc = %cst) {
  %5 = ttg.async_wait %6, %7 {num = 2 : i32} loc(#loc247)
  %8 = ttg.local_alloc %9 : (tensor<64x128xbf16, #blocked1>) -> !ttg.memdesc<64x128xbf16, #shared1, #smem>
 }
 %10 = ttg.async_wait {num = 0 : i32} loc(#loc308)
"""


def test_the_depth_of_a_pipeline_is_read() -> None:
    from fastvit.kernels.compile_check import pipeline

    assert pipeline(PIPELINED) == (2, "pixels 2, grad 3")
    assert pipeline(PIPELINED.replace("num = 2", "num = 0")) == (0, "pixels 2, grad 3")
    assert pipeline("") == (None, "")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 65536, 8, 2), (129, 65536, 8, 1), (128, 120 * 1024, 8, 1), (32, 0, 4, 16), (40, 0, 4, 12), (255, 0, 8, 1)],
)
def test_room_on_a_multiprocessor(registers: int, shared: int, warps: int, programs: int) -> None:
    from fastvit.kernels.compile_check import room

    assert room(90, registers, shared, warps) == programs


def test_a_load_that_others_wait_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage is a loop without prefetch."""
    from fastvit.kernels.compile_check import inspect

    row = inspect(replace(find("patch_embed_weight_gradient wide medium bf16 bf16"), num_stages=1), 90)
    assert any("nothing is prefetched" in problem for problem in row.problems)


@pytest.mark.parametrize("keep", ["", "keep"])
@pytest.mark.parametrize("image", ["u8", "bf16"])
def test_the_weight_gradient_prefetches_and_leaves_room_for_two(image: str, keep: str) -> None:
    """Also where an index is read on the way to the pixels, and with the sum of rows in the same kernel."""
    from fastvit.kernels.compile_check import inspect

    row = inspect(find(f"patch_embed_weight_gradient wide medium {image} bf16 ieee {keep}"), 90)
    assert row.problems == () and row.prefetched == 2 and row.programs == 2


@pytest.mark.parametrize("image", ["u8", "bf16"])
def test_the_forward_leaves_room_for_two(image: str) -> None:
    from fastvit.kernels.compile_check import inspect

    row = inspect(find(f"patch_embed_forward wide medium {image} bf16 bf16"), 90)
    assert row.problems == () and row.prefetched and row.programs == 2


@pytest.mark.parametrize(
    ("name", "target", "programs"),
    [
        ("packed_forward wide u8 bf16 fp32 bf16", 90, 2),
        ("packed_forward wide u8 bf16 fp32 bf16", 80, 1),
        ("packed_weight_gradient wide u8 bf16", 100, 2),
        ("patch_embed_forward wide medium bf16 bf16 bf16", 80, 2),
    ],
)
def test_registers_are_limited_on_the_targets_where_two_then_fit(name: str, target: int, programs: int) -> None:
    """On another the same limit would take stack."""
    from fastvit.kernels.compile_check import inspect

    entry = find(name)
    row = inspect(entry, target)
    assert row.problems == () and row.programs == programs
    assert (target in entry.max_registers) == (programs == 2)
    if programs == 1:
        (problem,) = inspect(replace(entry, max_registers=128), target).problems
        assert problem.endswith("bytes of stack")
    else:
        assert inspect(replace(entry, max_registers=None), target).programs == 1


@pytest.mark.parametrize("max_registers", [None, 80, {90: 128}])
def test_a_launch_has_the_limit_of_its_own_device(max_registers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that none names has none."""
    from fastvit.kernels import launch

    given: list[dict[str, Any]] = []
    entry = replace(find("position_table"), constants=(), max_registers=max_registers)
    monkeypatch.setattr(launch, "jit_function", lambda found: {(1,): lambda **options: given.append(options)})
    for target in (80, 86, 90, 120):
        monkeypatch.setattr(launch, "target_of", {torch.device("cpu"): target}.__getitem__)
        launch.launch(entry, (1,), tokens_ptr=torch.empty(1))
        limit = max_registers.get(target) if isinstance(max_registers, dict) else max_registers
        assert given[-1].get("maxnreg") == limit and given[-1].items() >= entry.options(target).items()


def test_a_target_is_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvit.kernels.launch import target_of

    capabilities = {torch.device("cuda", 0): (9, 0), torch.device("cuda", 1): (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    target_of.cache_clear()
    assert [target_of(device) for device in capabilities] == [90, 120] and target_of(torch.device("cpu")) == 0
    target_of.cache_clear()


def test_launches_of_a_call() -> None:
    """Nothing is cast, and nothing launched, besides the preparation and the product, there and back; of images of any
    sizes their table is copied, and their positions are summed from copied numbers."""
    from fastvit.kernels.calls import counted

    launches = {call.name: [entry.kernel for entry in call.launches] for call in counted()}
    packed = {"forward, 64 images": ["_to_copy", "_embedding_bag_forward_only", "_to_copy"]}
    packed["backward of all parameters"] = ["_to_copy"]
    for call in counted():
        assert call.others == packed.get(call.name.removeprefix("patch_embed_packed "), []), call.name
    assert launches["patch_embed_packed forward, 64 images"] == ["place_rows", "prepare_weight", "packed_forward"]
    for parameters in ("fp32", "bf16"):
        assert launches[f"patch_embed forward, {parameters} parameters"] == ["prepare_weight", "patch_embed_forward"]
    backward = ["patch_embed_weight_gradient", "reduce_weight_gradient"]
    assert launches["patch_embed backward of all parameters"] == backward
    assert all(call.bytes > 30e6 for call in counted())


def test_other_kernels_around_a_launch_are_counted() -> None:
    from fastvit.kernels.calls import count

    call = count("a cast", lambda: torch.empty(2, 3, device="meta").view(6).half())
    assert call.others == ["_to_copy"] and call.launches == []


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("name", [ENTRY, "patch_embed_weight_gradient wide medium bf16 bf16", "position_table"])
def test_entries_compile_clean(name: str, target: int) -> None:
    from fastvit.kernels.compile_check import inspect

    row = inspect(find(name), target)
    assert row.problems == () and row.registers > 0 and row.stack == 0
    instruction = {80: "mma m16n8k16", 90: "wgmma", 100: "tcgen05"}[target]
    assert name == "position_table" or instruction in row.mma


def test_offsets_of_the_batch_are_64_bit() -> None:
    """The image's batch offset is a product of 64-bit integers in the compiled kernel."""
    from fastvit.kernels.compile_check import compile_entry

    for name in ("patch_embed_forward generic", "patch_embed_weight_gradient wide", "patch_embed_image_gradient wide"):
        intermediate = compile_entry(find(name), 90).asm["ttir"]
        assert "arith.extsi" in intermediate and any(
            "arith.muli" in line and "i64" in line for line in intermediate.splitlines()
        )


def test_a_bad_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many stages for the shared memory of an sm_80."""
    from fastvit.kernels.compile_check import inspect

    row = inspect(replace(find("patch_embed_forward wide large bf16"), num_stages=6), 80)
    assert any("shared memory" in problem for problem in row.problems)


def test_command_line() -> None:
    from fastvit.kernels.compile_check import main

    command = [sys.executable, "-m", "fastvit.kernels.compile_check", "--json", "--workers", "1", "--target", "90"]
    done = subprocess.run([*command, "position_table bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["target"] == 90
    assert main(["no such entry"]) == 2
