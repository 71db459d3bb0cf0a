"""Stage warm: compile every kernel of the manifest for this GPU, so that no later stage waits for the compiler."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fastvit.benchmarks.campaign.output import passed_if, report

PROCESSES = 16


def warm(out: Path) -> str:
    """A pool of processes compiles; how long each kernel took goes to the log."""
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
                report(kernel=name, compile_seconds=round(future.result(), 2))
            else:
                failed += 1
                report(kernel=name, error=str(error))
                print(f"{name}: {error}", flush=True)
    figure = f"{len(entries) - failed} of {len(entries)} kernels compiled"
    print(f"{figure} in {time.monotonic() - started:.0f} s by {workers} processes")
    report(figure=figure)
    return passed_if(failed == 0)


def _warm_entry(index: int) -> float:
    from fastvit.kernels import manifest

    started = time.monotonic()
    warm_entry(manifest.entries()[index])
    return time.monotonic() - started


def warm_entry(entry: Any) -> Any:
    """Compile one entry along the very path of a launch, so that the launch finds it in the cache."""
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
    return function.warmup(grid=(1,), **arguments, **entry.constants_by_name, **options)
