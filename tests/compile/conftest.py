"""Tests that need Triton's compiler, for GPUs that need not be there; see tests/kernels for the interpreter's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fastvit.backend import triton_is_interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif triton_is_interpreted():
        reason = "TRITON_INTERPRET is set: nothing is compiled with it"
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
