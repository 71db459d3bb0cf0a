"""The command line of the campaign."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvit.benchmarks.campaign.runner import BUDGET, campaign, end_inside, find_stages
from fastvit.benchmarks.campaign.stages import STAGES
from fastvit.benchmarks.problem import NO_COMPILE, WITHOUT, left_out
from fastvit.benchmarks.rows import circumstances

ENVIRONMENT = f"""environment: {WITHOUT}: backends to leave out, separated by commas; {NO_COMPILE}: if set, no
torch.compile; FASTVIT_COMMIT: the commit that rows name, where the code is a copy without its history"""
NO_DEVICE = "no CUDA device: this command needs a GPU; on a CPU there are `make test` and `fastvit bench`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a stage failed, was cut off or did not start, or if there is no GPU."""
    started = time.monotonic()
    about = "Everything that only a GPU can tell: correctness, speed, tuning and profiles."
    parser = argparse.ArgumentParser(
        prog="python -m fastvit.benchmarks.campaign", description=about, epilog=ENVIRONMENT
    )
    known = ", ".join(stage.name for stage in STAGES)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu"), help="folder of results")
    chosen = f"of {known}: only these; repeat, or separate by commas; validate_* is all that start so"
    parser.add_argument("--stage", action="append", help=chosen)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages together")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and look for a device, nothing more")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # a stage, in this process
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a stage prints may not be in this terminal's alphabet
    try:
        left_out()
        stages = find_stages(STAGES, [options.inside] if options.inside else options.stage)
    except ValueError as error:
        parser.error(str(error))
    if options.inside:
        return end_inside(stages[0], options.out)
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name} ({stage.share} s): {stage.about}")
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 1
    if options.dry_run:
        return 0
    return campaign(stages, options.out.resolve(), options.budget, circumstances(torch.device("cuda")), started)


if __name__ == "__main__":
    sys.exit(main())
