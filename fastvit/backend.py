"""The one place where a backend is picked, and where its launches are counted."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch

from fastvit import tuning

BACKENDS = ("reference", "cpu", "native", "triton", "cuda", "emulated")

MIN_CAPABILITY = (8, 0)  # the oldest GPU the kernels are compiled for

_environment: str | None = os.environ.get("FASTVIT_BACKEND") or None

Constant = TypeVar("Constant", str, bool)

_launches: Counter[tuple[str, str]] = Counter()


def count_launch(op: str, backend: str) -> None:
    """Note that `op` was really run by `backend`."""
    _launches[op, backend] += 1


def launch_counts() -> dict[tuple[str, str], int]:
    """Runs so far in this process, by (op, backend); the proof that a forced backend was not bypassed."""
    return dict(_launches)


def reset_launch_counts() -> None:
    """Start counting from zero."""
    _launches.clear()


class _Scopes:
    """The scopes open in one thread, the innermost last, and what they force."""

    def __init__(self) -> None:
        self.open: list[list[str | None]] = []
        self.forced: str | None = None

    def enter(self, scope: list[str | None]) -> None:
        self.open.append(scope)
        self.forced = scope[0]

    def leave(self, scope: list[str | None]) -> None:
        """Scopes in generators may end in any order, and in another thread: each takes away itself alone."""
        self.open = [other for other in self.open if other is not scope]
        self.forced = self.open[-1][0] if self.open else None


# torch.compile guards on what a plain `threading.local` holds as on any other attribute, and reads it in the thread
# that calls; of a subclass, or a ContextVar, it would keep what it saw while tracing. Backward threads never read it:
# the resolved name travels to the forward and the backward op as an argument.
_thread = threading.local()
_thread.scopes = _Scopes()  # others get theirs with their first scope


def _forced() -> str | None:
    scopes = getattr(_thread, "scopes", None)
    return None if scopes is None else scopes.forced


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force every op that this thread calls inside the `with` block to one backend; None restores the automatic choice.

    Other threads choose for themselves. A backward pass uses its forward's backend, wherever it runs.

    Raises:
        ValueError: `name` is not a known backend. Whether it can run is checked where it is used, since that
            depends on the device of the tensors.
    """
    if name is not None:
        check_known(name, "use_backend(name)")
    scopes = getattr(_thread, "scopes", None)
    if scopes is None:
        scopes = _thread.scopes = _Scopes()
    scope = [name]
    scopes.enter(scope)
    try:
        yield
    finally:
        scopes.leave(scope)


def available_backends(device: str | torch.device | None = None) -> dict[str, str]:
    """Every backend with the reason why it can't run on `device` ("" if it can).

    Args:
        device: "cpu", "cuda" or a torch.device; default: CUDA where there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = torch.device(device).type
    return {name: why_unavailable(name, device_type) for name in BACKENDS}


def resolve(requested: str | None, device_type: str, float64: bool, op: str) -> str:
    """The backend for a call: the argument, then `use_backend`, then FASTVIT_BACKEND, then the device's default.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the forced backend can't run on this device, or has no kernel for the op.
    """
    source, name = "backend", requested
    if name is None:
        source, name = "use_backend", _forced()
    if name is None:
        source, name = "FASTVIT_BACKEND", _environment
    if name is None:
        return "reference" if float64 else _automatic(device_type, op, "")
    check_known(name, source)
    reason = why_unavailable(name, device_type) or why_missing(name, op)
    if not reason and float64 and name != "reference":
        reason = "float64 is computed by the reference alone"
    if reason:
        raise RuntimeError(f"{source}: {name!r} can't run on device {device_type!r}: {reason}")
    return name


def choose(
    requested: str | None, device: torch.device, float64: bool, problem: tuple[Any, ...], rows: int | None
) -> str:
    """The backend for a call: as :func:`resolve`, but where nothing is forced, what was measured to be the fastest, and
    where nothing was measured, what suits the shape.

    Args:
        requested, float64: as in :func:`resolve`.
        device: of the tensors.
        problem: the fields of :class:`fastvit.tuning.Problem`.
        rows: B·N; None while a graph is traced, in which the choice must hold for every batch.

    Raises:
        ValueError, RuntimeError: as :func:`resolve`.
    """
    op = problem[0]
    if float64 or is_forced(requested):
        return resolve(requested, device.type, float64, op)
    if rows is not None:
        name = _usable(tuning.find(device, problem, rows), device, op)
    elif _is_tuned(device):
        _, mode, image, compute, out, shape, keep = problem
        # Sizes of a weight that are symbols become numbers here: graphs of other weights are other graphs.
        sizes = tuple([operator.index(size) for size in shape])
        name = _fastest_of_all_batches(device, op, mode, image, compute, out, sizes, keep)
    else:
        name = ""
    return name or _automatic(device.type, op, _suited(device, problem, rows))


def is_forced(requested: str | None) -> bool:
    """Whether somebody has said which backend: the argument, a scope of this thread, or FASTVIT_BACKEND."""
    return forced(requested) is not None


def forced(requested: str | None) -> str | None:
    """The backend that somebody has named, known or not; None where nobody has."""
    if requested is not None:
        return requested
    scoped = _forced()
    return _environment if scoped is None else scoped


def multiplies_at_tf32(compute_dtype: torch.dtype) -> bool:
    """Whether a GPU's products are made at TF32 precision: those of float32, where torch's convolutions may be, since
    one of them is replaced."""
    return compute_dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def check_known(name: str, source: str) -> None:
    """Raise ValueError unless `name` is one of :data:`BACKENDS`."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known: {', '.join(BACKENDS)}")


