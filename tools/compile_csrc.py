"""Compile the CUDA C++ kernels for GPUs that need not be there, and check what comes out.

    python tools/compile_csrc.py [--target 80 --target 90a --target 100] [--json]

A row is one instantiation on one target: registers (and those of its roles, where warps have some), stack, spilled
bytes, shared memory (of the products: what they are launched with), matrix instructions and the widths of asynchronous
copies, loads and stores, read from the machine code. Fails on any stack or spill, on a product without the instructions
it is named after, on copies narrower than its vectors, on roles that take more registers than the block has or wait for
one another in the loop of the product, on narrow loads and stores where a kernel is for wide ones, and where the
objects of a target do not link. Without nvcc nothing is checked, which is said, and is no failure: the package needs no
CUDA toolkit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from build_extension import ONLY_SM90A, SOURCES

TARGETS = ("80", "90a", "100")
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-c")
MULTICAST = "multicast"  # among the copies: bulk copies to several blocks
SHORT = (
    ("fastvit::", ""), ("void ", ""), ("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("unsigned char", "u8"),
    ("float", "fp32"), ("(int)", ""),
)  # fmt: skip


@dataclass
class Row:
    """One instantiation on one target; `copies` are the widths in bytes of copies from global to shared memory, `mma`
    the matrix instructions, those of warpgroups with how often they stand in the code, `roles` the registers that
    warpgroups keep or ask for, and `waits` what stops threads in the innermost loop of warpgroups' products."""

    target: str
    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    mma: str = "-"
    copies: str = "-"
    loads: str = "-"
    stores: str = "-"
    roles: str = "-"
    waits: str = "-"
    problems: list[str] = field(default_factory=list)


