"""What the commands share: one-line errors, a console, progress, and choices checked before anything heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

# What a user can mend: bad arguments, files, missing backends. Anything else is ours and keeps its traceback.
ERRORS = (ValueError, OSError, ImportError)

Progress = Callable[[int, int, str], None]

# Options that several commands have.
DEVICE = typer.Option(None, help="cpu, cuda or cuda:N. Default: a GPU where there is one.")
THREADS = typer.Option(None, help="Threads on a CPU. Default: as torch chooses.", min=1)
KEY = typer.Option(
    None, help="Which of several models in a training's checkpoint, such as teacher or state_dict.student."
)
ALLOW = typer.Option(
    None, help="A class, package.module.Class, whose objects may be beside the weights. They are left out, not run."
)


def describe(error: Exception) -> str:
    """One line that names the option, its value and what is accepted."""
    if hasattr(error, "format_message"):
        text = error.format_message()
    elif type(error).__name__ == "OptionError":  # by name: importing it would load torch for `--help`
        name, value, accepted = error.args
        text = f"--{name.replace('_', '-')} {value}: accepted is {accepted}"
    elif isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def print_error(message: str) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr)


def console(*, to_stderr: bool = False) -> Console:
    """A console whose tables are not cut at 80 columns where the output is a file."""
    from rich.console import Console

    found = Console(stderr=to_stderr)
    return found if found.is_terminal else Console(stderr=to_stderr, width=160)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error, called as progress(done, total, description)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console(to_stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, description: str) -> None:
            bar.update(task, completed=done, total=total, description=description)

        yield update


def check_choices(option: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the first value that is not known."""
    for value in values:
        if value not in known:
            fail(f"{option} {value}: accepted is one of {', '.join(known)}")


def fail(message: str, code: int = 2) -> None:
    """Print one line and stop."""
    print_error(message)
    raise typer.Exit(code)


def split_commas(values: Sequence[str] | None) -> list[str]:
    """Options may be repeated or hold a list: `--op a --op b` and `--op a,b` are the same."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Those options that were written on the command line."""
    return {name: value for name, value in values.items() if value is not None}
