"""`fastvit inspect`."""

from __future__ import annotations

import json

import typer

from .common import ALLOW, KEY, console, split_commas


def inspect(
    checkpoint: str = typer.Argument(
        help="A .safetensors, .pth, .pt or .npz file, a folder with config.json, or owner/name on the hub."
    ),
    key: str | None = KEY,
    allow: list[str] | None = ALLOW,
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text."),
) -> None:
    """Say what a checkpoint is: whose names, which model and sizes, what it leaves open, what FastViT can do with it.

    The exit code is 0 where `fastvit.load_pretrained` takes it as it is, 1 where it does not, and 2 where it can't be
    read. Code inside a file is never run.

    Examples:

      fastvit inspect vit.pth

      fastvit inspect google/vit-base-patch16-224 --json

      fastvit inspect dino.pth --key student --allow mylib.config.Options
    """
    from fastvit import checkpoints

    with console(to_stderr=True).status(f"Reading {checkpoint}"):
        found = checkpoints.inspect(checkpoint, key=key, allow=split_commas(allow))
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)
    if not found.loads:
        raise typer.Exit(1)
