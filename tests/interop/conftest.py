"""Writes the support table of docs/interop.md where that is asked for, and keeps the tests of this folder quiet."""

from __future__ import annotations

import pytest

from tests.interop.support_table import Writer, is_written


def pytest_configure(config: pytest.Config) -> None:
    # The processes of pytest-xdist have a `workerinput`; what they find comes to the one that has none.
    if is_written() and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(), "fastvit-interop-table")
