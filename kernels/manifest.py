"""Every specialisation of every kernel, as data. A launcher can run nothing else.

An entry fixes what Triton compiles for: element types, constants, warps, stages, and whether pointers are 16-byte
aligned. Integers are never specialised on. Entries are declared beside their kernels: `ENTRIES` of each file is where
launchers look one up, and `entries` gathers them all, so that ``compile_check`` compiles each for all targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastvit.discovery import Declared

NAMES = {
    torch.uint8: "u8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
TARGETS = (80, 90, 100)
HALF = ("bf16", "fp16")
FLOATS = ("fp32", *HALF)
ROUNDINGS = (
    *((dtype, dtype) for dtype in FLOATS),
    *(("fp32", half) for half in HALF),
    *((half, "fp32") for half in HALF),
)  # from, to
MOST_REGISTERS = 255
TWO_PROGRAMS = 128  # registers of a thread with which two programs of 8 warps share a multiprocessor
Registers = int | dict[int, int] | None  # of a thread, on every target or by target; None leaves it to the compiler
ALIGNMENTS = (("aligned", 16), ("unaligned", 1))  # name, elements that divide every stride


@dataclass(frozen=True)
class Entry:
    """One compilation of one kernel."""

    kernel: str  # what the tables call it
    module: str  # in fastvit.kernels
    function: str  # in the module
    key: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]  # parameter, element type
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    compute: str = ""  # dtype of the operands of its products; "" where there are none
    product_rows: str = "BLOCK_M"  # the constant that says how many rows the tile of a product has
    copies: tuple[tuple[str, int], ...] = ()  # pointers to its operands, and the bytes that a copy must have at least
    max_registers: Registers = field(default=None, hash=False)  # where the compiler would set itself another limit
    targets: tuple[int, ...] = TARGETS  # compute capabilities it is meant for, times ten

    def options(self, target: int) -> dict[str, int]:
        """What the compiler is told for a compute capability, times ten."""
        limit = self.max_registers
        limit = limit.get(target) if isinstance(limit, dict) else limit
        return dict(num_warps=self.num_warps, num_stages=self.num_stages, **({"maxnreg": limit} if limit else {}))

    @property
    def constants_by_name(self) -> dict[str, Any]:
        return dict(self.constants)

    def constant(self, name: str) -> Any:
        return self.constants_by_name[name]

    @property
    def name(self) -> str:
        return " ".join((self.kernel, *self.key))

    @property
    def tile(self) -> tuple[int, ...]:
        constants = self.constants_by_name
        return tuple(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in constants)


class Entries(dict[tuple[str, ...], Entry]):
    """The entries of one file, by kernel and key."""

    def __init__(self, module: str) -> None:
        """`module`: the `__name__` of the file."""
        self.module = module.rpartition(".")[2]

    def add(
        self,
        kernel: str,
        key: tuple[str, ...],
        pointers: dict[str, str],
        constants: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 2,
        function: str = "",
        **more: Any,
    ) -> None:
        """One more; pointers by name without their ending _ptr, `function` by default the kernel's name."""
        place = (kernel, *key)
        assert place not in self, place
        types = tuple((f"{name}_ptr", element) for name, element in pointers.items())
        self[place] = Entry(
            kernel, self.module, function or kernel, key, types, tuple(constants.items()), num_warps, num_stages, **more
        )

    def find(self, kernel: str, *key: str | torch.dtype) -> Entry | None:
        """The entry of a kernel, dtypes in the key by the names they have there."""
        return self.get((kernel, *(NAMES.get(part, "") if isinstance(part, torch.dtype) else part for part in key)))

    def one(self, kernel: str, *key: str | torch.dtype) -> Entry:
        """The entry of a kernel that is known to have one."""
        entry = self.find(kernel, *key)
        assert entry is not None, (kernel, *key)
        return entry


def alignment(is_aligned: bool) -> str:
    """Its name in a key."""
    return "aligned" if is_aligned else "unaligned"


def entries() -> tuple[Entry, ...]:
    """The manifest."""
    declared: Declared[Entries] = Declared("fastvit.kernels", "ENTRIES")
    return tuple(entry for found in declared.values() for entry in found.values())
