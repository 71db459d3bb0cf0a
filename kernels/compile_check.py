"""Compiles every entry of the manifest for GPUs that need not be there, and checks what comes out.

    python -m fastvit.kernels.compile_check [--target 80 --target 90 --target 100] [--json] [--workers N] [NAME ...]

A row of the table is one entry on one target: registers, stack, shared memory, how many programs a multiprocessor has
room for, the matrix instruction, for each operand of the product the widths in bytes of its copies from and to global
memory, and for the loop around it how many copies are still under way when it waits, and the buffers of each load.
Exits with 1 if a rule of ``problems`` is broken. A second table counts the launches of a call (see calls.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastvit.kernels import manifest
from fastvit.kernels.interpreter import interpreting
from fastvit.kernels.manifest import Entry

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a thread block may use
SHARED_RESERVED = 1024  # bytes that the system takes of each block's
REGISTERS, WARPS = 65536, 64  # of a multiprocessor, on all of them


@dataclass(frozen=True)
class Row:
    """What one entry compiles to on one target."""

    target: int
    kernel: str
    config: str
    registers: int
    stack: int
    shared: int
    mma: str
    copies: dict[str, str]  # of each operand
    programs: int = 0  # that a multiprocessor has room for
    prefetched: int | None = None  # copies under way while the loop's product waits for its own; None without copies
    buffers: str = ""  # in shared memory, of each load that has several
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory."""

    kind: str  # "async" (global to shared), "ld" or "st"
    width: int  # bytes a thread moves
    parameter: str  # the pointer its address derives from


