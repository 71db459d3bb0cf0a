"""Timing that is hard to fool: rivals interleaved in one process, warm-up, random data, medians and spread.

On a CPU the number of threads is fixed, and freed memory stays in the process. On a GPU each call is timed by device
events after the L2 cache has been overwritten, once as it is launched and, where it can be captured, once more by
replaying a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastvit.cpu import gemm

Call = Callable[[], object]

MIN_ROUNDS = 7
MAX_ROUNDS = 300
WARM_UP = 3
SETTLED = 12  # rounds after which glibc's heap asks the kernel for nothing more: it has been seen to take ten
L2_BYTES = 256 * 2**20  # several times the largest L2 cache
# glibc's names for what mallopt sets, and what it is set to: no block from the kernel by itself, nothing given back.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEEP_FREED = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    p20_us: float
    p80_us: float
    repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summary of samples in microseconds."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def interleave(calls: Sequence[Call], device: torch.device, seconds: float) -> list[Timing]:
    """Time several calls in turn, for about `seconds` in all, after a warm-up."""
    if not calls:
        return []
    measure = _cuda_timer(device) if device.type == "cuda" else _cpu_time
    _warm_up(calls, device, seconds)
    estimate = sum(measure(call) for call in calls) / 1e6
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(estimate, 1e-6))))
    return in_turns(calls, measure, rounds)


def in_turns(calls: Sequence[Call], measure: Callable[[Call], float], rounds: int) -> list[Timing]:
    """Measure each call once a round, in microseconds.

    Each round starts with another call, so that none always runs behind the same neighbour.
    """
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        for place in range(len(calls)):
            index = (place + number) % len(calls)
            samples[index].append(measure(calls[index]))
    return [Timing.of(values) for values in samples]


def _warm_up(calls: Sequence[Call], device: torch.device, seconds: float) -> None:
    """A few rounds; on a CPU until the heap has settled, or a quarter of the time is gone."""
    start = time.perf_counter()
    for number in range(WARM_UP if device.type == "cuda" else SETTLED):
        if number >= WARM_UP and time.perf_counter() - start > seconds / 4:
            return
        for call in calls:
            call()


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, from now on; without effect where the allocator is not glibc's.

    glibc gives large blocks back to the kernel, or does not, by what was freed before. The page faults of getting
    them again can cost more than what is timed, and fall on one contender or on another by chance.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for option, value in KEEP_FREED.items():
            library.mallopt(option, value)


def _cpu_time(call: Call) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1000


def _cuda_timer(device: torch.device) -> Callable[[Call], float]:
    flush = torch.empty(L2_BYTES // 4, dtype=torch.int32, device=device)

    def measure(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000

    return measure


def captured(call: Call, device: torch.device) -> Call:
    """The call as the replay of a CUDA graph; raises where it can't be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory held at any moment of one call, beyond what was held before; None where it can't be known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        with quiet_errors(), torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:  # fmt: skip
            call()
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    except (AttributeError, RuntimeError):
        return None
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    return peak


@contextmanager
def quiet_errors() -> Iterator[None]:
    """Keep off the error stream what the profiler writes there, past Python, of its own start and stop."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@dataclass(frozen=True)
class Ceilings:
    """What this machine does at best, measured in this run."""

    flops_per_us: float
    bytes_per_us: float

    def floor_us(self, flops: float, moved: float) -> float:
        """The least time for this much arithmetic and this much memory traffic, overlapped perfectly."""
        return max(flops / self.flops_per_us, moved / self.bytes_per_us)


@functools.lru_cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured once a process: the best rate of a large square GEMM, and of a copy that no cache holds.

    On a GPU products of float32 are made as those of convolutions are, and so of patch embeddings: by torch's default
    in TF32, while `torch.mm` takes all bits of its factors.

    On a CPU the GEMM is in float32 unless half precision is multiplied in hardware, and it is the better of PyTorch's
    two libraries: on some processors MKL, which `torch.mm` calls, runs at half the rate of oneDNN.
    """
    on_gpu = device.type == "cuda"
    size, values = (8192, 2**28) if on_gpu else (1024, 2**25)
    if not on_gpu and not (dtype == torch.bfloat16 and gemm.has_bfloat16_units()):
        dtype = torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.rand(values, device=device)
    target = torch.empty_like(source)
    calls: list[Call] = [lambda: target.copy_(source), lambda: torch.mm(left, right, out=product)]
    if not on_gpu:
        calls.append(lambda: gemm.add_product(None, left, right.t()))
    with float32_products(torch.backends.cudnn.conv.fp32_precision):  # type: ignore[attr-defined]
        copy, *products = interleave(calls, device, 1.0 if on_gpu else 0.8)
    return Ceilings(2 * size**3 / min(timing.p20_us for timing in products), 8 * values / copy.p20_us)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Make matrix products of float32 on a GPU in a precision of torch's: "ieee", "tf32" or "none"."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
