"""Importing and calling FastViT leaves what belongs to the whole process as it was: the settings of torch, warnings,
random numbers, the environment."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, os, pkgutil, random, signal, sys, warnings
import numpy as np
import sklearn.datasets  # which draws a number
import torch
import torch._inductor  # which ignores a warning of torch's

def state():
    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)],
        "hooks": (sys.excepthook, sys.displayhook, sys.getrecursionlimit()),
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "precision": (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.conv.fp32_precision,
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
        ),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "operators": hasattr(torch.ops.torchvision, "nms"),
    }

def changed(before):
    after = state()
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}

before = state()
import fastvit
for module in pkgutil.walk_packages(fastvit.__path__, "fastvit."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except (ImportError, RuntimeError) as error:  # one library more, or of another build than torch
            print("not imported:", module.name, error)
print("by imports:", changed(before))
"""
CALLS = """
from fastvit.peers import import_peer
before = state()
vit = import_peer("torchvision.models.vision_transformer")
print("by torchvision:", {name: change for name, change in changed(before).items() if name == "operators"})
sizes = dict(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)
model = vit.VisionTransformer(**sizes).eval()
before = state()
fastvit.accelerate(model, mean=(0.5,) * 3, std=(0.5,) * 3, verify=True)
model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).sum().backward()
fastvit.restore(model)
print("by accelerate:", changed(before))
before = state()
assert not fastvit.validation.validate(["cpu"], ["add_position"], ["fp32"], quick=True).failed
print("by validate:", changed(before))
"""


def test_nothing_global_is_changed() -> None:
    calls = CALLS
    try:
        import torchvision  # noqa: F401
    except ImportError:
        calls = ""
    except RuntimeError:
        pass  # of another build than torch: what `import_peer` is for
    done = subprocess.run([sys.executable, "-c", PROGRAM + calls], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    reports = [line for line in done.stdout.splitlines() if line.startswith("by ")]
    assert len(reports) == (4 if calls else 1) and all(line.endswith(": {}") for line in reports), done.stdout
