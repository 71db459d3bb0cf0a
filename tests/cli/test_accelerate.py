"""`fastvit accelerate`: the report, the parity table, the speed of both, and one-line errors."""

from __future__ import annotations

import json

import pytest
from torch import nn

from fastvit import cli
from fastvit.interop import measuring, verification
from tests.libraries import peer

TIMM = ("accelerate", "--library", "timm", "--model", "test_vit")
RAW = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")


@pytest.fixture(autouse=True)
def _needs_timm() -> None:
    peer("timm")


def test_it_prints_the_report_the_parity_and_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main([*TIMM, *RAW, "--batch", "1", "--seconds", "0.1"])
    out = capsys.readouterr().out
    assert code == 0
    assert "projection, positions and class token in one call" in out
    assert "takes raw uint8 images" in out
    assert "outputs" in out and "gradients" in out
    assert all(f"uint8 images to {what}" in out for what in ("tokens", "logits", "gradients"))


def test_json_has_every_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main([*TIMM, "--json", "--no-speed"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and not found["speeds"]
    assert found["report"]["changes"][0]["module"] == "timm.models.vision_transformer.VisionTransformer"
    assert found["outputs"] and len(found["gradients"]) > 20
    assert all(row["error"] <= row["bound"] for row in found["gradients"])


def test_a_difference_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "FACTOR", 0.0)
    monkeypatch.setattr(verification, "FLOOR_EPS", 0.0)
    assert cli.main([*TIMM, "--no-speed"]) == 1
    assert "outputs and gradients differ by more than rounding" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--library", "keras", "--model", "x"), "--library keras: accepted is one of timm, torchvision, transformers"),
        (("--library", "timm", "--model", "nothing"), "--model nothing: not a model of timm"),
        (("--library", "timm", "--model", "test_resnet"), "no patch embedding that is known was found"),
        ((*TIMM[1:], "--mean", "a,b"), "--mean a,b: accepted are numbers"),
        ((*TIMM[1:], "--mean", "0.5,0.5,0.5"), "std"),
        ((*TIMM[1:], "--backend", "cuda", "--device", "cpu"), "--backend cuda: can't run on cpu"),
        ((*TIMM[1:], "--backend", "fast"), "unknown backend 'fast'"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["accelerate", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_without_a_row_of_blocks_is_timed_as_a_whole() -> None:
    assert measuring._first_block(nn.Linear(2, 2)) is None
