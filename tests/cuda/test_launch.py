"""A launch that CUDA refuses. Two functions of CUDA's runtime are replaced, so that it takes nvcc and no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
REPLACED = ("cudaFuncSetAttribute", "cudaGetLastError")
PROGRAM = """
#include <cstdio>
#include "simt/launch.h"

cudaError_t remembered = cudaSuccess;

extern "C" cudaError_t __wrap_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return remembered = cudaErrorInvalidValue;
}

extern "C" cudaError_t __wrap_cudaGetLastError() {
  const cudaError_t last = remembered;
  remembered = cudaSuccess;
  return last;
}

__global__ void nothing(int) {}

int main() {
  try {
    simt::launch(simt::Queue(), nothing, 1, 1, 32, 1 << 20, 0);
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
  std::puts(cudaGetErrorName(remembered));
}
"""


def test_a_refused_launch_leaves_no_error_for_the_next(tool: Any, tmp_path: Path) -> None:
    nvcc = tool._nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not here")
    source, program = tmp_path / "launch.cu", tmp_path / "launch"
    source.write_text(PROGRAM, encoding="utf-8")
    wraps = [word for name in REPLACED for word in ("-Xlinker", f"--wrap={name}")]
    subprocess.run([nvcc, "-std=c++17", f"-I{CSRC}", *wraps, str(source), "-o", str(program)], check=True, timeout=300)
    message, left = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert message == (
        "fastvit: CUDA refuses a launch of 1 x 1 blocks of 32 threads and 1048576 bytes of shared memory: "
        "invalid argument"
    )
    assert left == "cudaSuccess"
