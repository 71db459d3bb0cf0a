"""Fine-tune torchvision's ViT-B/16: a new head on a frozen backbone; one line accelerates it."""

from __future__ import annotations

import argparse
import pickle
import sys

import torch
from images import DEVICE, MEAN, STD, TINY_SIZE, accuracy, fit, load, missing, options
from torch import nn

import fastvit

try:
    from torchvision.models import vit_b_16
    from torchvision.models.vision_transformer import VisionTransformer
except (ImportError, RuntimeError) as error:
    sys.exit(missing(error, "torchvision tqdm"))


def create_model(args: argparse.Namespace, classes: int) -> VisionTransformer:
    model = VisionTransformer(TINY_SIZE, 8, 2, 3, 48, 192) if args.tiny else vit_b_16(weights=None)
    if args.weights:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            sys.exit(f"--weights {args.weights}: {str(error).splitlines()[0]}")
    model.requires_grad_(False)
    model.heads.head = nn.Linear(model.hidden_dim, classes)
    if args.plain:
        return model
    fastvit.accelerate(model, mean=MEAN, std=STD)  # <-- the one line
    return model


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--weights", help="a file with the state_dict of vit_b_16; default: random weights")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    # With --raw the loader hands over uint8, a quarter of the bytes: the model normalises while it projects.
    train, test, classes = load(args, raw=args.raw)
    model = create_model(args, classes).to(DEVICE)
    print(fastvit.report(model))

    optimizer = torch.optim.AdamW(model.heads.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss()
    loss, rate = fit(train, args.epochs, optimizer, lambda images, labels: criterion(model(images), labels))
    print(f"loss {loss:.6f}, accuracy {accuracy(model, test):.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
