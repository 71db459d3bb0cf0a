"""Train a model of timm's with timm's optimizers, schedules, Mixup and EMA; one line accelerates it."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from images import DEVICE, MEAN, STD, TINY_TIMM, accuracy, load, missing, options
from torch import nn

import fastvit

try:
    import timm
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3
    from tqdm import tqdm
except (ImportError, RuntimeError) as error:
    sys.exit(missing(error, "timm torchvision tqdm"))


def create_model(args: argparse.Namespace, classes: int) -> nn.Module:
    sizes = TINY_TIMM if args.tiny else {}
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes, **sizes)
    if args.plain:
        return model
    fastvit.accelerate(model, mean=MEAN, std=STD)  # <-- the one line
    return model


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="default: %(default)s")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (a download)")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of Mixup; default: off")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    if args.mixup and args.raw:
        parser.error("--mixup: mixes normalised images; leave out --raw")
    if args.mixup and args.batch_size % 2:
        parser.error("--mixup: pairs the images of a batch; --batch-size must be even")
    torch.manual_seed(args.seed)

    # With --raw the loader hands over uint8, a quarter of the bytes: the model normalises while it projects.
    train, test, classes = load(args, raw=args.raw, drop_last=args.mixup > 0)
    model = create_model(args, classes).to(DEVICE)
    print(fastvit.report(model))

    ema = ModelEmaV3(model, decay=0.9)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs * len(train), t_in_epochs=False)
    mixup = Mixup(mixup_alpha=args.mixup, num_classes=classes) if args.mixup else None
    criterion = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss()

    seen, step, start = 0, 0, time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        losses = []
        for images, labels in tqdm(train, desc=f"epoch {epoch}", unit="batch"):
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            if mixup:
                images, labels = mixup(images, labels)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=args.amp):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, seen = step + 1, seen + len(images)
            ema.update(model, step=step)
            scheduler.step_update(step)
            losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()  # waits for the GPU
    rate = seen / (time.perf_counter() - start)
    print(f"loss {mean_loss:.6f}, accuracy of the EMA {accuracy(ema.module, test):.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
