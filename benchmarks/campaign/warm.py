"""Stage warm: compile every kernel of the manifest for this GPU, so that no later stage waits for the compiler.

What was compiled is loaded too: that a kernel asks for more than this GPU has shows there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from fastvit.benchmarks.campaign.output import passed_if, report

PROCESSES = 16


def warm(out: Path) -> str:
    """A pool of processes compiles; how long each kernel took, its registers and its spills go to the log."""
    from fastvit.kernels import manifest

    started = time.monotonic()
    entries = manifest.entries()
    workers = min(len(os.sched_getaffinity(0)), PROCESSES)
    failed = 0
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_warm_entry, index): entry for index, entry in enumerate(entries)}
        for future in as_completed(waiting):
            name, error = waiting[future].name, future.exception()
            if error is None:
                report(kernel=name, **future.result())
            else:
                failed += 1
                report(kernel=name, error=str(error))
                print(f"{name}: {error}", flush=True)
    figure = f"{len(entries) - failed} of {len(entries)} kernels compiled"
    print(f"{figure} in {time.monotonic() - started:.0f} s by {workers} processes")
    report(figure=figure)
    return passed_if(failed == 0)


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
    for parameter in function.params:
        if parameter.is_constexpr:
            continue
        if parameter.name in pointers:
            arguments[parameter.name] = MockTensor(dtypes[pointers[parameter.name]])
        else:  # never specialised on, so that any value will do
            arguments[parameter.name] = 1.0 if "fp" in parameter.annotation_type else 64
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages}
    kernel = function.warmup(grid=(1,), **arguments, **entry.constants_by_name, **options)
    if torch.cuda.is_available():
        kernel._init_handles()  # what a first launch does; Triton has no public name for it
    return kernel
