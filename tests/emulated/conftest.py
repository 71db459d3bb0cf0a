"""The emulated kernels are built once for all tests, into the suite's own folder."""

from __future__ import annotations

import pytest

from fastvit.emulated import build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = build.why_unavailable()
    for item in items if reason else ():
        if "emulated" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))
