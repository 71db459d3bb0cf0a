"""Raw pixels on their way from the door of a model to the projection that normalises them.

What stands between (a wrapper that casts, a head that reads the images' size) was written for normalised floats,
[B, C, H, W]. So every module around an accelerated one brings raw images upright at its door and wraps them in
:class:`RawPixels`, which no cast unpacks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvit.interop.surgery import Mixin, mix_in, mixin_of
from fastvit.ops.decompositions import normalised

__all__ = ["Door", "Entrances", "RawPixels", "close_door", "open_doors", "upright"]

HOOK = "fastvit"  # the name of our hook among those of a module

# What moves pixels about and leaves their values alone.
LAYOUT = frozenset(
    "chunk clone contiguous detach expand flatten flip movedim narrow permute pin_memory repeat reshape roll select "
    "split squeeze transpose unbind unflatten unsqueeze view".split()
)
CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
PRODUCTS = frozenset("conv1d conv2d conv3d linear matmul mm bmm einsum".split())
JOINS = frozenset("cat concat stack hstack vstack flip roll".split())

Move = Callable[[Tensor], Any]


class Trail:
    """What became of the images of one call, shared by everything that was cut out of them."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = mean
        self.std = std
        self.embedded = False  # a projection took them as raw pixels, and normalised them
        self.numbers = ""  # what calculated with them before that


class RawPixels:
    """Raw images, uint8 [..., C, H, W], in place of the tensor a caller gave.

    Their shape can be read, and casts, moves and views of them are raw pixels still. What calculates with them gets

    - 0..255, as from the tensor itself, as long as nothing has normalised them: it was written for raw images. What it
      makes of them is a tensor, and no raw pixels any more;
    - normalised pixels, as the model would have been given without FastViT, once a projection has normalised them, and
      where it is a product itself: it was written for normalised images. The target of a loss is such a case.

    A model that does the one and then the other is wrong for either, and refused.
    """

    floats_left: ClassVar[int] = 0  # how often 0..255 went on as floats, which look like normalised ones

    def __init__(
        self,
        images: Tensor,
        trail: Trail,
        dtype: torch.dtype = torch.uint8,
        origin: Tensor | None = None,
        moves: tuple[Move, ...] = (),
    ) -> None:
        self.images = images
        self.trail = trail
        self.dtype = dtype
        self.origin = images if origin is None else origin  # [..., C, H, W]
        self.moves = moves  # what made `images` of it

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
            elif isinstance(value, (Tensor, RawPixels)):
                dtype, device = value.dtype, value.device
            elif isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
                device = torch.device(value)
        moved = self
        if device != self.images.device:
            non_blocking = bool(kwargs.get("non_blocking", False))
            moved = self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return RawPixels(moved.images, moved.trail, dtype, moved.origin, moved.moves)

    def type(self, dtype: Any = None, **_: Any) -> Any:
        return self.to(dtype) if isinstance(dtype, torch.dtype) else self.values("type").type(dtype)

    def cuda(self, device: Any = None, **kwargs: Any) -> RawPixels:
        return self.to("cuda" if device is None else device, **kwargs)

    def cpu(self) -> RawPixels:
        return self.to("cpu")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("images", "trail", "dtype", "origin", "moves"):  # asked by copies
            raise AttributeError(name)
        if name in CASTS:
            return lambda *_, **__: self.to(CASTS[name])
        if name in LAYOUT:
            return lambda *args, **kwargs: self._moved(lambda tensor: getattr(tensor, name)(*args, **kwargs))
        return getattr(self.values(name), name)

    def __getitem__(self, index: Any) -> Any:
        return self._moved(lambda tensor: tensor[index])

    def _moved(self, move: Move) -> Any:
        result = move(self.images)
        if isinstance(result, Tensor):
            return RawPixels(result, self.trail, self.dtype, self.origin, (*self.moves, move))
        return tuple(self._moved(_numbered(move, number)) for number in range(len(result)))

    def values(self, used_by: str) -> Tensor:
        """The tensor that `used_by` calculates with."""
        if not self.trail.embedded and used_by not in PRODUCTS:
            self.trail.numbers = used_by
            RawPixels.floats_left += 1
            return self.images.to(self.dtype)
        self.take(used_by)
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        tensor = normalised(self.origin, self.trail.mean, self.trail.std, dtype)
        for move in self.moves:
            tensor = move(tensor)
        return tensor

    def take(self, used_by: str) -> Tensor:
        """The raw images for what normalises them itself.

        Raises:
            RuntimeError: something has calculated with them before.
        """
        if self.trail.numbers and not self.trail.embedded:
            raise RuntimeError(
                f"raw pixels, 0..255, went into {self.trail.numbers} before {used_by} normalised them: what comes of "
                "that is not what normalised images give. Give this model floats, normalised as ever"
            )
        self.trail.embedded = True
        return self.images

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        return func(*_plain(name, args), **{key: _plain(name, value) for key, value in (kwargs or {}).items()})


def _numbered(move: Move, number: int) -> Move:
    """One of the several tensors that a move gives."""
    return lambda tensor: move(tensor)[number]


def _plain(used_by: str, value: Any) -> Any:
    if isinstance(value, RawPixels):
        # Put together as they are, they are raw pixels, in a tensor that says so by its dtype.
        return value.images if used_by in JOINS and value.dtype == torch.uint8 else value.values(used_by)
    if type(value) in (tuple, list):
        return type(value)(_plain(used_by, one) for one in value)
    return value


def _add_operators() -> None:
    for name in "add sub mul truediv floordiv pow matmul eq ne lt le gt ge neg".split():
        function = getattr(operator, f"__{name}__")
        setattr(RawPixels, f"__{name}__", lambda self, *others, f=function, n=name: f(self.values(n), *others))
        setattr(RawPixels, f"__r{name}__", lambda self, other, f=function, n=name: f(other, self.values(n)))


_add_operators()


def upright(images: Any, channels: int) -> Any:
    """Raw images as a tensor [B, C, H, W], a view of [B, H, W, C] where that is how they came."""
    if isinstance(images, RawPixels):
        images = images.take("the projection")
    is_nhwc = images.dim() >= 4 and images.shape[-1] == channels and images.shape[-3] != channels
    return images.movedim(-1, -3) if is_nhwc else images


class Door:
    """What brings raw images in at a module around accelerated ones: a hook that runs before its forward."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = mean
        self.std = std
        self.channels = len(mean)

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
        return RawPixels(images, Trail(self.mean, self.std)) if images.shape[-3] == self.channels else value


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


def open_doors(model: nn.Module, inside: Iterable[nn.Module], mean: Sequence[float], std: Sequence[float]) -> None:
    """Give every module of `model` around one of those `inside` a door."""
    parts = {id(module) for module in inside}
    for module in model.modules():
        if id(module) in parts or _scatters(module) or not any(id(inner) in parts for inner in module.modules()):
            continue
        door = Door(mean, std)
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
