"""Raw pixels on their way from the door of a model to the projection that normalises them.

What stands between (a wrapper that casts, a head that reads the images' size) was written for normalised floats,
[B, C, H, W]. So every module around an accelerated one brings raw images upright at its door and wraps them in
:class:`RawPixels`, which no cast unpacks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
PRODUCTS = frozenset("conv1d conv2d conv3d linear matmul mm bmm einsum batch_norm instance_norm group_norm".split())
JOINS = frozenset("cat concat concatenate stack".split())
# What says nothing of their values.
FACTS = frozenset(
    "is_cuda is_cpu is_meta is_sparse is_quantized requires_grad grad layout names numel nelement is_contiguous stride "
    "get_device element_size storage_offset is_leaf is_pinned new_zeros new_ones new_empty new_full new_tensor".split()
)

Move = Callable[[Tensor], Any]


class Trail:
    """What became of the images of one call, shared by everything that was cut out of them."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = mean
        self.std = std
        self.embedded = False  # a projection took them as raw pixels, and normalised them
        self.numbers = ""  # what calculated with them before that
        self.parts: tuple[Trail, ...] = ()  # of those that were joined to these

    def embed(self) -> None:
        self.embedded = True
        for part in self.parts:
            part.embed()


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
        if name in FACTS:
            return getattr(self.images, name)
        if name == "type_as":
            return lambda other: self.to(other.dtype)
        found = getattr(self.values(name), name)
        return (lambda *args, **kwargs: self._calculated(found(*args, **kwargs))) if callable(found) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError("raw pixels can't be written to: clone the images before the model, or give it floats")

    def __getitem__(self, index: Any) -> Any:
        return self._moved(lambda tensor: tensor[index])

    def _moved(self, move: Move) -> Any:
        result = move(self.images)
        if isinstance(result, Tensor):
            return RawPixels(result, self.trail, self.dtype, self.origin, (*self.moves, move))
        return tuple(self._moved(_numbered(move, number)) for number in range(len(result)))

    def _calculated(self, result: Any) -> Any:
        """What was made of 0..255 and looks like raw pixels still goes on as such, for its projection to refuse."""
        if isinstance(result, Tensor) and result.dtype == torch.uint8 and result.dim() >= 3 and not self.trail.embedded:
            return RawPixels(result, self.trail)
        return result

    def values(self, used_by: str) -> Tensor:
        """The tensor that `used_by` calculates with."""
        if not self.trail.embedded and used_by not in PRODUCTS:
            self.trail.numbers = used_by
            if not torch.compiler.is_compiling():  # where it would be a guard
                RawPixels.floats_left += 1
            return self.images.to(self.dtype)
        self._embed(used_by)
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        tensor = normalised(self.origin, self.trail.mean, self.trail.std, dtype)
        for move in self.moves:
            tensor = move(tensor)
        return tensor

    def take(self, used_by: str) -> Tensor:
        """The raw images for what normalises them itself.

        Raises:
            RuntimeError: something has calculated with them before, or moved their channels.
        """
        self._embed(used_by)
        if self.moves and not torch.compiler.is_compiling() and self._moves_channels():
            raise RuntimeError(
                f"raw pixels had their channels moved before {used_by} normalised them, with the mean and std of other "
                "channels: give this model floats, normalised as ever"
            )
        return self.images

    def _embed(self, used_by: str) -> None:
        if self.trail.numbers and not self.trail.embedded:
            raise RuntimeError(
                f"raw pixels, 0..255, went into {self.trail.numbers} before {used_by} normalised them: what comes of "
                "that is not what normalised images give. Give this model floats, normalised as ever"
            )
        self.trail.embed()

    def _moves_channels(self) -> bool:
        if len({*zip(self.trail.mean, self.trail.std, strict=True)}) == 1:
            return False
        channels = torch.arange(len(self.trail.mean), dtype=torch.uint8)[:, None, None]
        moved = channels.expand(self.origin.shape)
        for move in self.moves:
            moved = move(moved)
        return moved.shape[-3:-2] != channels.shape[:1] or not bool((moved.cpu() == channels).all())

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        given = kwargs or {}
        first = args[0] if args else None
        if name in LAYOUT and isinstance(first, RawPixels):
            return first._moved(lambda tensor: func(tensor, *args[1:], **given))
        if name in JOINS and isinstance(first, (tuple, list)) and all(_is_raw(one) for one in first):
            return _joined([one for one in first if isinstance(one, RawPixels)], func, first, args[1:], given)
        pixels = [one for one in _leaves((args, given)) if isinstance(one, RawPixels)]
        result = func(*_plain(name, args), **{key: _plain(name, value) for key, value in given.items()})
        return pixels[0]._calculated(result) if pixels else result


def _is_raw(one: Any) -> bool:
    return isinstance(one, (RawPixels, Tensor)) and one.dtype == torch.uint8


