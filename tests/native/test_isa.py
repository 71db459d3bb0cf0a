"""Every instruction set that this processor has, the variable that names one, and what may not pass between them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import build_native
import pytest
from build_extension import Toolchain, build, work_folder

from fastvit import native
from tests.native.conftest import check

SETS = tuple(native.build_info().get("instruction_sets", ()))


@pytest.mark.parametrize("name", SETS)
def test_each_keeps_the_contract_of_the_ops(library: Path, name: str) -> None:
    try:
        found = check(library, FASTVIT_CPU_ISA=name)
    except RuntimeError as error:
        if f"FASTVIT_CPU_ISA: this processor has no {name}; it has: portable" not in str(error):
            raise
        pytest.skip(f"this processor has no {name}")
    assert found == {"set": name, "failed": [], "conversions": [], "functions": []}


def test_an_unknown_one_is_an_error_that_lists_the_known(library: Path) -> None:
    with pytest.raises(
        RuntimeError, match="FASTVIT_CPU_ISA: unknown instruction set 'mmx'; this processor has: portab"
    ):
        check(library, FASTVIT_CPU_ISA="mmx")


def own(name: str) -> str:
    """What a symbol may be in: the set's namespace, and of the first one the ops themselves, which choose."""
    return rf"fastvit::{name}::|DW\.ref\." + (r"|fastvit::\w+\(" if name == "portable" else "")


def test_code_of_one_is_never_that_of_another(toolchain: Toolchain, tmp_path: Path) -> None:
    # Of a function that several objects have the linker takes one copy: it would be in no set's own namespace.
    built = build_native.native_library(toolchain)
    build(built, tmp_path / build_native.LIBRARY)
    objects = [path for path in work_folder(built).glob("cpu.*.o") if ".runtime." not in path.name]
    assert len(objects) == len(built.info["ops"]) * len(built.info["instruction_sets"])
    for path in objects:
        name = path.name.removesuffix(".o").rpartition(".cpp")[2].strip(".") or "portable"
        listed = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listed.splitlines() if re.search(r" [TWVu] (?!DW\.ref\.)", line)]
        assert shared and not [line for line in shared if not re.search(own(name), line)], path.name
