"""Pre-train transformers' masked autoencoder on raw uint8 images; one line accelerates it.

The accelerated model projects only the quarter of the patches that are not masked, and normalises them on the way.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from images import MEAN, STD, TINY_TRANSFORMERS, load, missing, normalise, options

import fastvit

try:
    from tqdm import tqdm
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
except (ImportError, RuntimeError) as error:
    sys.exit(missing(error, "transformers tqdm"))

TINY_DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}


def create_model(args: argparse.Namespace) -> ViTMAEForPreTraining:
    sizes = {**TINY_TRANSFORMERS, **TINY_DECODER} if args.tiny else {}
    model = ViTMAEForPreTraining(ViTMAEConfig(mask_ratio=0.75, norm_pix_loss=True, **sizes))
    if args.plain:
        return model
    fastvit.accelerate(model, mean=MEAN, std=STD)  # <-- the one line
    return model


def main() -> None:
    args = options(__doc__, raw=False).parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    train, _, _ = load(args, raw=True)
    with torch.device(device):
        model = create_model(args).train()
    print(fastvit.report(model))
    takes_raw = bool(fastvit.report(model).changes)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    seen, start = 0, time.perf_counter()
    for epoch in range(args.epochs):
        losses = []
        for images, _ in tqdm(train, desc=f"epoch {epoch}", unit="batch"):
            images = images.to(device)  # uint8 [B, 3, H, W]
            loss = model(pixel_values=images if takes_raw else normalise(images)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(images)
            losses.append(loss.detach())
    mean_loss = torch.stack(losses).mean().item()  # waits for the GPU
    print(f"loss {mean_loss:.6f}, {seen / (time.perf_counter() - start):.0f} images/s")


if __name__ == "__main__":
    main()
