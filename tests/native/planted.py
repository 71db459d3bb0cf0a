"""Faults in the source of the processor's own ops: how they are planted, built and seen.

All faults of some ops are built at once, for one instruction set: each is an expression in place of one, or statements
in place of statements, and a variable says which of them is there.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastvit.native as native

ROOT = Path(__file__).resolve().parents[2]
SWITCH = '__attribute__((visibility("default"))) int fastvit_planted'


@dataclass(frozen=True)
class Fault:
    """One change of one file of csrc/cpu/; the text to change must stand in it exactly once."""

    name: str
    file: str
    old: str
    new: str


def build(faults: Sequence[Fault], ops: Sequence[str], folder: Path, only: str = "") -> Path:
    """The library of some ops with all the faults, none of which is there at first; for the best instruction set of
    this processor, or the one that is named."""
    if native.why_unavailable("cpu"):
        pytest.skip(native.why_unavailable("cpu"))
    import build_native  # which a process that runs the cases has not on its path

    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    for path in (sources / "cpu").glob("*.cpp"):
        if path.stem not in ops:
            path.unlink()
    for number, fault in enumerate(faults, 1):
        path = sources / "cpu" / fault.file
        text, is_here = path.read_text(), f"fastvit_planted == {number}"
        assert text.count(fault.old) == 1, f"{fault.name}: stands {text.count(fault.old)} times in {fault.file}"
        switched = f"({is_here} ? ({fault.new}) : ({fault.old}))"
        if fault.old.endswith(";"):
            switched = f"if ({is_here}) {{ {fault.new} }} else {{ {fault.old} }}"
        path.write_text(text.replace(fault.old, switched))
    header, runtime = folder / "planted.h", sources / "cpu" / "runtime" / "threads.cpp"
    header.write_text(f"#pragma once\nextern {SWITCH};\n")
    runtime.write_text(f"{SWITCH} = 0;\n{runtime.read_text()}")
    toolchain, reason = build_native.plan({build_native.VARIABLE: "1"})
    assert toolchain, reason
    library, flags = folder / "planted.so", ("-Wno-unused", "-include", str(header))
    only = only or native.instruction_set()
    build_native.build(build_native.native_library(toolchain, sources, flags, only=only), library)
    return library


def outcomes(library: Path, count: int, cases: str) -> list[str]:
    """What is wrong with the library with no fault, and with each of `count`; "" for nothing. In a process of its own,
    as the library has the names of the package's.

    Args:
        cases: of these, as "module:NAME", a sequence of (case, compute dtype). Conversions are looked at too, where
            the library has add_position, by which they are seen.
    """
    arguments = [sys.executable, "-m", "tests.native.planted", str(library), str(count), cases]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def _run(library: str, count: str, cases: str) -> None:
    from fastvit.validation import make_inputs
    from fastvit.validation.runner import backend_candidate, check_inputs
    from tests.native.checks import wrong_conversions

    native.LIBRARY.path = Path(library)
    assert not native.why_unavailable("cpu"), native.why_unavailable("cpu")
    switch = ctypes.c_int.in_dll(ctypes.CDLL(library), "fastvit_planted")
    module, _, name = cases.partition(":")
    candidate, found = backend_candidate("native"), []
    for number in range(int(count) + 1):
        switch.value = number
        rows = (
            row
            for case, dtype in getattr(importlib.import_module(module), name)
            for row in check_inputs(candidate, case.op, make_inputs(case, dtype), case.name)
            if row.status != "passed"
        )
        wrong = next((f"{row.quantity} of {row.case}: {row.reason or row.status}" for row in rows), "")
        if not wrong and "add_position" in native.ops():
            wrong = "; ".join(wrong_conversions())
        found.append(wrong)
    print(json.dumps(found))


if __name__ == "__main__":
    _run(*sys.argv[1:])
