"""The stages in the order of their importance, and their shares of the budget in seconds.

A share is what its stage needs to find something out on a GPU of today: starting takes four seconds, a suite's rivals
six to eleven more. In front stands what is right or wrong, then what is fast: the suites that matter most without
torch.compile, which can take longer than all else, and at the end what compiled rivals and the other suites add.
"""

from __future__ import annotations

import functools

from fastvit.benchmarks.campaign.compiling import build, warm
from fastvit.benchmarks.campaign.correctness import limits, primitives, tests, validate
from fastvit.benchmarks.campaign.launch import launch
from fastvit.benchmarks.campaign.output import FOR_GPUS
from fastvit.benchmarks.campaign.runner import Stage
from fastvit.benchmarks.campaign.sanitize import sanitize
from fastvit.benchmarks.campaign.speed import ceilings, compiled, profiles, suite, tune
from fastvit.benchmarks.problem import NO_COMPILE

# What the tests compile is for graphs alone; a pool of compilers for each worker would slow the others.
FEW = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HYPOTHESIS_PROFILE": "gpu"}


def _suite(name: str, share: int) -> Stage:
    about = f"the suite {name} at size small, side by side with its rivals, none of them compiled"
    return Stage(name, share, about, functools.partial(suite, name), {NO_COMPILE: "1"})


def _validate(backend: str) -> Stage:
    about = f"every case of the validator against float64, by {backend}"
    return Stage(f"validate_{backend}", 18, about, functools.partial(validate, backend))


STAGES = (
    Stage("build", 55, "the C++/CUDA extension, compiled for this GPU alone", build),
    Stage("warm", 30, "compile and load every kernel of the manifest with a pool of processes", warm),
    Stage("tests", 55, "the tests of ops, kernels and model, CUDA graphs and streams", tests, FEW),
    Stage("primitives", 12, "what the CUDA C++ kernels are made of, against the emulation of it", primitives),
    Stage("limits", 22, "batches whose offsets pass 2^31; every even patch from 2 to 32, and 7", limits),
    *(_validate(backend) for backend in FOR_GPUS),
    Stage("sanitize", 22, "memcheck, racecheck and synccheck of compute-sanitizer on the smallest shapes", sanitize),
    Stage("ceilings", 12, "the rates of matrix products and of a copy", ceilings),
    _suite("patch_embed", 45),
    _suite("model", 45),
    Stage("launch", 12, "what a call costs the host: the public function, the extension's op, torch.add", launch),
    _suite("add_position", 14),
    Stage("tune", 22, "the fastest backend and configuration for each shape of ViT-S and ViT-B", tune),
    Stage("profile", 22, "time per kernel of ViT-S and ViT-B steps, ours and timm's, eager and compiled", profiles),
    Stage("compiled", 30, "the cases of the suites that have compiled rivals, beside those", compiled),
    _suite("input", 14),
    _suite("accelerated", 20),
    _suite("accelerated_model", 20),
    _suite("masked", 12),
)
