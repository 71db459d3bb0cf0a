"""`fastvit convert`."""

from __future__ import annotations

import typer

from .common import ALLOW, KEY, check_choices, console, fail, given, split_commas

TARGETS = ("timm", "torchvision", "huggingface", "fastvit")
SCHEMAS = ("v4", "v5")


def convert(
    source: str = typer.Argument(
        metavar="IN",
        help="A .safetensors, .pth, .pt or .npz file, a folder with config.json, or owner/name on the hub.",
    ),
    destination: str = typer.Argument(
        metavar="OUT", help="A .safetensors, .pth or .pt file, or a folder (always for huggingface, never torchvision)."
    ),
    to: str = typer.Option(help="timm, torchvision, huggingface or fastvit."),
    schema: str | None = typer.Option(
        None,
        help="Names for huggingface: v4, as files on the hub have them, which transformers 4 and 5 load; or v5, as the "
        "models of transformers 5 have them in memory.",
        show_default="v4",
    ),
    key: str | None = KEY,
    allow: list[str] | None = ALLOW,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is at OUT."),
    strict: bool = typer.Option(True, "--strict/--no-strict", help="Or leave out what has no place, and list it."),
    img_size: str | None = typer.Option(None, help="Resample the positions: 384, or 224x320 (height x width)."),
    patch_size: str | None = typer.Option(None, help="Resample the patch weight too: 8, or 16x8."),
    in_chans: int | None = typer.Option(None, help="Sum or repeat the weights of the channels.", min=1),
    head: bool = typer.Option(True, "--head/--no-head", help="Or leave the classifier out."),
    num_heads: int | None = typer.Option(None, help="What the checkpoint does not say.", min=1),
    norm_eps: float | None = typer.Option(None, help="What the checkpoint does not say.", min=0),
    act_layer: str | None = typer.Option(None, help="gelu, gelu_tanh, quick_gelu, relu, silu: as before."),
) -> None:
    """Write a checkpoint of any library in another library's names; there and back gives the same bits.

    OUT is written whole or not at all. Printed is what was assumed and what was left out; code inside a file is never
    run.

    Examples:

      fastvit convert vit.pth vit-hf --to huggingface

      fastvit convert google/vit-base-patch16-224 vit.safetensors --to timm

      fastvit convert B_16.npz vit_b_16.pth --to torchvision --act-layer gelu

      fastvit convert vit.pth larger.safetensors --to fastvit --img-size 384 --no-head

      fastvit convert dino.pth teacher.pth --to timm --key teacher
    """
    check_choices("--to", [to], TARGETS)
    check_choices("--schema", [schema or "v4"], SCHEMAS)
    if schema is not None and to != "huggingface":
        fail(f"--schema {schema}: accepted with --to huggingface only")
    overrides = given(
        {
            "img_size": _size("--img-size", img_size),
            "patch_size": _size("--patch-size", patch_size),
            "in_chans": in_chans,
            "num_classes": None if head else 0,
            "num_heads": num_heads,
            "norm_eps": norm_eps,
            "act_layer": act_layer,
        }
    )
    from fastvit import checkpoints

    name = "huggingface-v5" if schema == "v5" else to
    out = console()
    with console(to_stderr=True).status(f"Converting {source}"):
        lines = checkpoints.convert(
            source, destination, name, key=key, allow=split_commas(allow), strict=strict, overwrite=overwrite,
            **overrides,
        )  # fmt: skip
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print(f"Wrote {destination}: {name}", highlight=False, markup=False, soft_wrap=True)


def _size(option: str, text: str | None) -> int | tuple[int, int] | None:
    """A number for a square, "HxW" for a rectangle."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(part.isdecimal() and int(part) > 0 for part in numbers):
        fail(f"{option} {text}: accepted is a whole number, or height x width as in 224x320")
    sizes = [int(part) for part in numbers]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