def compile_file(source: Path, target: str, nvcc: str, objects: Path) -> list[Row]:
    """All kernels of a source for one target. Its object file is left in the folder of the target, to be linked."""
    folder = objects / target / source.stem
    folder.mkdir(parents=True)
    defines = ["-DFASTVIT_HAS_SM90A"] if target == "90a" else []
    command = [nvcc, *FLAGS, *defines, f"-arch=sm_{target}", "-o", str(folder.with_suffix(".o")), str(source)]
    done = subprocess.run([*command, "--keep", "--keep-dir", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[0]
        return [Row(target, source.name, 0, 0, 0, 0, problems=[f"does not compile: {message}"])]
    (cubin,) = folder.glob("*.cubin")
    sass = subprocess.run([disassembler(nvcc), str(cubin)], capture_output=True, text=True, check=True)
    shutil.rmtree(folder)
    code = dict(_functions(sass.stdout))
    rows = list(_usage(done.stderr, target))
    for name, row in rows:
        _read_code(row, code.get(name, ""))
        row.problems = list(problems(row))
    return [row for _, row in rows]


def link_problems(target: str, nvcc: str, objects: Path) -> Iterator[str]:
    """Why the object files of a target make no library: what is defined twice, or nowhere."""
    files = sorted(map(str, (objects / target).glob("*.o")))
    command = [nvcc, "-shared", "-Xlinker", "--no-undefined", "-o", str(objects / f"{target}.so"), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = re.findall(r"((?:multiple definition|undefined reference)[^;\n]*)", done.stderr)
        yield from told[:3] or [done.stderr.strip()[-200:] or "no message"]


def problems(row: Row) -> Iterator[str]:
    """The rules a kernel breaks."""
    if row.stack or row.spills:
        yield f"{row.stack} bytes of stack, {row.spills} bytes spilled"
    # WIDE: single words are add_norm's factors and statistics.
    if re.fullmatch(r"(add_norm|bias_act|split_heads)_\w+<(?:\w+, )*true>", row.kernel):
        for what, widths in (("loads", row.loads), ("stores", row.stores)):
            if widths not in ("16", "4, 16"):
                yield f"{what} of {widths} bytes, 16 are expected"
    product = Product.of(row.kernel)
    if product is None:
        return
    if not row.mma.startswith(product.instruction):
        yield f"no {product.instruction}"
    if row.copies != product.copies():
        yield f"copies of {row.copies} bytes, {product.copies()} are expected"
    if product.producers:
        yield from _role_problems(row, product)


def _role_problems(row: Row, product: Product) -> Iterator[str]:
    """What a kernel with producers breaks: registers move from them to the consumers, of those the block has, and no
    consumer waits for other threads than through an mbarrier."""
    given, taken = [int(count) for count in row.roles.split(", ")] if row.roles.count(",") == 1 else (0, 0)
    wanted, there = product.producers * given + product.threads * taken, row.registers * product.all_threads
    if not 0 < given < row.registers < taken or wanted > there:
        yield f"roles of {row.roles} registers a thread, of a block that has {there}"
    if row.waits != "-":
        yield f"{row.waits} in the loop of the product"


@dataclass(frozen=True)
class Product:
    """What the name of a product's instantiation says: op<image, vector, compute tile, way of multiplying>."""

    op: str
    image: str
    vector: int
    compute: str
    tile: tuple[int, ...]  # BM, BN, BK, WARP_M, WARP_N, STAGES, BLOCKS
    way: str

    @staticmethod
    def of(kernel: str) -> Product | None:
        """None for a kernel that is no product."""
        parts = re.fullmatch(r"patch_embed_(\w+)<(\w+), (\d+), (\w+) ([\dx]+), (\w+)>", kernel)
        if parts is None:
            return None
        tile = tuple(int(size) for size in parts[5].split("x"))
        return Product(parts[1], parts[2], int(parts[3]), parts[4], tile, parts[6])

    @property
    def threads(self) -> int:
        """That multiply."""
        rows, columns, _, warp_rows, warp_columns, *_ = self.tile
        return rows // warp_rows * (columns // warp_columns) * 32

    @property
    def producers(self) -> int:
        """Threads that load for the others: PRODUCERS in csrc/patch_embed_stream.h."""
        return 128 if self.op == "forward_stream" else 0

    @property
    def all_threads(self) -> int:
        """Of a block."""
        return self.threads + self.producers

    @property
    def size(self) -> int:
        return 4 if self.compute == "fp32" else 2

    @property
    def instruction(self) -> str:
        """What the machine code must hold."""
        if self.way.startswith("Warpgroup"):
            return f"HGMMA.64x{self.tile[1]}x16 x {self.tile[2] // 16}"
        if self.way.startswith("MultiplyAdds"):
            return "FFMA"
        return "HMMA.16816" if self.size == 2 else "HMMA.1688"

    def copies(self) -> str:
        """Widths of the asynchronous copies: weights by 16 bytes, pixels of the compute type by their vectors. A
        stream's weights are bulk copies to all blocks of the cluster."""
        is_stream = self.op == "forward_stream"
        widths = set() if is_stream else {16}
        if self.image == self.compute and self.vector * self.size >= 4:
            widths.add(min(16, self.vector * self.size))
        if self.op.endswith("weight_gradient") and self.size == 4:
            widths.add(4)  # gradients of widths that no vector divides
        return ", ".join([*map(str, sorted(widths)), *([MULTICAST] if is_stream else [])])

    @property
    def shared_bytes(self) -> int:
        """As csrc/pipeline.h, ForwardMemory, StreamMemory and WeightGradientMemory in csrc/ have it."""
        rows, columns, depth, _, _, stages, _ = self.tile
        pipeline = stages * (rows + columns) * depth * self.size
        is_packed = self.op.startswith("packed_")
        if self.op.endswith("weight_gradient"):
            return pipeline + stages * depth * (32 if is_packed else 16)
        slabs = self.threads // 32 * 16 * (32 + 8) * 4
        if self.op == "forward_stream":
            return pipeline + slabs + rows * 8 + stages * 16
        return max(pipeline, slabs) + rows * (16 if is_packed else 8)


def _usage(log: str, target: str) -> Iterator[tuple[str, Row]]:
    """What ptxas says of each kernel, by mangled name."""
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if name is None or registers is None or stack is None:
            raise RuntimeError(f"ptxas reports no resource usage: {part[:300]!r}")
        spills = int(stack[2]) + int(stack[3])
        static = re.search(r"(\d+) bytes smem", part)
        shared = int(static[1]) if static else 0
        yield name[1], Row(target, name[1], int(registers[1]), int(stack[1]), spills, shared)


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"\n\.text\.", sass)[1:]:
        name, _, code = part.partition(":")
        yield name, code


def _read_code(row: Row, code: str) -> None:
    mma = Counter(re.findall(r"HGMMA\.\d+x\d+x\d+|HMMA\.\d+", code))
    named = (f"{name} x {count}" if name.startswith("HGMMA") else name for name, count in sorted(mma.items()))
    row.mma = ", ".join(named) or ("FFMA" if "FFMA" in code else "-")
    row.copies = _widths(re.findall(r"LDGSTS\.E(?:\.\w+)*", code))
    if re.search(r"UBLKCP\.\S*MULTICAST", code):
        row.copies = MULTICAST if row.copies == "-" else f"{row.copies}, {MULTICAST}"
    row.loads = _widths(re.findall(r"\bLDG\.E(?:\.\w+)*", code))
    row.stores = _widths(re.findall(r"\bSTG\.E(?:\.\w+)*", code))
    counts = sorted(int(count, 16) for count in re.findall(r"USETMAXREG\.\S+ (?:UP\d, )?(0x\w+)", code))
    row.roles = ", ".join(map(str, counts)) or "-"
    row.waits = ", ".join(sorted(set(re.findall(r"\b(?:BAR\.SYNC|MEMBAR)\b", _product_loop(code))))) or "-"
    row.kernel = _readable(row.kernel)
    product = Product.of(row.kernel)
    row.shared += product.shared_bytes if product else 0


def _product_loop(code: str) -> str:
    """The shortest loop that has a warpgroup's product, "" where there is none."""
    labels = {found[1]: found.start() for found in re.finditer(r"(\.L_x_\d+):", code)}
    jumps = ((labels.get(jump[1], jump.end()), jump.end()) for jump in re.finditer(r"BRA[^;\n]*`\((\.L_x_\d+)\)", code))
    return min((code[to:end] for to, end in jumps if "HGMMA" in code[to:end]), key=len, default="")


def _widths(instructions: Sequence[str]) -> str:
    """Distinct widths in bytes, the narrowest first."""
    bits = {next((int(w) for w in ("128", "64") if f".{w}" in i), 8 if ".U8" in i else 16 if ".U16" in i else 32)
            for i in instructions}  # fmt: skip
    return ", ".join(str(width // 8) for width in sorted(bits)) or "-"


def _readable(mangled: str) -> str:
    filter_ = shutil.which("c++filt") or shutil.which("cu++filt")
    if filter_ is None:
        return mangled
    name = subprocess.run([filter_, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").rpartition("(")[0]
    for long, short in SHORT:
        name = name.replace(long, short)
    name = re.sub(r"(\w+)<Tile<[^>]*> ?>", r"\1", name)  # a way of multiplying, whose tile is named before it
    tile = r"Tile<(\w+), ([^>]*)>"
    return re.sub(tile, lambda found: f"{found[1]} {found[2].replace(', ', 'x')}", name).replace(" >", ">")


def disassembler(nvcc: str) -> str:
    """nvdisasm: of the toolkit where it has one, else of Triton's wheel."""
    # nvcc on the path may be a script that calls the real one, which tells where it is.
    told = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    here = re.search(r"_HERE_=(\S+)", told)
    folders = [Path(here[1]) if here else Path(nvcc).parent]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for folder in folders:
        if (folder / "nvdisasm").exists():
            return str(folder / "nvdisasm")
    raise FileNotFoundError("nvdisasm is neither in the CUDA toolkit nor in a Triton wheel (pip install triton)")


def _size(source: Path) -> int:
    """Of a source, in instantiations, roughly: those of the products are compiled for minutes."""
    return source.read_text().count("template void launch_")


def print_table(rows: Sequence[Row]) -> None:
    """Plain text, so that a log keeps it whole."""
    header = ("target", "kernel", "registers", "roles", "stack", "spills", "shared", "mma", "copies", "loads", "stores")
    table = [header, *(tuple(str(getattr(row, name)) for name in header) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 1 if a kernel breaks a rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", action="append", help=f"such as 90a; default: {', '.join(TARGETS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of the table")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("csrc: not compiled, nvcc is not here (the package works without it)")
        return 0
    targets = options.target or TARGETS
    sources = sorted(SOURCES.glob("*.cu"), key=_size, reverse=True)  # the longest first: all cores end together
    jobs = [(source, target) for target in targets for source in sources]
    jobs = [job for job in jobs if job[1] == "90a" or not job[0].name.endswith(ONLY_SM90A)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = Path(folder)
        rows = [row for found in pool.map(lambda job: compile_file(*job, nvcc, objects), jobs) for row in found]
        for target in targets:
            found = list(link_problems(target, nvcc, objects))
            rows += [Row(target, "all of them, linked", 0, 0, 0, 0, problems=found)] if found else []
    rows.sort(key=lambda row: (row.target, row.kernel))
    if options.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    else:
        print_table(rows)
    failed = [row for row in rows if row.problems]
    for row in failed:
        print(f"FAIL sm_{row.target} {row.kernel}: {'; '.join(row.problems)}")
    if not options.json:
        print(f"csrc: {len(rows)} rows, {len(targets)} targets: {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
