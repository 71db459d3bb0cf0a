"""Build the ops for the processor: fastvit/native/_fastvit_native.so, from csrc/cpu/ and csrc/torch/ by a C++ compiler.

    python tools/build_native.py                        in place, as `make native` does
    python tools/build_native.py --output FILE          somewhere else

Each op of csrc/cpu/ is compiled once for each instruction set, of which one is chosen when the library is used. An op
that is not there is left out. setup.py uses this too, so nothing but the standard library is imported.

FASTVIT_BUILD_NATIVE    auto (default): build where a compiler, ninja and torch's headers are here; 0: don't; 1: fail
                        if they aren't, or if it does not compile
CXX, MAX_JOBS           as in tools/build_extension.py
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from build_extension import (
    CXX_FLAGS,
    ROOT,
    SOURCES,
    BuildError,
    Library,
    Toolchain,
    build,
    build_mode,
    digest_of,
    headers,
    leave_out,
    link_torch,
    plan_by,
)

PACKAGE = Path("fastvit") / "native"
LIBRARY = "_fastvit_native.so"
INFO = "_fastvit_native.json"
VARIABLE = "FASTVIT_BUILD_NATIVE"

# By machine; names and order are those of csrc/cpu/isa.h. The first is every processor's.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"portable": (), "avx2": _AVX2, "avx512": _AVX512, "avx512bf16": (*_AVX512, "-mavx512bf16")},
}
KERNEL_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=fast", "-fno-math-errno")
# Of what csrc/ has beside the folders cpu/ and torch/.
SHARED = ("ops.h", "views.h", "simt/queue.h")


def plan(environment: Mapping[str, str] = os.environ) -> tuple[Toolchain | None, str]:
    """The tools to build with, or None and the reason why nothing is to be built.

    Raises:
        BuildError: FASTVIT_BUILD_NATIVE has no meaning, or is 1 and something is missing.
    """
    toolchain, reason = plan_by(VARIABLE, environment, cuda=False)
    if toolchain and not sys.platform.startswith("linux"):
        toolchain, reason = None, "it is built on Linux alone"
    return toolchain, reason


def native_library(toolchain: Toolchain, sources: Path = SOURCES, flags: Sequence[str] = (), only: str = "") -> Library:
    """The library, with more flags for compiler and linker, and perhaps of one instruction set alone."""
    library = Library("native", toolchain, sources, texts(sources), "the library for the processor")
    sets = INSTRUCTION_SETS.get(platform.machine(), {"portable": ()})
    if only:
        sets, flags = {only: sets[only]}, [f"-DFASTVIT_EACH_ISA(use,op)=use({only},op)", *flags]
    for name, own in sets.items():
        is_first = ["-DFASTVIT_ISA_IS_FIRST"] if name == next(iter(sets)) else []
        library.rules[name] = [toolchain.cxx, *KERNEL_FLAGS, *own, f"-DFASTVIT_ISA={name}", *is_first, *flags]
    library.rules["cxx"] = [toolchain.cxx, *CXX_FLAGS, "-DFASTVIT_NATIVE", f"-isystem{headers(toolchain)}", *flags]
    ops = sorted((sources / "cpu").glob("*.cpp"))
    # What is for every processor comes first: of a function that several objects have, the linker takes the first.
    library.objects = [("cxx", unit, []) for unit in sorted((sources / "cpu" / "runtime").glob("*.cpp"))]
    library.objects += [("cxx", sources / "torch" / unit.name, []) for unit in ops]
    library.objects += [(name, unit, []) for name in sets for unit in ops]
    library.link = [*link_torch(toolchain), *flags]
    library.info = {"instruction_sets": list(sets), "ops": [unit.stem for unit in ops]}
    return library


def build_native(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Build the library into `folder`, or write there why it is not built, and return that reason.

    Where nothing is to be built, a library that is there is left alone: it may have been built elsewhere.

    Raises:
        BuildError: FASTVIT_BUILD_NATIVE has no meaning, or is 1 and something is missing or does not compile.
    """
    toolchain, reason = plan(environment)
    if toolchain:
        try:
            build(native_library(toolchain), folder / LIBRARY)
        except BuildError:
            if build_mode(environment, VARIABLE) == "1":
                raise
            reason = f"it did not compile where FastViT was installed; {VARIABLE}=1 makes that an error"
    if reason:
        leave_out(folder / LIBRARY, reason)
    return reason


def texts(sources: Path) -> list[Path]:
    """Everything that is compiled into the library."""
    found = [path for folder in ("cpu", "torch") for path in (sources / folder).rglob("*")]
    return sorted([*(path for path in found if path.suffix in (".h", ".cpp")), *(sources / name for name in SHARED)])


def sources_digest(sources: Path = SOURCES) -> str:
    """Of all `texts`."""
    return digest_of(sources, texts(sources))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 1 if nothing was built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="the library, somewhere else than in the package")
    options = parser.parse_args(arguments)
    try:
        if options.output:
            toolchain, reason = plan({VARIABLE: "1"})
            if toolchain is None:
                raise BuildError(reason)
            build(native_library(toolchain), options.output.resolve())
            return 0
        reason = build_native(ROOT / PACKAGE)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"not built: {reason}" if reason else f"built: {ROOT / PACKAGE / LIBRARY}")
    return 1 if reason else 0


if __name__ == "__main__":
    raise SystemExit(main())
