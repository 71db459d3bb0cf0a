"""Pre-train transformers' masked autoencoder on raw uint8 images; one line accelerates it.

The accelerated model projects only the quarter of the patches that are not masked, and normalises them on the way.
"""

from __future__ import annotations

import argparse
import sys

import torch
from images import DEVICE, MEAN, STD, TINY_TRANSFORMERS, fit, load, missing, normalise, options
from torch import Tensor

import fastvit

try:
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

    train, _, _ = load(args, raw=True)
    with torch.device(DEVICE):
        model = create_model(args).train()
    print(fastvit.report(model))
    takes_raw = bool(fastvit.report(model).changes)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)

    def loss_of(images: Tensor, _: Tensor) -> Tensor:  # uint8 [B, 3, H, W]
        return model(pixel_values=images if takes_raw else normalise(images)).loss

    loss, rate = fit(train, args.epochs, optimizer, loss_of)
    print(f"loss {loss:.6f}, {rate:.0f} images/s")


if __name__ == "__main__":
    main()
