"""`fastvit demo`."""

from __future__ import annotations

from pathlib import Path

import typer

from .common import console


def demo(
    out: Path = typer.Option(Path("out/demo"), help="Folder for report.html, the pictures and results.json."),
    quick: bool = typer.Option(
        False, "--quick", help="A shortened run that only shows that everything works; its accuracy is not judged."
    ),
) -> None:
    """Do the main job on real images: validate every backend, train, compare with timm, measure, write a report.

    Exits with 1 if the validation fails or the mean test accuracy is below 96%.

    Examples:

      fastvit demo

      fastvit demo --quick --out /tmp/demo
    """
    from fastvit.demo.run import run_demo

    if not run_demo(out, quick=quick, console=console()):
        raise typer.Exit(1)
