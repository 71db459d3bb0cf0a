"""The command line of the campaign."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastvit.benchmarks.campaign.runner import DRY_RUN, campaign, end_inside, find_stages
from fastvit.benchmarks.campaign.stages import CALLS, DRY_SHARE, STAGES
from fastvit.benchmarks.problem import NO_COMPILE, WITHOUT, left_out
from fastvit.benchmarks.rows import circumstances

ABOUT = "Everything that only a GPU can tell: correctness, speed, tuning and profiles."
ENVIRONMENT = f"""environment: {WITHOUT}: backends to leave out, separated by commas; {NO_COMPILE}: if set, no
torch.compile; FASTVIT_COMMIT: the commit that rows name, where the code is a copy without its history"""
NO_DEVICE = f"no CUDA device: this command needs a GPU; {DRY_RUN} runs the code of its stages on a CPU"
NO_COMMIT = "FASTVIT_COMMIT is not set, and there is no history here: the rows will name no commit"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if a stage failed, was cut off or did not start, or if there is no GPU."""
    started = time.monotonic()
    parser = _parser()
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
        return end_inside(stages[0], options.out, options.dry_run)
    if options.call:
        stages = [stage for stage in stages if options.call in stage.calls]
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget {options.budget:g}: expected seconds, more than 0")
    if options.dry_run:
        stages = [replace(stage, share=DRY_SHARE) for stage in stages]
    elif not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 1
    budget = options.budget or sum(stage.share for stage in stages)
    about = circumstances(torch.device("cpu" if options.dry_run else "cuda"))
    if not about["commit"]:
        print(NO_COMMIT, flush=True)
    out = options.out or Path("out/dry" if options.dry_run else "out/gpu")
    return campaign(stages, out.resolve(), budget, about, started, dry=options.dry_run)


def _parser() -> argparse.ArgumentParser:
    known = (f"  {s.name:18}{s.share:4} s  {s.calls:4}{s.about}" for s in STAGES)
    epilog = "\n".join(["stages, their shares and their calls:", *known, "", ENVIRONMENT])
    parser = argparse.ArgumentParser(
        prog="python -m fastvit.benchmarks.campaign", description=ABOUT, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    budgets = ", ".join(f"{name} of {seconds} s" for name, seconds in CALLS.items())
    which.add_argument("--call", choices=CALLS, help=f"the stages of one call, in its budget: {budgets}")
    chosen = "only these; repeat, or separate by commas; validate_* is all that start so"
    which.add_argument("--stage", action="append", metavar="NAME,...", help=chosen)
    where = "folder of results; default: $OUT, else out/gpu or out/dry"
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, metavar="FOLDER", help=where)
    spend = "seconds for all stages together; default: all their shares"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=spend)
    parser.add_argument(DRY_RUN, action="store_true", help="run every stage's code on the CPU; its times mean nothing")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # a stage, in this process
    return parser


if __name__ == "__main__":
    sys.exit(main())
