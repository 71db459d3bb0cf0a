"""The whole Vision Transformer, forward and training step, against timm with the same weights.

A training step is forward, cross-entropy, backward and a fused AdamW step. Both residual streams have the same dtype.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import backend as backends
from fastvit import peers
from fastvit.benchmarks.problem import (
    COMPILED,
    FORWARD,
    STEP,
    Contender,
    Plan,
    Problem,
    Unavailable,
    compiled,
    our_backends,
)
from fastvit.benchmarks.rows import OURS
from fastvit.benchmarks.timing import Call
from fastvit.validation.tolerance import FACTOR, FLOOR_EPS, relative_error

NAMES = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}
CHECKED = 2  # samples on which outputs and gradients are compared before timing: float64 models are slow


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    on_gpu = device.type == "cuda"
    cases: list[tuple[str, int, dict[str, Any]]]
    if size == "tiny":
        cases = [("Ti", 1, {"depth": 1})]
    elif size == "small":
        cases = [(model, 64 if on_gpu else 8, {}) for model in (("S", "B") if on_gpu else ("Ti", "S"))]
    else:
        batches = (64, 256) if on_gpu else (1, 16)
        cases = [(model, batch, {}) for model in (NAMES if on_gpu else ("Ti", "S")) for batch in batches]
    return [
        (
            f"model ViT-{model}, batch {batch}",
            functools.partial(_problems_of, model, batch, overrides, device, on_gpu or size == "full"),
        )
        for model, batch, overrides in cases
    ]


def _problems_of(
    model: str, batch: int, overrides: dict[str, Any], device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator).to(device)
    labels = torch.randint(1000, (batch,), generator=generator).to(device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    check = functools.lru_cache(lambda backend: _check(backend, model, overrides, images, labels))
    for mode in (FORWARD, STEP):
        contenders = []
        for backend in our_backends(device):
            build = functools.partial(_build, model, overrides, images, labels, mode, autocast, backend, False)
            contenders.append(Contender(f"{OURS}{backend}", build))
            if with_compiled:
                build = functools.partial(_build, model, overrides, images, labels, mode, autocast, backend, True)
                contenders.append(Contender(f"{OURS}{backend}", build, COMPILED))
        for compile_it in (False, True) if with_compiled else (False,):
            build = functools.partial(_build, model, overrides, images, labels, mode, autocast, "", compile_it)
            contenders.append(Contender("timm", build, COMPILED if compile_it else ""))
        yield Problem(
            op="model",
            shape=f"ViT-{model}/16 224, batch {batch}" + (f", {overrides}" if overrides else ""),
            dtype="float32" if autocast is None else "bfloat16 autocast, fp32 residual",
            layout="NCHW",
            mode=mode,
            contenders=contenders,
            check=check,
            batch=batch,
        )


def _timm_model(model: str, overrides: dict[str, Any], device: torch.device) -> nn.Module:
    try:
        timm = peers.import_timm()
    except ImportError as error:
        raise Unavailable(str(error)) from error
    torch.manual_seed(0)
    return timm.create_model(NAMES[model], **overrides).to(device)


def _our_model(model: str, overrides: dict[str, Any], device: torch.device) -> nn.Module:
    """Ours, with timm's weights where timm is there."""
    from fastvit.model import create_model

    torch.manual_seed(0)
    ours = create_model(NAMES[model], **overrides).to(device)
    if not peers.timm_missing():
        ours.load_state_dict(_timm_model(model, overrides, device).state_dict())
    return ours


def _build(
    model: str,
    overrides: dict[str, Any],
    images: Tensor,
    labels: Tensor,
    mode: str,
    autocast: torch.dtype | None,
    backend: str,
    compile_it: bool,
) -> Call:
    make = _our_model if backend else _timm_model
    module = make(model, overrides, images.device).train(mode == STEP)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True) if mode == STEP else None

    def forward() -> Tensor:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            return module(images)

    with _forced(backend), torch.set_grad_enabled(mode == STEP):
        run = compiled(forward, images.device) if compile_it else forward

    def infer() -> object:
        with _forced(backend), torch.no_grad():
            return run()

    def step() -> object:
        assert optimizer is not None
        with _forced(backend):
            out = run()
        assert isinstance(out, Tensor)
        loss = F.cross_entropy(out.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return infer if mode == FORWARD else step


def _forced(backend: str) -> Any:
    return backends.use_backend(backend or None)


def _check(backend: str, model: str, overrides: dict[str, Any], images: Tensor, labels: Tensor) -> str:
    """Outputs and gradients against a float64 timm, held to twice the error of timm at float32."""
    reason = peers.timm_missing()
    if reason:
        return f"not timed: its check needs timm: {reason}"
    device = images.device
    theirs = _timm_model(model, overrides, device)
    truth = copy.deepcopy(theirs).double()
    wide, labels = images[:CHECKED], labels[:CHECKED]
    with _forced(backend):
        ours = _outcome(_our_model(model, overrides, device), wide, labels)
    plain = _outcome(theirs, wide, labels)
    exact = _outcome(truth, wide.double(), labels)
    floor = FLOOR_EPS * torch.finfo(torch.float32).eps
    for name, value in exact.items():
        error, bound = relative_error(ours[name], value), FACTOR * relative_error(plain[name], value) + floor
        if not error <= bound:
            return f"not timed, out of tolerance: {name}: error {error:.3g} > {bound:.3g}"
    return ""


def _outcome(module: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    module.train()
    out = module(images)
    F.cross_entropy(out, labels).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **gradients}
