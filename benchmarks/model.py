"""The whole Vision Transformer, forward and training step, against timm, torchvision and Hugging Face.

All have the same weights and the same dtype of the residual stream, which the row names; attention is PyTorch's fused
one everywhere. A training step is forward, cross-entropy, backward and a fused AdamW step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import backend as backends
from fastvit.benchmarks import models
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

CHECKED = 2  # samples on which outputs and gradients are compared before timing: float64 models are slow
Outcome = dict[str, Tensor]  # the logits, and the gradients where all parameters have the same names


@dataclass(frozen=True)
class Setup:
    """One model on one batch, and the precision it runs in."""

    model: str
    batch: int
    device: torch.device
    residual: torch.dtype | None = None  # None: no autocast, all in float32
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        more = "".join(f", {name} {value}" for name, value in self.overrides.items())
        return f"ViT-{self.model}/16 224, batch {self.batch}{more}"

    @property
    def precision(self) -> str:
        if self.residual is None:
            return "float32"
        name = "fp32" if self.residual == torch.float32 else "bf16"
        return f"bfloat16 autocast, {name} residual"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.residual is not None)

    def make(self, build: Callable[..., nn.Module]) -> nn.Module:
        """A model of `models`, on the device."""
        with self.device:  # one core of a CPU would take seconds to draw the numbers of a whole model
            return build(self.model, self.residual, **self.overrides).to(self.device)

    def data(self) -> tuple[Tensor, Tensor]:
        """Random images [B, 3, 224, 224] and labels [B]."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, 224, 224, generator=generator)
        return images.to(self.device), torch.randint(1000, (self.batch,), generator=generator).to(self.device)


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    on_gpu = device.type == "cuda"
    residuals = (torch.float32, torch.bfloat16) if on_gpu else (None,)
    if size == "tiny":
        cases = [Setup("Ti", 1, device, overrides={"depth": 1})]
    elif size == "small":
        sizes = (("S", 256), ("B", 256)) if on_gpu else (("Ti", 8), ("S", 8))
        cases = [Setup(model, batch, device, residual) for residual in residuals for model, batch in sizes]
    else:
        names, batches = (tuple(models.NAMES), (64, 256)) if on_gpu else (("Ti", "S"), (8,))
        cases = [Setup(name, batch, device, dtype) for name in names for batch in batches for dtype in residuals]
    return [
        (
            f"model ViT-{setup.model}, batch {setup.batch}, {setup.precision}",
            functools.partial(_problems_of, setup, _compiled(size, setup)),
        )
        for setup in cases
    ]


def _compiled(size: str, setup: Setup) -> dict[str, tuple[str, ...]]:
    """Mode → who is compiled too, of ours and of the rivals."""
    ours = [f"{OURS}{backend}" for backend in our_backends(setup.device)]
    if size == "full":
        return {mode: (*ours, *models.RIVALS) for mode in (FORWARD, STEP)}
    # Compiling a training step takes half a minute: where minutes count, the one comparison that matters most, and
    # of ours one alone, since a whole model is nearly the same with any of them.
    return {STEP: (*ours[:1], "timm")} if size == "small" and setup.residual == torch.float32 else {}


def _problems_of(setup: Setup, who_is_compiled: dict[str, tuple[str, ...]]) -> Iterator[Problem]:
    images, labels = setup.data()
    truth = functools.lru_cache(lambda: _truth(setup, images[:CHECKED], labels[:CHECKED]))
    check = functools.lru_cache(lambda backend: _check(backend, setup, images[:CHECKED], labels[:CHECKED], truth))
    for mode in (FORWARD, STEP):
        data = (setup, images, labels, mode)
        builds = {
            **{f"{OURS}{b}": functools.partial(timed_model, models.ours, *data, b) for b in our_backends(setup.device)},
            **{name: functools.partial(_build_rival, make, *data, truth) for name, make in models.RIVALS.items()},
        }
        contenders = [
            Contender(name, functools.partial(build, how), how)
            for name, build in builds.items()
            for how in (("", COMPILED) if name in who_is_compiled.get(mode, ()) else ("",))
        ]
        case = ("model", setup.shape, setup.precision, "NCHW", mode)
        yield Problem(*case, contenders, check, batch=setup.batch)


def timed_model(
    make: Callable[..., nn.Module], setup: Setup, images: Tensor, labels: Tensor, mode: str, backend: str, how: str
) -> Call:
    """The call that is timed: a forward pass, or a training step; compiled where `how` says so."""
    module = setup.make(make).train(mode == STEP)

    def forward() -> Tensor:
        with setup.autocast():
            return module(images)

    with _forced(backend), torch.set_grad_enabled(mode == STEP):
        run = compiled(forward, setup.device) if how else forward

    def infer() -> object:
        with _forced(backend), torch.no_grad():
            return run()

    if mode == FORWARD:
        return infer
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> object:
        with _forced(backend):
            out = run()
        assert isinstance(out, Tensor)
        loss = F.cross_entropy(out.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def _build_rival(
    make: Callable[..., nn.Module],
    setup: Setup,
    images: Tensor,
    labels: Tensor,
    mode: str,
    truth: Callable[[], tuple[Outcome, Outcome]],
    how: str,
) -> Call:
    """The timed call of a rival that computes the same as timm does."""
    exact, plain = truth()
    logits = _outcome(setup.make(make), setup, images[:CHECKED], labels[:CHECKED])["output"]
    reason = _difference("output", logits, exact, plain)
    if reason:
        raise Unavailable(f"does not compute the same: {reason}")
    return timed_model(make, setup, images, labels, mode, "", how)


def _forced(backend: str) -> Any:
    return backends.use_backend(backend or None)


def _truth(setup: Setup, images: Tensor, labels: Tensor) -> tuple[Outcome, Outcome]:
    """What timm gives in float64, and at the precision under test: the truth, and how near plain PyTorch comes.

    Raises:
        Unavailable: timm is not installed.
    """
    theirs = setup.make(models.timm)
    exact = copy.deepcopy(theirs).double()
    plain = _outcome(theirs, setup, images, labels)
    return _outcome(exact, replace(setup, residual=None), images.double(), labels), plain


def _check(
    backend: str, setup: Setup, images: Tensor, labels: Tensor, truth: Callable[[], tuple[Outcome, Outcome]]
) -> str:
    """Why ours must not be timed: its logits and gradients against float64, held to twice the error of timm."""
    try:
        exact, plain = truth()
    except Unavailable as error:
        return f"not timed: its check needs timm: {error}"
    with _forced(backend):
        found = _outcome(setup.make(models.ours), setup, images, labels)
    reasons = [_difference(name, found[name], exact, plain) for name in exact]
    return next((f"not timed, out of tolerance: {reason}" for reason in reasons if reason), "")


def _difference(name: str, found: Tensor, exact: Outcome, plain: Outcome) -> str:
    """Why a tensor is not the same; "" if it is."""
    floor = FLOOR_EPS * torch.finfo(torch.float32).eps
    error = relative_error(found, exact[name])
    bound = FACTOR * relative_error(plain[name], exact[name]) + floor
    return "" if error <= bound else f"{name}: error {error:.3g} > {bound:.3g}"


def _outcome(module: nn.Module, setup: Setup, images: Tensor, labels: Tensor) -> Outcome:
    module.train()
    with setup.autocast():
        out = module(images)
    F.cross_entropy(out if out.dtype == torch.float64 else out.float(), labels).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **gradients}
