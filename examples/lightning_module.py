"""Train a LightningModule around a model of timm's; one line accelerates the model."""

from __future__ import annotations

import sys
import time
from tempfile import TemporaryDirectory
from typing import Any

import torch
from images import MEAN, STD, TINY_TIMM, load, missing, options
from torch import Tensor
from torch.nn import functional as F

import fastvit

try:
    import lightning as L
    import timm
except (ImportError, RuntimeError) as error:
    sys.exit(missing(error, "lightning timm torchvision"))


class Classifier(L.LightningModule):
    def __init__(self, name: str, plain: bool, **options: Any) -> None:
        super().__init__()
        self.model = timm.create_model(name, **options)
        if plain:
            return
        fastvit.accelerate(self.model, mean=MEAN, std=STD)  # <-- the one line

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of timm; default: %(default)s")
    args = parser.parse_args()
    L.seed_everything(args.seed)

    # With --raw the loader hands over uint8, a quarter of the bytes: the model normalises while it projects.
    train, test, classes = load(args, raw=args.raw)
    module = Classifier(args.model, args.plain, num_classes=classes, **(TINY_TIMM if args.tiny else {}))
    print(fastvit.report(module))

    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=args.epochs,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        start = time.perf_counter()
        trainer.fit(module, train, test)
    seconds = time.perf_counter() - start  # with the validation
    rate = args.epochs * len(train.dataset) / seconds  # type: ignore[arg-type]
    loss, accuracy = trainer.callback_metrics["loss"], trainer.callback_metrics["accuracy"]
    print(f"loss {loss:.6f}, accuracy {accuracy:.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
