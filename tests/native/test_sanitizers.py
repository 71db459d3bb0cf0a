"""The kernels under the compilers' sanitizers: no access out of bounds, nothing undefined."""

from __future__ import annotations

import subprocess

import pytest
from build_extension import Toolchain

from tests.native.conftest import check, one_set

FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.full
def test_nothing_is_found(toolchain: Toolchain) -> None:
    names = ("libasan.so", "libubsan.so")
    found = [
        subprocess.run([toolchain.cxx, f"-print-file-name={name}"], capture_output=True, text=True) for name in names
    ]
    paths = [done.stdout.strip() for done in found]
    if not all(path.startswith("/") for path in paths):
        pytest.skip("the compiler has no sanitizers")
    library, target = one_set(toolchain, "native-sanitized", *FLAGS)
    # Python was not built with them, and keeps what it allocates.
    outcome = check(target, *library.info["ops"], LD_PRELOAD=" ".join(paths), ASAN_OPTIONS="detect_leaks=0")
    assert not outcome["failed"] and not outcome["conversions"] and not outcome["functions"]
