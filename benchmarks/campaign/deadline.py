"""A plugin of pytest: a test whose time is up fails, and the process that it runs in goes on.

A signal ends what Python does, such as a compilation. It does not reach a thread that waits for the GPU: when twice the
time is up, the process goes with it, and pytest-xdist starts another.
"""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

OPTION = "--test-seconds"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Zero is no limit."""
    parser.addoption(OPTION, type=float, default=0.0, help="seconds after which a test counts as hung")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test without its fixtures, whose processes are nobody's to end."""
    seconds = item.config.getoption(OPTION)

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"hung: it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    if seconds:
        faulthandler.dump_traceback_later(2 * seconds, exit=True, file=2)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
