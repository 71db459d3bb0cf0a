"""What this machine has: versions, devices, backends and why one is missing."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import torch
from rich.table import Table

from fastvit import cuda, native
from fastvit._version import __version__
from fastvit.backend import available_backends, resolve
from fastvit.benchmarks.rows import installed_versions, processor
from fastvit.kernels.manifest import TARGETS
from fastvit.validation.ops import OPS

# First and last minor version that the tests are run with.
TESTED = {"torch": ((2, 11), (2, 14)), "triton": ((3, 6), (3, 8))}
PACKAGES = ("fastvit", "torch", "triton", "numpy", "timm", "torchvision", "transformers")


def collect() -> dict[str, Any]:
    """Everything `fastvit info` shows, as plain values."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": versions(),
        "system": {
            "platform": platform.platform(),
            "processor": processor(),
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": gpus(),
        "backends": {kind: available_backends(kind) for kind in kinds},
        "chosen": {kind: chosen(kind) for kind in kinds},
        "compiled_targets": compiled_targets(),
        "extension": extension(),
        "native": native_library(),
        "warnings": version_warnings(versions()) + extension_warnings(),
    }


def chosen(device_type: str) -> dict[str, str]:
    """For each op the backend of a call that names none, where no tuning table does; or why there is none."""
    return {op: _chosen(device_type, op) for op in OPS}


def _chosen(device_type: str, op: str) -> str:
    try:
        return resolve(None, device_type, False, op)
    except (RuntimeError, ValueError) as error:  # of FASTVIT_BACKEND
        return str(error)


def versions() -> dict[str, str]:
    """Version of each package; "" for one that is not installed. Imports none of them."""
    found = {"python": platform.python_version(), **installed_versions(PACKAGES)}
    found["fastvit"] = found["fastvit"] or __version__  # of an uninstalled checkout
    found["torch"] = torch.__version__  # the distribution's metadata leaves out which build it is
    return found


def version_warnings(found: dict[str, str]) -> list[str]:
    """A line for each package outside the tested versions. They may well work: nothing is refused."""
    warnings = []
    for name, (first, last) in TESTED.items():
        match = re.match(r"(\d+)\.(\d+)", found.get(name, ""))
        if match and not first <= (int(match[1]), int(match[2])) <= last:
            tested = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
            warnings.append(f"{name} {found[name]} is untested; tested are {tested}. Run: fastvit validate --quick")
    return warnings


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_gib": round(found.total_memory / 2**30, 1),
        }
        for found in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def compiled_targets() -> dict[str, str]:
    """For each kind of kernel, the GPU targets it is compiled for, and when."""
    return {
        "triton": ", ".join(f"sm_{target}" for target in TARGETS) + " (compiled at first use)",
        "cuda": ", ".join(cuda.architectures()) if not cuda.why_missing() else "none",
    }


def extension() -> dict[str, str]:
    """The library of the C++/CUDA extension, or why there is none and the command that builds it."""
    missing = cuda.why_missing()
    how_to_get = cuda.how_to_get() if missing else ""
    return {"library": "" if missing else str(cuda.LIBRARY.path), "why_missing": missing, "how_to_get": how_to_get}


def native_library() -> dict[str, Any]:
    """The library for the processor and the instruction set that it runs with, or why there is none, as `extension`."""
    reason = native.why_missing() or native.why_not_loaded()
    return {
        "library": "" if reason else str(native.LIBRARY.path),
        "instruction_set": "" if reason else native.instruction_set(),
        "ops": [] if reason else list(native.ops()),
        "why_missing": reason,
        "how_to_get": native.how_to_get() if reason else "",
    }


def extension_warnings() -> list[str]:
    """A line for each library that is older than the sources beside it."""
    return [
        f"{name} was built from other sources than those in csrc/. Run: {package.how_to_get()}"
        for name, package in (("the C++/CUDA extension", cuda), ("the library for the processor", native))
        if package.is_outdated()
    ]


def tables(found: dict[str, Any]) -> list[Table]:
    """Two tables for the terminal: what is here, and the backends."""
    about = Table(show_header=False, title="FastViT", title_justify="left")
    for name, value in found["versions"].items():
        about.add_row(name, value or "not installed")
    system = found["system"]
    about.add_row("processor", f"{system['processor']}, {system['cores']} cores, {system['cpu_capability']}")
    about.add_row("platform", system["platform"])
    for gpu in found["gpus"]:
        about.add_row("GPU", f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB")
    if not found["gpus"]:
        about.add_row("GPU", "none found by torch")
    for name, targets in found["compiled_targets"].items():
        about.add_row(f"{name} targets", targets)
    for name, library in (("cuda extension", found["extension"]), ("native library", found["native"])):
        missing = f"{library['why_missing']}; to get it: {library['how_to_get']}"
        with_set = f", {library['instruction_set']}" if library.get("instruction_set") else ""
        about.add_row(name, f"{library['library']}{with_set}" if library["library"] else missing)
    for kind, names in found["chosen"].items():
        about.add_row(f"chosen on {kind}", _summary(names))
    backends = Table("backend", "device", "runs here", "why not", title="Backends", title_justify="left")
    for kind, reasons in found["backends"].items():
        for name, reason in reasons.items():
            backends.add_row(name, kind, "[red]no[/red]" if reason else "[green]yes[/green]", reason)
    return [about, backends]


def _summary(names: dict[str, str]) -> str:
    """Of the backends of ops: one for all, or each with its ops."""
    ops: dict[str, list[str]] = {}
    for op, name in names.items():
        ops.setdefault(name, []).append(op)
    return (
        next(iter(ops)) if len(ops) == 1 else "; ".join(f"{name}: {', '.join(listed)}" for name, listed in ops.items())
    )
