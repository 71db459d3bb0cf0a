"""A GPU that is not there: tensors of it without data, autograd on them, and the properties that inductor asks for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.utils import _triton

from fastvit.benchmarks.traffic.gradients import gradients

DEVICE = torch.device("cuda", 0)

# NVIDIA's data sheet of the H200 and its tuning guide for Hopper; the clock is of no use here.
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=141 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)

_CUDA_TYPE, _META_TYPE = 1, 14  # places in c10's list of device types
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Inside, tensors have no data, "cuda" is an H200, and gradients are `torch.autograd.grad`'s.

    All that is replaced comes back at the end. What torch keeps of what it has asked (the backends that can run, the
    passes that inductor has built) does not: run it in a process of its own.
    """
    with ExitStack() as stack:
        for target, name, value in _replacements():
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(_device_guard())
        stack.enter_context(_attention())
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def to_gpu(module: nn.Module) -> nn.Module:
    """Put tensors on the fake GPU in the place of a module's parameters and buffers."""
    part: Any  # its parameters may be of any class
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(_like(value), requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else _like(value)
    return module


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Object, attribute and what takes its place."""
    yield FakeTensorMode, "avoid_device_init", True  # as where no GPU is
    yield FunctionCtx, "set_materialize_grads", _set_materialize_grads
    yield torch.autograd, "grad", gradients
    yield UniformValueConstantFolder, "_deduce_value", _folded_on_host(UniformValueConstantFolder._deduce_value)
    yield torch.version, "cuda", "12.8"
    yield torch._C, "_cuda_getCurrentRawStream", _always(0)
    facts = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True}
    for name, value in {
        **facts,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "is_current_stream_capturing": False,
        "set_device": None,
        "synchronize": None,
        "_lazy_init": None,
        "get_device_properties": H200,
        "get_device_capability": (H200.major, H200.minor),
        "get_device_name": H200.name,
        "get_rng_state": torch.empty(16, dtype=torch.uint8),
        "set_rng_state": None,
    }.items():
        yield torch.cuda, name, _always(value)
    for name, value in {
        **facts,
        "get_device_properties": H200,
        "get_compute_capability": 10 * H200.major + H200.minor,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "get_raw_stream": 0,
    }.items():
        yield CudaInterface, name, staticmethod(_always(value))
    yield CudaInterface.Worker, "get_device_properties", staticmethod(_always(H200))
    yield CudaInterface.Worker, "current_device", staticmethod(_always(0))
    yield _triton, "has_triton", _always(True)
    yield _triton, "triton_hash_with_backend", _always("none")
    yield scheduler, "has_triton", _always(True)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    ctx.materialize_grads = value
    ctx.keeps_none = not value  # the first can't be read


def _folded_on_host(deduce: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor makes real tensors of one value on a graph's device to compute constants: on the CPU instead."""

    def run(self: Any, node: Any) -> Any:
        kwargs = node.kwargs
        node.kwargs = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = kwargs

    return run


@contextmanager
def _device_guard() -> Iterator[None]:
    """Autograd asks a device's guard for streams even where there is no data; a torch without CUDA has none of it.

    It gets that of the device "meta", which does nothing. On other systems than Linux and macOS torch must have CUDA.
    """
    name = {"linux": "libc10.so", "darwin": "libc10.dylib"}.get(sys.platform)
    if name is None:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / name))
    guards = (ctypes.c_void_p * (_META_TYPE + 1)).in_dll(library, _GUARDS)
    before = guards[_CUDA_TYPE]
    guards[_CUDA_TYPE] = before or guards[_META_TYPE]
    try:
        yield
    finally:
        guards[_CUDA_TYPE] = before


@contextmanager
def _attention() -> Iterator[None]:
    """Attention by FlashAttention, as on a GPU: without one, torch would take it apart."""

    def flash(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or query.dtype not in (torch.float16, torch.bfloat16):
            raise NotImplementedError("attention is counted without a mask, in float16 or bfloat16")
        call = torch.ops.aten._scaled_dot_product_flash_attention
        return call(query, key, value, dropout_p, is_causal, False, scale=scale)[0]

    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradCUDA", "AutogradMeta"):  # the second where launchers run
        library.impl("scaled_dot_product_attention", flash, key)
    try:
        yield
    finally:
        library._destroy()