def _joined(pixels: list[RawPixels], func: Callable, all_of: Any, args: Any, kwargs: Any) -> RawPixels:
    """Raw images put together are raw images; what becomes of them becomes of those they were."""
    trail = Trail(pixels[0].trail.mean, pixels[0].trail.std)
    trail.parts = tuple(one.trail for one in pixels)
    trail.numbers = next((part.numbers for part in trail.parts if part.numbers), "")
    return RawPixels(
        func([one.images if isinstance(one, RawPixels) else one for one in all_of], *args, **kwargs), trail
    )


def _numbered(move: Move, number: int) -> Move:
    """One of the several tensors that a move gives."""
    return lambda tensor: move(tensor)[number]


def _plain(used_by: str, value: Any) -> Any:
    if isinstance(value, RawPixels):
        return value.values(used_by)
    if type(value) in (tuple, list):
        return type(value)(_plain(used_by, one) for one in value)
    return value


def _add_operators() -> None:
    def operation(name: str) -> Callable:
        function = getattr(operator, f"__{name}__")
        return lambda self, *others: self._calculated(function(self.values(name), *_plain(name, others)))

    def reflected(name: str) -> Callable:
        function = getattr(operator, f"__{name}__")
        return lambda self, other: self._calculated(function(other, self.values(name)))

    for name in "add sub mul truediv floordiv mod pow matmul and or xor eq ne lt le gt ge neg invert abs".split():
        setattr(RawPixels, f"__{name}__", operation(name))
        setattr(RawPixels, f"__r{name}__", reflected(name))


_add_operators()


def upright(images: Any, channels: int) -> Any:
    """Raw images as a tensor [B, C, H, W], a view of [B, H, W, C] where that is how they came."""
    if isinstance(images, RawPixels):
        images = images.take("the projection")
    is_nhwc = images.dim() >= 4 and images.shape[-1] == channels and images.shape[-3] != channels
    return images.movedim(-1, -3) if is_nhwc else images


class Hook:
    """One of ours on a module, which runs before its forward."""

    def put_in(self, module: nn.Module) -> None:
        """Before every other hook, by a name of its own: numbers are given out again in another process."""
        hooks: Any = module._forward_pre_hooks
        hooks[HOOK] = self
        hooks.move_to_end(HOOK, last=False)
        module._forward_pre_hooks_with_kwargs[HOOK] = True  # type: ignore[index]


class Door(Hook):
    """What brings raw images in at a module around accelerated ones."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = mean
        self.std = std
        self.channels = len(mean)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.welcomed(args, kwargs)

    def welcomed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, the raw images among them wrapped.

        Raises:
            ValueError: its first tensor is one of raw images with other channels.
        """
        images = next((one for one in _tensors((args, kwargs)) if one.dim() >= 4), None)
        if images is None or images.dtype != torch.uint8:  # floats, normalised; bytes beside them are a mask
            return args, kwargs
        welcomed = self._welcomed((args, kwargs))
        if not any(isinstance(one, RawPixels) for one in _leaves(welcomed)):
            raise ValueError(f"images: {images.shape[-3]} channels, but mean and std have {self.channels}")
        return welcomed

    def _welcomed(self, value: Any) -> Any:
        if isinstance(value, Tensor) and _may_be_raw(value):
            images = upright(value, self.channels)
            return RawPixels(images, Trail(self.mean, self.std)) if images.shape[-3] == self.channels else value
        if type(value) is dict:
            return {key: self._welcomed(one) for key, one in value.items()}
        return type(value)(map(self._welcomed, value)) if type(value) in (tuple, list) else value


class Exit(Hook):
    """What gives a wrapper that splits or moves tensors the raw images as one."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _unwrapped(args), {key: _unwrapped(value) for key, value in kwargs.items()}


class Refusal(Hook):
    """What stops them before what passes over, in silence, whatever is no tensor or image: torchvision's transforms."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(isinstance(one, RawPixels) for one in _leaves((args, kwargs))):
            raise RuntimeError(
                f"raw pixels reached {type(module).__name__}, in front of the projection that normalises them: what it "
                "makes of bytes is not what it makes of normalised images. Give this model floats, normalised as ever"
            )


def _unwrapped(value: Any) -> Any:
    if isinstance(value, RawPixels):
        return value.take("a wrapper that splits batches")
    return type(value)(map(_unwrapped, value)) if type(value) in (tuple, list) else value


def _leaves(value: Any) -> Iterator[Any]:
    """What tuples, lists and dictionaries hold, whatever is in what."""
    if type(value) in (tuple, list, dict):
        for one in value.values() if type(value) is dict else value:
            yield from _leaves(one)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (one for one in _leaves(value) if isinstance(one, Tensor))


def _may_be_raw(images: Tensor) -> bool:
    return images.dtype == torch.uint8 and images.dim() >= 4


class Entrances(Mixin):
    """Other methods that take images, of a module around accelerated ones: through its door, as its forward."""

    overrides = (
        "forward_features",
        "forward_intermediates",
        "get_intermediate_layers",
        "get_image_features",
        "encode_image",
    )

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
        if any(base.__module__.startswith("torchvision.transforms.") for base in type(module).__mro__):
            Refusal().put_in(module)
        if id(module) in parts or not any(id(inner) in parts for inner in module.modules()):
            continue
        if _scatters(module):
            Exit().put_in(module)
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
