"""`fastvit info`."""

from __future__ import annotations

import json
from collections.abc import Iterable

import typer

from .common import console


def info(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table.")) -> None:
    """Show versions, devices, the backends with the reason where one cannot run and the one that is chosen, compiled
    targets and tuning tables.

    Examples:

      fastvit info

      fastvit info --json
    """
    from fastvit.demo.environment import collect, tables

    found = collect()
    found["tuning"] = _tuning(found["backends"])
    if as_json:
        print(json.dumps(found, indent=2))
        return
    out = console()
    for table in tables(found):
        out.print(table)
    for kind, table in found["tuning"].items():
        out.print(f"tuning table, {kind}: {table}", highlight=False, soft_wrap=True)
    for warning in found["warnings"]:
        out.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def _tuning(kinds: Iterable[str]) -> dict[str, str]:
    """For each kind of device, the file of its tuning table, or why there is none."""
    import torch

    from fastvit.tuning import describe

    return {kind: describe(torch.device(kind)) for kind in kinds}
