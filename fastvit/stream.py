"""The residual stream between halves of blocks, and the norm of it, with what is still to be done to each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fastvit import backend as backends
from fastvit import functional, half_block, ops, tuning
from fastvit.cpu.linear import linear as apply_linear
from fastvit.guards import is_transformed
from fastvit.half_block import Products, Settings
from fastvit.ops.add_norm import Arguments as NormArguments
from fastvit.ops.add_norm import norm_of

__all__ = ["Norm", "Normed", "Result", "Setup", "State", "Stream"]

# Of B·T·D in an eager call.
LEAST_VALUES = 2**22  # on a GPU: ViT-S at a batch of 64. A rule, not a measurement
LEAST_ON_A_CPU = 2**18  # ViT-Ti at a batch of 7. Measured on two cores: at 8 faster by 3%, at 4 slower by 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class State(NamedTuple):
    """What surrounds a call, as far as the ops go by it."""

    joins: bool  # whether nothing looks at ops one by one, so that several may be one node
    trained: bool  # whether gradients are on
    autocast: torch.dtype | None
    forced: str | None  # the backend that is forced for every op
    resets: int  # of what the tuner has measured


class Setup(NamedTuple):
    """How the ops are called."""

    backend: str | None = None
    keeps_dtype: bool = False  # the stream keeps its dtype, whatever is added to it
    ends: bool = False  # the stream is a tensor behind this half: no norm comes that would add the product's bias
    state: State = State(False, False, None, None, 0)

    @classmethod
    def of(cls, x: Any, backend: str | None, keeps_dtype: bool) -> Setup | None:
        """For a call on tokens [B, T, D]; None where blocks are to run their own code.

        That is where something watches that can't see into the ops, where a graph is traced that needs no gradients
        (the compiler fuses as well by itself there) or is to be exported, and where the ops need not pay: for few
        tokens, which wait for the calls rather than for memory, and on a CPU without the backend "native". A
        `backend` that the blocks were given themselves says that they are wanted; one that is forced for every op
        says so on a GPU alone.
        """
        if not isinstance(x, Tensor) or x.dim() != 3 or x.dtype not in DTYPES or _has_any_global_hook():
            return None
        if is_transformed() or (torch.compiler.is_compiling() and not _is_trained()):
            return None
        if backend is None and not _pay(x):
            return None
        return cls(backend, keeps_dtype, state=_state(x))


def _state(x: Tensor) -> State:
    device_type = x.device.type
    is_cast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    autocast = torch.get_autocast_dtype(device_type) if is_cast else None
    if torch.compiler.is_compiling():
        return State(False, torch.is_grad_enabled(), autocast, None, 0)
    return State(ops.is_plain(x), torch.is_grad_enabled(), autocast, backends.forced(None), tuning.resets())


def _pay(x: Tensor) -> bool:
    """Whether the ops are known to pay for a call on these tokens."""
    if x.device.type == "cuda":
        return torch.compiler.is_compiling() or x.numel() >= LEAST_VALUES or backends.is_forced(None)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() < LEAST_ON_A_CPU:
        return False
    return backends.resolve(None, "cpu", False, "add_norm") == "native"


def _is_trained() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_exporting()


class Norm(NamedTuple):
    """Parameters of a norm that `add_norm` can make."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool


class Result(NamedTuple):
    """What a branch gives: a tensor [B, T, D], or with a weight [D, D] what is still to be multiplied by it, and the
    bias that is still to be added to it."""

    tensor: Tensor
    bias: Tensor | None = None
    weight: Tensor | None = None

    def whole(self) -> Tensor:
        """With its bias."""
        made = self.tensor if self.weight is None else apply_linear(self.tensor, self.weight)
        return made if self.bias is None else made + self.bias.to(made.dtype)


class Stream(NamedTuple):
    """The residual stream: a tensor [B, T, D], and a branch that is still to be added to it."""

    residual: Tensor
    branch: Result | None = None
    scale: Tensor | None = None
    keep: Tensor | None = None  # [B] float32

    def tensor(self, setup: Setup) -> Tensor:
        """With the branch added, in the dtype that torch's addition gives."""
        if self.branch is None:
            return self.residual
        branch = self.branch.whole()
        branch = branch if self.scale is None else branch * self.scale
        branch = branch if self.keep is None else branch * self.keep.to(branch.dtype)[:, None, None]
        narrows = setup.keeps_dtype and torch.promote_types(self.residual.dtype, branch.dtype) != self.residual.dtype
        return self.residual + (branch.to(self.residual.dtype) if narrows else branch)


