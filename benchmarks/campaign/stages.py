"""The stages in the order in which they run, their shares of a budget in seconds, and the calls that they make up.

A GPU is often lent for minutes, a few at a time: a call is what one command does with so many seconds. In front stands
what is right or wrong, then what is fast: the suites that matter most without torch.compile, which can take longer than
all else, and at the end what compiled rivals and other suites add. A share is what its stage takes with time to spare:
starting takes four seconds, a suite's rivals six to eleven more. Each call is ready for a machine that is bare; where a
library that loads came with the tree, `build` is over at once, and its share is everybody's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fastvit.benchmarks.campaign.compiling import build, warm
from fastvit.benchmarks.campaign.correctness import limits, primitives, tests, validate
from fastvit.benchmarks.campaign.launch import launch
from fastvit.benchmarks.campaign.output import FOR_GPUS
from fastvit.benchmarks.campaign.runner import Stage
from fastvit.benchmarks.campaign.sanitize import STAND_IN, sanitize
from fastvit.benchmarks.campaign.speed import ceilings, compiled, profiles, suite, sweep, tune
from fastvit.benchmarks.problem import NO_COMPILE
from fastvit.benchmarks.profiling import Setup
from fastvit.benchmarks.sweep import PRECISIONS
from fastvit.benchmarks.tune import Scope

DRY_SHARE = 120
# What the tests compile is for graphs alone; a pool of compilers for each worker would slow the others.
FEW = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HYPOTHESIS_PROFILE": "gpu"}
_CPU = {"device": "cpu"}
_TINY = {**_CPU, "size": "tiny", "seconds": 0.001}
_TESTS = {"paths": ("tests/validation/test_primitives.py",)}
# What runs the kernels of a backend on a CPU, in the interpreter and in the emulation.
_STAND_INS = {"triton": "triton", "cuda": "emulated"}


def _suite(name: str, share: int, calls: str = "") -> Stage:
    about = f"the suite {name} at size small, side by side with its rivals, none of them compiled"
    return Stage(name, share, about, functools.partial(suite, name=name), _TINY, calls, {NO_COMPILE: "1"})


def _by_backends(kind: str, share: int, calls: str, about: str, run: Callable[..., str], **dry: Any) -> Iterator[Stage]:
    """A stage for each backend: a kernel that goes wrong breaks CUDA for all that run in the same process."""
    for name in FOR_GPUS:
        stand_in = dry.get("backend") or _STAND_INS[name]
        run_one = functools.partial(run, backend=name)
        yield Stage(
            f"{kind}_{name}", share, f"{about}, by {name}", run_one, {**_CPU, **dry, "backend": stand_in}, calls
        )


_ENTRIES = {"every": 60, "target": 90}
_RATES = {**_CPU, "size": 32, "values": 2**10, "seconds": 0.001}
_VARIANTS = {**_CPU, "batch": 2, "image": 32, "width": 64, "checked": 2, "precisions": PRECISIONS[:1], "limit": 100.0}
_SHAPES = {**_CPU, "models": ("Ti",), "scope": Scope((1,), ("uint8 to float32",), 0.001)}
_STEPS = {**_CPU, "setups": (Setup("Ti", 1),), "depth": 1}
_COMPILED = {**_CPU, "seconds": 0.001, "names": ("add_position",), "most": 1}
_UNDER_A_TOOL = {**_CPU, "program": (sys.executable, "-c", STAND_IN), "tools": ("memcheck",)}
_LARGE = {"backend": "cpu", "patches": (7,), "dtypes": ("bfloat16",), "threshold": 2**19}

STAGES = (
    Stage("build", 70, "the C++/CUDA extension for this GPU, unless one is there", build, {"capability": (9, 0)}, "AB"),
    Stage("warm", 40, "compile and load every kernel of the manifest with a pool of processes", warm, _ENTRIES, "AB"),
    Stage("primitives", 12, "what the CUDA C++ kernels are made of, against its emulation", primitives, _CPU, "A"),
    *_by_backends(
        "validate", 18, "A", "every case of the validator against float64", validate, quick=True, dtypes=("bfloat16",)
    ),
    Stage("ceilings", 12, "the rates of matrix products and of a copy", ceilings, _RATES, "A"),
    Stage("tests", 75, "the tests of ops, kernels and model, CUDA graphs and streams", tests, _TESTS, "B", FEW),
    *_by_backends(
        "limits", 15, "B", "batches whose offsets pass 2^31; every even patch to 32, and 7", limits, **_LARGE
    ),
    _suite("patch_embed", 50, "AB"),
    Stage(
        "sweep", 50, "each kernel of the op that multiplies in each of its variants, by graphs", sweep, _VARIANTS, "A"
    ),
    _suite("model", 34, "B"),
    Stage("launch", 10, "what a call costs the host, and torch.add", launch, {**_CPU, "rounds": 2}, "B"),
    _suite("add_position", 12, "B"),
    Stage("tune", 32, "the fastest backend and configuration for ViT-S and ViT-B", tune, _SHAPES, "B"),
    Stage("profile", 20, "time per kernel of steps, ours and timm's, eager and compiled", profiles, _STEPS, "B"),
    Stage("compiled", 23, "the cases of the suites that have compiled rivals, beside those", compiled, _COMPILED, "B"),
    Stage("sanitize", 16, "compute-sanitizer's tools on the smallest shapes", sanitize, _UNDER_A_TOOL, "B"),
    *(_suite(name, 20) for name in ("input", "accelerated", "accelerated_model", "masked")),
    *(_suite(name, 20) for name in ("add_norm", "bias_act", "split_heads")),
    _suite("packed", 60),  # rivals that go through the images one by one, and convolutions of twenty sizes to choose
)
CALLS = {name: sum(stage.share for stage in STAGES if name in stage.calls) for name in "AB"}  # seconds
