"""Mistakes in the kernels' own source: each is built and must be seen."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_extension import SOURCES, Toolchain, work_folder, write_info

from tests.native.conftest import check, one_set


@dataclass(frozen=True)
class Fault:
    """One change of one file of csrc/cpu/, in which the text stands exactly once, and the op that must show it."""

    name: str
    op: str
    file: str
    old: str
    new: str


FAULTS = (
    Fault("a tail is dropped", "add_position", "vector.h", "if (column < width) use(", "if (width < 0) use("),
    Fault("what lies behind a row counts", "add_norm", "add_norm.cpp", "first_of(load(values + i) - mean, n)",
          "(load(values + i) - mean)"),
    Fault("the bias is dropped", "add_norm", "add_norm.cpp", "(load(branch + i, n) + load(bias + i))",
          "load(branch + i, n)"),
    Fault("the stream's gradient is lost", "add_norm", "add_norm.cpp", "if (has_d_sum) result +=",
          "if (false) result +="),
    Fault("a chunk's last row is dropped", "split_heads", "threads.h", "? (chunk + 1) * size : rows",
          "? (chunk + 1) * size - 1 : rows"),
    Fault("bfloat16 is cut off", "add_position", "vector.h", "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
          "bits >> 16"),
    Fault("ties of bfloat16 go up", "add_position", "vector.h", "bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x8000"),
    Fault("positions begin a row late", "add_position", "add_position.cpp",
          "pointer_to<Any>(positions) + place", "pointer_to<Any>(positions) + (place - this->width)"),
    Fault("the slope forgets the density", "bias_act", "bias_act.cpp", "cdf + x * (0.3989422804f * power)", "cdf"),
)  # fmt: skip


def test_without_one_nothing_is_wrong(toolchain: Toolchain) -> None:
    _, target = one_set(toolchain, "native-faults", "-O1")
    found = check(target, *sorted({fault.op for fault in FAULTS}))
    assert not found["failed"] and not found["conversions"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_is_caught(fault: Fault, toolchain: Toolchain, tmp_path: Path) -> None:
    library, target = one_set(toolchain, "native-faults", "-O1")
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCES, sources)
    path = sources / "cpu" / fault.file
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"stands {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")

    spoilt, broken = tmp_path / f"{fault.op}.o", tmp_path / target.name
    unit = sources / "cpu" / f"{fault.op}.cpp"
    subprocess.run([*library.rules["portable"], "-c", unit, "-o", spoilt], check=True)
    others = [path for path in work_folder(library).glob("*.o") if path.name != f"cpu.{fault.op}.cpp.o"]
    subprocess.run([library.toolchain.cxx, "-shared", spoilt, *others, *library.link, "-o", broken], check=True)
    write_info(broken.with_suffix(".json"), {"ops": [fault.op]})
    found = check(broken, fault.op)
    assert found["failed"] or found["conversions"]
