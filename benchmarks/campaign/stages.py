"""The stages in the order of their importance, and their shares of the budget in seconds."""

from __future__ import annotations

import functools

from fastvit.benchmarks.campaign.ceilings import ceilings
from fastvit.benchmarks.campaign.correctness import tests, validate
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
    Stage("warm", 45, "compile every kernel of the manifest with a pool of processes", warm),
    Stage("tests", 70, "the tests of ops, kernels and model, CUDA graphs and streams", tests),
    Stage("limits", 30, "every even patch from 2 to 32, and 7; batches whose offsets pass 2^31", limits),
    Stage("validate", 20, "every case of the validator against float64", validate),
    Stage("sanitize", 30, "memcheck and racecheck of compute-sanitizer on the smallest shapes", sanitize),
    Stage("ceilings", 10, "the rates of matrix products and of a copy", ceilings),
    _suite("patch_embed", 70),
    _suite("model", 90),
    _suite("masked", 25),
    _suite("add_position", 15),
    _suite("input", 15),
    Stage("tune", 30, "the fastest configuration for each shape of ViT-S and ViT-B", tune),
    Stage("profile", 50, "time per kernel of ViT-S and ViT-B steps, ours and timm's, eager and compiled", profiles),
)
