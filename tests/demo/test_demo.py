"""The demo: a quick run from start to end, its report and pictures, and that it fails when it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastvit
from fastvit.demo import checks as checks_module
from fastvit.demo import figures, report
from fastvit.demo import run as run_module
from fastvit.demo.checks import Checks
from fastvit.demo.run import run_demo
from fastvit.demo.training import Comparison, compare_with_timm
from fastvit.training import TrainOptions, train
from fastvit.validation import Row

PICTURES = ("curves.png", "positions.png", "attention.png")


@pytest.fixture
def console(tmp_path: Path) -> Console:
    return Console(file=(tmp_path / "printed.txt").open("w", encoding="utf-8"), width=160)


def printed(console: Console) -> str:
    console.file.flush()
    return Path(console.file.name).read_text(encoding="utf-8")


def test_a_quick_demo_writes_everything(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter has a test of its own below; here its place is taken, because it takes long.
    monkeypatch.setattr(checks_module, "check_interpreted", lambda quick: Checks())
    out = tmp_path / "demo"
    assert run_demo(out, quick=True, console=console)
    assert list(out.glob("ratios-patch-embed*.png"))
    for name in (*PICTURES, "report.html", "results.json"):
        assert (out / name).stat().st_size > 1000, name
    results = json.loads((out / "results.json").read_text())
    assert 0 < results["train"]["test_accuracy"] <= 1 and len(results["train"]["seeds"]) == 2
    assert results["validate"]["passed"] > 50 and results["validate"]["failed"] == 0
    assert any("photo" in name for name in results["validate"]["cases"])
    assert any(row["provider"].startswith("fastvit:") and row["ratios"] for row in results["bench"])
    assert results["timm"]["skipped"] or results["timm"]["ok"]
    text = printed(console)
    assert text.rstrip().splitlines()[-1].startswith(f"All good. Open {out / 'report.html'}")

    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4
    assert not re.search(r"""(?:src|href)=['"](?!data:)""", page), "the page needs another file"
    assert f"{results['train']['test_accuracy']:.2%}" in page and "fastvit:cpu" in page
    for word in ("section", "table", "main", "li", "p", "h2"):
        assert len(re.findall(rf"<{word}[ >]", page)) == page.count(f"</{word}>"), word


def good_results() -> dict[str, Any]:
    return {
        "validate": {"ok": True, "passed": 10, "failed": 0},
        "train": {"ok": True, "test_accuracy": 0.97},
        "timm": {"ok": True, "largest_difference": 1e-7},
    }


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({}, "All good. Open"),
        ({"validate": {"ok": False, "passed": 9, "failed": 1}}, "validation failed (1 of 10 checks)"),
        ({"train": {"ok": False, "test_accuracy": 0.959}}, "test accuracy 95.90% is below 96%"),
        ({"timm": {"ok": False, "largest_difference": 1e-3}}, "losses differ from timm's by 1.0e-03"),
    ],
)
def test_the_verdict(tmp_path: Path, console: Console, fault: dict[str, Any], said: str) -> None:
    assert run_module._verdict(console, tmp_path, good_results() | fault) == (not fault)
    assert said in printed(console)
    assert ("FAILED. Open" in printed(console)) == bool(fault)


def row(status: str, reason: str = "") -> Row:
    return Row("cpu", "patch_embed", "float32", "a case", "forward", status, reason=reason)


def test_what_is_judged() -> None:
    assert Checks((row("passed"),)).ok
    assert not Checks((row("passed"), row("failed"))).ok
    assert not Checks((row("skipped"),)).ok
    assert not Checks((row("passed"),), problems=("the interpreter did not finish",)).ok
    assert Comparison([1.0], [1.000001]).ok and not Comparison([1.0], [1.001]).ok
    assert Comparison(skipped="not installed").ok


def test_a_low_accuracy_is_a_failure_unless_the_run_is_quick(tmp_path: Path) -> None:
    run = train(TrainOptions(epochs=1, device="cpu", output=str(tmp_path / "run"), tensorboard=False))
    run.history[-1]["test_accuracy"] = 0.9599
    assert not run_module.train_results([run], 1.0, judged=True)["ok"]
    assert run_module.train_results([run], 1.0, judged=False)["ok"]
    run.history[-1]["test_accuracy"] = 0.9601
    assert run_module.train_results([run], 1.0, judged=True)["ok"]


def test_text_in_the_page_is_escaped() -> None:
    page = report.validation(Checks((row("failed", "<b>wrong</b>"), row("skipped", "<b>x</b>")), problems=("<i>hm",)))
    assert "&lt;b&gt;wrong&lt;/b&gt;" in page and "<b>" not in page and "<i>hm" not in page


def test_the_command_exits_with_one_on_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastvit import cli

    for ok in (True, False):
        monkeypatch.setattr(run_module, "run_demo", lambda *_, ok=ok, **__: ok)
        assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == (0 if ok else 1)


def test_triton_is_checked_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    checks = checks_module.check_interpreted(quick=True, only=("--op", "add_position"))
    assert checks.ok, checks.problems or checks.failures
    assert {row.device for row in checks.rows} == {"interpreter"}


def test_a_broken_interpreter_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module.sys, "executable", "false")
    checks = checks_module.check_interpreted(quick=True)
    assert not checks.ok and "in the interpreter failed (exit 1)" in checks.problems[0]


def test_losses_equal_timms_until_a_model_is_spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: logits a thousandth too large."""
    found = compare_with_timm()
    if found.skipped:
        pytest.skip(found.skipped)
    assert found.ok and len(found.ours) == 45 and found.ours[0] != found.ours[4]
    forward = fastvit.VisionTransformer.forward
    monkeypatch.setattr(fastvit.VisionTransformer, "forward", lambda self, images: forward(self, images) * 1.001)
    assert not compare_with_timm().ok


def test_similarity_of_a_grid_falls_with_distance() -> None:
    from fastvit.positions import sincos_2d

    table = sincos_2d((4, 5), 32).view(-1, 32)[-20:]
    similarity = figures.position_similarity(table, (4, 5))
    assert similarity.shape == (4, 5, 4, 5)
    torch.testing.assert_close(similarity[1, 2, 1, 2], torch.tensor(1.0))
    found = figures.mean_similarity(table, (4, 5))
    assert found["neighbours"] > found["far"]


def test_attention_belongs_to_the_class_token_and_the_patches() -> None:
    model = fastvit.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=16, depth=2, num_heads=2, mean=(0.3,), std=(0.4,)
    )
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    found = figures.class_attention(model, images, (4, 4))
    assert found.shape == (3, 4, 4) and torch.equal(found.amax((1, 2)), torch.ones(3))
    full = model.get_attention_maps(images)[-1].mean(1)[:, 0, 1:].view(3, 4, 4)
    torch.testing.assert_close(found, full / full.amax((1, 2), keepdim=True))


@pytest.mark.full
def test_the_whole_demo(tmp_path: Path, console: Console) -> None:
    assert run_demo(tmp_path / "demo", quick=False, console=console)
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["train"]["test_accuracy"] >= 0.96
    assert results["train"]["seconds"] < 120
