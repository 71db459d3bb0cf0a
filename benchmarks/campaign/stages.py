"""The stages in the order of their importance, and their shares of the budget in seconds."""

from __future__ import annotations

import functools

from fastvit.benchmarks.campaign.build import build
from fastvit.benchmarks.campaign.ceilings import ceilings
from fastvit.benchmarks.campaign.correctness import primitives, tests, validate
from fastvit.benchmarks.campaign.launch import launch
from fastvit.benchmarks.campaign.limits import limits
from fastvit.benchmarks.campaign.profiles import profiles
from fastvit.benchmarks.campaign.runner import Stage
from fastvit.benchmarks.campaign.sanitize import sanitize
from fastvit.benchmarks.campaign.suites import suite
from fastvit.benchmarks.campaign.tuning import tune
from fastvit.benchmarks.campaign.warm import warm


def _suite(name: str, share: int) -> Stage:
    return Stage(
        name, share, f"the suite {name} at size small, side by side with its rivals", functools.partial(suite, name)
    )


STAGES = (
    Stage("build", 70, "the C++/CUDA extension, compiled for this GPU alone", build),
    Stage("warm", 35, "compile every kernel of the manifest with a pool of processes", warm),
    Stage("tests", 65, "the tests of ops, kernels and model, CUDA graphs and streams", tests),
    Stage("primitives", 20, "what the CUDA C++ kernels are made of, against the emulation of it", primitives),
    Stage("limits", 30, "every even patch from 2 to 32, and 7; batches whose offsets pass 2^31", limits),
    Stage("validate", 25, "every case of the validator against float64", validate),
    Stage("sanitize", 30, "memcheck, racecheck and synccheck of compute-sanitizer on the smallest shapes", sanitize),
    Stage("ceilings", 10, "the rates of matrix products and of a copy", ceilings),
    _suite("patch_embed", 55),
    _suite("model", 55),
    Stage("launch", 10, "what a call costs the host: the public function, the extension's op, torch.add", launch),
    _suite("masked", 15),
    _suite("add_position", 10),
    _suite("input", 10),
    Stage("tune", 20, "the fastest backend and configuration for each shape of ViT-S and ViT-B", tune),
    Stage("profile", 20, "time per kernel of ViT-S and ViT-B steps, ours and timm's, eager and compiled", profiles),
    _suite("accelerated", 8),
    _suite("accelerated_model", 12),
)
