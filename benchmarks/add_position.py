"""Positions and class token for tokens from elsewhere: cat, add and cast in one pass, against the eager ops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastvit import functional
from fastvit.benchmarks.patch_embed import WIDTHS, check_backend
from fastvit.benchmarks.problem import BOTH, COMPILED, FORWARD, Contender, Plan, Problem, compiled, our_backends
from fastvit.benchmarks.rows import OURS
from fastvit.benchmarks.timing import Call
from fastvit.validation.cases import AddPositionCase, Inputs, make_inputs

# label → (dtype of the tokens, dtype of positions and prefix)
PRECISIONS = {"float32": (torch.float32, "same"), "bfloat16": (torch.bfloat16, "same"),
              "bfloat16, fp32 positions": (torch.bfloat16, "mixed")}  # fmt: skip


def plan(size: str, device: torch.device) -> Plan:
    """The cases of the suite."""
    on_gpu = device.type == "cuda"
    if size == "tiny":
        shapes = [("Ti", 2, 4)]
    else:
        batches = (
            ((256,) if size == "small" else (64, 256, 1024)) if on_gpu else ((16,) if size == "small" else (1, 16))
        )
        models = ("S", "B") if size == "small" else tuple(WIDTHS)
        shapes = [(model, batch, 196) for model in models for batch in batches]
    return [
        (
            f"add_position ViT-{model}, batch {batch}, {precision}",
            functools.partial(_problems_of, model, batch, patches, precision, device, size != "tiny"),
        )
        for model, batch, patches in shapes
        for precision in PRECISIONS
    ]


def _problems_of(
    model: str, batch: int, patches: int, precision: str, device: torch.device, with_compiled: bool
) -> Iterator[Problem]:
    dtype, parameters = PRECISIONS[precision]
    name = f"ViT-{model}, {patches} patches, batch {batch}"
    case = AddPositionCase(name, batch=batch, patches=patches, width=WIDTHS[model], parameters=parameters)
    inputs = make_inputs(case, dtype, device)
    for tensor in inputs.tensors.values():
        assert tensor is not None
        tensor.requires_grad_()
    check = functools.lru_cache(lambda backend: check_backend(backend, "add_position", inputs, device))
    tokens = inputs.tensors["tokens"]
    assert tokens is not None
    moved = float(tokens.numel() * tokens.element_size() + inputs.grad.numel() * inputs.grad.element_size())
    for mode in (FORWARD, BOTH):
        yield Problem(
            op="add_position",
            shape=name,
            dtype=precision,
            layout="contiguous",
            mode=mode,
            contenders=list(_contenders(inputs, mode, device, with_compiled)),
            check=check,
            compute=inputs.compute,
            batch=batch,
            flops=float(inputs.grad.numel()),
            # Backward reads the gradient once; the tokens' own gradient is a view of it.
            moved=moved + (inputs.grad.numel() * inputs.grad.element_size() if mode == BOTH else 0.0),
        )


def _contenders(inputs: Inputs, mode: str, device: torch.device, with_compiled: bool) -> Iterator[Contender]:
    tokens, pos_embed, prefix = leaves = [inputs.tensors[name] for name in ("tokens", "pos_embed", "prefix")]
    assert tokens is not None and pos_embed is not None and prefix is not None
    known: list[Tensor] = [leaf for leaf in leaves if leaf is not None]

    def ours(backend: str) -> Tensor:
        return functional.add_position(tokens, pos_embed, prefix=prefix, backend=backend)

    def eager() -> Tensor:
        return (torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1) + pos_embed).to(tokens.dtype)

    def build(function: Callable[[], Tensor], compile_it: bool) -> Call:
        with torch.set_grad_enabled(mode == BOTH):
            run = compiled(function, device) if compile_it else function

        def forward() -> object:
            with torch.no_grad():
                return run()

        def forward_and_backward() -> object:
            out = run()
            assert isinstance(out, Tensor)
            return torch.autograd.grad(out, known, inputs.grad)

        return forward if mode == FORWARD else forward_and_backward

    for backend in our_backends(device):
        yield Contender(f"{OURS}{backend}", functools.partial(build, functools.partial(ours, backend), False))
    yield Contender("cat + add", functools.partial(build, eager, False))
    if with_compiled:
        yield Contender("cat + add", functools.partial(build, eager, True), COMPILED)
