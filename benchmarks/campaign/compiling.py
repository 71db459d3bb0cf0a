"""Stages build and warm: what is compiled before anything is tested, so that no later stage waits for a compiler."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from fastvit import cuda
from fastvit.backend import available_backends
from fastvit.benchmarks.campaign.output import report, run_program
from fastvit.validation.report import FAILED, PASSED, SKIPPED

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_extension.py"
BUILT, NOT_BUILT = "built: ", "not built: "  # how the last line of the tool starts
PROCESSES = 16


def build(out: Path, device: str = "cuda", tool: Path = TOOL) -> str:
    """The C++/CUDA extension, for this GPU alone; without it the later stages go on with Triton.

    What the compilers print goes to the log. Where a tool is missing that it takes, the stage is skipped.
    """
    status, words = _built(architecture_of(*torch.cuda.get_device_capability(device)), tool)
    found = available_backends(device)
    if status == PASSED and found["cuda"]:
        status, words = FAILED, f"{words}, and can't run: {found['cuda']}"
    print(words, flush=True)
    report(figure=words, backends=found)
    return status


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


def warm(out: Path) -> str:
    """A pool of processes compiles every kernel of the manifest, and loads it: that a kernel asks for more than this
    GPU has shows there. How long each took, its registers and its spills go to the log."""
    from fastvit.kernels import manifest

    started = time.monotonic()
    entries = manifest.entries()
    workers = min(len(os.sched_getaffinity(0)), PROCESSES)
    failed = 0
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_warm_entry, index): entry.name for index, entry in enumerate(entries)}
        for future in as_completed(waiting):
            name, error = waiting[future], future.exception()
            if error is None:
                report(kernel=name, **future.result())
            else:
                failed += 1
                report(kernel=name, error=str(error))
                print(f"{name}: {error}", flush=True)
    figure = f"{len(entries) - failed} of {len(entries)} kernels compiled"
    print(f"{figure} in {time.monotonic() - started:.0f} s by {workers} processes")
    report(figure=figure)
    return FAILED if failed else PASSED


def _warm_entry(index: int) -> dict[str, Any]:
    """Of an entry: seconds, and where there is a GPU what Triton says of the loaded kernel."""
    from fastvit.kernels import manifest

    started = time.monotonic()
    kernel = warm_entry(manifest.entries()[index])
    found = {"compile_seconds": round(time.monotonic() - started, 2)}
    return found | {name: getattr(kernel, name) for name in ("n_regs", "n_spills") if hasattr(kernel, name)}


def warm_entry(entry: Any) -> Any:
    """Compile one entry along the very path of a launch, so that the launch finds it in the cache, and load it where
    there is a GPU."""
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
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    kernel = function.warmup(grid=(1,), **arguments, **entry.constants_by_name, **options)
    if torch.cuda.is_available():
        kernel._init_handles()  # what a first launch does; Triton has no public name for it
    return kernel
