"""One training step of a host's model on the fake GPU, counted."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fastvit.benchmarks.traffic.counting import Count
from fastvit.benchmarks.traffic.gpu import DEVICE, fake_gpu, to_gpu
from fastvit.benchmarks.traffic.gradients import gradients
from fastvit.benchmarks.traffic.hosts import check_stream
from fastvit.benchmarks.traffic.lowered import count_compiled


def count_step(module: nn.Module, batch: int, *, compiled: bool, stream: torch.dtype | None = None) -> Count:
    """What a training step of a classifier of 224 pixels comes to; the module is on the fake GPU afterwards.

    Args:
        module: in training mode, on the CPU.
        stream: what the dtype of its residual stream is to be; None: any.

    Raises:
        LeftOut: it is of another one.
        NotWhole: it does not compile to one graph forward and one backward.
    """
    count = Count()
    with fake_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_gpu(module)
        images = torch.empty(batch, 3, 224, 224, device=DEVICE)
        with torch.autocast("cuda", torch.bfloat16):
            if stream is not None:
                check_stream(module, images, stream)
            if compiled:
                count_compiled(module, images, count)
                return count
        _run_eagerly(module, images, count)
    return count


def _run_eagerly(module: nn.Module, images: Tensor, count: Count) -> None:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with count:
        # It ends before the backward, as in training, and with it the weights' copies that it keeps in between.
        with torch.autocast("cuda", torch.bfloat16):
            logits = module(images)
        gradients(logits, parameters, torch.empty_like(logits))
