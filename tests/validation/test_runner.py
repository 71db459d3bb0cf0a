"""The runner: what it refuses, counts and reports; and a kernel of one's own held to the same rule."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastvit import reference
from fastvit.ops import registry
from fastvit.validation import Inputs, PatchEmbedCase, cases_for, make_inputs, poisoned, validate, validate_function
from fastvit.validation import runner as runner_module
from fastvit.validation.cases import DTYPES
from fastvit.validation.report import FAILED, PASSED, Report, Row
from fastvit.validation.runner import Candidate, check_case, check_inputs
from fastvit.validation.tolerance import FEW_VALUES

EMBED = [case for case in cases_for("patch_embed", large=False) if isinstance(case, PatchEmbedCase)]


@pytest.mark.parametrize("op", ["patch_embed", "add_position"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_cpu_backend_passes_every_case(op: str, dtype: str) -> None:
    report = validate(backends=["cpu"], ops=[op], dtypes=[dtype], device="cpu")
    assert report.ok and not report.skipped, report.failures


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known: reference, cpu"):
        validate(backends=["gpu"])
    with pytest.raises(ValueError, match="unknown op 'conv'"):
        validate(backends=["cpu"], ops=["conv"])
    with pytest.raises(ValueError, match="unknown compute dtype 'uint8'.*float32"):
        validate(backends=["cpu"], dtypes=["uint8"])


def test_what_can_not_run_is_counted_with_its_reason() -> None:
    report = validate(backends=["cuda", "reference"], dtypes=["fp32"], quick=True)
    assert report.skipped == len(report.rows) > 0 and not report.ok
    assert report.summary().startswith("nothing ran")
    reasons = {reason for _, reason in report.skip_reasons()}
    assert any("never held to itself" in reason for reason in reasons) and all(reasons)


def test_progress_and_dtypes() -> None:
    seen: list[tuple[int, int, str]] = []
    report = validate(
        ["cpu"], ["add_position"], [torch.bfloat16, "fp16"], quick=True, progress=lambda *a: seen.append(a)
    )
    assert {row.dtype for row in report.rows} == {"bfloat16", "float16"}
    assert [done for done, _, _ in seen] == list(range(len(seen))) and seen[-1][0] == seen[-1][1]


def test_a_backend_that_did_not_launch_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "count_launch", lambda op, backend: None)
    report = validate(["cpu"], ["add_position"], ["fp32"], quick=True)
    assert report.failed and "did not launch add_position" in report.failures[0].reason


def test_a_silent_fallback_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    count = registry.count_launch
    monkeypatch.setattr(registry, "count_launch", lambda op, backend: count(op, "triton"))
    report = validate(["cpu"], ["patch_embed"], ["fp32"], quick=True)
    assert report.failed and "but triton did" in report.failures[0].reason


def test_a_result_that_varies_is_found() -> None:
    def noisy(*args: object, **kwargs: object) -> Tensor:
        out = reference.patch_embed(*args, **kwargs)  # type: ignore[arg-type]
        # A last bit here and there, well within tolerance.
        return out * (1 + (torch.rand(out.shape) > 0.5) * torch.finfo(torch.float32).eps)

    report = validate_function(noisy, dtypes=["fp32"], cases=EMBED[:1])
    assert [row.quantity for row in report.failures] == ["repeat"]


def test_memory_is_poisoned_and_settings_restored() -> None:
    def settings() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    before = settings()
    with poisoned():
        assert torch.empty(64).isnan().all()
    assert before == settings()


def test_a_case_that_breaks_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a fault on a GPU, when not even the inputs of the next case can be made."""
    make = runner_module.make_inputs

    def broken(case: object, *args: object) -> object:
        if case == EMBED[1]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return make(case, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(runner_module, "make_inputs", broken)
    rows = validate_function(reference.patch_embed, dtypes=["fp32"], cases=EMBED[:3]).rows
    assert [row.case for row in rows if row.status == "failed"] == [EMBED[1].name]
    assert {row.case for row in rows if row.status == "passed"} == {EMBED[0].name, EMBED[2].name}
    assert "RuntimeError: CUDA error: an illegal" in next(row.reason for row in rows if row.status == "failed")


def test_a_repetition_that_breaks_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def once(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("the second call")
        return reference.patch_embed(*args, **kwargs)  # type: ignore[arg-type]

    failures = validate_function(once, dtypes=["fp32"], cases=EMBED[:1]).failures
    assert [(row.quantity, row.reason) for row in failures] == [("repeat", "RuntimeError: the second call")]


def test_report_prints_and_serialises() -> None:
    rows = (
        Row("cpu", "patch_embed", "float32", "a", "forward", "passed", 1e-7, 4e-7, "all values"),
        Row("cpu", "patch_embed", "float32", "b", "forward", "failed", float("inf"), 0.0, "token (0, 1)"),
        Row("triton", "patch_embed", "float32", "a", "all", "skipped", reason="no CUDA device"),
    )
    report = Report(rows)
    assert (report.passed, report.failed, report.skipped, report.ok) == (1, 1, 1, False)
    lines = [json.loads(line) for line in report.to_json_lines().splitlines()]
    assert lines[1]["error"] is None and lines[2]["reason"] == "no CUDA device"
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    console.print(report.table())
    text = console.export_text()
    assert "1 passed, 1 failed, 1 skipped" in text and "no CUDA device" in text and "token (0, 1)" in text


def _mine(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
    **arguments: object,
) -> Tensor:
    """A user's function: computes in float64 and rounds once; declines what it does not do."""
    if keep is not None:
        raise NotImplementedError("keep is not supported")
    out = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    images = images if images.dtype is torch.uint8 else images.double()
    with torch.autocast("cpu", enabled=False):
        tokens = reference.patch_embed(
            images,
            weight.double(),
            None if bias is None else bias.double(),
            **wide,  # type: ignore[arg-type]
        )
    return tokens.to(dtype or out)


def test_a_function_of_ones_own_passes_by_autograd() -> None:
    report = validate_function(_mine, quick=False, cases=EMBED)
    assert report.ok, report.failures
    assert {reason for _, reason in report.skip_reasons()} == {"keep is not supported"}
    assert {"d_images", "d_weight", "d_bias", "d_pos_embed", "d_prefix"} <= {row.quantity for row in report.rows}


def test_a_function_of_ones_own_with_a_backward() -> None:
    def backward(grad: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        return {"bias": grad[:, -inputs_patches(inputs) :].sum((0, 1))}

    def inputs_patches(inputs: Inputs) -> int:
        prefix = inputs.tensors["prefix"]
        return inputs.grad.shape[1] - (0 if prefix is None else prefix.shape[0])

    report = validate_function(
        lambda *args, **kwargs: _mine(*args, **kwargs).detach(),
        backward,
        name="mine",
        dtypes=["fp32"],
        cases=EMBED[:4],
        supports=lambda case: "no photographs" if case.source == "photo" else "",  # type: ignore[union-attr]
    )
    status = {(row.quantity, row.status) for row in report.rows}
    assert ("d_bias", "passed") in status and ("d_weight", "skipped") in status and report.ok
    assert {"no photographs", "keep is not supported"} <= {reason for _, reason in report.skip_reasons()}


def test_a_wrong_function_of_ones_own_fails() -> None:
    def forgets_the_mean(*args: Tensor, mean: object = None, std: object = None, **kwargs: object) -> Tensor:
        return _mine(*args, **kwargs)  # type: ignore[arg-type]

    report = validate_function(forgets_the_mean, dtypes=["fp32"], quick=True)
    assert "raw photograph, ImageNet normalisation" in {row.case for row in report.failures}

    def divides_by_zero(*args: object, **kwargs: object) -> Tensor:
        return torch.ones(1 // 0)

    raising = validate_function(divides_by_zero, dtypes=["fp32"], quick=True)
    assert raising.passed == 0 and "ZeroDivisionError" in raising.failures[0].reason
    wrong_dtype = validate_function(
        lambda *args, **kwargs: _mine(*args, **kwargs).double(), dtypes=["fp32"], cases=EMBED[:1]
    )
    assert "dtype is torch.float64" in wrong_dtype.failures[0].reason


def test_slow_backends_are_known() -> None:
    assert runner_module.is_interpreted("triton", torch.device("cpu"))
    assert not runner_module.is_interpreted("cpu", torch.device("cpu"))


TWO_VALUES = PatchEmbedCase(
    "example 161", batch=1, channels=2, grid=(3, 3), patch=(8, 8), width=1, layout="transposed", bias=False,
    positions="none", keep=1, repeat_keep=True, normalise=True, parameters="mixed",
)  # fmt: skip
# Of 336 values here 240 are copied, and a column has 6 products.
MOSTLY_PREFIX = PatchEmbedCase(
    "example 3", batch=3, channels=1, grid=(2, 1), patch=(2, 2), width=16, images="uint8", layout="transposed",
    bias=False, prefix=5, positions="none", normalise=True,
)  # fmt: skip


def _normalisation_in_the_weight(factor: float) -> Candidate:
    """As exact as eager PyTorch, which rounds the normalised pixels where this rounds the weight; times a factor."""

    def forward(op: str, inputs: Inputs, tensors: dict[str, torch.Tensor | None]) -> torch.Tensor:
        images, weight = tensors["images"], tensors["weight"]
        assert images is not None and weight is not None and inputs.mean and inputs.std
        scale = 255 if images.dtype == torch.uint8 else 1
        std, mean = (scale * torch.tensor(values)[:, None, None] for values in (inputs.std, inputs.mean))
        folded = (weight.float() / std).to(weight.dtype).float()
        bias = -(folded * mean).sum((1, 2, 3))
        tokens = reference.patch_embed(
            images.float(), folded, bias, prefix=tensors["prefix"], keep=inputs.keep, dtype=inputs.out
        )
        return tokens * factor

    return Candidate("folded", torch.device("cpu"), forward)


@pytest.mark.parametrize(("case", "dtype"), [(TWO_VALUES, "float16"), (MOSTLY_PREFIX, "bfloat16")])
def test_a_lucky_yardstick_is_settled_on_more_draws(case: PatchEmbedCase, dtype: str) -> None:
    """Where few values are products: prefix rows, which are copied, do not make a handful many."""
    fair, wrong = _normalisation_in_the_weight(1.0), _normalisation_in_the_weight(1.01)
    inputs = make_inputs(case, DTYPES[dtype])
    assert inputs.grad[:, case.prefix :].numel() < FEW_VALUES
    alone = {row.quantity: row for row in check_inputs(fair, "patch_embed", inputs)}
    assert alone["forward"].status == FAILED  # plain PyTorch happened to be exact here
    settled = {row.quantity: row for row in check_case(fair, case, dtype)}
    assert settled["forward"].status == PASSED and "of 16 draws" in settled["forward"].where
    assert all(row.status == PASSED for row in settled.values()) or case is MOSTLY_PREFIX
    assert {row.quantity: row for row in check_case(wrong, case, dtype)}["forward"].status == FAILED