def _constant_when_traced(function: Callable[..., Constant]) -> Callable[..., Constant]:
    # What torch.compiler.assume_constant_result does, without importing the compiler (and Triton with it) for it.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_when_traced
def under_transforms() -> bool:
    """Whether torch.func transforms (grad, vmap, jvp) are at work; compiled code is guarded against others."""
    return torch._C._are_functorch_transforms_active()


@_constant_when_traced
def _automatic(device_type: str, op: str, suited: str) -> str:
    """Without a measurement: on a CPU the library for the processor where it is, else plain PyTorch; of the two that
    run on a GPU, the extension, whose launch costs less and whose kernels have no shape to be compiled for. `suited`
    goes before them where it is one of them, and an op that one has not goes to the other."""
    if device_type == "cpu":
        return "cpu" if suited == "cpu" or not _prefers_native(op) else "native"
    if device_type != "cuda":
        return "cpu" if device_type == "meta" else "reference"
    order = ("triton", "cuda") if suited == "triton" else ("cuda", "triton")
    return next((name for name in order if _can_run(name, "cuda", op)), "reference")


def _prefers_native(op: str) -> bool:
    """Whether the library for the processor is there, is the faster one, and will be there when the op runs."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # the program may be run on another machine
        return False
    if not _can_run("native", "cpu", op):
        return False
    from fastvit.native import uses_the_processor

    return uses_the_processor()


def _suited(device: torch.device, problem: tuple[Any, ...], rows: int | None) -> str:
    """The backend that is known to be faster for such a call than the device's own, "" if there is none."""
    if device.type == "cuda":
        return "triton" if _suits_triton(problem, rows) and _is_hopper(device) else ""
    return "cpu" if _suits_tiles(problem) and _has_tiles(device.type) else ""


LARGE = 132 * 128 * 128  # values of the tokens: a tile of 128 x 128 for every multiprocessor of an H100


def _suits_triton(problem: tuple[Any, ...], rows: int | None) -> bool:
    """Whether a call is a large product for tensor cores, with rows that 16-byte copies divide.

    A graph, in which `rows` is None, is taken for large: its launches are not what it waits for.
    """
    _, _, _, compute, _, shape, _ = problem
    if len(shape) < 4 or compute not in (torch.float16, torch.bfloat16):  # without a convolution's weight: no product
        return False
    return shape[3] % 8 == 0 and shape[0] % 8 == 0 and (rows is None or rows * shape[0] >= LARGE)


def _suits_tiles(problem: tuple[Any, ...]) -> bool:
    """Whether a call is a product in bfloat16, of which the tiles of AMX make many times what other units do."""
    _, _, _, compute, out, shape, _ = problem
    return len(shape) == 4 and compute == out == torch.bfloat16


@_constant_when_traced
def _has_tiles(device_type: str) -> bool:
    """Whether the CPU has AMX, by which PyTorch's library multiplies, and ours not."""
    from fastvit.cpu.gemm import has_bfloat16_tiles

    return device_type == "cpu" and has_bfloat16_tiles()


