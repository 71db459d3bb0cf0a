"""Bytes and launches of ops, counted while they run on tensors without data.

An op of PyTorch is one launch that reads each tensor it is given once, as far as it reaches (an expanded one is as
small as what it was expanded from), and writes each tensor it returns once; what only looks at its input otherwise,
or makes room, is free. Two things are more than that on a GPU: the backward of a layer norm are two kernels, one for
the input's gradient and one for the parameters', and both read everything. The backward of a convolution or of
attention counts as one launch, and what they hold in between as nothing.

An op of FastViT is what its launchers come to: they are run, and each launch is noted in place of being made. A file
of launchers that knows better, of a kernel that reads a part of a tensor or reads it twice, declares `TRAFFIC`: a
function by the op's name, from arguments and result to launches and bytes. Without launchers, an op counts as one of
PyTorch's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastvit import backend
from fastvit.discovery import Declared
from fastvit.ops import OPS

PRODUCTS, ATTENTION, REST = "products", "attention", "rest"
KINDS = (PRODUCTS, ATTENTION, REST)

# Ops that make room and write nothing there, by the start of the name, and those that only ask.
_FREE = ("empty", "new_empty", "_unsafe_view", "device", "is_", "sym_", "_local_scalar_dense")
# Ops that write what they return, or their first argument, without reading it.
_FILLS = ("zeros", "ones", "full", "new_", "rand", "zero_", "fill_", "copy_", "bernoulli_", "uniform_", "normal_")
_READ_TWICE = {"native_layer_norm_backward": 2}

Traffic = Callable[..., tuple[int, int]]
_DECLARED: Mapping[str, Mapping[str, Traffic]] = Declared("fastvit.kernels", "TRAFFIC")


@dataclass(frozen=True)
class Kernels:
    """One op that ran: its launches, the bytes that they read and write, and the operations of its product."""

    name: str
    kind: str
    launches: int
    bytes: int
    flops: int = 0


class Count(TorchDispatchMode):
    """Notes in `kernels` every op that runs inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernels] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "fastvit":
            self.kernels += _of_ours(func, args, kwargs, result)
        elif func.namespace != "prim" and not _is_free(func, args, result):
            self.kernels.append(_of_torch(func, args, kwargs, result))
        return result

    def total(self, what: str, *kinds: str) -> int:
        """A field of `Kernels`, summed over some kinds or all."""
        return sum(getattr(kernel, what) for kernel in self.kernels if kernel.kind in (kinds or KINDS))

    def by_name(self) -> dict[str, tuple[int, int]]:
        """Launches and bytes of each op or kernel, the largest first."""
        launches: Counter[str] = Counter()
        moved: Counter[str] = Counter()
        for kernel in self.kernels:
            launches[kernel.name] += kernel.launches
            moved[kernel.name] += kernel.bytes
        return {name: (launches[name], total) for name, total in moved.most_common()}


def size(tensor: Tensor) -> int:
    """Bytes that a tensor reaches: a dimension of stride 0 has one row."""
    reached = (
        extent for extent, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or not extent
    )
    return math.prod(reached) * tensor.element_size()


def _tensors(value: Any) -> dict[Any, Tensor]:
    """Those inside, each once."""
    return {_place(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _is_free(func: Any, args: Any, result: Any) -> bool:
    """Whether it launches nothing: it makes room, or another view of the memory that it was given."""
    return func.is_view or _name(func).startswith(_FREE) or not _tensors(result)


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _of_torch(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Kernels:
    name, formula = _name(func), flop_registry.get(func.overloadpacket)
    kind = ATTENTION if "attention" in name else PRODUCTS if formula else REST
    flops = formula(*args, **kwargs, out_val=result) if formula else 0
    times = _READ_TWICE.get(name, 1)
    reads, writes = _reads(func, args, kwargs), _writes(func, args, kwargs, result)
    moved = times * sum(map(size, reads.values())) + sum(map(size, writes.values()))
    return Kernels(name, kind, times, moved, flops)


def _arguments(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, bool, Any]]:
    """Each argument of the schema that was given, whether it is written, and its value."""
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        yield argument, argument.alias_info is not None and argument.alias_info.is_write, value


def _reads(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[Any, Tensor]:
    name = _name(func)
    found: dict[Any, Tensor] = {}
    for position, (argument, _, value) in enumerate(_arguments(func, args, kwargs)):
        is_filled = position == 0 and name.startswith(_FILLS)
        if not argument.is_out and not is_filled:
            found |= _tensors(value)
    return found


def _writes(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> dict[Any, Tensor]:
    found = _tensors(result)
    for _, is_written, value in _arguments(func, args, kwargs):
        if is_written:
            found |= _tensors(value)
    return found


def _of_ours(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> list[Kernels]:
    """As its file declares, else as its launchers launch, else as an op of PyTorch."""
    op = OPS[_name(func)]
    flops = op.flops(*_shapes(args), **_shapes(kwargs))
    kind = PRODUCTS if flops else REST
    declared = {name: traffic for names in _DECLARED.values() for name, traffic in names.items()}
    if op.name in declared:
        launches, moved = declared[op.name](*args, **kwargs, result=result)
        return [Kernels(op.name, kind, launches, moved, flops)]
    function = _launcher(op.name)
    if function is None:
        plain = _of_torch(func, args, kwargs, result)
        return [Kernels(op.name, kind, 1, plain.bytes, flops)]
    values = [_without_device(value) for _, _, value in _arguments(func, args, kwargs)]
    return _launched(op.name, lambda: function(*values[:-1]), kind, flops)


def _without_device(value: Any) -> Any:
    """A tensor of the device "meta" in the place of one: launchers may ask a GPU for more than it has without data."""
    if not isinstance(value, Tensor):
        return value
    with unset_fake_temporarily():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _shapes(value: Any) -> Any:
    """The arguments with shapes in the place of tensors, as formulas of products take them."""
    if isinstance(value, dict):
        return {name: _shapes(item) for name, item in value.items()}
    return tuple(item.shape if isinstance(item, Tensor) else item for item in value)


def _launcher(name: str) -> Callable[..., object] | None:
    """What makes the launches of an op on a GPU, by Triton; None where nothing does."""
    try:
        pair = backend.implementation("triton", name.removesuffix("_backward"))
    except (ImportError, AttributeError):
        return None
    return pair[name.endswith("_backward")]


def _launched(name: str, run: Callable[[], object], kind: str, flops: int) -> list[Kernels]:
    """The launches of one call, and PyTorch's own kernels around them."""
    from fastvit.kernels import calls, launch

    call, others = calls.Call(name), Count()
    with mock.patch.object(launch, "launch", call.note), unset_fake_temporarily(), others:
        run()
    ours = Kernels(name, kind, len(call.launches), call.bytes, max(0, flops - others.total("flops")))
    return [ours, *others.kernels]
