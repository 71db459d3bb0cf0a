"""The product of the ops for the processor (csrc/cpu/product.h) as a share of what a core can multiply at most.

    python tools/measure_product.py

On one core, for each instruction set that it has: multiply-adds of registers alone, which are the measured peak; the
innermost loop on operands in the nearest cache; and a whole product of D = 768 ([3136, 768] by [768, 768]) with both
operands packed on the way and the result written, as patch embedding and the projections of ViT-B have it.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from build_extension import find_toolchain
from build_native import INSTRUCTION_SETS, KERNEL_FLAGS

SOURCE = Path(__file__).resolve().with_name("product.cpp")


def main() -> int:
    toolchain, missing = find_toolchain(cuda=False)
    if toolchain is None:
        print(f"there is no {'; no '.join(missing)}")
        return 1
    print("10^9 operations a second of one core, and the share of the peak")
    print(f"{'set':12} {'operands':9} {'peak':>7} {'innermost loop':>17} {'product, D = 768':>19}")
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in INSTRUCTION_SETS.get(platform.machine(), {"portable": ()}).items():
            program = Path(folder) / name
            command = [toolchain.cxx, *KERNEL_FLAGS, *flags, f"-DFASTVIT_ISA={name}", str(SOURCE), "-o", str(program)]
            subprocess.run(command, check=True)
            measured = subprocess.run([program], capture_output=True, text=True, check=False)
            if measured.returncode:
                print(f"{name:12} this processor lacks it")
            for line in measured.stdout.splitlines():
                operands, *rates = line.split()
                peak, *others = map(float, rates)
                shares = "".join(f"{rate:12.1f} {rate / peak:5.1%}" for rate in others)
                print(f"{name:12} {operands:9} {peak:7.1f} {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