def compile_entry(entry: Entry, target: int) -> Any:
    """Triton's compiled kernel, for a signature built from the manifest alone, as a launch would specialise it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastvit.kernels.launch import jit_function

    function = jit_function(entry)
    signature, attributes, constants = specialisation(entry, function)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=entry.options(target))


def specialisation(entry: Entry, function: Any) -> tuple[dict[str, str], dict[Any, Any], dict[str, Any]]:
    """Types of all parameters, divisibility of pointers by their place, and values of the constants."""
    pointers, values = dict(entry.pointers), entry.constants_by_name
    signature: dict[str, str] = {}
    attributes: dict[Any, Any] = {}
    constants: dict[str, Any] = {}
    for place, parameter in enumerate(function.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = values[parameter.name]
        elif parameter.name in pointers:
            signature[parameter.name] = "*" + pointers[parameter.name]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    return signature, attributes, constants


def inspect(entry: Entry, target: int) -> Row:
    """Compile an entry for a target and read the result."""
    try:
        compiled = compile_entry(entry, target)
        registers, stack = resource_usage(compiled.asm["cubin"])
        prefetched, buffers = pipeline(compiled.asm["ttgir"])
    except Exception as error:  # a compiler that fails, in whatever way, is a row of the table and not the end of it
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Row(target, entry.kernel, _config(entry), 0, 0, 0, "", {}, problems=(f"does not compile: {message}",))
    ptx = compiled.asm["ptx"]
    accesses = list(global_accesses(ptx, list(dict(entry.pointers)), _parameter_names(entry)))
    row = Row(
        target=target,
        kernel=entry.kernel,
        config=_config(entry),
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        mma=mma_instruction(ptx, entry),
        copies={
            operand.removesuffix("_ptr"): _widths(access for access in accesses if access.parameter == operand)
            for operand, _ in entry.copies
        },
        programs=room(target, registers, compiled.metadata.shared, entry.num_warps),
        prefetched=prefetched if entry.compute else None,
        buffers=buffers,
    )
    found = list(problems(entry, row))
    if any(access.parameter not in dict(entry.pointers) for access in accesses):
        found.append("an access to memory could not be traced to its tensor")
    return replace(row, problems=tuple(found))


def problems(entry: Entry, row: Row) -> Iterator[str]:
    """The rules an entry breaks on a target."""
    if row.stack:
        yield f"{row.stack} bytes of stack"
    if row.shared > SHARED_LIMIT[row.target]:
        yield f"{row.shared} bytes of shared memory, {SHARED_LIMIT[row.target]} are allowed"
    fits = entry.compute in manifest.HALF and entry.constant(entry.product_rows) >= 64 and entry.num_warps >= 4
    if row.target == 90 and fits and "wgmma" not in row.mma:
        yield "no wgmma"
    is_wide = any(least for _, least in entry.copies)
    if entry.compute and (row.prefetched == 0 or (is_wide and row.prefetched is None)):
        yield "the loop of the product waits for what it loads itself: nothing is prefetched"
    for pointer, least in entry.copies:
        operand = pointer.removesuffix("_ptr")
        if _narrowest(row.copies[operand]) < least:
            yield f"copies of {operand} narrower than {least} bytes"


def room(target: int, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor holds at a time. Registers are given out to warps by eights a thread."""
    of_a_warp = max(registers + 7, 8) // 8 * 8 * 32
    memory = SHARED_LIMIT[target] + SHARED_RESERVED
    return min(REGISTERS // (of_a_warp * warps), memory // (shared + SHARED_RESERVED), WARPS // warps)


_WAIT = re.compile(r"ttg\.async_wait\b.*\{num = (\d+)")
_BUFFERS = re.compile(r"%([a-z_]\w*?)(?:_\d+)? = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x")


def pipeline(intermediate: str) -> tuple[int | None, str]:
    """How deep loads are prefetched, read from Triton's GPU intermediate: (copies under way at the deepest wait, None
    where there is no wait; buffers of each load, named as the kernel names what it loads)."""
    waits = [int(number) for number in _WAIT.findall(intermediate)]
    buffers = ", ".join(f"{name} {number}" for name, number in _BUFFERS.findall(intermediate))
    return max(waits, default=None), buffers


def _config(entry: Entry) -> str:
    tile = "x".join(map(str, entry.tile)) or "-"
    return f"{' '.join(entry.key)} {tile} w{entry.num_warps} s{entry.num_stages}".strip()


def _widths(accesses: Iterable[Access]) -> str:
    """Distinct widths, as "16" for asynchronous copies and as "ld 2" or "st 16" for others."""
    found = {(access.kind, access.width) for access in accesses}
    return ", ".join(str(width) if kind == "async" else f"{kind} {width}" for kind, width in sorted(found)) or "-"


def _narrowest(copies: str) -> int:
    """The narrowest of the widths in a column; 0 if there is none."""
    return min((int(width) for width in re.findall(r"\d+", copies)), default=0)


def mma_instruction(ptx: str, entry: Entry) -> str:
    """The matrix instruction with its shape, "fma" for products without one, "-" where there are no products."""
    if not entry.compute:
        return "-"
    shapes = re.findall(r"(wgmma)\.mma_async\S*?\.(m\d+n\d+k\d+)|(mma)\.sync\S*?\.(m\d+n\d+k\d+)", ptx)
    found = {" ".join(part for part in shape if part) for shape in shapes}
    found |= {f"tcgen05 {kind}" for kind in re.findall(r"tcgen05\.mma\S*?kind::(\w+)", ptx)}
    return ", ".join(sorted(found)) or "fma"


# Where a copy reads from is not written in the machine code, where addresses are sums in anonymous registers. In PTX
# it can be followed: every 64-bit register is traced back through all instructions that define it (several, where a
# loop changes it) to the parameters it derives from. Values that were themselves loaded from memory end a trace, so
# that an index read from keep does not make the image's address one of keep. Of the parameters reached, exactly one
# is a pointer: the tensor that is read.
_DEFINITION = re.compile(r"^(?:@!?%p\d+\s+)?([\w.:]+)\s+(\{[^}]*\}|%\w+|_)\s*,\s*(.*)$")
_REGISTER = re.compile(r"%rd\d+")
_PARAMETER = re.compile(r"_param_(\d+)\b")
_ASYNC = re.compile(
    r"cp\.async\.c[ag]\.shared\.global\S*\s+\[[^\]]*\],\s*\[\s*(%rd\d+)[^\]]*\],\s*(0x[0-9a-fA-F]+|\d+)"
)
_PLAIN = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)\s+(.*)$")


def global_accesses(ptx: str, pointers: Sequence[str], parameters: Sequence[str]) -> Iterator[Access]:
    """Every access to global memory with the pointer parameter its address derives from.

    parameters: names in the order in which the kernel takes them, constants left out.
    """
    lines = [part.strip() for line in ptx.splitlines() for part in _without_comment(line).split(";") if part.strip()]
    sources: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        match = _DEFINITION.match(line)
        if match is None or match[1].startswith(("ld.global", "ld.shared", "st.", "atom", "red", "cp.", "setp")):
            continue
        for register in _REGISTER.findall(match[2]):
            sources[register].update(_REGISTER.findall(match[3]))
            sources[register].update(f"#{index}" for index in _PARAMETER.findall(match[3]))
    for line in lines:
        for kind, width, register in _accesses_of(line):
            reached = {parameters[index] for index in _parameters_of(register, sources) if index < len(parameters)}
            candidates = sorted(reached & set(pointers))
            yield Access(kind, width, candidates[0] if len(candidates) == 1 else "?" + "/".join(candidates))


