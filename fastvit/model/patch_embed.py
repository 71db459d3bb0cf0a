"""The patch embedding as a module: from raw images to patches, or to the finished token sequence in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvit import functional
from fastvit.checks import check_packed_images, check_scale, normalisation, require, shape_of
from fastvit.guards import attribute, warn_once, why_no_projection
from fastvit.model.layers import Layer, first_parameter
from fastvit.ops.decompositions import normalised

__all__ = ["PatchEmbed", "pad_to_patches", "pair", "resample_patch_weight"]

NORMS = (nn.Identity, nn.LayerNorm, nn.RMSNorm)  # to which a patch is a patch, wherever it lies


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A size given as one number or as (height, width).

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    sizes = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{name}: {value!r} is not a positive number or two of them, (height, width)")
    return sizes[0], sizes[1]


def model_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> tuple:
    """`mean` and `std` of a model as tuples of floats, or None and None.

    Raises:
        ValueError, TypeError: they can't be, or are not in the 0..1 scale.
    """
    means, stds = normalisation(mean, std, channels)
    check_scale(means, stds)
    return (None, None) if means is None or stds is None else (tuple(means), tuple(stds))


def is_given_up(reason: str) -> bool:
    """Whether there is a reason not to make one call of it; told once."""
    if reason:
        warn_once("VisionTransformer makes tokens part by part, as timm does, not in one call", reason)
    return bool(reason)


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects them, as timm's PatchEmbed does, with its parameters.

    While `proj` is the plain convolution that it was made as, its weight and bias are handed to
    :func:`fastvit.functional.patch_embed`; once it is anything else (adapted, pruned, watched, replaced), it is called.

    Args:
        img_size: height and width of the images; both multiples of the patch, unless padding is on.
        patch_size: height and width of a patch.
        embed_dim: width of a token.
        norm_layer: a norm behind the projection; costs further passes over the tokens.
        output_fmt: None: [B, N, D]; "NHWC": [B, rows, columns, D].
        strict_img_size: refuse images of another size.
        dynamic_img_pad: pad images on the right and below to a multiple of the patch, with what is zero after
            normalisation.
        mean, std: one float a channel, in the 0..1 scale; raw uint8 images are normalised inside the projection, after
            a division by 255 that they get in any case. Float images are taken as they are: normalised.
        copy_images: keep a copy of a uint8 batch for the backward pass, for loaders that write the next one over it.

    Raises:
        ValueError: an argument that can't be; the message names it.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Layer | None = None,
        output_fmt: str | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        copy_images: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(output_fmt in (None, "NHWC"), f"output_fmt: {output_fmt!r} is not known; accepted: None, 'NHWC'")
        factory = {"device": device, "dtype": dtype}
        self.patch_size = pair("patch_size", patch_size)
        self.output_fmt = output_fmt
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.mean, self.std = model_normalisation(mean, std, in_chans)
        self.copy_images = copy_images
        self._set_img_size(pair("img_size", img_size))
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias, **factory
        )
        self.norm = norm_layer(embed_dim, **factory) if norm_layer is not None else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to patches [B, N, D], or [B, rows, columns, D]: projection and norm."""
        if self.may_fuse(images):
            rows, columns = self.grid_of(images)
            x = self._call(images)
            x = x if self.output_fmt is None else x.reshape(x.shape[0], rows, columns, x.shape[2])
        else:
            like = first_parameter(self.proj)
            pixels = _prepared(images, self.mean, self.std, None if like is None else like.dtype, *self._sizes())
            x = self.proj(pixels).permute(0, 2, 3, 1)  # [B, rows, columns, D]
            x = x.flatten(1, 2) if self.output_fmt is None else x
        return self.norm(x)

    def may_fuse(self, images: Tensor) -> bool:
        """Whether to read the projection's parameters is all there is to running it, here and now."""
        if not isinstance(images, Tensor) or torch.jit.is_tracing():  # torch.fx, and traces that are to stand alone
            return False
        proj = attribute(self, "proj")
        reason = why_no_projection(proj)
        if not reason and proj.stride != self.patch_size:
            reason = f"has kernel and stride {proj.stride}, but patch_size is {self.patch_size}"
        if reason:
            reason = f"patch_embed.proj {reason}"
        elif _has_any_global_hook():
            reason = "a hook on every module is registered"
        return not is_given_up(reason)

    def sequence(
        self, images: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, keep: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The finished sequence, [B, R+N, D], where `may_fuse` allows: one call, or two with a norm, and no `keep`."""
        if isinstance(attribute(self, "norm"), nn.Identity):
            return self._call(images, pos_embed=pos_embed, prefix=prefix, keep=keep, dtype=dtype)
        tokens = self.norm(self._call(images))  # [B, N, D]
        if pos_embed is not None:
            return functional.add_position(tokens, pos_embed, prefix=prefix, dtype=dtype)
        if prefix is not None:
            tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return tokens.to(dtype)

    def packed(
        self,
        images: Sequence[Tensor],
        order: Sequence[int],
        pos_embed: Tensor | None,
        prefix: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Images [C, H_i, W_i] of any sizes to [Σ R+N_i, D], in another order, where `may_fuse` allows and there is no
        norm; the positions are a grid [rows, columns, D], which is resampled to that of each image."""
        weight, bias = attribute(self.proj, "weight"), self.proj.bias
        is_raw = any(image.dtype == torch.uint8 for image in images)
        mean, std = (self.mean, self.std) if is_raw else (None, None)
        height, width = self.patch_size
        is_cut_off = any(image.shape[1] % height or image.shape[2] % width for image in images)
        # Images of several dtypes are refused below: among them none is to be normalised for another's sake.
        if self.dynamic_img_pad and is_cut_off and len({image.dtype for image in images}) == 1:
            images = [pad_to_patches(normalised(image[None], mean, std), self.patch_size)[0] for image in images]
            mean, std = None, None  # a mean is no whole grey level
        images = check_packed_images(images, weight, bias)  # whose errors name them by their places as they were given
        images = [images[i] for i in order]
        if is_raw and self.copy_images and _are_kept(weight, bias, pos_embed, prefix):
            images = [image.clone() for image in images]
        options: dict[str, Any] = {"pos_embed": pos_embed, "prefix": prefix, "mean": mean, "std": std, "dtype": dtype}
        return functional.patch_embed_packed(images, weight, bias, **options)[0]

    def _call(self, images: Tensor, **arguments: Any) -> Tensor:
        proj, is_raw = attribute(self, "proj"), images.dtype == torch.uint8
        weight = attribute(proj, "weight")
        mean, std = (self.mean, self.std) if is_raw else (None, None)
        if self.dynamic_img_pad:
            padded = pad_to_patches(images, self.patch_size)
            if padded is not images and mean is not None:  # a mean is no whole grey level
                padded = pad_to_patches(normalised(images, mean, std), self.patch_size)
                mean, std = None, None
            images = padded
        if is_raw and self.copy_images and _are_kept(weight, proj.bias, *arguments.values()):
            images = images.clone()
        return functional.patch_embed(images, weight, proj.bias, mean=mean, std=std, **arguments)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches these images have.

        Raises:
            ValueError: not images, or of a size this module does not take.
        """
        _check_images(images, *self._sizes())
        return self.dynamic_feat_size(images.shape[2:])

    def _sizes(self) -> tuple[tuple[int, int] | None, tuple[int, int], bool]:
        """What `_check_images` holds images to."""
        return self.img_size if self.strict_img_size else None, self.patch_size, self.dynamic_img_pad

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches for images of this size."""
        height, width = img_size
        patch_height, patch_width = self.patch_size
        if self.dynamic_img_pad:
            return -(-height // patch_height), -(-width // patch_width)
        return height // patch_height, width // patch_width

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels a patch: the larger side, or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Take images of another size, or cut them into other patches (the weight is resampled)."""
        new_img_size = self.img_size if img_size is None else pair("img_size", img_size)
        new_patch_size = self.patch_size if patch_size is None else pair("patch_size", patch_size)
        self._check_size(new_img_size, new_patch_size)
        if new_patch_size != self.patch_size:
            self.proj = _resampled_projection(self.proj, new_patch_size)
            self.patch_size = new_patch_size
        self._set_img_size(new_img_size)

    def _set_img_size(self, img_size: tuple[int, int]) -> None:
        self._check_size(img_size, self.patch_size)
        self.img_size = img_size
        # Whole patches only, also with padding: checkpoints of timm have this many positions.
        self.grid_size = (img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _check_size(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
        if img_size[0] < patch_size[0] or img_size[1] < patch_size[1]:
            raise ValueError(f"img_size: {img_size} is smaller than the patch {patch_size}")
        if not self.dynamic_img_pad and (img_size[0] % patch_size[0] != 0 or img_size[1] % patch_size[1] != 0):
            raise ValueError(
                f"img_size: {img_size} is not a multiple of the patch {patch_size}; dynamic_img_pad=True pads"
            )


def _are_kept(*arguments: Any) -> bool:
    """Whether a call with these keeps its images for the backward pass, whichever of them has a gradient."""
    return torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments)


def _check_images(images: Tensor, img_size: tuple[int, int] | None, patch_size: tuple[int, int], can_pad: bool) -> None:
    if images.dim() != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got {images.dim()}: {shape_of(images)}")
    height, width = images.shape[2:]
    if img_size is not None:
        if height != img_size[0] or width != img_size[1]:
            raise ValueError(
                f"images: {height} x {width}, the model takes {img_size[0]} x {img_size[1]}; "
                "dynamic_img_size=True takes any size, set_input_size changes this one"
            )
    elif not can_pad and (height % patch_size[0] != 0 or width % patch_size[1] != 0):
        raise ValueError(
            f"images: {height} x {width} is not a multiple of the patch {patch_size[0]} x {patch_size[1]}; "
            "dynamic_img_pad=True pads"
        )


@torch.fx.wrap
def _prepared(images: Tensor, mean: Any, std: Any, dtype: torch.dtype | None, *size: Any) -> Tensor:
    """Images as a convolution takes them: looked at, normalised, of its dtype and padded. One step to torch.fx."""
    _check_images(images, *size)
    images = as_floats(images, mean, std, dtype)
    images = images if dtype is None else images.to(dtype)
    _, patch_size, can_pad = size
    return pad_to_patches(images, patch_size) if can_pad else images


@torch.fx.wrap
def as_floats(images: Tensor, mean: Any, std: Any, dtype: torch.dtype | None) -> Tensor:
    """Raw uint8 images normalised, in `dtype`; float images as they are. One step to torch.fx."""
    if images.dtype != torch.uint8:
        return images
    if mean is not None and images.shape[-3] != len(mean):
        raise ValueError(f"images: {images.shape[-3]} channels, the model's mean and std have {len(mean)}")
    return normalised(images, mean, std, dtype or torch.float32)


def pad_to_patches(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[B, C, H, W] with zeros on the right and below, to whole patches."""
    height, width = images.shape[2:]
    more_rows, more_columns = -height % patch_size[0], -width % patch_size[1]
    return F.pad(images, (0, more_columns, 0, more_rows)) if more_rows or more_columns else images


@torch.no_grad()
def _resampled_projection(proj: nn.Conv2d, patch_size: tuple[int, int]) -> nn.Conv2d:
    like: dict[str, Any] = {"device": proj.weight.device, "dtype": proj.weight.dtype, "bias": proj.bias is not None}
    new = nn.Conv2d(proj.in_channels, proj.out_channels, patch_size, patch_size, **like)
    values: dict[str, Any] = {"weight": resample_patch_weight(proj.weight, patch_size), "bias": proj.bias}
    for name, parameter in new.named_parameters():
        parameter.copy_(values[name]).requires_grad_(getattr(proj, name).requires_grad)
    return new.train(proj.training)


def resample_patch_weight(
    weight: Tensor, patch_size: Sequence[int], *, interpolation: str = "bicubic", antialias: bool = True
) -> Tensor:
    """The weight for another patch size that gives a resized patch the token of the original one.

    The pseudo-inverse resize of FlexiViT (Beyer et al., 2023, section 3.4).

    Args:
        weight: [D, C, P_h, P_w].
        patch_size: the new height and width.
        interpolation, antialias: how patches are resized, as `torch.nn.functional.interpolate` takes them: "bilinear"
            or "bicubic", with or without a filter where the size shrinks.

    Returns:
        [D, C, *patch_size], in the dtype of `weight`.
    """
    old_size = (weight.shape[2], weight.shape[3])
    new_size = (patch_size[0], patch_size[1])
    if old_size == new_size:
        return weight
    pixels = old_size[0] * old_size[1]
    basis = torch.eye(pixels, device=weight.device).reshape(pixels, 1, *old_size)
    resize = F.interpolate(basis, size=new_size, mode=interpolation, antialias=antialias, align_corners=False)
    resize = resize.reshape(pixels, math.prod(new_size)).T  # [new pixels, old pixels]
    flat = weight.flatten(2).float() @ torch.linalg.pinv(resize)  # [D, C, new pixels]
    return flat.reshape(*weight.shape[:2], *new_size).to(weight.dtype)
