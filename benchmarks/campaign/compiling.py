"""Stages build and warm: what is compiled before anything is tested, so that no later stage waits for a compiler."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastvit import cuda
from fastvit.benchmarks.campaign.output import report, run_program, skipped
from fastvit.validation.report import FAILED, PASSED, SKIPPED

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_extension.py"
BUILT, NOT_BUILT = "built: ", "not built: "  # how the last line of the tool starts
PROCESSES = 16
EMULATION = "the emulation"


def build(out: Path, tool: Path = TOOL, capability: tuple[int, int] | None = None) -> str:
    """The C++/CUDA extension, for this GPU alone; skipped where one of the same sources is there already and loads,
    such as a library that was built elsewhere and came with the tree. Without it the later stages go on with Triton.

    What the compilers print goes to the log. Where a tool is missing that it takes, the stage is skipped.
    """
    if not cuda.why_missing() and cuda.build_info().get("sources") and not cuda.is_outdated():
        reason = _why_not_running()
        if not reason:
            return skipped(f"not needed: it loads, built for {', '.join(cuda.architectures())} with the same sources")
        print(f"the library that is here can't run: {reason}", flush=True)
    architecture = architecture_of(*(capability or torch.cuda.get_device_capability()))
    status, words = _built(architecture, tool)
    reason = _why_not_running() if status == PASSED else ""
    if reason:
        status, words = FAILED, f"{words}, and can't run: {reason}"
    print(words, flush=True)
    report(figure=words)
    return status


def _why_not_running() -> str:
    """Why the library can't run, by a fresh attempt to load it."""
    cuda.why_unavailable.cache_clear()
    cuda.why_not_loaded.cache_clear()
    return cuda.why_unavailable("cuda")


def architecture_of(major: int, minor: int) -> str:
    """What FASTVIT_CUDA_ARCHS calls the GPUs of a compute capability: "80", and "90a" for Hopper's warpgroups."""
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def _built(architecture: str, tool: Path) -> tuple[str, str]:
    """Build; a status, and words for it."""
    if not tool.exists():
        return SKIPPED, f"{NOT_BUILT}there is no {tool}: run this from a checkout"
    started = time.monotonic()
    _, lines = run_program([sys.executable, "-u", str(tool)], print, {"FASTVIT_CUDA_ARCHS": architecture})
    last = next((line for line in reversed(lines) if line), "it said nothing")
    if last.startswith(BUILT):
        return PASSED, f"built for sm_{architecture} in {time.monotonic() - started:.0f} s"
    words = NOT_BUILT + last.removeprefix(NOT_BUILT).removeprefix("error: ")
    if cuda.is_outdated():
        words = f"{words}; what is measured is an older build"
    return SKIPPED if last.startswith(NOT_BUILT) else FAILED, words


def warm(out: Path, every: int = 1, target: int = 0) -> str:
    """A pool of processes compiles every kernel of the manifest, or every so-manieth, and loads it: that a kernel asks
    for more than this GPU has shows there. How long each took, its registers and its spills go to the log. The
    emulation that primitives are compared with is compiled beside them.

    With `target`, such as 90, they are compiled for a GPU that need not be there, and nothing is loaded.
    """
    from fastvit.kernels import manifest

    os.environ.pop("TRITON_INTERPRET", None)  # for the processes of the pool
    started = time.monotonic()
    entries = manifest.entries()
    chosen = range(0, len(entries), every)
    workers = min(len(os.sched_getaffinity(0)), PROCESSES)
    failed = 0
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_warm_emulation): EMULATION}  # first, since it takes longest
        waiting |= {pool.submit(_warm_entry, index, target): entries[index].name for index in chosen}
        for future in as_completed(waiting):
            name, error = waiting[future], future.exception()
            if error is None:
                report(kernel=name, **future.result())
            else:
                failed += name != EMULATION  # which the stage that needs it will judge
                report(kernel=name, error=str(error))
                print(f"{name}: {error}", flush=True)
    figure = f"{len(chosen) - failed} of {len(chosen)} kernels compiled"
    print(f"{figure} in {time.monotonic() - started:.0f} s by {workers} processes")
    report(figure=figure)
    return FAILED if failed else PASSED


def _warm_emulation() -> dict[str, Any]:
    """Seconds."""
    from fastvit.emulated.build import library

    started = time.monotonic()
    library()
    return {"compile_seconds": round(time.monotonic() - started, 2)}


def _warm_entry(index: int, target: int) -> dict[str, Any]:
    """Of an entry: seconds, and where there is a GPU what Triton says of the loaded kernel."""
    from fastvit.kernels import manifest
    from fastvit.kernels.launch import target_of

    if target:
        _pretend(target)
    started = time.monotonic()
    kernel = warm_entry(manifest.entries()[index], target or target_of(torch.device("cuda")), load=not target)
    found = {"compile_seconds": round(time.monotonic() - started, 2)}
    return found | {name: getattr(kernel, name) for name in ("n_regs", "n_spills") if hasattr(kernel, name)}


def _pretend(target: int) -> None:
    """Give Triton, in this process, a driver that only names its GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    names = {"get_current_target": GPUTarget("cuda", target, 32), "get_current_device": 0, "get_current_stream": 0}
    driver.set_active(SimpleNamespace(**{name: lambda *_, value=value: value for name, value in names.items()}))


def warm_entry(entry: Any, target: int, load: bool = True) -> Any:
    """Compile one entry along the very path of a launch on such a GPU, so that the launch finds it in the cache, and
    load it."""
    from triton.runtime.jit import MockTensor

    from fastvit.kernels import manifest
    from fastvit.kernels.launch import jit_function

    dtypes = {name: dtype for dtype, name in manifest.NAMES.items()}
    pointers = dict(entry.pointers)
    function = jit_function(entry)
    arguments: dict[str, Any] = {}
    for parameter in (parameter for parameter in function.params if not parameter.is_constexpr):
        if parameter.name in pointers:
            arguments[parameter.name] = MockTensor(dtypes[pointers[parameter.name]])
        else:  # never specialised on, so that any value will do
            arguments[parameter.name] = 1.0 if "fp" in parameter.annotation_type else 64
    kernel = function.warmup(grid=(1,), **arguments, **entry.constants_by_name, **entry.options(target))
    if load:
        kernel._init_handles()  # what a first launch does; Triton has no public name for it
    return kernel
