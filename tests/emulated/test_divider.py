"""Division by multiplication is division, for every dividend that a kernel may have."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastvit.emulated import build

PROGRAM = """
#include "divider.h"
#include <cstdio>

// At multiples of the divisor and beside them, where a rounded multiplier goes wrong first, and at both ends.
static int wrong(int divisor) {
  const fastvit::Divider divider(divisor);
  const int64_t last = INT32_MAX;
  const int64_t step = int64_t{divisor} * (1 + last / divisor / 4096);
  for (int64_t base = 0; base <= last; base += step) {
    for (int64_t n = base - 1; n <= base + 1; n++) {
      if (n < 0 || n > last) continue;
      const int quotient = divider.quotient(static_cast<int>(n));
      if (quotient != n / divisor || divider.remainder(static_cast<int>(n), quotient) != n % divisor) return 1;
    }
  }
  return divider.quotient(INT32_MAX) != INT32_MAX / divisor;
}

int main() {
  for (int64_t divisor = 1; divisor <= INT32_MAX; divisor += divisor < 5000 ? 1 : divisor / 997) {
    if (wrong(static_cast<int>(divisor))) return std::printf("%lld\\n", static_cast<long long>(divisor)), 1;
  }
  const int edges[] = {INT32_MAX, INT32_MAX - 1, 1 << 30, (1 << 30) + 1, (1 << 30) - 1};
  for (int divisor : edges) if (wrong(divisor)) return std::printf("%d\\n", divisor), 1;
  return fastvit::Divider(0).quotient(7) != 7;  // of nothing: as by 1
}
"""


@pytest.mark.parametrize("fault", [False, True])
def test_quotients_and_remainders(fault: bool, tmp_path: Path) -> None:
    header = (build.SOURCES / "divider.h").read_text()
    if fault:
        changed = header.replace("31 + bits", "30 + bits")
        assert changed != header
        header = changed
    (tmp_path / "divider.h").write_text(header.replace('"simt/simt.h"', f'"{build.SOURCES}/simt/simt.h"'))
    source, program = tmp_path / "divide.cpp", tmp_path / "divide"
    source.write_text(PROGRAM)
    command = [str(build.compiler()), "-std=c++17", "-O2", "-Wno-unknown-pragmas", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == int(fault), done.stdout
