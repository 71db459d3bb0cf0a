"""The patch embedding as a module: from raw images to the finished token sequence in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import functional
from fastvit.checks import normalisation, shape_of
from fastvit.model.layers import Layer
from fastvit.ops.decompositions import by_channel

__all__ = ["PatchEmbed", "pad_to_patches", "pair", "resample_patch_weight"]


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A size given as one number or as (height, width).

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    sizes = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{name}: {value!r} is not a positive number or two of them, (height, width)")
    return sizes[0], sizes[1]


class PatchEmbed(nn.Module):
    """Cuts images into patches, projects them, adds their positions and puts the prefix rows in front.

    The parameters are those of timm's PatchEmbed: `proj` is a convolution whose weight and bias are handed to
    :func:`fastvit.functional.patch_embed`, which does all of it in one pass. Positions and prefix rows belong to the
    model and come in with the call.

    Args:
        img_size: height and width of the images; both multiples of the patch, unless padding is on.
        patch_size: height and width of a patch.
        embed_dim: width of a token.
        norm_layer: a norm between projection and position; costs further passes over the tokens.
        strict_img_size: refuse images of another size.
        dynamic_img_pad: pad images on the right and below to a multiple of the patch, with what is zero after
            normalisation.
        mean, std: one float a channel; normalise inside the projection. Pixels of uint8 are divided by 255 first
            in any case, floats never.

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
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.patch_size = pair("patch_size", patch_size)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        means, stds = normalisation(mean, std, in_chans)
        self.mean = None if means is None else tuple(means)
        self.std = None if stds is None else tuple(stds)
        self._set_img_size(pair("img_size", img_size))
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias, **factory
        )
        self.norm = norm_layer(embed_dim, **factory) if norm_layer is not None else nn.Identity()

    def forward(
        self,
        images: Tensor,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        keep: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[B, C, H, W] to [B, R+N, D]; the arguments are those of :func:`fastvit.functional.patch_embed`."""
        rows, columns = self.grid_of(images)
        if self.dynamic_img_pad:
            images = self._pad(images)
        if isinstance(self.norm, nn.Identity):
            return functional.patch_embed(
                images,
                self.proj.weight,
                self.proj.bias,
                pos_embed=pos_embed,
                prefix=prefix,
                mean=self.mean,
                std=self.std,
                keep=keep,
                dtype=dtype,
            )
        tokens = functional.patch_embed(
            images, self.proj.weight, self.proj.bias, mean=self.mean, std=self.std, keep=keep
        )
        return _finish(self.norm(tokens), rows * columns, pos_embed, prefix, keep, dtype)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches these images have.

        Raises:
            ValueError: not images, or of a size this module does not take.
        """
        if images.dim() != 4:
            raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got {images.dim()}: {shape_of(images)}")
        _, channels, height, width = images.shape
        if channels != self.proj.in_channels:
            raise ValueError(f"images: {channels} channels, the model has {self.proj.in_channels} (in_chans)")
        if self.strict_img_size:
            if height != self.img_size[0] or width != self.img_size[1]:
                raise ValueError(
                    f"images: {height} x {width}, the model takes {self.img_size[0]} x {self.img_size[1]}; "
                    "dynamic_img_size=True takes any size, set_input_size changes this one"
                )
        elif not self.dynamic_img_pad and (height % self.patch_size[0] != 0 or width % self.patch_size[1] != 0):
            raise ValueError(
                f"images: {height} x {width} is not a multiple of the patch "
                f"{self.patch_size[0]} x {self.patch_size[1]}; dynamic_img_pad=True pads"
            )
        return self.dynamic_feat_size((height, width))

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

    def _pad(self, images: Tensor) -> Tensor:
        """Padded on the right and below with the value that normalisation turns into zero."""
        if self.mean is None:
            return pad_to_patches(images, self.patch_size)
        height, width = images.shape[2:]
        more_rows, more_columns = -height % self.patch_size[0], -width % self.patch_size[1]
        if more_rows == 0 and more_columns == 0:
            return images
        if not images.is_floating_point():
            images = images.float() / 255  # a mean is no whole number of grey levels
        mean = by_channel(self.mean, images)[None]  # [1, C, 1, 1]
        batch, channels = images.shape[:2]
        images = torch.cat([images, mean.expand(batch, channels, height, more_columns)], dim=3)
        return torch.cat([images, mean.expand(batch, channels, more_rows, width + more_columns)], dim=2)


def pad_to_patches(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """[B, C, H, W] with zeros on the right and below, to whole patches."""
    height, width = images.shape[2:]
    more_rows, more_columns = -height % patch_size[0], -width % patch_size[1]
    return F.pad(images, (0, more_columns, 0, more_rows)) if more_rows or more_columns else images


def _finish(
    tokens: Tensor,
    patches: int,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Positions and prefix rows for tokens that have been through a norm: [B, N, D] to [B, R+N, D]."""
    if pos_embed is not None and keep is None:
        return functional.add_position(tokens, pos_embed, prefix=prefix, dtype=dtype)
    prefix = None if prefix is None else prefix.flatten(0, -2)  # [R, D]
    if pos_embed is not None and keep is not None:
        table = pos_embed.flatten(0, -2)  # [N, D] or [R+N, D]
        rows = table.shape[0] - patches
        tokens = tokens + table[rows:][keep]
        prefix = prefix + table[:rows] if prefix is not None and rows else prefix
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if dtype is None else tokens.to(dtype)


def _resampled_projection(proj: nn.Conv2d, patch_size: tuple[int, int]) -> nn.Conv2d:
    new = nn.Conv2d(
        proj.in_channels,
        proj.out_channels,
        kernel_size=patch_size,
        stride=patch_size,
        bias=proj.bias is not None,
        device=proj.weight.device,
        dtype=proj.weight.dtype,
    )
    with torch.no_grad():
        new.weight.copy_(resample_patch_weight(proj.weight, patch_size))
        new.weight.requires_grad_(proj.weight.requires_grad)
        if new.bias is not None and proj.bias is not None:
            new.bias.copy_(proj.bias)
            new.bias.requires_grad_(proj.bias.requires_grad)
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
