"""`fastvit accelerate`."""

from __future__ import annotations

import json
from typing import Any

import typer

from .common import DEVICE, check_choices, console, fail, progress_bar, split_commas

LIBRARIES = ("timm", "torchvision", "transformers")


def accelerate(
    library: str = typer.Option(..., help="timm, torchvision or transformers."),
    model: str = typer.Option(
        ...,
        help="A name of the library's: vit_small_patch16_224 (timm), vit_b_16 (torchvision), or for transformers a "
        "model type (vit, dinov2, clip_vision_model, ...), a folder or a name on the hub. Only the last two have "
        "weights that are not random.",
    ),
    mean: str | None = typer.Option(None, help="One number a channel, by commas: take raw uint8 images."),
    std: str | None = typer.Option(None, help="One number a channel, by commas; together with --mean."),
    batch: int = typer.Option(8, min=1, help="Images in a batch, for the speed."),
    seconds: float = typer.Option(5.0, min=0.1, help="Time for each line of the speed table."),
    backend: str | None = typer.Option(None, help="A backend. Default: the fastest known."),
    device: str | None = DEVICE,
    no_speed: bool = typer.Option(False, "--no-speed", help="Verify only."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Accelerate a model of another library: what changes, that the results do not, and the speed of both here.

    Outputs and every gradient are compared on random images, by the tolerance rule: an error against float64 of at
    most twice the original's. Exits with 1 where one differs.

    Examples:

      fastvit accelerate --library timm --model vit_small_patch16_224

      fastvit accelerate --library timm --model vit_tiny_patch16_224 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5

      fastvit accelerate --library torchvision --model vit_b_16 --batch 2

      fastvit accelerate --library transformers --model dinov2 --no-speed
    """
    check_choices("--library", [library], LIBRARIES)
    means, stds = _numbers("--mean", mean), _numbers("--std", std)
    import torch

    from fastvit.backend import available_backends, check_known
    from fastvit.interop import acceleration, verification

    from .validate import check_device

    check_device(device)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if backend is not None:
        check_known(backend, "--backend")
        reason = available_backends(place)[backend]
        if reason:
            fail(f"--backend {backend}: can't run on {place}: {reason}")
    torch.manual_seed(0)
    subject = _build(library, model).to(place)
    acceleration.accelerate(subject, mean=means, std=stds, backend=backend)
    settings = acceleration.settings_of(subject)
    speeds: list[Any] = []
    with progress_bar() as progress:
        progress(0, 1, "verifying")
        found = verification.verify_acceleration(subject, settings, check=False)
        if not no_speed:
            from fastvit.interop.measuring import measure

            speeds = measure(subject, batch, seconds, progress)
    report = acceleration.report(subject)
    if as_json:
        print(json.dumps(_data(report, found, speeds), indent=2))
    else:
        _print(report, found, speeds, f"batch {batch}, {place}, {torch.get_num_threads()} threads")
    if found.failures:
        fail(found.verdict, 1)


def _build(library: str, name: str) -> Any:
    """The library's model of this name."""
    from fastvit.peers import import_peer

    if library == "timm":
        timm: Any = import_peer("timm")
        if not timm.is_model(name):
            fail(f"--model {name}: not a model of timm; timm.list_models() lists them")
        return timm.create_model(name)
    if library == "torchvision":
        models: Any = import_peer("torchvision.models")
        if name not in models.list_models():
            fail(f"--model {name}: not a model of torchvision; torchvision.models.list_models() lists them")
        return models.get_model(name, weights=None)
    import_peer("torchvision")
    transformers: Any = import_peer("transformers")
    if name in transformers.CONFIG_MAPPING:
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name))
    return transformers.AutoModel.from_pretrained(name)


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in split_commas([text])]
    except ValueError:
        fail(f"{option} {text}: accepted are numbers, separated by commas")
        raise AssertionError from None


def _data(report: Any, found: Any, speeds: list[Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "report": report.as_dict(),
        "outputs": [asdict(row) for row in found.outputs],
        "gradients": [asdict(row) for row in found.gradients],
        "speeds": [{**asdict(speed), "ratio": speed.ratio} for speed in speeds],
    }


def _print(report: Any, found: Any, speeds: list[Any], where: str) -> None:
    from rich.table import Table

    out = console()
    out.print(str(report), highlight=False, soft_wrap=True)
    table = Table(title="the same results", title_justify="left")
    for heading in ("", "compared", "failed", "largest difference", "largest error, of its bound", "where"):
        table.add_column(heading)
    for name, rows in (("outputs", found.outputs), ("gradients", found.gradients)):
        if not rows:
            continue
        tightest = max(rows, key=lambda row: row.share)
        failed = sum(not row.passed for row in rows)
        difference = max(row.difference for row in rows)
        table.add_row(name, str(len(rows)), str(failed), f"{difference:.1e}", f"{tightest.share:.0%}", tightest.name)
    out.print(table)
    if not speeds:
        return
    table = Table(title=f"speed: {where}", title_justify="left")
    for heading in ("from", "original", "accelerated", "ratio"):
        table.add_column(heading, justify="left" if heading == "from" else "right")
    for speed in speeds:
        ratio = f"[red]{speed.ratio:.2f}[/red]" if speed.ratio < 1 else f"{speed.ratio:.2f}"
        table.add_row(speed.task, _time(speed.original), _time(speed.accelerated), ratio)
    out.print(table)


def _time(timing: Any) -> str:
    """Median in milliseconds, with the spread of the middle three fifths."""
    return f"{timing.median_us / 1e3:.2f} ms ({timing.p20_us / 1e3:.2f} to {timing.p80_us / 1e3:.2f})"
