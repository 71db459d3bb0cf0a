"""The learning rate of a step, and which parameters decay."""

from __future__ import annotations

import math

import torch
from torch import nn

from .options import TrainOptions, peer_for


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Of a step since the start, of `steps` an epoch: a linear warm-up, then half a cosine down to `min_lr` at the end.

    A pure function of the step: resuming needs no state of it.
    """
    warmup, total = round(options.warmup_epochs * steps), options.epochs * steps
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW in two groups, as timm's: vectors, biases and what `model.no_weight_decay()` names do not decay.

    With `layer_decay` below 1, in two groups for each depth, as timm's too, each with an `lr_scale` for its learning
    rate: 1 for the head, and so much less for each layer before it.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    if layer_decay != 1:
        timm_optim = peer_for("layer_decay", layer_decay, "timm.optim")
        decays = timm_optim.param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
        )
        return torch.optim.AdamW(decays, lr=lr)
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt].append(parameter)
    decays = ({"params": part, "weight_decay": decay} for part, decay in zip(groups, (0.0, weight_decay), strict=True))
    return torch.optim.AdamW(decays, lr=lr)