@_constant_when_traced
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@_constant_when_traced
def _is_tuned(device: torch.device) -> bool:
    return tuning.table_of(device) is not None


@_constant_when_traced
def _fastest_of_all_batches(device: torch.device, *problem: Any) -> str:
    table = tuning.table_of(device)
    return _usable(table.lookup(tuning.Problem(*problem), None) if table else None, device, problem[0])


def _usable(choice: tuning.Choice | None, device: torch.device, op: str) -> str:
    """The backend that a table names, or where it can't run in this process the fastest of those measured that can;
    "" if nothing was measured."""
    if choice is None:
        return ""
    if choice.backend in BACKENDS and _can_run(choice.backend, device.type, op):
        return choice.backend
    for candidate in sorted(choice.times_us, key=choice.times_us.__getitem__):
        name = candidate.partition(",")[0]  # the rest is a configuration
        if name in BACKENDS and _can_run(name, device.type, op):
            return name
    return ""


def _can_run(name: str, device_type: str, op: str) -> bool:
    return not (why_unavailable(name, device_type) or why_missing(name, op))


@_constant_when_traced
def why_unavailable(name: str, device_type: str) -> str:
    """The reason why a backend can't run on a device type, "" if it can."""
    return _REASONS[name](device_type)


def _reference_reason(device_type: str) -> str:
    return ""


def _cpu_reason(device_type: str) -> str:
    return "" if device_type in ("cpu", "meta") else "it computes on the CPU only"


def _native_reason(device_type: str) -> str:
    from fastvit.native import why_unavailable

    return why_unavailable(device_type)


@lru_cache
def _triton_reason(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (Linux: pip install 'triton>=3.6')"
    if device_type == "cpu":
        return "" if triton_is_interpreted() else "on a CPU it needs TRITON_INTERPRET=1 (slow: for validation)"
    if device_type != "cuda":
        return f"there are no kernels for device {device_type!r}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if triton_is_interpreted():
        return ""
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return ""


def triton_is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _cuda_reason(device_type: str) -> str:
    from fastvit.cuda import why_unavailable

    return why_unavailable(device_type)


def _emulated_reason(device_type: str) -> str:
    if device_type != "cpu":
        return "it runs the CUDA kernels on the CPU (slow: for validation)"
    from fastvit.emulated.build import why_unavailable

    return why_unavailable()


_REASONS: dict[str, Callable[[str], str]] = {
    "reference": _reference_reason,
    "cpu": _cpu_reason,
    "native": _native_reason,
    "triton": _triton_reason,
    "cuda": _cuda_reason,
    "emulated": _emulated_reason,
}

_LIBRARIES = {"native": "cpu", "cuda": "cuda"}  # what must be loaded first, and the kind of device it is for

_PACKAGES = {
    "cpu": "fastvit.cpu",
    "native": "fastvit.native",
    "triton": "fastvit.kernels",
    "cuda": "fastvit.cuda",
    "emulated": "fastvit.emulated",
}


@_constant_when_traced
def why_missing(backend: str, op: str) -> str:
    """The reason why a backend has no part in an op, "" if it has: a file of the op's name."""
    is_there = backend == "reference" or _is_module(f"{_PACKAGES[backend]}.{op}")
    if is_there and backend == "native":  # whose library may be older than the file
        is_there = op in _native_ops()
    return "" if is_there else f"it has no kernel for {op}"


def has_op(backend: str, op: str) -> bool:
    """Whether a backend, known or not, has a kernel for an op; the reference has none."""
    return backend in _PACKAGES and not why_missing(backend, op)


@lru_cache
def _native_ops() -> tuple[str, ...]:
    from fastvit.native import ops

    return ops()


@lru_cache
def _is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@lru_cache
def implementation(backend: str, op: str) -> tuple[Callable, Callable]:
    """The (forward, backward) functions of an op in a backend: `forward` and `backward` of the file of its name.

    Raises:
        RuntimeError: the backend is of a library that is not here. A program that was compiled or exported somewhere
            else may name it; where it is here, it is loaded now.
    """
    home = _LIBRARIES.get(backend)
    if home and (reason := why_unavailable(backend, home)):
        raise RuntimeError(f"backend {backend!r}, which a program names, can't run here: {reason}")
    module = importlib.import_module(f"{_PACKAGES[backend]}.{op}")
    return module.forward, module.backward
