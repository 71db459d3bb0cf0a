"""The emulated kernels are built once for all tests, into the suite's own folder."""

from __future__ import annotations

import pytest

from fastvit.emulated import build
from tests.emulated.planted import Switched


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = build.why_unavailable()
    for item in items if reason else ():
        if "emulated" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Switched:
    """The kernels with all of a file's FAULTS, which are of one unit."""
    return Switched(request.module.FAULTS, tmp_path_factory.mktemp("planted"))
