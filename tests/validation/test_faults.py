"""Every planted fault must fail the validator, in the quantity that it spoils."""

from __future__ import annotations

import pytest

from fastvit.validation import validate
from fastvit.validation.faults import faults, planted


@pytest.mark.parametrize("name", faults())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planted_fault_is_found(name: str, dtype: str) -> None:
    if dtype == "bfloat16" and "through bf16" in name:
        pytest.skip("rounding a bf16 result to bf16 changes nothing")
    with planted(name) as fault:
        report = validate(backends=["cpu"], ops=[faults()[name][0]], dtypes=[dtype], quick=True)
    assert report.failed and not report.ok
    assert fault.spoils in {row.quantity for row in report.failures}


def test_the_same_validation_passes_without_a_fault() -> None:
    # Also shows that planting leaves nothing behind.
    assert validate(backends=["cpu"], quick=True).ok
