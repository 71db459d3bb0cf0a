"""Importing other libraries: plainly, and with a stand-in for torchvision's operators only where they are missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USES = """
import torch
{before}
torch.library.register_fake("torchvision::nms", lambda dets, scores, iou_threshold: dets)
"""
DEFINES = """
operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
LATER = f"import torch\n{DEFINES}"
PROGRAM = """
import sys, torch
from fastvit.peers import import_peer, peer_missing
import_peer("json")
assert "torchvision" not in sys.modules
print(peer_missing("torchvision.models") or import_peer("torchvision.models").NAME)
print("declared:", hasattr(torch.ops.torchvision, "nms"))
"""


@pytest.mark.parametrize(
    ("package", "after", "expected"),
    [
        pytest.param(USES.format(before=DEFINES), "", ["the models", "declared: True"], id="fits"),
        pytest.param(USES.format(before=""), LATER, ["the models", "declared: False"], id="other build"),
        pytest.param(
            "raise RuntimeError('broken otherwise')",
            LATER,
            ["torchvision can't be imported: broken otherwise", "declared: False"],
            id="broken",
        ),
    ],
)
def test_torchvision(package: str, after: str, expected: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text(f"from . import state\n{package}")
    (folder / "state.py").write_text("")
    (folder / "models.py").write_text("NAME = 'the models'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + after], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.splitlines() == expected, done.stdout + done.stderr
