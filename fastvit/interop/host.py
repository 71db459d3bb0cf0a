"""What all accelerated modules of other libraries share: settings, when they may fuse, and the one call they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from fastvit import functional
from fastvit.guards import (
    attribute,
    full_name,
    is_transformed,
    warn_once,
    why_no_projection,
    why_not_plain,
    why_not_plain_parameters,
    why_not_plain_tensor,
    why_observed,
)
from fastvit.interop.raw_pixels import RawPixels, upright
from fastvit.interop.surgery import Mixin, mixin_of
from fastvit.model.layers import autocast_dtype
from fastvit.ops.decompositions import normalised

__all__ = [
    "LIBRARIES",
    "Fused",
    "Part",
    "Settings",
    "cat_rows",
    "fused",
    "holds_a_patch",
    "is_library_s",
    "listed",
    "may_be_read",
    "present",
    "why_not_methods",
    "why_not_part",
    "why_not_table",
]

# Library of a class → where its mixins are.
LIBRARIES = {
    "timm": "fastvit.interop.timm",
    "torchvision": "fastvit.interop.torchvision",
    "transformers": "fastvit.interop.huggingface",
}

# Normalised pixels end at (0 - mean) / std and (1 - mean) / std; floats this many times beyond are raw ones.
FAR_OUTSIDE = 16

# What the libraries call the tensors that are added to patches, or put before them.
IN_WORDS = {
    "pos_embed": "positions",
    "position_embedding": "positions",
    "position_embeddings": "positions",
    "cls_token": "class token",
    "class_embedding": "class token",
    "dist_token": "distillation token",
    "distillation_token": "distillation token",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
}


class Settings(NamedTuple):
    """How a model was accelerated; the arguments of :func:`fastvit.accelerate`."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    residual_dtype: torch.dtype | None = None
    backend: str | None = None
    copy_images: bool = False
    trunk: bool = True


class Part(NamedTuple):
    """A submodule whose parameters a fused call reads, or that it passes over, without running it."""

    name: str
    module: Any
    # What running it must amount to: one of torch's classes, one of our mixins, or None for the library's own code.
    kind: type[Any] | None = None