def _without_comment(line: str) -> str:
    return line.split("//", 1)[0]


def _accesses_of(line: str) -> Iterator[tuple[str, int, str]]:
    """(kind, bytes, address register) of the accesses in a line."""
    for register, width in _ASYNC.findall(line):
        yield "async", int(width, 0), register
    for kind, vector, bits, operands in _PLAIN.findall(line):
        address = re.search(r"\[\s*(%rd\d+)", operands)
        if address is not None:
            yield kind, int(vector or 1) * int(bits) // 8, address[1]


def _parameters_of(register: str, sources: dict[str, set[str]]) -> set[int]:
    """Places of the parameters a register derives from."""
    seen, open_ends = set(), [register]
    while open_ends:
        name = open_ends.pop()
        if name not in seen:
            seen.add(name)
            open_ends.extend(sources.get(name, ()))
    return {int(name[1:]) for name in seen if name.startswith("#")}


def _parameter_names(entry: Entry) -> list[str]:
    from fastvit.kernels.launch import jit_function

    return [parameter.name for parameter in jit_function(entry).params if not parameter.is_constexpr]


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread) of a compiled kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+)\s+STACK:(\d+)", output)
    if usage is None:
        raise RuntimeError(f"cuobjdump reports no resource usage: {output!r}")
    return int(usage[1]), int(usage[2])


def _tasks(entries: Sequence[Entry], targets: Sequence[int]) -> list[tuple[Entry, int]]:
    return [(entry, target) for entry in entries for target in targets if target in entry.targets]


def check(entries: Sequence[Entry], targets: Sequence[int], workers: int) -> Iterator[Row]:
    """Rows in the order in which they are done; every process compiles one entry at a time."""
    tasks = _tasks(entries, targets)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(inspect, *task) for task in tasks]):
            yield future.result()


def run(entries: Sequence[Entry], targets: Sequence[int], workers: int, as_json: bool) -> int:
    """Check, show progress, print the table; the exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    rows: list[Row] = []
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(_tasks(entries, targets)))
        for row in check(entries, targets, workers):
            rows.append(row)
            progress.advance(task)
    rows.sort(key=lambda row: (row.target, row.kernel, row.config))
    failed = [row for row in rows if row.problems]
    if as_json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print_table(rows)
        for row in failed:
            print(f"FAIL sm_{row.target} {row.kernel} {row.config}: {'; '.join(row.problems)}")
        import triton

        print(
            f"{len(rows)} rows, {len(entries)} entries, {len(targets)} targets, Triton {triton.__version__}: "
            f"{len(failed)} failed\n"
        )
        print_calls()
    return 1 if failed or not rows else 0


def print_table(rows: Sequence[Row]) -> None:
    """Plain text, so that a log keeps it whole however wide the terminal is."""
    names = "target kernel config registers stack shared programs mma copies prefetched buffers".split()
    _print_columns([tuple(names), *(tuple(_cell(row, name) for name in names) for row in rows)])


def print_calls() -> None:
    """Launches and bytes of each op's example calls, counted."""
    from fastvit.kernels.calls import counted

    print("counted, each tensor that a launch reads or writes once:")
    header = ("call", "launches", "others", "MB", "kernels")
    _print_columns([header, *(tuple(map(str, call.cells())) for call in counted())])


def _print_columns(table: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(row: Row, name: str) -> str:
    if name == "copies":
        return "; ".join(f"{operand} {widths}" for operand, widths in row.copies.items()) or "-"
    if getattr(row, name) in (None, ""):
        return "-"
    return f"sm_{row.target}" if name == "target" else str(getattr(row, name))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compile_check", description="Compile and check every kernel offline.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only entries whose name contains one of these")
    parser.add_argument("--target", type=int, action="append", choices=manifest.TARGETS, help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of the table")
    options = parser.parse_args(arguments)
    if interpreting():
        print("compile_check: unset TRITON_INTERPRET, with it nothing is compiled", file=sys.stderr)
        return 2
    entries = [e for e in manifest.entries() if not options.names or any(name in e.name for name in options.names)]
    if not entries:
        print(f"compile_check: no entry's name contains {' or '.join(options.names)}", file=sys.stderr)
        return 2
    return run(entries, options.target or list(manifest.TARGETS), options.workers, options.json)


if __name__ == "__main__":
    sys.exit(main())
