"""timm's models: its patch embedding alone, and with class, register tokens and positions where the model is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from timm.layers import resample_abs_pos_embed
from timm.layers.format import Format
from timm.layers.pos_embed_sincos import apply_keep_indices_nlc
from timm.models import beit, deit, eva, vision_transformer
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from fastvit import branches, trunk
from fastvit.grids import grid_rows
from fastvit.guards import attribute, full_name
from fastvit.interop.host import Fused, Part, cat_rows, holds_a_patch, present, why_not_part, why_not_table
from fastvit.interop.surgery import own_class
from fastvit.interop.trunk import TrunkBlock
from fastvit.model.layers import autocast_dtype
from fastvit.model.patch_embed import pad_to_patches
from fastvit.positions import numbers_where_traced, resample_pos_embed

__all__ = ["MIXINS", "TRUNK"]


class Deferred:
    """Images on their way to `_pos_embed`, where the whole sequence is made: through a `patch_embed` that hands them on
    and code of the host that reads their shape."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.shape = images.shape


class PatchEmbed(Fused):
    """Projection alone; or, handed `Deferred` by a model that makes the whole sequence itself, nothing."""

    hosts = ("timm.layers.patch_embed.PatchEmbed",)

    proj: nn.Conv2d
    norm: nn.Module

    @classmethod
    def refusal_behind(cls, module: Any) -> str:
        # Models of several stages have this class before each, and some a stem before the first. A model may also be
        # one of two, both of which see images: these have fewer channels than a patch has pixels.
        channels, (height, width) = module.proj.in_channels, module.proj.kernel_size
        if channels < height * width:
            return ""
        return f"proj takes feature maps, not images: {channels} channels in patches of {height} × {width}"

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["the projection of patches"]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [Part("proj", attribute(module, "proj"), nn.Conv2d)]

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        height, width = module.img_size or (4 * size for size in module.proj.kernel_size)
        return height, width

    def forward(self, x: Any) -> Any:
        if isinstance(x, Deferred):
            return x
        x = self.upright(x)
        if not self.may_fuse(x):
            return super().forward(self.as_the_host_takes_them(x))
        images = self.padded(x)
        tokens = self.embed(images, self.proj.weight, self.proj.bias)
        return self.finished(tokens, self.grid_of(images))

    def why_not_of(self, images: Tensor) -> str:
        # The host pads and checks by the one, and projects by the other.
        patch, stride = self.patch_size, attribute(self, "proj").stride
        return "" if patch == stride else f"patch_size is {patch}, and the stride of proj {stride}"

    def takes(self, images: Tensor) -> bool:
        if self.img_size is None or (self.dynamic_img_pad and not self.strict_img_size):
            return True
        height, width = images.shape[2:]
        if self.strict_img_size:
            return height == self.img_size[0] and width == self.img_size[1]
        return height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0

    def padded(self, images: Tensor) -> Tensor:
        return _padded(self, images, self.patch_size) if self.dynamic_img_pad else images

    def grid_of(self, images: Tensor) -> list[int]:
        """Rows and columns of patches, of padded images where the host pads."""
        height, width = images.shape[2:]
        patch_height, patch_width = self.patch_size
        if self.dynamic_img_pad:
            return [-(-height // patch_height), -(-width // patch_width)]
        return [height // patch_height, width // patch_width]

    def finished(self, tokens: Tensor, grid: list[int]) -> Any:
        """What the host returns, of projected patches, [B, N, D]."""
        return self.norm(self._shaped(tokens, grid))

    def _shaped(self, tokens: Tensor, grid: list[int]) -> Tensor:
        if self.flatten or self.output_fmt == Format.NLC:
            return tokens
        if self.output_fmt == Format.NHWC:
            return tokens.unflatten(1, grid)
        tokens = tokens.transpose(1, 2)  # [B, D, N]
        return tokens if self.output_fmt == Format.NCL else tokens.unflatten(2, grid)


class TwinsPatchEmbed(PatchEmbed):
    """Twins' own class, which takes any size, leaves out what fills no whole patch, and returns its grid too."""

    hosts = ("timm.models.twins.PatchEmbed",)

    def takes(self, images: Tensor) -> bool:
        return holds_a_patch(images, self.patch_size)

    def padded(self, images: Tensor) -> Tensor:
        return images

    def grid_of(self, images: Tensor) -> list[int]:
        return [images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]]

    def finished(self, tokens: Tensor, grid: list[int]) -> tuple[Tensor, tuple[int, ...]]:
        return self.norm(tokens), tuple(grid)


class _Whole(Fused):
    """A model of timm's whose whole sequence is made in one call, before its blocks."""

    tables = ("pos_embed", "cls_token", "reg_token", "dist_token")

    patch_embed: Any
    pos_embed: nn.Parameter | None

    @classmethod
    def refusal(cls, module: Any) -> str:
        own = own_class(module.patch_embed)
        if PatchEmbed.hosts[0] not in {full_name(base) for base in own.__mro__}:
            return f"patch_embed is a {own.__name__}: its tokens come from a network of its own"
        if not isinstance(module.patch_embed.norm, nn.Identity):
            return "patch_embed has a norm between projection and positions"
        return ""

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection", *present(module)]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        embed = attribute(module, "patch_embed")
        return [
            Part("patch_embed", embed, PatchEmbed),
            Part("patch_embed.proj", attribute(embed, "proj"), nn.Conv2d),
            Part("patch_embed.norm", attribute(embed, "norm"), nn.Identity),
        ]

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        return PatchEmbed.example_size(module.patch_embed)

    def takes(self, images: Tensor) -> bool:
        return attribute(self, "patch_embed").takes(images)

    def why_not_of(self, images: Tensor) -> str:
        embed, prefix = attribute(self, "patch_embed"), self._prefix()
        reason = embed.why_not_of(images)
        if reason:
            return reason
        is_dynamic = bool(attribute(self, "dynamic_img_size"))
        is_map = embed.output_fmt == Format.NHWC and not embed.flatten
        if is_map != is_dynamic or embed.output_fmt in (Format.NCHW, Format.NCL) and not embed.flatten:
            return f"patch_embed gives {embed.output_fmt}"
        for name, table in prefix.items():
            reason = why_not_table(name, table)
            if reason:
                return reason
        rows, columns = embed.grid_of(images)
        positioned = 0 if attribute(self, "no_embed_class") else sum([table.shape[1] for table in prefix.values()])
        return why_not_table(
            "pos_embed", attribute(self, "pos_embed"), None if is_dynamic else positioned + rows * columns
        )

    def _deferred(self, images: Any) -> Any:
        """Images to be embedded in `_pos_embed`, where that can be; else as `patch_embed` takes them."""
        images = self.upright(images)
        return Deferred(images) if self.may_fuse(images) else self._for_patch_embed(images)

    def _for_patch_embed(self, images: Any) -> Any:
        # Neither what was put in the place of ours nor who listens to it may know raw pixels.
        return self.as_the_host_takes_them(images) if why_not_part(self.patch_embed, PatchEmbed) else images

    def _tokens(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """The sequence and its grid."""
        grid = self.patch_embed.grid_of(images)
        images, proj = self.patch_embed.padded(images), self.patch_embed.proj
        prefix = cat_rows(*self._prefix().values())
        return self.embed(images, proj.weight, proj.bias, pos_embed=self._positions(grid), prefix=prefix), grid

    def prefix_names(self) -> tuple[str, ...]:
        """What the host puts before its patches, in order."""
        return ("cls_token", "reg_token")

    def _prefix(self) -> dict[str, Tensor]:
        """Class token and register or distillation tokens, by name."""
        found = {name: attribute(self, name) for name in self.prefix_names()}
        return {name: table for name, table in found.items() if table is not None}

    def _positions(self, grid: list[int]) -> Tensor | None:
        table, own = self.pos_embed, self.patch_embed.grid_size
        if table is None or not getattr(self, "dynamic_img_size", False):
            return table
        rows = 0 if self.no_embed_class else self.num_prefix_tokens
        resample = getattr(self._host_module(), "resample_abs_pos_embed", resample_abs_pos_embed)
        # Ours gives the same to float32's rounding, in less time, where values are computed here and now. timm's takes
        # float32 for a table in float64 too, and somebody may have put a function in its place.
        if torch.compiler.is_compiling() or resample is not resample_abs_pos_embed or table.dtype == torch.float64:
            return resample(table, new_size=numbers_where_traced(grid), old_size=own, num_prefix_tokens=rows)
        return resample_pos_embed(table, grid, own, num_prefix_tokens=rows)

    def _host_module(self) -> Any:
        """The module where the host's code finds its functions."""
        return vision_transformer


class _InPosEmbed(_Whole):
    """Made in `_pos_embed`, which the model calls with what `patch_embed` returns: the images, still."""

    overrides = ("forward", "forward_features", "forward_intermediates", "_pos_embed")

    def forward_features(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward_features(self._deferred(x), *args, **kwargs)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward_intermediates(self._deferred(x), *args, **kwargs)


class VisionTransformer(_InPosEmbed):
    """ViT, DeiT (with its distillation token), DINOv2, CLIP's and SigLIP's towers, and all else of that class."""

    hosts = (
        "timm.models.vision_transformer.VisionTransformer",
        "timm.models.deit.VisionTransformerDistilled",
    )

    def prefix_names(self) -> tuple[str, ...]:
        return ("cls_token", "dist_token" if self._is_distilled() else "reg_token")

    def _host_module(self) -> Any:
        return deit if self._is_distilled() else vision_transformer

    def _is_distilled(self) -> bool:
        return any(full_name(base) == self.hosts[1] for base in self._own_class.__mro__)

    def _pos_embed(self, x: Any) -> Tensor:
        if not isinstance(x, Deferred):
            return super()._pos_embed(x)
        tokens, _ = self._tokens(x.images)
        return tokens if self.pos_embed is None else self.pos_drop(tokens)


class Eva(_InPosEmbed):
    """EVA, EVA-02, DINOv3 and the other models with rotary positions."""

    hosts = ("timm.models.eva.Eva",)

    def _host_module(self) -> Any:
        return eva

    def _pos_embed(self, x: Any) -> Any:
        if not isinstance(x, Deferred):
            return super()._pos_embed(x)
        tokens, grid = self._tokens(x.images)
        rotary = self._rotary(grid)
        tokens = self.pos_drop(tokens)
        if self.patch_drop is None:
            return tokens, rotary
        tokens, keep = self.patch_drop(tokens)
        if rotary is not None and keep is not None:
            # Rotary positions follow their patches; those that differ by block have the depth in front.
            rotary = apply_keep_indices_nlc(tokens, rotary, keep)
            by_block = getattr(self, "rope_mixed", False)
            rotary = rotary.transpose(0, 1) if by_block else rotary.unsqueeze(1)
        return tokens, rotary

    def _rotary(self, grid: list[int]) -> Any:
        rope: Any = self.rope
        if rope is None:
            return None
        if self.dynamic_img_size:
            return rope.get_embed(shape=grid)
        return rope.get_embed() if hasattr(rope, "feat_shape") else rope.get_embed(shape=self.patch_embed.grid_size)


class Beit(_Whole):
    """BEiT and BEiT v2, whose positions are relative, in attention, unless it has a table too."""

    hosts = ("timm.models.beit.Beit",)
    overrides = ("forward", "forward_features", "forward_intermediates")

    def prefix_names(self) -> tuple[str, ...]:
        return ("cls_token",)

    def forward_intermediates(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward_intermediates(self._for_patch_embed(self.upright(x)), *args, **kwargs)

    def forward_features(self, x: Any) -> Tensor:
        deferred = self._deferred(x)
        if not isinstance(deferred, Deferred):
            return super().forward_features(deferred)
        x = self.pos_drop(self._tokens(deferred.images)[0])
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, shared_rel_pos_bias=bias)
            else:
                x = block(x, shared_rel_pos_bias=bias)
        return self.norm(x)


class NaFlexEmbeds(Fused):
    """NaFlexViT's embedding of whole images, and of batches of patches of images of many sizes."""

    hosts = ("timm.models.naflexvit.NaFlexEmbeds",)
    overrides = (
        "forward",
        "_apply_learned_pos_embed",
        "_apply_factorized_pos_embed",
        "_apply_learned_naflex_pos_embed",
    )
    tables = ("cls_token", "reg_token")

    proj: Any
    norm: nn.Module

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        positions = ["positions"] if module.pos_embed_type == "factorized" else []  # which is no single tensor
        projection = "projection" if cls._takes_patches(module) else "projection of whole images"
        return [projection, *positions, *present(module)]

    @staticmethod
    def _takes_patches(module: Any) -> bool:
        """Whether patches that are cut already are ours too."""
        is_known = module.pos_embed_type in ("learned", "none") and not module.pos_embed_use_grid_sample
        return module.is_linear and is_known and not module.pos_embed_ar_preserving

    @classmethod
    def refusal(cls, module: Any) -> str:
        if not isinstance(module.norm, nn.Identity) or module.norm_input is not None:
            return "it has a norm before or behind the projection"
        return ""

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        kind = nn.Linear if module.is_linear else nn.Conv2d
        proj, norm = attribute(module, "proj"), attribute(module, "norm")
        return [Part("proj", proj, kind), Part("norm", norm, nn.Identity)]

    def why_not_of(self, images: Tensor) -> str:
        shape = self._weight().shape[1:]
        if shape != (self.in_chans, *self.patch_size):
            return f"proj takes patches of shape {tuple(shape)}, not {(self.in_chans, *self.patch_size)}"
        if self.norm_input is not None:
            return "it has a norm before the projection"
        return why_not_table("cls_token", self.cls_token) or why_not_table("reg_token", self.reg_token)

    @classmethod
    def channels(cls, module: Any) -> int | None:
        return module.in_chans

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        rows, columns = module.pos_embed_grid_size or (4, 4)
        return rows * module.patch_size[0], columns * module.patch_size[1]

    def forward(self, x: Any, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None) -> Any:
        if patch_coord is not None:
            tokens = self._of_patches(x, patch_coord)
            return super().forward(x, patch_coord, patch_valid) if tokens is None else (tokens, None)
        x = self.upright(x)
        if not self.may_fuse(x):
            return super().forward(self.as_the_host_takes_them(x))
        images = _padded(self, x, self.patch_size) if self.dynamic_img_pad else x
        grid = torch.Size(size // patch for size, patch in zip(images.shape[2:], self.patch_size, strict=True))
        prefix = cat_rows(self.cls_token, self.reg_token)
        positions = self._positions(grid)
        tokens = self.embed(images, self._weight(), self.proj.bias, pos_embed=positions, prefix=prefix)
        return self.pos_drop(tokens), grid

    def _of_patches(self, patches: Any, coordinates: Any) -> Tensor | None:
        """Padded [B, N, P·P·C] with each patch's row and column [B, N, 2], as one image of B·N patches of one pixel.

        None where the host's own code runs. That waits twice an image for the sizes of the grids, this once.
        """
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or not isinstance(patches, Tensor)
            or not isinstance(coordinates, Tensor)
            or patches.dim() != 3
            or not patches.is_floating_point()
            or not coordinates.numel()
            or coordinates.shape[-1] != 2
            or coordinates.is_floating_point()
            or not self._takes_patches(self)
            or not self.may_fuse(patches.new_empty(0, self.in_chans, *self.patch_size))  # asks of the module alone
        ):
            return None
        batch, count, values = patches.shape
        images = patches.reshape(1, batch * count, 1, values).permute(0, 3, 1, 2)  # [1, P·P·C, B·N, 1]
        table = None if self.pos_embed_type == "none" else self._table_of_patches(coordinates, count)
        tokens = self.embed(images, self.proj.weight[:, :, None, None], self.proj.bias, pos_embed=table)
        tokens = tokens.unflatten(1, (batch, count))[0]
        prefix = [rows.expand(batch, -1, -1) for rows in (self.cls_token, self.reg_token) if rows is not None]
        if self.fastvit_settings.residual_dtype is not None and autocast_dtype(tokens.device) is not None:
            prefix = [rows.to(tokens.dtype) for rows in prefix]
        return self.pos_drop(torch.cat([*prefix, tokens], dim=1) if prefix else tokens)

    def _table_of_patches(self, coordinates: Tensor, count: int) -> Tensor:
        """The position of every row, [B·N, D], zero behind an image's own; the host rounds them to the projection's
        dtype, and counts an image's patches row by row."""
        dtype = autocast_dtype(self.proj.weight.device) or self.proj.weight.dtype
        sizes = [(rows, columns) for rows, columns in (coordinates.amax(1) + 1).tolist()]
        how = self.pos_embed_interp_mode, self.pos_embed_antialias, self.pos_embed_align_corners
        rows, starts = grid_rows(self.pos_embed[0], sizes, *how)
        tables = {}
        for size, start in zip(sizes, starts, strict=True):
            if size not in tables:
                own = rows[start : start + min(count, size[0] * size[1])].to(dtype)
                tables[size] = F.pad(own, (0, 0, 0, count - len(own)))
        return torch.cat([tables[size] for size in sizes])

    def takes(self, images: Tensor) -> bool:
        if self.dynamic_img_pad:
            return True
        if self.is_linear:
            return images.shape[2] % self.patch_size[0] == 0 and images.shape[3] % self.patch_size[1] == 0
        return holds_a_patch(images, self.patch_size)

    def _weight(self) -> Tensor:
        """The projection's weight as a convolution has it, [D, C, P_h, P_w]."""
        weight = self.proj.weight
        if not self.is_linear:
            return weight
        if not self.channels_last:
            return weight.unflatten(1, (self.in_chans, *self.patch_size))
        return weight.unflatten(1, (*self.patch_size, self.in_chans)).permute(0, 3, 1, 2)

    def _positions(self, grid: torch.Size) -> Tensor | None:
        """The table for this grid, [1, N, D], by the host's own function, which adds it to what it is given."""
        if self.pos_embed_type == "none":
            return None
        # The host rounds positions to the dtype of the projection.
        dtype = autocast_dtype(self.proj.weight.device) or self.proj.weight.dtype
        table = self.proj.weight.new_zeros(1, grid[0] * grid[1], self.embed_dim, dtype=dtype)
        add = self._apply_learned_pos_embed if self.pos_embed_type == "learned" else self._apply_factorized_pos_embed
        add(table, grid_size=torch.Size(numbers_where_traced(grid)))
        return table


class Block(TrunkBlock):
    """The block of ViT, DeiT, DINOv2, CLIP's and SigLIP's towers."""

    hosts = ("timm.models.vision_transformer.Block",)
    form = trunk.TIMM


class EvaBlock(TrunkBlock):
    """The block of EVA, EVA-02, DINOv3 and BEiT, whose attention has positions of its own and runs as it is."""

    hosts = ("timm.models.eva.EvaBlock", "timm.models.beit.Block")
    form = (
        trunk.Names("norm1", "attn", scale="gamma_1", drop_path="drop_path1"),
        trunk.Names("norm2", "mlp", scale="gamma_2", drop_path="drop_path2"),
    )


def _quick_gelu(act: Any) -> str:
    return "" if getattr(act, "inplace", False) else "quick_gelu"


branches.know(
    norms={layers.LayerNorm.forward: False, layers.RmsNorm.forward: True},
    scales={layers.LayerScale.forward: "gamma"},
    drop_paths=[layers.DropPath.forward],
    branches={
        layers.Attention.forward: branches.ATTENTION,
        eva.EvaAttention.forward: branches.WHOLE,
        layers.AttentionRope.forward: branches.WHOLE,
        beit.Attention.forward: branches.WHOLE,
        layers.Mlp.forward: branches.MLP,
        layers.GluMlp.forward: branches.MLP,
        layers.SwiGLU.forward: branches.SWIGLU,
    },
    acts={layers.GELUTanh.forward: lambda _: "gelu_tanh", layers.QuickGELU.forward: _quick_gelu},
)


def _padded(module: Fused, images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Zeros to whole patches, as the host adds them: to normalised pixels."""
    if images.shape[2] % patch_size[0] == 0 and images.shape[3] % patch_size[1] == 0:
        return images
    # What is zero after normalisation is no whole number of grey levels.
    return pad_to_patches(module.as_the_host_takes_them(images), patch_size)


TRUNK: tuple[type[TrunkBlock], ...] = (Block, EvaBlock)
MIXINS: tuple[type[Fused], ...] = (VisionTransformer, Eva, Beit, NaFlexEmbeds, PatchEmbed, TwinsPatchEmbed)
