"""Hugging Face transformers: the embeddings of its vision models, under the classes of versions 4 and 5.

Everything that becomes one call lies in one module of the host, which changes its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.grids import grid_rows
from fastvit.guards import attribute
from fastvit.interop.host import Fused, Part, cat_rows, holds_a_patch, may_be_read, present, why_not_table
from fastvit.interop.huggingface_blocks import TRUNK, fingerprint
from fastvit.interop.surgery import own_class
from fastvit.model.layers import autocast_dtype
from fastvit.positions import numbers_where_traced

__all__ = ["MIXINS", "TRUNK"]


class Unprojected:
    """Images on their way through code of the host's to its convolution, which gives what `projected` gives."""

    def __init__(self, images: Tensor, batch: int, projected: Callable[[], Any]) -> None:
        self.shape = (batch, *images.shape[1:])
        self.device = images.device
        self.projected = projected

    def to(self, *_: Any, **__: Any) -> Unprojected:
        return self  # our op converts what it reads

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].projected() if func is torch.conv2d else NotImplemented


class Unpositioned:
    """What the host takes for projected patches until it adds positions, of this dtype: `embed` makes the sum."""

    def __init__(self, embed: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> None:
        self.embed = embed
        self.dtype = dtype

    def flatten(self, _: int) -> Unpositioned:
        return self

    def transpose(self, _: int, __: int) -> Unpositioned:
        return self

    def __add__(self, positions: Tensor) -> Tensor:
        return self.embed(positions)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "add":  # what torch.compile makes of `+`, in either order
            return NotImplemented
        patches, positions = args if isinstance(args[0], cls) else reversed(args)
        return patches.embed(positions)


class Taps:
    """The rows that the host reads in a table of positions, by number, for every patch: their weighted sum is known."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions  # [N, D]

    def __mul__(self, weights: Tensor) -> Taps:
        return self

    def sum(self, _: int) -> Tensor:
        return self.positions

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is F.embedding else NotImplemented


class OfKnownCode(Fused):
    """A host whose own code runs on stand-ins for tensors, which can do no more than what is known to be asked of them:
    so that code is known by the fingerprint of its source."""

    known: ClassVar[tuple[str, ...]]

    @classmethod
    def refusal(cls, module: Any) -> str:
        is_known = fingerprint(own_class(module).forward) in cls.known
        return "" if is_known else "its forward is not one that is known"


class OfCutPatches(Fused):
    """A host whose patches come cut."""

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["the projection of patches"]

    @classmethod
    def refuses_uint8(cls, module: Any) -> str:
        return "its processor cuts and normalises the patches"


class Embeddings(Fused):
    """What the embeddings of all models share: where the projection is, and when a call can be ours."""

    tables: ClassVar[tuple[str, ...]] = ("position_embeddings", "cls_token", "distillation_token", "register_tokens")

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection", *present(module)]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [
            Part("patch_embeddings", attribute(module, "patch_embeddings")),
            Part("patch_embeddings.projection", cls.projection(module), nn.Conv2d),
        ]

    @classmethod
    def projection(cls, module: Any) -> Any:
        return attribute(attribute(module, "patch_embeddings"), "projection")

    def takes(self, images: Tensor) -> bool:
        return holds_a_patch(images, self.projection(self).stride)

    def why_not_of(self, images: Tensor) -> str:
        projection = self.projection(self)
        channels, taken = attribute(attribute(self, "patch_embeddings"), "num_channels"), self.channels(self)
        if channels not in (None, taken):
            return f"num_channels is {channels}, and patch_embeddings.projection takes {taken}"
        height, width = self.example_size(self)
        rows = (height // projection.stride[0]) * (width // projection.stride[1])
        for name in ("cls_token", "distillation_token", "register_tokens"):
            table = attribute(self, name)
            reason = why_not_table(name, table)
            if reason:
                return reason
            if table is not None and name != "register_tokens":  # which have no positions
                rows += table.shape[1]
        return why_not_table("position_embeddings", attribute(self, "position_embeddings"), rows)

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        # By version and class it is known to the embeddings, to the patch embedding in them, or to the configuration.
        size = attribute(module, "image_size") or attribute(attribute(module, "patch_embeddings"), "image_size")
        size = size or attribute(module, "config").image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def forward(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        images = self.upright(pixel_values)
        options = self._options(*args, **kwargs)
        if options is not None and self.may_fuse(images):
            result = self.sequence(images, **options)
            if result is not None:
                return result
        return super().forward(self.as_the_host_takes_them(images), *args, **kwargs)

    def _options(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """The arguments behind the images, by name; None where one of them is not for us (a mask of patches)."""
        if args:
            kwargs = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        return None if kwargs.pop("bool_masked_pos", None) is not None else kwargs

    # What the host returns, made by us, from the images and the host's options; None where only the host knows what
    # to do.
    sequence: Callable[..., Any]

    def tokens(
        self, images: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, keep: Tensor | None = None
    ) -> Tensor:
        projection = self.projection(self)
        return self.embed(images, projection.weight, projection.bias, pos_embed=pos_embed, prefix=prefix, keep=keep)

    def interpolated(self, table: Tensor, images: Tensor, prefix_rows: int) -> Tensor:
        """The table for images of this size, by the host's own function, which looks at the number of tokens only."""
        rows = prefix_rows + self._patches(images)
        height, width = numbers_where_traced(images.shape[2:])
        return self.interpolate_pos_encoding(table[:, :1].expand(-1, rows, -1), height, width)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.projection(self).stride
        return images.shape[2] // height, images.shape[3] // width

    def _patches(self, images: Tensor) -> int:
        rows, columns = self.grid_of(images)
        return rows * columns

    def has_own_size(self, images: Tensor) -> bool:
        """Whether images are of the size that the model was made for."""
        height, width = self.example_size(self)
        return images.shape[2] == height and images.shape[3] == width


class DirectEmbeddings(Embeddings):
    """Those that hold the convolution themselves, under this name."""

    convolution: ClassVar[str] = "patch_embedding"

    @classmethod
    def projection(cls, module: Any) -> Any:
        return attribute(module, cls.convolution)

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [Part(cls.convolution, cls.projection(module), nn.Conv2d)]


class ViTEmbeddings(Embeddings):
    """ViT, and DeiT with its distillation token."""

    hosts = (
        "transformers.models.vit.modeling_vit.ViTEmbeddings",
        "transformers.models.deit.modeling_deit.DeiTEmbeddings",
    )

    def sequence(self, images: Tensor, interpolate_pos_encoding: bool | None = False) -> Tensor | None:
        prefix = cat_rows(self.cls_token, getattr(self, "distillation_token", None))
        table = self.position_embeddings
        if interpolate_pos_encoding:
            table = self.interpolated(table, images, prefix.shape[1])  # type: ignore[union-attr]
        elif not self.has_own_size(images):
            return None
        return self.dropout(self.tokens(images, table, prefix))


class BeitEmbeddings(Embeddings):
    """BEiT and Data2Vec-vision, whose positions are relative, in attention, unless they have a table too."""

    hosts = (
        "transformers.models.beit.modeling_beit.BeitEmbeddings",
        "transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionEmbeddings",
    )

    def sequence(self, images: Tensor, interpolate_pos_encoding: bool | None = None) -> Any:
        # That option is without effect: this host always interpolates.
        table = self.position_embeddings
        if table is not None:
            table = self.interpolated(table, images, 1)
        tokens = self.dropout(self.tokens(images, table, self.cls_token))
        # The variant of this class that knows its grid returns it.
        return (tokens, self.grid_of(images)) if hasattr(self.patch_embeddings, "patch_shape") else tokens


class Dinov2Embeddings(Embeddings):
    """DINOv2, with register tokens or without; they have no position and stand between class token and patches."""

    hosts = (
        "transformers.models.dinov2.modeling_dinov2.Dinov2Embeddings",
        "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersEmbeddings",
    )

    def sequence(self, images: Tensor) -> Tensor:
        table = self.interpolated(self.position_embeddings, images, 1)
        registers = getattr(self, "register_tokens", None)
        if registers is None:
            return self.dropout(self.tokens(images, table, self.cls_token))
        prefix = torch.cat([self.cls_token + table[:, :1], registers], dim=1)
        return self.dropout(self.tokens(images, table[:, 1:], prefix))


class DINOv3Embeddings(DirectEmbeddings):
    """DINOv3, whose positions are rotary, in attention."""

    hosts = ("transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTEmbeddings",)
    convolution = "patch_embeddings"

    def sequence(self, images: Tensor) -> Tensor:
        return self.tokens(images, None, torch.cat([self.cls_token, self.register_tokens], dim=1))


class ViTMAEEmbeddings(Embeddings):
    """The encoder of a masked autoencoder: patches that are masked are never projected."""

    hosts = ("transformers.models.vit_mae.modeling_vit_mae.ViTMAEEmbeddings",)
    overrides = ("forward", "random_masking")

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection of the kept patches", *present(module)]

    def sequence(
        self, images: Tensor, noise: Tensor | None = None, interpolate_pos_encoding: bool | None = False
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        table = self.position_embeddings
        if interpolate_pos_encoding:
            # This host counts without its class token.
            table = self.interpolated(table, images, 0)
        elif not self.has_own_size(images):
            return None
        patches = table.shape[1] - 1
        # The host draws and sorts; numbers in place of tokens come back as those of the kept patches.
        numbers = torch.arange(patches, device=images.device)[None, :, None].expand(images.shape[0], -1, 1)
        keep, mask, ids_restore = self.random_masking(numbers, noise)
        prefix = self.cls_token + table[:, :1]
        return self.tokens(images, table[:, 1:], prefix, keep.squeeze(-1)), mask, ids_restore


class CLIPEmbeddings(DirectEmbeddings):
    """CLIP's vision tower."""

    hosts = ("transformers.models.clip.modeling_clip.CLIPVisionEmbeddings",)
    tables = ("class_embedding",)

    def why_not_of(self, images: Tensor) -> str:
        shape = tuple(attribute(self, "position_ids").shape)
        if len(shape) != 2 or shape[0] != 1:
            return f"position_ids has shape {shape}, not (1, N)"
        token = attribute(self, "class_embedding")
        return "" if token is None or token.dim() == 1 else f"class_embedding has shape {tuple(token.shape)}, not (D,)"

    def sequence(self, images: Tensor, interpolate_pos_encoding: bool | None = False) -> Tensor | None:
        token = attribute(self, "class_embedding")
        prefix = None if token is None else token[None, None]
        rows = 0 if prefix is None else 1
        if interpolate_pos_encoding:
            table = self.interpolated(self.position_embedding.weight[None], images, rows)
        elif self.has_own_size(images) and self.position_ids.shape[1] == rows + self._patches(images):
            # By the host's module, which a hook, an adapter or other ids may have made more than a table.
            table = self.position_embedding(self.position_ids)
        else:
            return None
        return self.tokens(images, table, prefix)


class SiglipEmbeddings(CLIPEmbeddings):
    """SigLIP's vision tower, which has no class token."""

    hosts = ("transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings",)


class Idefics3Embeddings(OfKnownCode, DirectEmbeddings):
    """The vision towers of Idefics 3 and SmolVLM, whose batches are padded: each image has a mask of its patches, and
    by it positions of its own, which the host finds."""

    hosts = (
        "transformers.models.idefics3.modeling_idefics3.Idefics3VisionEmbeddings",
        "transformers.models.smolvlm.modeling_smolvlm.SmolVLMVisionEmbeddings",
    )

    tables = ()
    # Images are projected, flattened, turned to [B, N, D] and added to positions; else their shape and device is read.
    known = ("1eefdb500aac0923",)

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        table = Part("position_embedding", attribute(module, "position_embedding"), nn.Embedding)
        return [*super().inside(module), table]

    def why_not_of(self, images: Tensor) -> str:
        # Rows are looked up once for all images that are alike.
        is_scaled = attribute(self, "position_embedding").scale_grad_by_freq
        return "position_embedding scales gradients by how often a row is looked up" if is_scaled else ""

    def sequence(self, images: Tensor, patch_attention_mask: Any = None) -> Tensor | None:
        mask = patch_attention_mask
        if not isinstance(mask, Tensor) or mask.shape != (images.shape[0], *self.grid_of(images)):
            return None
        batch = 1 if _are_alike(mask) else images.shape[0]
        # The host's code from its convolution to the addition of positions, [1 or B, N, D], which is where ours begins.
        unpositioned = Unpositioned(lambda positions: self._positioned(images, positions))
        return super(Embeddings, self).forward(Unprojected(images, batch, lambda: unpositioned), mask[:batch])

    def _positioned(self, images: Tensor, positions: Tensor) -> Tensor:
        batch = positions.shape[0]
        if batch == 1:
            return self.tokens(images, positions, None)
        # One image of all of them, one below the other, whose patches come in the order of their positions.
        height = images.shape[2] - images.shape[2] % self.projection(self).stride[0]
        images = images[:, :, :height].transpose(0, 1).flatten(1, 2)[None]  # [1, C, B·H, W]
        return self.tokens(images, positions.flatten(0, 1), None)[0].unflatten(0, (batch, -1))


class PixtralVisionModel(OfKnownCode):
    """Pixtral's vision tower, which projects a padded batch and makes one sequence of the patches that are images'."""

    hosts = ("transformers.models.pixtral.modeling_pixtral.PixtralVisionModel",)

    # Images are cast and projected, and each cropped to its size in whole patches.
    known = ("2a9abcaf045c37bd",)

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["the projection of patches"]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [Part("patch_conv", attribute(module, "patch_conv"), nn.Conv2d)]

    @classmethod
    def example_size(cls, module: Any) -> tuple[int, int]:
        height, width = module.patch_conv.stride
        return 4 * height, 4 * width

    def takes(self, images: Tensor) -> bool:
        return holds_a_patch(images, attribute(self, "patch_conv").stride)

    def why_not_of(self, images: Tensor) -> str:
        # The host crops by the one, and projects by the other.
        size, stride = self.patch_size, attribute(self, "patch_conv").stride
        return "" if stride == (size, size) else f"patch_size is {size}, and the stride of patch_conv {stride}"

    def forward(self, pixel_values: Any, image_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        images = self.upright(pixel_values)
        if not self.may_fuse(images):
            return super().forward(self.as_the_host_takes_them(images), image_sizes, *args, **kwargs)
        if isinstance(image_sizes, Tensor) and not image_sizes.is_floating_point():
            image_sizes = image_sizes.tolist()  # one wait for the device, where the host has two an image
        deferred = Unprojected(images, images.shape[0], lambda: self._maps(images, image_sizes))
        return super().forward(deferred, image_sizes, *args, **kwargs)

    def _maps(self, images: Tensor, sizes: Any) -> Any:
        """Projected patches as maps, [B, D, h, w], or a list of the images' own."""
        height, width = self.patch_conv.stride
        tokens = self.embed(images, self.patch_conv.weight, self.patch_conv.bias)
        maps = tokens.unflatten(1, (images.shape[2] // height, images.shape[3] // width))  # [B, h, w, D]
        if sizes is None:
            return maps.permute(0, 3, 1, 2)
        # The host makes rows of them again. So they are cropped while they are, and seen as maps by their strides.
        own = [one[: size[0] // height, : size[1] // width] for one, size in zip(maps, sizes, strict=False)]
        return [one.contiguous().permute(2, 0, 1) for one in own]


class Siglip2Embeddings(OfCutPatches):
    """SigLIP2's vision tower: patches come cut, and every image has a grid, so positions, of its own.

    A batch of B sequences of N patches is one image of B·N patches of one pixel and C·P·P channels.
    """

    hosts = ("transformers.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings",)

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection", *present(module)]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [Part("patch_embedding", module.patch_embedding, nn.Linear)]

    def forward(self, pixel_values: Any, spatial_shapes: Any) -> Tensor:
        batch, patches, values = pixel_values.shape
        images = pixel_values.reshape(1, batch * patches, 1, values).permute(0, 3, 1, 2)  # [1, C·P·P, B·N, 1]
        if not self.may_fuse(images):
            return super().forward(pixel_values, spatial_shapes)
        side = self.position_embedding_size
        table = self.position_embedding.weight.reshape(side, side, -1)
        table = self.resize_positional_embeddings(table, spatial_shapes, max_length=patches)  # [B, N, D]
        linear = self.patch_embedding
        tokens = self.embed(images, linear.weight[:, :, None, None], linear.bias, pos_embed=table.flatten(0, 1))
        return tokens.unflatten(1, (batch, patches))[0]


class VideoPatchEmbed(OfCutPatches):
    """The projection of the vision towers of Qwen2-VL, 2.5 and 3, whose patches come cut, of two frames each.

    A convolution in three dimensions whose kernel is a patch is a product: N patches are one image of N patches of one
    pixel and C·T·P·P channels.
    """

    hosts = (
        "transformers.models.qwen2_vl.modeling_qwen2_vl.PatchEmbed",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionPatchEmbed",
        "transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionPatchEmbed",
    )

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [Part("proj", attribute(module, "proj"), nn.Conv3d)]

    def why_not_of(self, images: Tensor) -> str:
        proj = self.proj
        patch = (self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size)
        if proj.weight.shape != (self.embed_dim, *patch):
            return f"proj takes patches of shape {tuple(proj.weight.shape[1:])}, not {patch}"
        if proj.stride != patch[1:] or proj.padding not in ((0, 0, 0), "valid") or proj.dilation != (1, 1, 1):
            return f"proj has stride {proj.stride}, padding {proj.padding} and dilation {proj.dilation}"
        return "" if proj.groups == 1 else f"proj has {proj.groups} groups"

    def forward(self, hidden_states: Any) -> Any:
        if isinstance(hidden_states, Unpositioned):
            return hidden_states
        images = self.images_of(hidden_states)
        if images is None or not self.may_fuse(images):
            return super().forward(hidden_states)
        return self.tokens(images)

    def images_of(self, patches: Any) -> Tensor | None:
        """Patches as one image, [1, C·T·P·P, N, 1]; None where they are no patches."""
        length = self.proj.weight[0].numel()
        if not isinstance(patches, Tensor) or patches.numel() % length or not patches.numel():
            return None
        return patches.reshape(1, -1, 1, length).permute(0, 3, 1, 2)

    def tokens(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """[N, D], with positions of as many rows."""
        weight = self.proj.weight.flatten(1)[:, :, None, None]
        return self.embed(images, weight, self.proj.bias, pos_embed=positions)[0]


class Qwen3VLVisionModel(OfKnownCode, OfCutPatches):
    """Qwen3-VL's vision tower: projection and positions, which are a table's on the grid of each image."""

    hosts = ("transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",)

    # Patches are projected, rows of the table looked up, weighted and summed, and both added.
    known = ("7d46292acd9ea8b7",)
    # Which rows, and by what weights: the host's function, and that for an axis.
    known_taps = ("67e7323f7c4b7df3", "aaa26d0d671f3516")

    @classmethod
    def parts(cls, module: Any) -> Sequence[str]:
        return ["projection", "positions"]

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        embed = attribute(module, "patch_embed")
        return [
            Part("patch_embed", embed, VideoPatchEmbed),
            *(Part(f"patch_embed.{part.name}", part.module, part.kind) for part in VideoPatchEmbed.inside(embed)),
            Part("pos_embed", attribute(module, "pos_embed"), nn.Embedding),
        ]

    def why_not_of(self, images: Tensor) -> str:
        table, side = attribute(self, "pos_embed"), self.num_grid_per_side
        if table.weight.shape[0] != side * side:
            return f"pos_embed has {table.weight.shape[0]} rows, not {side} × {side}"
        if table.padding_idx is not None or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            return "pos_embed is more than a table"
        return attribute(self, "patch_embed").why_not_of(images)

    def forward(self, hidden_states: Any, grid_thw: Any, *args: Any, **kwargs: Any) -> Any:
        images = self.patch_embed.images_of(hidden_states) if self._has_own_taps(grid_thw, kwargs) else None
        if images is None or not self.may_fuse(images):
            return super().forward(hidden_states, grid_thw, *args, **kwargs)
        table = self._table(grid_thw.tolist(), images.shape[2])
        if table is None:
            return super().forward(hidden_states, grid_thw, *args, **kwargs)
        embed = self.patch_embed
        dtype = autocast_dtype(images.device) or embed.proj.weight.dtype
        unpositioned = Unpositioned(lambda positions: embed.tokens(images, positions), dtype)
        taps = {"interp_indices": Taps(table), "interp_weights": table.new_ones(1, 1)}
        return super().forward(unpositioned, grid_thw, *args, **kwargs, **taps)

    def _has_own_taps(self, grid_thw: Any, kwargs: Any) -> bool:
        """Whether the host would find out what to read of its table, by sizes that can be known here and now, and in
        float32."""
        return (
            isinstance(grid_thw, Tensor)
            and grid_thw.dim() == 2
            and may_be_read(grid_thw)
            and not torch.jit.is_tracing()
            and "interp_indices" not in kwargs
            and "interp_weights" not in kwargs
            and attribute(self.pos_embed, "weight").dtype != torch.float64
            and self._taps() == self.known_taps
        )

    def _taps(self) -> tuple[str, str]:
        """Of the host's functions that find the rows of its table and their weights, as they are now."""
        found = vars(inspect.getmodule(own_class(self))).get("get_vision_interpolation_indices_and_weights")
        axis = getattr(found, "__globals__", {}).get("_interpolation_axis_taps_weights")
        return fingerprint(found), fingerprint(axis)

    def _table(self, clips: list[list[int]], count: int) -> Tensor | None:
        """The positions of all patches, [N, D], those that are merged behind the tower next to one another; None for
        grids that are not of N patches."""
        side, merge = self.num_grid_per_side, self.config.spatial_merge_size
        is_whole = all(rows % merge == 0 and columns % merge == 0 for _, rows, columns in clips)
        if not is_whole or sum(frames * rows * columns for frames, rows, columns in clips) != count:
            return None
        table = self.pos_embed.weight.unflatten(0, (side, side)).float()
        frames = [(rows, columns) for count_of, rows, columns in clips for _ in range(count_of)]
        how = self.interpolation_mode, False, self.interpolation_align_corners
        positions, starts = grid_rows(table, frames, *how, merge)
        return torch.cat([
            positions[start : start + rows * columns] for start, (rows, columns) in zip(starts, frames, strict=True)
        ])  # fmt: skip


class KimiPatchEmbed(OfCutPatches):
    """The projection of Kimi K2.5's vision tower, whose patches come cut, [N, C, P, P], as one image of N patches."""

    hosts = ("transformers.models.kimi_k25.modeling_kimi_k25.Kimi_K25VisionPatchEmbed",)

    @classmethod
    def inside(cls, module: Any) -> Sequence[Part]:
        return [Part("proj", attribute(module, "proj"), nn.Conv2d)]

    @classmethod
    def channels(cls, module: Any) -> None:
        return None

    def forward(self, pixel_values: Any, grid_thw: Any, **kwargs: Any) -> Tensor:
        weight = self.proj.weight
        if not isinstance(pixel_values, Tensor) or pixel_values.shape[1:] != weight.shape[1:]:
            return super().forward(pixel_values, grid_thw, **kwargs)
        images = pixel_values.flatten(1).T[None, :, :, None]  # [1, C·P·P, N, 1]
        if not images.numel() or not self.may_fuse(images):
            return super().forward(pixel_values, grid_thw, **kwargs)
        tokens = self.embed(images, weight.flatten(1)[:, :, None, None], self.proj.bias)[0]
        return self.pos_emb(tokens, grid_thw, **kwargs)


def _are_alike(masks: Tensor) -> bool:
    """Whether the masks of all images, [B, h, w], are known to be the same; to look is to wait for the device."""
    return len(masks) == 1 or (len(masks) > 1 and may_be_read(masks) and bool((masks == masks[:1]).all()))


MIXINS: tuple[type[Fused], ...] = (
    ViTEmbeddings,
    BeitEmbeddings,
    Dinov2Embeddings,
    DINOv3Embeddings,
    ViTMAEEmbeddings,
    CLIPEmbeddings,
    SiglipEmbeddings,
    Idefics3Embeddings,
    PixtralVisionModel,
    Siglip2Embeddings,
    Qwen3VLVisionModel,
    VideoPatchEmbed,
    KimiPatchEmbed,
)
