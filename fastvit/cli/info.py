"""`fastvit info`."""

from __future__ import annotations

import json

import typer

from .common import console


def info(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """Show versions, devices, the backends with the reason where one cannot run, and compiled targets.

    Examples:

      fastvit info

      fastvit info --json
    """
    from fastvit.demo.environment import collect, tables

    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    out = console()
    for table in tables(found):
        out.print(table)
    for warning in found["warnings"]:
        out.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