class Normed:
    """What the norm of half a block gives, made where it is read: by itself, or in one node with what follows."""

    def __init__(
        self,
        stream: Stream,
        setup: Setup,
        norm: Norm | None = None,
        dtype: torch.dtype | None = None,
        ready: Any = None,
        made: Tensor | None = None,
    ) -> None:
        self.stream = stream  # with nothing to be added, once the norm is made
        self._setup, self._norm, self._dtype, self._made = setup, norm, dtype, made
        self._key: Any = None
        self._ready: dict[Any, Any] = {} if ready is None else ready  # what was decided, by `key`

    def tensor(self) -> Tensor:
        """[B, T, D]."""
        if self._made is None:
            branch = self.stream.branch
            if branch is not None and branch.weight is not None:
                branch = Result(apply_linear(branch.tensor, branch.weight), branch.bias)
                self.stream = self.stream._replace(branch=branch)
            call = self._settled_call()
            if call.branch is None and self._setup.state.joins and call.backend != "reference":
                total, self._made = norm_of(call, self._setup.state.trained)
            else:
                total, self._made = functional.call_add_norm(call)
            self.stream = Stream(total)
        return self._made

    def _settled_call(self) -> NormArguments:
        """Checked and settled once for every kind of call, where nothing looks at ops."""
        if not self._setup.state.joins:
            return self._call()
        residual, branch, scale, keep = self.stream
        x, bias, _ = NOTHING if branch is None else branch
        key = "alone", *self.key()
        rest = self._ready.get(key)
        if rest is None:
            self._make_room()
            call = self._call()
            self._ready[key] = call[7:]
            return call
        assert self._norm is not None
        weight, norm_bias, _, _ = self._norm
        return NormArguments(residual, x, bias, scale, keep, weight, norm_bias, *rest)

    def key(self) -> tuple[Any, ...]:
        """What is decided on a call goes by this."""
        if self._key is None:
            residual, branch, scale, keep = self.stream
            forms = map(form, NOTHING if branch is None else branch)
            self._key = self._setup, residual.shape, residual.dtype, residual.device, form(scale), form(keep), *forms
        return self._key

    def _make_room(self) -> None:
        if len(self._ready) >= MOST_READY:
            self._ready.clear()

    def in_one(self, products: Products, backend: str = "") -> tuple[Tensor, ...] | None:
        """What these make of it; None where they are to be made one by one.

        Args:
            products: always the same for one `ready`, but for the number of heads.
            backend: of the gradient of heads.
        """
        if self._norm is None or self._made is not None or not self._setup.state.joins:
            return None
        residual, branch, scale, keep = self.stream
        x, bias, before = NOTHING if branch is None else branch
        if type(residual) is not Tensor or (x is not None and type(x) is not Tensor):
            return None
        key = products.heads, *self.key()
        settings = self._ready.get(key, MISSING)
        if settings is MISSING:
            self._make_room()
            settings = self._ready[key] = self._settle(products, before, backend)
        if settings is None:
            return None
        weight, norm_bias, _, _ = self._norm
        tensors = residual, x, bias, scale, keep, weight, norm_bias, before
        total, *results = half_block.run(settings, tensors, products, self._setup.state.trained)
        self.stream = Stream(total)
        return tuple(results)

    def _settle(self, products: Products, before: Tensor | None, backend: str) -> Settings | None:
        call, setup = self._call(), self._setup
        if products.act:
            first, bias, *_ = products
            backend = functional.act_backend(call.residual, first, bias, setup.backend, call.dtype, setup.state.trained)
            if not backend:
                return None
        return half_block.settle(call, products, before, backend, setup.state.autocast)

    def _call(self) -> NormArguments:
        residual, branch, scale, keep = self.stream
        assert self._norm is not None
        x, bias, _ = NOTHING if branch is None else branch
        kept_dtype = residual.dtype if self._setup.keeps_dtype and branch is not None else None
        return functional.settle_add_norm(
            residual, x, bias, scale, keep, *self._norm, kept_dtype, self._dtype, self._setup.backend
        )


NOTHING = (None, None, None)  # of a Result
MISSING: Any = object()
MOST_READY = 64  # kinds of calls of half a block


def form(tensor: Tensor | None) -> Any:
    """What a decision on a tensor goes by."""
    return None if tensor is None else (tensor.shape, tensor.dtype)
