"""What all accelerated modules of other libraries share: settings, when they may fuse, and the one call they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from fastvit import functional
from fastvit.interop.surgery import Mixin
from fastvit.model.layers import autocast_dtype
from fastvit.ops.decompositions import normalised

__all__ = [
    "Fused",
    "Pixels",
    "Settings",
    "cat_rows",
    "full_name",
    "holds_a_patch",
    "is_observed",
    "listed",
    "normalised",
    "present",
    "projection_refusal",
    "upright",
]


PLAIN = (nn.Conv2d, nn.Linear, nn.Embedding, nn.Identity)

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


class Pixels:
    """Images on their way through code of the host that looks at no value: to where the whole sequence is made.

    It answers what such code asks of a tensor of images: shape, dtype, device and a cast, which is not made.
    """

    def __init__(self, images: Tensor, dtype: torch.dtype) -> None:
        self.images = images
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, *_: Any, **__: Any) -> Pixels:
        return self


class Fused(Mixin):
    """A module whose tokens come from :func:`fastvit.functional.patch_embed`.

    A subclass names the classes it stands in for, says where it can't, and overrides their methods. A call it can't
    fuse (somebody listens inside, a size the host refuses, a tracer) runs the host's own code, which knows what to do.
    """

    hosts: ClassVar[tuple[str, ...]]  # classes by their full names
    overrides: ClassVar[tuple[str, ...]] = ("forward",)  # methods that must be the host's own for this mixin to fit

    fastvit_settings: Settings

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why this module can't be accelerated, "" if it can."""
        raise NotImplementedError

    @classmethod
    def refusal_behind(cls, module: Any) -> str:
        """Why this module can't be accelerated where it is not the first convolution of its model, "" if it can."""
        return ""

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        """What becomes one call, in words; nothing where this module changes for the sake of another."""
        return ()

    @classmethod
    def companions(cls, module: Any) -> Mapping[str, type[Fused]]:
        """Submodules that change along with it, by name."""
        return {}

    @classmethod
    def leaves(cls, module: Any) -> Sequence[nn.Module]:
        """Submodules whose parameters are read without running them."""
        return []

    @classmethod
    def passed_over(cls, module: Any) -> Sequence[nn.Module]:
        """Other submodules that a fused call does not run, or not on what the host would give them."""
        return []

    @classmethod
    def channels(cls, module: Any) -> int | None:
        """Channels of its images; None: it sees none."""
        leaves = cls.leaves(module)
        return leaves[0].in_channels if leaves and isinstance(leaves[0], nn.Conv2d) else None

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int] | None:
        """Height and width of images that it takes; None: it takes no images alone."""
        return None

    @classmethod
    def refuses_uint8(cls, module: Any) -> str:
        """Why this module can't take raw uint8 images, "" if it can."""
        return ""

    @staticmethod
    def is_plain(leaf: nn.Module) -> bool:
        """Whether reading this module's parameters is all there is to running it.

        Adapters, parametrisations and FSDP change the class of what they wrap; a hook would miss the call.
        """
        return type(leaf) in PLAIN and not is_observed([leaf])

    def is_raw(self, images: Any) -> bool:
        """Whether these are raw pixels, to be normalised here."""
        return isinstance(images, Tensor) and images.dtype == torch.uint8 and self.fastvit_settings.mean is not None

    def upright(self, images: Any) -> Any:
        """Raw images as [B, C, H, W], a view of [B, H, W, C] where that is how they came."""
        return upright(images, len(self.fastvit_settings.mean or ())) if self.is_raw(images) else images

    def may_fuse(self, images: Any) -> bool:
        """Whether this call can be one call of ours."""
        return (
            isinstance(images, Tensor)
            and images.dim() == 4
            and (images.is_floating_point() or self.is_raw(images))
            and images.shape[1] == (self.channels(self) or images.shape[1])
            and all(self.is_plain(leaf) for leaf in self.leaves(self))
            and not is_observed(self.passed_over(self))
            and not _has_any_global_hook()
            and forward_ad._current_level < 0
            and not torch.jit.is_tracing()
            and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script can't compile an accelerated {self._own_class.__name__}: call fastvit.restore on "
            "the model first, or use torch.export or torch.jit.trace"
        )

    def as_the_host_takes_them(self, images: Any, dtype: torch.dtype | None = None) -> Any:
        """Raw images as normalised floats, of the parameters' dtype, everything else as it is: for the host's code."""
        if not self.is_raw(images):
            return images
        dtype = next(self.parameters()).dtype if dtype is None else dtype
        return normalised(images, self.fastvit_settings.mean, self.fastvit_settings.std, dtype)

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


def is_observed(modules: Sequence[nn.Module]) -> bool:
    """Whether somebody would miss a call that does not run these modules: a hook, a `forward` put on the module."""
    for module in modules:
        if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
            return True
        if "forward" in module.__dict__:
            return True
    return False


def projection_refusal(name: str, projection: object) -> str:
    """Why this is no projection of patches that do not overlap, "" if it is one."""
    if isinstance(projection, nn.Conv2d) and projection.kernel_size != projection.stride:
        kernel, stride = projection.kernel_size, projection.stride
        do_overlap = any(one > other for one, other in zip(kernel, stride, strict=True))
        return f"{name} has kernel {kernel} and stride {stride}: its patches {'overlap' if do_overlap else 'lie apart'}"
    if type(projection) is not nn.Conv2d:
        return f"{name} is a {type(projection).__name__}, not a plain Conv2d"
    if projection.padding not in ((0, 0), "valid") or projection.dilation != (1, 1) or projection.groups != 1:
        return f"{name} is a convolution with padding, dilation or groups"
    return ""


def holds_a_patch(images: Tensor, patch_size: Sequence[int]) -> bool:
    """Whether images, [B, C, H, W], are no smaller than a patch."""
    return images.shape[2] >= patch_size[0] and images.shape[3] >= patch_size[1]


def upright(images: Tensor, channels: int) -> Tensor:
    """Images as [B, C, H, W], a view of [B, H, W, C] where that is how they came."""
    is_nhwc = images.dim() == 4 and images.shape[3] == channels and images.shape[1] != channels
    return images.permute(0, 3, 1, 2) if is_nhwc else images


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


def full_name(cls: type) -> str:
    """The name a class is imported by."""
    return f"{cls.__module__}.{cls.__qualname__}"
