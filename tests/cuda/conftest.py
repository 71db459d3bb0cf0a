"""The library over emulated kernels, whose ops take tensors on the CPU. Nothing here needs fastvit to be installed:
`make test-abi` runs test_binding*.py in environments that have torch alone."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_extension.py"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tool() -> Any:
    """tools/build_extension.py."""
    spec = importlib.util.spec_from_file_location("build_extension", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def host_library(tool: Any) -> Path:
    """The file: $FASTVIT_HOST_LIBRARY, or what is built for this checkout, once for each state of it."""
    given = os.environ.get("FASTVIT_HOST_LIBRARY")
    if given:
        return Path(given)
    toolchain, missing = tool.find_toolchain(cuda=False)
    if toolchain is None:
        pytest.skip(f"there is no {'; no '.join(missing)}")
    library = tool.WORK / "fastvit_host.so"
    tool.build(tool.host_library(toolchain), library)
    return library


@pytest.fixture(scope="session")
def ops(host_library: Path) -> Any:
    """The namespace of the library's ops."""
    torch.ops.load_library(str(host_library))
    return torch.ops.fastvit_host
