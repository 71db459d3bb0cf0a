"""Train FastViT's own ViT on photographs of mixed sizes: no padding, no resizing to a square, a budget of tokens."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from images import DEVICE, MEAN, STD, missing
from torch import Tensor, nn

import fastvit
from fastvit.validation import photographs

try:
    from tqdm import tqdm
except ImportError as error:
    sys.exit(missing(error, "tqdm"))

PATCH = 16
Sample = tuple[Tensor, int]  # raw pixels [3, H, W], and which photograph they are of


def crops(count: int, most_tokens: int, seed: int) -> list[Sample]:
    """Crops of scikit-learn's two photographs, of any aspect ratio from 1:3 to 3:1, of whole patches."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        area, ratio = torch.rand(2, generator=generator).tolist()
        patches, ratio = most_tokens * (0.25 + 0.75 * area), 3 ** (2 * ratio - 1)  # rows to columns
        rows = max(1, min(26, int((patches * ratio) ** 0.5)))
        columns = max(1, min(39, most_tokens // rows, int((patches / ratio) ** 0.5)))
        # The same seed gives the same pair of places: one crop of each photograph, of which one is kept.
        pair = photographs(2, rows * PATCH, columns * PATCH, seed=seed * count + index)
        samples.append((pair[index % 2], index % 2))
    return samples


def batches(samples: list[Sample], budget: int, seed: int) -> Iterator[list[Sample]]:
    """All samples in random order, as many at a time as have `budget` tokens together."""
    batch: list[Sample] = []
    tokens = 0
    for index in torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist():
        image, label = samples[index]
        own = 1 + image[0].numel() // PATCH**2
        if batch and tokens + own > budget:
            yield batch
            batch, tokens = [], 0
        batch.append((image, label))
        tokens += own
    if batch:
        yield batch


def on_device(batch: list[Sample]) -> tuple[list[Tensor], Tensor]:
    return [image.to(DEVICE) for image, _ in batch], torch.tensor([label for _, label in batch], device=DEVICE)


def train(model: nn.Module, samples: list[Sample], args: argparse.Namespace) -> tuple[float, float]:
    """The mean loss of the last epoch, and images per second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start, losses = time.perf_counter(), [0.0]
    for epoch in range(args.epochs):
        losses = []
        with tqdm(total=len(samples), desc=f"epoch {epoch}", unit="img") as progress:
            for batch in batches(samples, args.tokens_per_batch, args.seed + epoch):
                images, labels = on_device(batch)
                loss = nn.functional.cross_entropy(model(images), labels)  # a list of images of any sizes
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                progress.update(len(batch))
    return sum(losses) / len(losses), args.epochs * len(samples) / (time.perf_counter() - start)


@torch.no_grad()
def accuracy(model: nn.Module, samples: list[Sample], budget: int) -> float:
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels in map(on_device, batches(samples, budget, 0))]
    return torch.cat(right).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few images: a few seconds on a CPU")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=196, help="patches of an image; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    for name in ("epochs", "tokens_per_batch", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} is less than 1")
    torch.manual_seed(args.seed)

    count, most = (640, min(24, args.max_tokens)) if args.tiny else (1024, args.max_tokens)
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3} if args.tiny else {"embed_dim": 192, "num_heads": 3}
    model = fastvit.VisionTransformer(224, PATCH, num_classes=2, dynamic_img_size=True, mean=MEAN, std=STD, **size)
    samples, held_out = crops(count, most, args.seed + 1), crops(count // 4, most, args.seed + 2)
    loss, rate = train(model.to(DEVICE), samples, args)
    right = accuracy(model, held_out, args.tokens_per_batch)
    print(f"loss {loss:.6f}, accuracy {right:.3f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
