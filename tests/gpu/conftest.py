"""What runs on a GPU, once for each backend that has kernels for it."""

from __future__ import annotations

import pytest

from fastvit.backend import why_unavailable


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """The name of a backend that can run here."""
    reason = why_unavailable(request.param, "cuda")
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)