class Fused(Mixin):
    """A module whose tokens come from :func:`fastvit.functional.patch_embed`.

    A subclass names the classes it stands in for, says where it can't, and overrides their methods. Before every call
    it looks whether its parts still are what it stands in for; a call it can't fuse (somebody listens inside, a part
    was replaced, a size the host refuses, a tracer) runs the host's own code, which knows what to do.
    """

    hosts: ClassVar[tuple[str, ...]]  # classes by their full names
    overrides: ClassVar[tuple[str, ...]] = ("forward",)
    tables: ClassVar[tuple[str, ...]] = ()  # attributes whose rows are added to tokens, or put before them

    fastvit_settings: Settings
    fastvit_looked: int  # RawPixels.floats_left when floats were last looked at

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why this module can't be accelerated, apart from its parts; "" if it can."""
        return ""

    @classmethod
    def refusal_behind(cls, module: Any) -> str:
        """Why this module can't be accelerated where it is not the first convolution of its model, "" if it can."""
        return ""

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        """Its submodules that a fused call does not run, or not on what the host would give them; projection first."""
        raise NotImplementedError

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        """What becomes one call, in words; nothing where this module changes for the sake of another."""
        return ()

    @classmethod
    def companions(cls, module: Any) -> Mapping[str, type[Fused]]:
        """Submodules that change along with it, by name."""
        return {part.name: part.kind for part in cls.inside(module) if part.kind and issubclass(part.kind, Fused)}

    @classmethod
    def channels(cls, module: Any) -> int | None:
        """Channels of its images; None: it sees none."""
        for part in cls.inside(module):
            if part.kind is nn.Conv2d:
                return attribute(part.module, "weight").shape[1]
        return None

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int] | None:
        """Height and width of images that it takes; None: it takes no images alone."""
        return None

    @classmethod
    def refuses_uint8(cls, module: Any) -> str:
        """Why this module can't take raw uint8 images, "" if it can."""
        return ""

    @classmethod
    def why_not(cls, module: Any) -> str:
        """Why calls of this module can't be ours at present, whatever the images; "" if they can."""
        reason = why_not_methods(module)
        if reason:
            return reason
        for name, part, kind in cls.inside(module):
            reason = why_not_part(part, kind)
            if reason:
                return f"{name} {reason}"
        for name in cls.tables:
            reason = why_not_plain_tensor(attribute(module, name))
            if reason:
                return f"{name} {reason}"
        return ""

    def is_raw(self, images: Any) -> bool:
        """Whether these are raw pixels, to be normalised here."""
        if isinstance(images, RawPixels):
            return True
        return isinstance(images, Tensor) and images.dtype == torch.uint8 and self.fastvit_settings.mean is not None

    def upright(self, images: Any) -> Any:
        """Raw images as a tensor [B, C, H, W], everything else as it is.

        Raises:
            ValueError: they have other channels than mean and std; or they are floats, and raw pixels still.
        """
        mean = self.fastvit_settings.mean
        if mean is None and not isinstance(images, RawPixels):
            return images
        if not self.is_raw(images):
            self._look_at(images)
            return images
        if mean is None or (isinstance(images, RawPixels) and images.trail.mean != mean):
            raise RuntimeError("mean, std: a part and the model around it were accelerated apart, with others of them")
        images = upright(images, len(mean))
        if images.dim() == 4 and images.shape[1] != len(mean):
            raise ValueError(f"images: {images.shape[1]} channels, but mean and std have {len(mean)}")
        return images

    def _look_at(self, images: Any) -> None:
        """Refuse raw pixels that were cast to floats on their way: at the first batch of floats, and where a part of
        the model has taken raw pixels as numbers since. Looking waits for the device."""
        if torch.compiler.is_compiling() or self.__dict__.get("fastvit_looked") == RawPixels.floats_left:
            return
        if not isinstance(images, Tensor) or not images.is_floating_point() or not images.numel():
            return
        if not may_be_read(images) or is_transformed():
            return
        settings = self.fastvit_settings
        assert settings.mean is not None and settings.std is not None
        usual = max(max(mean, 1 - mean) / std for mean, std in zip(settings.mean, settings.std, strict=True))
        low, high = (float(value) for value in images.detach().aminmax())
        largest = max(-low, high)
        if low < 0 < high and largest <= FAR_OUTSIDE * usual:
            self.fastvit_looked = RawPixels.floats_left
        are_bytes = low >= 0 and high > 1 and bool((images == images.round()).all())
        if largest > FAR_OUTSIDE * usual or are_bytes:
            raise ValueError(
                f"images: floats up to {largest:.0f}, where normalised ones end at {usual:.1f}: raw pixels that were "
                "cast before they came here would be taken as normalised. Give fastvit.accelerate the outermost "
                "module, which sees them as uint8, or normalise them"
            )

    def may_fuse(self, images: Any) -> bool:
        """Whether this call can be one call of ours; where a part of the module is the reason, it is told once."""
        if not (
            isinstance(images, Tensor)
            and images.dim() == 4
            and (images.is_floating_point() or self.is_raw(images))
            and not _has_any_global_hook()
            and not is_transformed()
        ):
            return False
        reason = self.why_not(self)
        if not reason:
            if images.shape[1] != (self.channels(self) or images.shape[1]) or not self.takes(images):
                return False
            reason = self.why_not_of(images)
        if reason:
            library = next(name for name, file in LIBRARIES.items() if file == self._mixin.__module__)
            warn_once(f"{self._own_class.__name__} runs {library}'s own code", reason)
            return False
        return True

    def takes(self, images: Tensor) -> bool:
        """Whether the host takes images of this size; where it does not, its own code says so."""
        return True

    def why_not_of(self, images: Tensor) -> str:
        """Why a call can't be ours for a reason that is not the images', but needs their size; "" if it can."""
        return ""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script can't compile an accelerated {self._own_class.__name__}: call fastvit.restore on "
            "the model first, or use torch.export or torch.jit.trace"
        )

    def as_the_host_takes_them(self, images: Any) -> Any:
        """Raw images as normalised floats, of the parameters' dtype, everything else as it is: for the host's code."""
        if not self.is_raw(images):
            return images
        settings = self.fastvit_settings
        return normalised(self.upright(images), settings.mean, settings.std, _parameter_dtype(self))

    def embed(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The finished tokens, [B, R+N, D], in the dtype that the host's additions would give.

        Pixels that fill no whole patch are left out, as a convolution does.
        """
        settings = self.fastvit_settings
        height, width = images.shape[2:]
        patch_height, patch_width = weight.shape[2:]
        if height % patch_height != 0 or width % patch_width != 0:
            images = images[:, :, : height - height % patch_height, : width - width % patch_width]
        autocast = None if weight.dtype == torch.float64 else autocast_dtype(images.device)
        dtype = autocast or weight.dtype
        if autocast is not None and settings.residual_dtype is not None:
            dtype = settings.residual_dtype
        else:
            for table in (pos_embed, prefix):
                dtype = dtype if table is None else torch.promote_types(dtype, table.dtype)
        is_raw = self.is_raw(images)
        if is_raw and settings.copy_images and torch.is_grad_enabled():
            images = images.clone()
        return functional.patch_embed(
            images,
            weight,
            bias,
            pos_embed=pos_embed,
            prefix=prefix,
            mean=settings.mean if is_raw else None,
            std=settings.std if is_raw else None,
            keep=keep,
            dtype=dtype,
            backend=settings.backend,
        )


def fused(module: nn.Module) -> type[Fused] | None:
    """The mixin of a module that is accelerated, None where it is not, though one around it may be."""
    mixin: Any = mixin_of(module)
    return mixin if mixin is not None and issubclass(mixin, Fused) else None


def why_not_table(name: str, table: Tensor | None, rows: int | None = None) -> str:
    """Why this is no table of one row a token, [1, rows, D], the same for every sample; "" if it is."""
    if table is None or (table.dim() == 3 and table.shape[0] == 1 and (rows is None or table.shape[1] == rows)):
        return ""
    wanted = "rows" if rows is None else rows
    return f"{name} has shape {tuple(table.shape)}, not (1, {wanted}, D)"


def is_library_s(method: Any) -> bool:
    """Whether a method is defined in one of the libraries."""
    return method.__module__.partition(".")[0] in LIBRARIES


def why_not_part(part: Any, kind: type[Any] | None) -> str:
    """Why running this part is not, or more than, what its kind says; "" if it is just that."""
    if kind is nn.Conv2d:
        return why_no_projection(part)
    if kind is None:
        return why_observed(part) or ("" if is_library_s(type(part).forward) else "has a forward of its own")
    if issubclass(kind, Fused):
        if vars(type(part)).get("_mixin") is not kind:
            return f"is a {full_name(type(part))}, and was put in later"
        return why_observed(part) or why_not_methods(part)
    return why_not_plain(part, kind) or why_not_plain_parameters(part)


def why_not_methods(module: Any) -> str:
    """Why an accelerated module's methods are not those that were taken over, "" if they are."""
    for name, method in module._found.items():
        if name in module.__dict__ and name != "forward":  # one that replaced forward has called ours
            return f"has a {name} that was replaced on the module itself"
        if getattr(module._own_class, name) is not method:
            return f"has a {name} that was replaced in its class"
    return ""


def may_be_read(tensor: Tensor) -> bool:
    """Whether a tensor has values here and now, which a device may be waited for."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _parameter_dtype(module: nn.Module) -> torch.dtype:
    """Of the first parameter; replicas have theirs as plain attributes."""
    for inner in module.modules():
        for value in (*inner._parameters.values(), *inner.__dict__.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
    return torch.get_default_dtype()


def holds_a_patch(images: Tensor, patch_size: Sequence[int]) -> bool:
    """Whether images, [B, C, H, W], are no smaller than a patch."""
    return images.shape[2] >= patch_size[0] and images.shape[3] >= patch_size[1]


def cat_rows(*rows: Tensor | None) -> Tensor | None:
    """Class and register tokens one after another, [1, R, D]; None where there are none."""
    present = [row for row in rows if row is not None]
    if len(present) < 2:
        return present[0] if present else None
    return torch.cat(present, dim=1)


def present(module: nn.Module) -> list[str]:
    """Which of positions, class, distillation and register tokens a module has, in words."""
    found = [(word, getattr(module, name, None)) for name, word in IN_WORDS.items()]
    # No register tokens are None in one library, and a tensor without rows in another.
    return [word for word, it in found if it is not None and not (isinstance(it, Tensor) and it.numel() == 0)]


def listed(words: Sequence[str]) -> str:
    """As in a sentence: "a, b and c"."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)
