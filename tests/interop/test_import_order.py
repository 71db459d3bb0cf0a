"""fastvit and transformers get along in a fresh process, whichever is imported first and wherever it is started.

In the repository lies a folder `kernels/`, and transformers looks for a package of that name. The other tests of this
folder run there too, with fastvit imported first.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.backend import _automatic

ROOT = Path(__file__).resolve().parents[2]

# As fastvit.peers does it, which would import fastvit: torchvision's wheel beside any build of torch.
PREPARE = """
import torch
if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
OURS = "import fastvit, fastvit.interop"
THEIRS = "from transformers.models.vit.modeling_vit import ViTConfig, ViTModel"
USE = """
import sys
assert sys.path[0] == "", sys.path
sizes = dict(image_size=32, patch_size=8, hidden_size=48, intermediate_size=96)
model = ViTModel(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=3)).eval()
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    want = model(images)[0]
    got = fastvit.accelerate(model)(images)[0]
assert (got - want).norm() <= 1e-5 * want.norm()
import fastvit.kernels.manifest
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(), fastvit.backend.launch_counts())
"""


@pytest.mark.parametrize(
    ("first", "then", "folder"),
    [
        (THEIRS, OURS, "repository"),
        pytest.param(OURS, THEIRS, "repository", marks=pytest.mark.full),
        pytest.param(THEIRS, OURS, "elsewhere", marks=pytest.mark.full),
        pytest.param(OURS, THEIRS, "elsewhere", marks=pytest.mark.full),
    ],
    ids=lambda value: {THEIRS: "transformers", OURS: "fastvit"}.get(value, value),
)
def test_order_and_folder(first: str, then: str, folder: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([PREPARE, first, then, USE])],
        cwd=ROOT if folder == "repository" else tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "", "FASTVIT_BACKEND": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    chosen = _automatic("cpu", "patch_embed", "")
    assert done.stdout.strip() == f"{is_package('kernels')} {{('patch_embed', '{chosen}'): 1}}"


def is_package(name: str) -> bool:
    """Whether there is a package of that name; a folder is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None
