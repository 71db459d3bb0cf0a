"""Fine-tune torchvision's ViT-B/16: a new head on a frozen backbone; one line accelerates it."""

from __future__ import annotations

import argparse
import pickle
import sys
import time

import torch
from images import MEAN, STD, TINY_SIZE, load, missing, options
from torch import nn
from torch.utils.data import DataLoader

import fastvit

try:
    from torchvision.models import vit_b_16
    from torchvision.models.vision_transformer import VisionTransformer
    from tqdm import tqdm
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


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: str) -> float:
    """The share of images that are classified correctly."""
    model.eval()
    correct = [(model(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in loader]
    return torch.cat(correct).mean().item()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--weights", help="a file with the state_dict of vit_b_16; default: random weights")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # With --raw the loader hands over uint8, a quarter of the bytes: the model normalises while it projects.
    train, test, classes = load(args, raw=args.raw)
    model = create_model(args, classes).to(device)
    print(fastvit.report(model))

    optimizer = torch.optim.AdamW(model.heads.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss()
    seen, start = 0, time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        losses = []
        for images, labels in tqdm(train, desc=f"epoch {epoch}", unit="batch"):
            loss = criterion(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(images)
            losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()  # waits for the GPU
    rate = seen / (time.perf_counter() - start)
    print(f"loss {mean_loss:.6f}, accuracy {evaluate(model, test, device):.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
