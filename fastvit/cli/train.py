"""`fastvit train`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import typer

from .common import console, describe, given

PATIENCE = 10  # seconds that a process waits for the first one to say what is wrong


def train(
    data: str | None = typer.Option(
        None,
        help="'digits' (bundled, 8x8) or a folder: FOLDER/<class>/<image> or FOLDER/*.tar, or train/ and val/ of them.",
        show_default="digits",
    ),
    model: str | None = typer.Option(
        None,
        help="vit_digits, or a name of fastvit.create_model.",
        show_default="vit_digits; folder: vit_tiny_patch16_224",
    ),
    image_size: int | None = typer.Option(None, help="Height and width.", show_default="8; folder: 224"),
    channels: int | None = typer.Option(None, help="1 or 3.", show_default="1; folder: 3"),
    validation_share: float | None = typer.Option(
        None, help="Share of each class held out, in a folder without train/ and val/.", show_default="0.2"
    ),
    epochs: int | None = typer.Option(None, help="Passes over the data.", show_default="36; folder: 100"),
    batch_size: int | None = typer.Option(
        None, help="Images a step in each process, at most.", show_default="32; folder: 64"
    ),
    accumulate_steps: int | None = typer.Option(None, help="Batches in each process before a step.", show_default="1"),
    tokens_per_batch: int | None = typer.Option(
        None,
        help="Instead of --batch-size, for a folder: each image keeps its shape, and this many tokens are a step in "
        "each process, at most.",
        show_default="off",
    ),
    max_tokens: int | None = typer.Option(
        None,
        help="With --tokens-per-batch: patches an image is shrunk to, at most.",
        show_default="those of --image-size",
    ),
    lr: float | None = typer.Option(None, help="Highest learning rate.", show_default="2e-3; folder: 5e-4"),
    min_lr: float | None = typer.Option(None, help="Learning rate at the end.", show_default="lr / 100"),
    warmup_epochs: float | None = typer.Option(None, help="Linear warm-up.", show_default="a tenth of the epochs"),
    weight_decay: float | None = typer.Option(
        None, help="AdamW's, not for biases, norms, positions and tokens.", show_default="0.05"
    ),
    clip_grad: float | None = typer.Option(None, help="Largest gradient norm; 0: off.", show_default="1.0"),
    label_smoothing: float | None = typer.Option(None, help="From 0 to below 1.", show_default="0.1"),
    drop_path: float | None = typer.Option(None, help="Stochastic depth, from 0 to below 1.", show_default="0"),
    layer_decay: float | None = typer.Option(
        None, help="Learning rate of each block, relative to the one after it; needs timm.", show_default="1: off"
    ),
    mixup: float | None = typer.Option(
        None, help="Alpha of mixup: 0.8 is usual, with --cutmix 1.0; needs timm.", show_default="0: off"
    ),
    cutmix: float | None = typer.Option(None, help="Alpha of CutMix; needs timm.", show_default="0: off"),
    mixup_prob: float | None = typer.Option(
        None, help="Share of batches that are mixed, with --mixup or --cutmix.", show_default="1.0"
    ),
    mixup_switch_prob: float | None = typer.Option(
        None, help="Share of those that CutMix mixes, with --mixup and --cutmix.", show_default="0.5"
    ),
    ema: float | None = typer.Option(
        None,
        help="Decay a step of an average of the parameters, such as 0.9999. It is tested and stored beside them: "
        "best.pt goes by it, and load_pretrained takes it unless key='model'.",
        show_default="0: off",
    ),
    ema_warmup: bool | None = typer.Option(
        None, "--ema-warmup", help="Let the decay rise to --ema in the first steps; for short runs."
    ),
    augment: bool | None = typer.Option(
        None, "--augment/--no-augment", help="Random shifts (digits), crops and flips (folder).", show_default="on"
    ),
    auto_augment: str | None = typer.Option(
        None, help="randaugment or trivialaugment, behind crops and flips (torchvision's).", show_default="off"
    ),
    repeated_aug: int | None = typer.Option(
        None,
        help="Times an image comes in an epoch, each with another augmentation; an epoch has as many images as "
        "before, so fewer different ones.",
        show_default="1: off",
    ),
    amp: str | None = typer.Option(None, help="Mixed precision: off, bf16, fp16.", show_default="off"),
    compile: bool | None = typer.Option(None, "--compile", help="Use torch.compile; in shards, on each block."),
    shard: str | None = typer.Option(
        None,
        help="Under torchrun: none (a whole model in each process, DDP), full (parameters, gradients and AdamW's "
        "averages in shards over all processes, FSDP2), hybrid (over the processes of a machine, copied to each).",
        show_default="none",
    ),
    shard_size: int | None = typer.Option(
        None, help="With --shard hybrid: processes that hold one model.", show_default="those of a machine"
    ),
    checkpoint_blocks: int | None = typer.Option(
        None, help="Recompute so many blocks in the backward pass instead of keeping activations.", show_default="0"
    ),
    seed: int | None = typer.Option(None, help="Of weights, order and augmentation.", show_default="0"),
    device: str | None = typer.Option(None, help="auto, cpu, cuda, cuda:N.", show_default="auto"),
    threads: int | None = typer.Option(None, help="Threads on a CPU.", show_default="1; folder: as torch chooses"),
    workers: int | None = typer.Option(None, help="Processes that decode images.", show_default="0; folder: 2"),
    init_from: Path | None = typer.Option(
        None, help="Start from these weights: whatever load_pretrained reads. Every shape must fit."
    ),
    output: Path | None = typer.Option(None, help="Folder for checkpoints and logs.", show_default="out/train"),
    save_steps: int | None = typer.Option(None, help="Save every so many steps too.", show_default="after each epoch"),
    keep: int | None = typer.Option(
        None, help="With --shard: the last checkpoints that are kept, beside the best one.", show_default="2"
    ),
    tensorboard: bool | None = typer.Option(
        None, "--tensorboard/--no-tensorboard", help="Logs under OUTPUT/tensorboard.", show_default="where installed"
    ),
    resume: str | None = typer.Option(
        None,
        help="Go on from this checkpoint, or the last one of a run's folder, with its options; on a CPU exactly as if "
        "it had never stopped. auto: from the last one in --output where there is one, else from the start.",
    ),
) -> None:
    """Train a Vision Transformer on raw uint8 images, normalised inside the kernel.

    AdamW, warm-up and cosine schedule, mixed precision, gradient clipping. After each epoch OUTPUT has last.pt,
    best.pt (each written whole or not at all) and metrics.jsonl. Under torchrun, one process a GPU (or on the CPU).

    A folder is read as by torchvision's ImageFolder, without what is hidden or left over (__MACOSX, ._1.jpg). Images
    come out upright and without opacity; 16 bits and floats from 0 to 1 are scaled to 8 bits; damaged ones are named.

    Tars in it are shards as WebDataset's: KEY.jpg with KEY.cls or KEY.json (its "label" or "cls"), a number. Those with
    the word train, and val or test, in their names are a split; classes.txt names the classes, one a line. They are
    indexed, not streamed, so that a run resumes on them as exactly as on a folder.

    With --tokens-per-batch, images keep their shapes, to whole patches, as NaViT's do: as many as this budget has room
    for are a step, without padding. --image-size is the size that the model's table of positions is made for.

    Examples:

      fastvit train --data digits --output out/digits

      fastvit train --data photos/ --model vit_small_patch16_224 --amp bf16 --epochs 50

      fastvit train --data photos/ --mixup 0.8 --cutmix 1.0 --repeated-aug 3 --drop-path 0.1 --ema 0.9999

      fastvit train --data photos/ --tokens-per-batch 16384 --max-tokens 256

      fastvit train --resume out/digits/last.pt

      torchrun --nproc-per-node 2 -m fastvit.cli train --data photos/

      torchrun --nproc-per-node 8 --max-restarts 3 -m fastvit.cli train --data photos/ --shard full --resume auto
    """
    values = {name: str(value) if isinstance(value, Path) else value for name, value in given(dict(locals())).items()}
    resumed = values.pop("resume", None)
    try:
        _run(values, resumed)
    except Exception as error:
        if type(error).__name__ == "ToldError":
            raise typer.Exit(2) from error
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE)  # the same is wrong in the first process, which says so and ends this one
        raise


def _run(values: dict[str, Any], resumed: str | None) -> None:
    from fastvit.training import train as run
    from fastvit.training.observers import Observer, ProgressBar, TensorBoard
    from fastvit.training.saving import CompleteError, begin_or_resume, last_of

    out = console()
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        options, checkpoint = begin_or_resume(values, resumed)
    except CompleteError as error:
        if resumed != "auto":
            raise
        if is_first:
            out.print(str(error), highlight=False)
        return
    observers: list[Observer] = [ProgressBar(out)]
    if is_first and options.tensorboard:
        try:
            observers.append(TensorBoard())
        except ImportError as error:
            out.print(f"no TensorBoard logs: {error}; `pip install tensorboard` adds them", highlight=False)
    if is_first:
        batch = f"{options.tokens_per_batch} tokens" if options.tokens_per_batch else str(options.batch_size)
        world = os.environ.get("WORLD_SIZE", "1")
        where = f", {world} processes" * (world != "1") + f", shard {options.shard}" * (options.shard != "none")
        out.print(
            f"{options.model} on {options.data}, {options.epochs} epochs, batch {batch}, "
            f"lr {options.lr:g}, amp {options.amp}, seed {options.seed}{where}",
            highlight=False,
        )
        if checkpoint is not None:
            epoch, step = checkpoint["epoch"], checkpoint["step"]
            place = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
            out.print(f"going on after {place}", highlight=False)
    try:
        done = run(options, resume=checkpoint, observers=observers, describe=describe)
    except KeyboardInterrupt:
        last = last_of(options.output)
        if is_first and last:
            out.print(f"interrupted; go on with: fastvit train --resume {last}", highlight=False)
        raise
    if is_first:
        ema = f" (of the average: {done.history[-1]['ema_test_accuracy']:.2%})" if done.ema else ""
        out.print(
            f"test accuracy {done.test_accuracy:.2%}{ema} after {options.epochs} epochs, {done.seconds:.0f} s; "
            f"checkpoints and metrics in {done.output}",
            highlight=False,
        )
