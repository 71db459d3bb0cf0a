"""Train transformers' ViTForImageClassification with its Trainer; one line accelerates the model."""

from __future__ import annotations

import argparse
import sys
from tempfile import TemporaryDirectory
from typing import Any

import torch
from images import MEAN, STD, TINY_TRANSFORMERS, load, missing, options
from torch import Tensor

import fastvit

try:
    import accelerate  # noqa: F401  (the Trainer needs it)
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
except (ImportError, RuntimeError) as error:
    sys.exit(missing(error, "transformers accelerate"))


def create_model(args: argparse.Namespace, classes: int) -> ViTForImageClassification:
    if args.model:
        model = ViTForImageClassification.from_pretrained(args.model, num_labels=classes, ignore_mismatched_sizes=True)
    else:
        config = ViTConfig(**(TINY_TRANSFORMERS if args.tiny else {}))
        config.num_labels = classes
        model = ViTForImageClassification(config)
    if args.plain:
        return model
    fastvit.accelerate(model, mean=MEAN, std=STD)  # <-- the one line
    return model


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", help="pretrained, a folder or a name on the hub; default: random weights")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # With --raw the batches are uint8, which reach the GPU four times as fast: the model normalises while it projects.
    train, test, classes = load(args, raw=args.raw)
    model = create_model(args, classes)
    print(fastvit.report(model))

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=1e-3,
            dataloader_num_workers=args.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            seed=args.seed,
            save_strategy="no",
            report_to="none",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=train.dataset,
            eval_dataset=test.dataset,
            data_collator=collate,
            compute_metrics=accuracy,
        )
        trained = trainer.train()
        found = trainer.evaluate()
    rate = trained.metrics["train_samples_per_second"]
    print(f"loss {trained.training_loss:.6f}, accuracy {found['eval_accuracy']:.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
