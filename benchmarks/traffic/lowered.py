"""The code that inductor writes for a training step, run on tensors without data with its kernels counted.

The module is compiled by torch.compile as on the GPU, but for the last step: the code around the kernels runs, and a
kernel is noted in place of being compiled and launched.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch._inductor.virtualized import V

from fastvit.benchmarks.traffic.counting import REST, Count, Kernels
from fastvit.benchmarks.traffic.gpu import DEVICE


class NotWhole(RuntimeError):
    """torch.compile did not make one graph forward and one backward of the module; the message says why."""


class _Lowered(Exception):
    """Raised in place of running compiled code: all that was wanted is known."""


def count_compiled(module: nn.Module, images: Tensor, count: Count) -> None:
    """Note in `count` what the compiled forward and backward of a module come to, inside `fake_gpu`.

    Raises:
        NotWhole: the graph breaks, or there is no backward.
    """
    graphs = 0

    def lower(graph: GraphLowering) -> Any:
        nonlocal graphs
        graphs += 1
        code, _ = graph.codegen()
        call = _loaded(code.value, count)
        with V.fake_mode, count:
            call(list(graph.example_inputs))  # type: ignore[arg-type]
        return SimpleNamespace(call=_stop, __file__=__file__, __path__=__file__)

    whole_backward = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    # Whether to pad a product inductor decides by timing it; those of Vision Transformers need none.
    untimed: dict[str, Any] = {"shape_padding": False}
    with (
        fresh_cache(),
        config.patch(compile_threads=1, force_disable_caches=True, **untimed),
        whole_backward,
        mock.patch.object(GraphLowering, "compile_to_module", lower),
    ):
        torch._dynamo.reset()
        try:
            torch.compile(module, fullgraph=True, dynamic=False)(images)
        except _Lowered:
            pass
        except torch._dynamo.exc.Unsupported as error:
            raise NotWhole(f"does not compile to one graph: {str(error).splitlines()[0]}") from error
        finally:
            torch._dynamo.reset()
    if graphs != 2:
        raise NotWhole(f"compiled to {graphs} graphs, not to a forward and a backward")


def _stop(*_: Any) -> None:
    raise _Lowered


def _loaded(code: str, count: Count) -> Callable[[list[Tensor]], Any]:
    """The function `call` of a module that inductor has written, with what touches data replaced."""
    note = functools.partial(_noted, count)
    names: dict[str, Any] = {"__name__": "lowered"}
    with (
        mock.patch.object(AsyncCompile, "triton", lambda self, name, source, **_: note(name, source)),
        mock.patch.object(AsyncCompile, "wait", lambda self, scope: None),
    ):
        exec(compile(code, "lowered", "exec"), names)
    names.update(
        empty_strided_cuda=functools.partial(_empty, device=DEVICE),
        reinterpret_tensor=_reinterpreted,
        copy_if_misaligned=lambda tensor: tensor,
    )
    return names["call"]


def _empty(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _reinterpreted(tensor: Tensor, shape: Any, stride: Any, offset: int) -> Tensor:
    return tensor.as_strided(shape, stride, tensor.storage_offset() + offset)


def _noted(count: Count, name: str, source: str) -> Any:
    """In place of a compiled kernel: its launches are noted."""

    def run(*arguments: Any, stream: int) -> None:
        count.kernels.append(Kernels(name, REST, 1, kernel_bytes(name, source, arguments)))

    return SimpleNamespace(run=run)


def kernel_bytes(name: str, source: str, arguments: tuple[Any, ...]) -> int:
    """Bytes that a kernel of inductor's loads and stores, every tensor once a direction.

    Each value of its ranges is one load or store at each place of the code with an address of its own; where these
    come to less than the tensor, as for a slice, only they are counted.

    Raises:
        ValueError: the code is not of the form that is understood.
    """
    found = re.search(rf"def {re.escape(name)}\((.*?)\):", source, re.S)
    if not found:
        raise ValueError(f"{name}: no such function in the code of the kernel")
    names = [part.strip() for part in found[1].split(",") if "constexpr" not in part]
    given = dict(zip(names, arguments, strict=True))
    values = math.prod(value for argument, value in given.items() if argument.endswith("numel"))
    total = 0
    for parameter, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        moved = 0
        for direction in ("load", "store", "atomic_add"):
            places = _addresses(source, direction, parameter)
            moved += min(len(places) * values, tensor.numel())
        if not moved and tensor.numel():
            raise ValueError(f"{name}: its code neither loads nor stores {parameter}")
        total += moved * tensor.element_size()
    return total


def _addresses(source: str, direction: str, parameter: str) -> set[str]:
    """The different addresses at which the code of a kernel loads or stores a parameter."""
    found = set()
    for match in re.finditer(rf"tl\.{direction}\({parameter}\b", source):
        depth, end = 0, match.end()
        while depth or source[end] not in ",)":
            depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(source[end], 0)
            end += 1
        found.add(source[match.end() : end])
    return found
