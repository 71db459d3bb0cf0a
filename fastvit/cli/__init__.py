"""The command line `fastvit`: info, validate, bench, tune, train, accelerate, demo, inspect, convert.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from .accelerate import accelerate
from .bench import bench
from .common import ERRORS, describe, print_error
from .convert import convert
from .demo import demo
from .info import info
from .inspect import inspect
from .train import train
from .tune import tune
from .validate import validate

INTERRUPTED = 130

app = typer.Typer(
    name="fastvit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    help="From raw images to Vision Transformer tokens in one kernel: look, validate, measure, train, convert.",
    epilog="Every command has [bold]--help[/bold] with examples. FASTVIT_DEBUG=1 shows the traceback of an error.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fastvit._version import __version__

        print(f"fastvit {__version__}")
        raise typer.Exit()


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop.", callback=_print_version, is_eager=True
    ),
) -> None:
    pass


for command in (info, validate, bench, tune, train, accelerate, demo, inspect, convert):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 1 (failed), 2 (bad input), 130 (interrupted)."""
    try:
        result: Any = app(args=list(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    except Exception as error:
        # typer brings click along under one name or another, by version; its errors are known by name and method.
        if type(error).__name__ == "Abort":
            print_error("interrupted")
            return INTERRUPTED
        if os.environ.get("FASTVIT_DEBUG") or not (isinstance(error, ERRORS) or hasattr(error, "format_message")):
            raise
        print_error(describe(error))
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
