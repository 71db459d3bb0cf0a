"""Raw pixels on their way from the door of a model to the projection that normalises them.

What stands between (a wrapper that casts, a head that reads the images' size) was written for normalised floats,
[B, C, H, W]. So every module around an accelerated one brings raw images upright at its door and wraps them in
:class:`RawPixels`, which no cast unpacks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit.guards import warn_once
from fastvit.interop.surgery import Mixin, mix_in, mixin_of

__all__ = ["Door", "Entrances", "RawPixels", "close_door", "open_doors", "upright"]

HOOK = "fastvit"  # the name of our hook among those of a module

# What moves pixels about and leaves their values alone.
LAYOUT = frozenset(
    "chunk clone contiguous detach expand flatten flip movedim narrow permute pin_memory repeat reshape roll select "
    "split squeeze transpose unbind unflatten unsqueeze view".split()
)
CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
PRODUCTS = frozenset("conv1d conv2d conv3d linear matmul __matmul__ mm bmm einsum unfold".split())


class RawPixels:
    """Raw images, uint8 [..., C, H, W], in place of the tensor a caller gave.

    Their shape can be read, and casts and moves and views of them are raw pixels still. Anything else gets the tensor
    of their values, 0..255, in the dtype that they were cast to, as from the tensor itself. A product refuses them: it
    is a part of the model that takes normalised images, and was not accelerated; so does what comes behind the
    projection, where they are the target of a loss.
    """

    floats_left: ClassVar[int] = 0  # how often their values went on as floats, which look like normalised ones

    def __init__(self, images: Tensor, dtype: torch.dtype = torch.uint8, embedded: list[bool] | None = None) -> None:
        self.images = images
        self.dtype = dtype
        self.embedded = [] if embedded is None else embedded  # filled once they were; all views share it

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    @property
    def ndim(self) -> int:
        return self.images.dim()

    @property
    def device(self) -> torch.device:
        return self.images.device

    def size(self, dim: int | None = None) -> Any:
        return self.images.shape if dim is None else self.images.shape[dim]

    def dim(self) -> int:
        return self.images.dim()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __len__(self) -> int:
        return len(self.images)

    def to(self, *args: Any, **kwargs: Any) -> RawPixels:
        """The cast is remembered, the move is made."""
        dtype, device = self.dtype, self.images.device
        for value in (*args, *(kwargs.get(name) for name in ("dtype", "device", "other"))):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            elif isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
                device = torch.device(value)
        non_blocking = bool(kwargs.get("non_blocking", False))
        images = self.images if device == self.images.device else self.images.to(device, non_blocking=non_blocking)
        return RawPixels(images, dtype, self.embedded)

    def type(self, dtype: Any = None, **_: Any) -> Any:
        return self.to(dtype) if isinstance(dtype, torch.dtype) else self._values("type").type(dtype)

    def cuda(self, device: Any = None, **kwargs: Any) -> RawPixels:
        return self.to("cuda" if device is None else device, **kwargs)

    def cpu(self) -> RawPixels:
        return self.to("cpu")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in (
            "images",
            "dtype",
            "embedded",
        ):  # asked of every object by copies and pickles
            raise AttributeError(name)
        if name in CASTS:
            return lambda *_, **__: self.to(CASTS[name])
        if name in LAYOUT:
            return lambda *args, **kwargs: self._moved(getattr(self.images, name)(*args, **kwargs))
        return getattr(self._values(name), name)

    def __getitem__(self, index: Any) -> Any:
        return self._moved(self.images[index])

    def _moved(self, result: Any) -> Any:
        if isinstance(result, Tensor):
            return RawPixels(result, self.dtype, self.embedded) if result.dim() >= 3 else result.to(self.dtype)
        return type(result)(self._moved(one) for one in result) if isinstance(result, (tuple, list)) else result

    def _values(self, used_by: str) -> Tensor:
        if used_by in PRODUCTS:
            raise RuntimeError(
                f"raw pixels reached {used_by}: a part of this model that is not accelerated takes these images too, "
                "normalised; give it floats, normalised as ever"
            )
        if self.embedded:
            raise RuntimeError(
                f"raw pixels, 0..255, reached {used_by} behind the projection that normalised them, as the target of a "
                "loss does: give this model floats, normalised as ever, or the loss a target of its own"
            )
        warn_once(
            "a model accelerated with mean and std",
            f"{used_by} takes raw pixels, 0..255, in front of the projection "
            "that normalises them; what comes out is taken as normalised images",
        )
        if self.dtype.is_floating_point:
            RawPixels.floats_left += 1
        return self.images.to(self.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        return func(*_plain(name, args), **{key: _plain(name, value) for key, value in (kwargs or {}).items()})


def _plain(used_by: str, value: Any) -> Any:
    if isinstance(value, RawPixels):
        return value._values(used_by)
    if type(value) in (tuple, list):
        return type(value)(_plain(used_by, one) for one in value)
    return value


def _add_operators() -> None:
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "pow",
        "matmul",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "neg",
    ):
        function = getattr(operator, f"__{name}__")
        setattr(RawPixels, f"__{name}__", lambda self, *others, f=function, n=name: f(self._values(n), *others))
        setattr(RawPixels, f"__r{name}__", lambda self, other, f=function, n=name: f(other, self._values(n)))


_add_operators()


def upright(images: Any, channels: int) -> Any:
    """Raw images as a tensor [B, C, H, W], a view of [B, H, W, C] where that is how they came."""
    if isinstance(images, RawPixels):
        images.embedded.append(True)
        images = images.images
    is_nhwc = images.dim() >= 4 and images.shape[-1] == channels and images.shape[-3] != channels
    return images.movedim(-1, -3) if is_nhwc else images


class Door:
    """What brings raw images in at a module around accelerated ones: a hook that runs before its forward."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.welcomed(args, kwargs)

    def put_in(self, module: nn.Module) -> None:
        """Before every other hook, by a name of its own: numbers are given out again in another process."""
        hooks: Any = module._forward_pre_hooks
        hooks[HOOK] = self
        hooks.move_to_end(HOOK, last=False)
        module._forward_pre_hooks_with_kwargs[HOOK] = True  # type: ignore[index]

    def welcomed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, the raw images among them wrapped.

        Raises:
            ValueError: its first tensor is one of raw images with other channels.
        """
        values = (*args, *kwargs.values())
        found = [self._welcomed(value) for value in values]
        if all(one is value for one, value in zip(found, values, strict=True)):
            first = next((value for value in values if isinstance(value, Tensor)), None)
            if first is not None and _may_be_raw(first):
                raise ValueError(f"images: {first.shape[-3]} channels, but mean and std have {self.channels}")
            return args, kwargs
        return tuple(found[: len(args)]), dict(zip(kwargs, found[len(args) :], strict=True))

    def _welcomed(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _may_be_raw(value):
            return value
        images = upright(value, self.channels)
        return RawPixels(images) if images.shape[-3] == self.channels else value


def _may_be_raw(images: Tensor) -> bool:
    return images.dtype == torch.uint8 and images.dim() >= 4


class Entrances(Mixin):
    """Other methods that take images, of a module around accelerated ones: through its door, as its forward."""

    overrides = ("forward_features", "forward_intermediates", "get_intermediate_layers", "get_image_features")

    fastvit_door: Door

    @classmethod
    def methods(cls, own: Any) -> dict[str, Callable]:
        return {name: _through_the_door(getattr(own, name)) for name in cls.overrides if hasattr(own, name)}


def _through_the_door(method: Callable) -> Callable:
    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.fastvit_door.welcomed(args, kwargs)
        return method(self, *args, **kwargs)

    return enter


def open_doors(model: nn.Module, inside: Iterable[nn.Module], channels: int) -> None:
    """Give every module of `model` around one of those `inside` a door."""
    parts = {id(module) for module in inside}
    for module in model.modules():
        if id(module) in parts or _scatters(module) or not any(id(inner) in parts for inner in module.modules()):
            continue
        door = Door(channels)
        door.put_in(module)
        if mixin_of(module) is None and Entrances.methods(type(module)):
            mix_in(module, Entrances)
            module.fastvit_door = door  # type: ignore[assignment]


def close_door(module: nn.Module) -> None:
    """Undo :func:`open_doors` for one module, but for its class."""
    module._forward_pre_hooks.pop(HOOK, None)  # type: ignore[call-overload]
    module._forward_pre_hooks_with_kwargs.pop(HOOK, None)  # type: ignore[call-overload]


def _scatters(module: nn.Module) -> bool:
    """Whether this is a wrapper that splits or moves the tensors it is given, and would miss wrapped ones."""
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "_orig_mod" in module._modules
