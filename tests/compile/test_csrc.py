"""The check of compiled CUDA C++: it reads what nvcc made, and a broken rule fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import compile_csrc as tool
import pytest

SMALL, FP32 = "bf16 64x64x32x32x32x3x2", "fp32 64x64x16x32x32x3x2"
ALIGNED = f"patch_embed_forward<bf16, 8, {SMALL}, TensorCoresByRows>"
PATCH_14 = f"patch_embed_forward<bf16, 2, {SMALL}, TensorCoresByRows>"
RAW = f"patch_embed_forward<u8, 8, {SMALL}, TensorCoresByRows>"
TF32 = f"patch_embed_weight_gradient<fp32, 4, {FP32}, TensorCoresByColumns>"
FFMA = f"patch_embed_image_gradient<fp32, 1, {FP32}, MultiplyAddsByRows>"
HOPPER = "patch_embed_forward_stream<u8, 8, bf16 192x192x64x16x192x4x1, WarpgroupByRows>"
HOPPER_16 = HOPPER.replace("u8", "bf16")
STREAM = {"registers": 128, "mma": "HGMMA.64x192x16 x 4", "copies": "multicast", "roles": "104, 136"}
HOPPER_GRADIENT = "patch_embed_weight_gradient<bf16, 8, bf16 192x192x64x16x192x4x1, WarpgroupByColumns>"


@pytest.mark.parametrize(
    ("kernel", "row", "problem"),
    [
        (ALIGNED, {}, ""),
        (ALIGNED, {"stack": 8}, "8 bytes of stack"),
        (ALIGNED, {"spills": 16}, "16 bytes spilled"),
        (ALIGNED, {"mma": "-"}, "no HMMA.16816"),
        (ALIGNED, {"copies": "8, 16"}, "copies of 8, 16 bytes, 16 are expected"),
        (ALIGNED, {"copies": "-"}, "copies of - bytes"),
        (PATCH_14, {"copies": "4, 16"}, ""),
        (PATCH_14, {"copies": "16"}, "4, 16 are expected"),
        (RAW, {}, ""),
        (TF32, {"mma": "HMMA.1688", "copies": "4, 16"}, ""),
        (TF32, {"mma": "HMMA.16816", "copies": "4, 16"}, "no HMMA.1688"),
        (FFMA, {"mma": "FFMA", "copies": "4, 16"}, ""),
        (FFMA, {"mma": "-", "copies": "4, 16"}, "no FFMA"),
        (HOPPER, STREAM, ""),
        (HOPPER, STREAM | {"copies": "16"}, "copies of 16 bytes, multicast are expected"),
        (HOPPER, STREAM | {"mma": "HGMMA.64x192x16 x 3"}, "no HGMMA.64x192x16 x 4"),
        (HOPPER, STREAM | {"mma": "-"}, "no HGMMA"),
        (HOPPER_16, STREAM | {"copies": "16, multicast"}, ""),
        (HOPPER_16, STREAM, "16, multicast are expected"),
        (HOPPER, STREAM | {"roles": "104, 144"}, "roles of 104, 144 registers a thread, of a block that has 65536"),
        (HOPPER, STREAM | {"registers": 120}, "roles of 104, 136 registers a thread, of a block that has 61440"),
        (HOPPER, STREAM | {"roles": "-"}, "roles of - registers"),
        (HOPPER, STREAM | {"roles": "136"}, "roles of 136 registers"),
        (HOPPER, STREAM | {"roles": "128, 128"}, "roles of 128, 128 registers"),
        (HOPPER, STREAM | {"waits": "BAR.SYNC"}, "BAR.SYNC in the loop of the product"),
        (HOPPER, STREAM | {"waits": "MEMBAR"}, "MEMBAR in the loop of the product"),
        (HOPPER_GRADIENT, {"mma": "HGMMA.64x192x16 x 4"}, ""),
        (HOPPER_GRADIENT, {"mma": "HGMMA.64x128x16 x 4"}, "no HGMMA.64x192x16"),
        ("sum_rows<fp16, 8>", {"mma": "-", "copies": "-"}, ""),
        ("add_norm_forward<true>", {"loads": "4, 16", "stores": "4, 16"}, ""),
        ("add_norm_forward<false>", {"loads": "2, 4", "stores": "2, 4"}, ""),
        ("add_norm_backward<false, true, true>", {"loads": "4, 16", "stores": "4"}, "stores of 4 bytes, 16 are exp"),
        ("add_norm_backward<true, false, true>", {"loads": "2, 16", "stores": "16"}, "loads of 2, 16 bytes, 16 are"),
        ("bias_act_forward<false, true>", {"loads": "16", "stores": "16"}, ""),
        ("split_heads_backward<true>", {"loads": "8, 16", "stores": "16"}, "loads of 8, 16 bytes, 16 are expected"),
        ("bias_act_backward<true, true>", {"loads": "16", "stores": "2, 16"}, "stores of 2, 16 bytes, 16 are"),
    ],
)
def test_a_broken_rule_is_named(kernel: str, row: dict[str, object], problem: str) -> None:
    values = {"registers": 96, "stack": 0, "spills": 0, "shared": 0, "mma": "HMMA.16816", "copies": "16", **row}
    found = list(tool.problems(tool.Row("90a", kernel, **values)))
    assert (problem in found[0] and len(found) == 1) if problem else not found


def test_what_stops_the_loop_of_a_product_is_read() -> None:
    code = ".L_x_1:\n HGMMA R ;\n WARPGROUP.DEPBAR.LE gsb0 ;\n @P0 BRA `(.L_x_1) ;\n MEMBAR.ALL.CTA ;\n"
    for before, inside, waits in (
        ("", "", "-"), ("BAR.SYNC 0x0 ;", "", "-"), ("", "BAR.SYNC.DEFER_BLOCKING 0x0 ;", "BAR.SYNC"),
        ("", "MEMBAR.ALL.CTA ;", "MEMBAR"),
    ):  # fmt: skip
        row = tool.Row("90a", "x", 128, 0, 0, 0)
        roles = "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0x88 ;\n USETMAXREG.DEALLOC.CTAPOOL 0x68 ;\n"
        outer = f".L_x_0:\n {roles} {before}\n" + code.replace("HGMMA", f"{inside}\n HGMMA") + "BRA `(.L_x_0) ;\n"
        tool._read_code(row, outer)
        assert (row.waits, row.roles) == (waits, "104, 136")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_what_nvcc_made_is_read(tmp_path: Path) -> None:
    rows = tool.compile_file(tool.SOURCES / "add_position.cu", "90a", shutil.which("nvcc"), tmp_path)
    by_name = {row.kernel: row for row in rows}
    wide, scalar = by_name["add_position_forward<bf16, fp32, 8>"], by_name["add_position_forward<bf16, fp32, 1>"]
    assert len(rows) == 18 and all(row.registers and not row.problems for row in rows)
    assert wide.loads == "16" and scalar.loads.startswith("2")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_one_add_norm_serves_all_types(tmp_path: Path) -> None:
    rows = tool.compile_file(tool.SOURCES / "add_norm.cu", "90a", shutil.which("nvcc"), tmp_path)
    by_name = {row.kernel: row for row in rows}
    assert len(rows) == 6 and not any(row.problems for row in rows)
    assert by_name["add_norm_forward<true>"].loads == by_name["add_norm_forward<true>"].stores == "4, 16"
    # Three blocks of 256 threads a multiprocessor, and with a scale two.
    assert by_name["add_norm_backward<false, true, true>"].registers <= 80
    assert all(row.registers <= 128 for row in rows)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
def test_a_source_that_does_not_compile_is_a_failed_row(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("this is no C++\n")
    (row,) = tool.compile_file(source, "90a", shutil.which("nvcc"), tmp_path / "objects")
    assert row.problems and "does not compile" in row.problems[0]


def test_the_shared_memory_of_a_product_is_its_stages_and_origins() -> None:
    product = tool.Product.of(ALIGNED)
    assert product.shared_bytes == 3 * (64 + 64) * 32 * 2 + 64 * 8
    assert tool.Product.of(HOPPER).shared_bytes == 4 * (192 + 192) * 64 * 2 + 12 * 16 * 40 * 4 + 192 * 8 + 64
    packed = f"patch_embed_packed_forward<bf16, 8, {SMALL}, TensorCoresByRows>"
    assert tool.Product.of(packed).shared_bytes == product.shared_bytes + 64 * 8
    assert tool.Product.of("sum_rows<fp16, 8>") is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not here")
@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"a": "__global__ void kernel() {}"}, ""),
        ({"a": "__global__ void kernel() {}", "b": "__global__ void kernel() {}"}, "multiple definition"),
        ({"a": "void launch(); void run() { launch(); }"}, "undefined reference"),
    ],
)
def test_objects_that_do_not_link_are_a_failure(files: dict[str, str], problem: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    for name, text in files.items():
        source = tmp_path / f"{name}.cu"
        source.write_text(text + "\n")
        subprocess.run([nvcc, *tool.FLAGS, "-arch=sm_90a", "-o", tmp_path / f"{name}.o", source], check=True)
    (tmp_path / "90a").mkdir()
    for name in files:
        (tmp_path / f"{name}.o").rename(tmp_path / "90a" / f"{name}.o")
    found = list(tool.link_problems("90a", nvcc, tmp_path))
    assert problem in found[0] if problem else not found
