"""`fastvit validate`."""

from __future__ import annotations

import typer

from .common import check_choices, console, progress_bar, split_commas


def validate(
    backend: list[str] | None = typer.Option(
        None, help="A backend: cpu, triton, cuda, emulated. Repeat or separate by commas. Default: all but emulated."
    ),
    op: list[str] | None = typer.Option(None, help="An op, such as patch_embed. Default: all."),
    dtype: list[str] | None = typer.Option(None, help="A compute dtype: fp32, bf16, fp16. Default: all."),
    quick: bool = typer.Option(False, "--quick", help="A few cases of each op, in fp32 and bf16."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N. Default: a GPU where a backend runs on one."),
    primitives: bool = typer.Option(
        False, "--primitives", help="Instead, hold the GPU's primitives (mma, ldmatrix, ...) to the emulation of them."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON for each case and tensor."),
) -> None:
    """Hold every backend to the float64 reference: forward and each gradient, on random images and photographs.

    Truth is plain convolution, concatenation and addition in float64. A backend passes where its error is at most
    twice that of plain PyTorch at the same precision, plus a small floor. Exits with 1 if anything fails or if
    nothing ran.

    Examples:

      fastvit validate --quick

      fastvit validate --backend cpu --op patch_embed --dtype fp32,bf16

      TRITON_INTERPRET=1 fastvit validate --backend triton --quick

      fastvit validate --backend emulated --quick

      fastvit validate --primitives
    """
    from fastvit.backend import BACKENDS
    from fastvit.validation import check_primitives
    from fastvit.validation import validate as run
    from fastvit.validation.cases import DTYPES, OPS, SHORT_NAMES

    backends, ops, dtypes = split_commas(backend), split_commas(op), split_commas(dtype)
    check_choices("--backend", backends, BACKENDS)
    check_choices("--op", ops, list(OPS))
    check_choices("--dtype", dtypes, [*DTYPES, *SHORT_NAMES])
    if primitives and (backends or ops or dtypes or quick):
        raise typer.BadParameter("accepted alone or with --device and --json", param_hint="--primitives")
    check_device(device)
    with progress_bar() as progress:
        if primitives:
            report = check_primitives(device, progress)
        else:
            report = run(backends or None, ops or None, dtypes or None, quick, device, progress)
    if as_json:
        print(report.to_json_lines(), end="")
    else:
        console().print(report.table())
    if not report.ok:
        if not report.failed:
            console(to_stderr=True).print("nothing ran: see the reasons above", style="red")
        raise typer.Exit(1)


def check_device(device: str | None) -> None:
    """Refuse a device that is not there, before anything runs."""
    if device is not None:
        from fastvit.training.distributed import choose_device

        choose_device(device)
