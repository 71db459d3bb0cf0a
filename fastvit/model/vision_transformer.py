"""The Vision Transformer, with timm's arguments, parameter names and numerics."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvit.checks import check_tensor, require, shape_of
from fastvit.guards import attribute, full_name, why_not_plain, why_not_plain_tensor, why_observed
from fastvit.model import packed
from fastvit.model.arguments import block_indices, check_arguments, check_pool
from fastvit.model.checkpoints import check_state_dict
from fastvit.model.initialisation import initialise, trunc_normal_
from fastvit.model.layers import (
    Attention,
    AttentionPool,
    Block,
    Layer,
    LayerNorm,
    Mlp,
    PatchDropout,
    activation_layer,
    autocast_dtype,
    first_parameter,
    norm_layer_of,
    to_module_dtype,
)
from fastvit.model.patch_embed import NORMS, PatchEmbed, as_floats, is_given_up, model_normalisation
from fastvit.positions import resample_pos_embed, rotary_2d, sincos_2d
from fastvit.stream import Setup
from fastvit.trunk import run_blocks

__all__ = ["VisionTransformer"]

torch.fx.wrap("resample_pos_embed")  # one step to torch.fx, since it looks at sizes


class VisionTransformer(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2021), a drop-in for timm's `VisionTransformer`.

    Images become tokens in one call of :func:`fastvit.functional.patch_embed`: projection, positions, class and
    register tokens, and the normalisation of raw uint8 images. Where a part of that has been changed, wrapped or is
    watched by hooks, the parts are called one after another, as timm does, and a warning says so once.

    Args:
        img_size: height and width of the images.
        patch_size: height and width of a patch.
        in_chans: channels of the images.
        num_classes: outputs of the head; 0: no head.
        global_pool: "token" (the class token), "avg", "max", "avgmax", "map" (attention, `attn_pool`), or "" for
            every token.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, and the MLP's width in units of the width.
        qkv_bias, proj_bias: biases of attention's first, and of all other linear layers in the blocks.
        qk_norm: norm on queries and keys. scale_attn_norm, scale_mlp_norm: norm before the last layer of each.
        init_values: LayerScale starts here; None or 0: no LayerScale.
        class_token: put a class token in front.
        pos_embed: "learn"; "sincos", a fixed table in the same place, not trained; "rotary", which turns queries and
            keys in every block (`fastvit.positions.rotary_2d`); "" or "none".
        no_embed_class: class and register tokens get no position.
        reg_tokens: how many register tokens.
        pre_norm: norm before the blocks (and no bias in the patch embedding), as in CLIP.
        final_norm: norm after the blocks. fc_norm: have it after the pooling instead; None: if pooling is by
            average or maximum.
        pool_include_prefix: average or maximum over class and register tokens too.
        dynamic_img_size: take images of any size, with the positions resampled.
        dynamic_img_pad: pad images to whole patches.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after the positions, after
            linear layers in the blocks, on attention weights.
        patch_drop_rate: share of patches dropped in training; they are not even projected.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        weight_init: "", "jax", "jax_nlhb", "moco", "reset" or "skip"; fix_init: scale by depth, as in BEiT.
        embed_layer: class of the patch embedding, called as timm calls it.
        embed_norm_layer: norm between projection and position.
        norm_layer, act_layer: a class, or "layernorm", "rmsnorm"; "gelu", "gelu_tanh", "quick_gelu", "relu", "silu".
        block_fn, mlp_layer, attn_layer: classes of the blocks' parts.
        mean, std: one float a channel, in the 0..1 scale: raw uint8 images are normalised inside the projection (and
            divided by 255, as they are without them too). Float images are taken as they are: normalised.
        copy_images: keep a copy of a uint8 batch for the backward pass, which reads it again. Needed where a loader
            writes the next batch into the same memory before that (shared buffers of numpy, DALI or ffcv): torch does
            not see it, and gradients would be wrong without a word.
        residual_dtype: dtype of the tokens between the blocks. None: timm's numerics, which under autocast is
            float32; torch.bfloat16 halves that traffic.

    Raises:
        ValueError: an argument that can't be; the message names it, its value and what is accepted.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer: Layer = PatchEmbed,
        embed_norm_layer: str | Layer | None = None,
        norm_layer: str | Layer | None = None,
        act_layer: str | Layer | None = None,
        block_fn: Layer = Block,
        mlp_layer: Layer = Mlp,
        attn_layer: str | Layer = Attention,
        device=None,
        dtype=None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        copy_images: bool = False,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_arguments(locals())
        attn_layer = Attention if isinstance(attn_layer, str) else attn_layer
        norm: Layer = norm_layer_of(norm_layer) or LayerNorm
        activation: Layer = activation_layer(act_layer) or nn.GELU
        factory = {"device": device, "dtype": dtype}
        use_fc_norm = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens = reg_tokens
        self.num_heads = num_heads
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix
        self.dynamic_img_size = dynamic_img_size
        self.residual_dtype = residual_dtype
        self.grad_checkpointing = False
        self.checkpointed_blocks: int | None = None
        self.pos_embed_kind = pos_embed or "none"

        embed_norm = norm_layer_of(embed_norm_layer, "embed_norm_layer")
        # Modules are made in timm's order, so that the same seed gives the same weights.
        self.patch_embed: Any = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            dynamic_img_pad=dynamic_img_pad,
            **({"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}),
            **({} if embed_norm is None else {"norm_layer": embed_norm}),
            **factory,
        )
        self.mean, self.std = model_normalisation(mean, std, in_chans)
        if isinstance(self.patch_embed, PatchEmbed):
            self.patch_embed.copy_images = copy_images
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **factory)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **factory)) if reg_tokens else None
        self.pos_embed: nn.Parameter | None = None
        if self.pos_embed_kind in ("learn", "sincos"):
            rows = self.patch_embed.num_patches + self._positioned_prefix_tokens
            table = torch.empty(1, rows, embed_dim, **factory)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed_kind == "learn")
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop: Any = nn.Identity()
        if patch_drop_rate > 0:
            self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens)
        self.norm_pre = norm(embed_dim, **factory) if pre_norm else nn.Identity()

        # Only Block knows about a residual dtype; a block of the caller's own takes timm's arguments.
        block_options: dict[str, Any] = {} if residual_dtype is None else {"residual_dtype": residual_dtype}
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *[
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    scale_attn_norm=scale_attn_norm,
                    scale_mlp_norm=scale_mlp_norm,
                    proj_bias=proj_bias,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[index],
                    norm_layer=norm,
                    act_layer=activation,
                    mlp_layer=mlp_layer,
                    attn_layer=attn_layer,
                    depth=index,
                    **block_options,
                    **factory,
                )
                for index in range(depth)
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": reduction} for index in range(depth)
        ]
        self.norm = norm(embed_dim, **factory) if final_norm and not use_fc_norm else nn.Identity()
        self.attn_pool: nn.Module | None = None
        if global_pool == "map":
            options = {"norm_layer": norm, "act_layer": activation, **factory}
            self.attn_pool = AttentionPool(embed_dim, num_heads, mlp_ratio, **options)
        self.fc_norm = norm(embed_dim, **factory) if final_norm and use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()

        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fix_init = fix_init
        self._fill_table()  # a fixed table is not a matter of initialisation: also with "skip"
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    # ---- weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise every weight.

        Args:
            mode: "", "jax", "jax_nlhb", "moco" or "reset"; "" is the mode given to the constructor.
            needs_reset: also call reset_parameters() where the scheme names nothing, which is needed after
                `to_empty()`.
        """
        mode = mode or self.weight_init_mode
        head_bias = -math.log(self.num_classes) if "nlhb" in mode else 0.0
        if self.pos_embed is not None and self.pos_embed_kind == "learn":
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        self._fill_table()
        initialise(self, mode, head_bias, reset=needs_reset)
        if self.fix_init:
            block: Any
            for index, block in enumerate(self.blocks, start=1):
                block.attn.proj.weight.div_(math.sqrt(2.0 * index))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * index))

    @torch.no_grad()
    def _fill_table(self) -> None:
        if self.pos_embed is not None and self.pos_embed_kind == "sincos":
            like: dict[str, Any] = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
            rows = self._positioned_prefix_tokens
            self.pos_embed.copy_(sincos_2d(self.patch_embed.grid_size, self.embed_dim, num_prefix_tokens=rows, **like))

    @property
    def _positioned_prefix_tokens(self) -> int:
        """Rows of `pos_embed` that belong to class and register tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but what does not fit is refused before anything is loaded.

        Raises:
            RuntimeError: names every parameter that is missing, not wanted, or of another shape (with both shapes).
        """
        # Hooks may rename keys on the way in (activation checkpointing does); then only torch can tell.
        if strict and not any(module._load_state_dict_pre_hooks for module in self.modules()):
            check_state_dict(self, state_dict, prefix="", strict=True)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Torch calls this before it loads any submodule, also as a part of DDP or of a larger model: raising here
        # leaves every parameter of this model as it was.
        check_state_dict(self, state_dict, prefix, strict=False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- changing a built model ----------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations: the first so many that the
        attribute `checkpointed_blocks` says, or all where it is None."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` (0: none), and another pooling if one is given."""
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes: {num_classes!r} must be a whole number of at least 0")
        if global_pool is not None:
            check_pool(global_pool, self.has_class_token)
            can = global_pool != "map" or self.attn_pool is not None
            require(can, "global_pool: 'map' needs a model built with it; attention pooling can't be added")
            self.attn_pool = self.attn_pool if global_pool == "map" else None
            self.global_pool = global_pool
        like = first_parameter(self)
        factory: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size, or other patches: positions and the patch weight are resampled."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        table, grid = self.pos_embed, self.patch_embed.grid_size
        if table is not None and grid != old_grid:
            rows = self._positioned_prefix_tokens
            resampled = resample_pos_embed(table.detach(), grid, old_grid, num_prefix_tokens=rows)
            self.pos_embed = nn.Parameter(resampled, requires_grad=table.requires_grad)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what :meth:`forward_intermediates` does not need for these blocks; returns the blocks taken."""
        taken = block_indices(len(self.blocks), indices)
        self.blocks = nn.Sequential(*list(self.blocks)[: max(taken) + 1])
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return taken

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("mean", "std") and isinstance(self._modules.get("patch_embed"), PatchEmbed):
            setattr(self.patch_embed, name, value)  # any other is given normalised floats

    # ---- from images to tokens -----------------------------------------------------------------------------------

    def _embed(self, images: Tensor) -> Tensor:
        """Images to the sequence that enters the first block, [B, R+N, D]."""
        keep: Tensor | None = None
        embed = attribute(self, "patch_embed")
        if self._is_one_call(embed, images):
            grid = embed.grid_of(images)
            table = self._positions(grid, embed.grid_size)
            keep = self._choose_patches(images.shape[0], grid[0] * grid[1], images.device)
            dtype = self._token_dtype(images.device, embed.proj.weight.dtype)
            x = embed.sequence(images, table, self._prefix(), keep, dtype)
            x = x if table is None else self.pos_drop(x)
        else:
            if why_not_plain(embed, PatchEmbed):  # what stands there takes, and is seen to take, floats
                like = first_parameter(embed)
                images = as_floats(images, self.mean, self.std, None if like is None else like.dtype)
            x = self._pos_embed(embed(images))
            x = x if self.residual_dtype is None else x.to(self.residual_dtype)
        x = x if keep is not None else self.patch_drop(x)
        if isinstance(self.norm_pre, nn.Identity):
            return self.norm_pre(x)
        x = self.norm_pre(self._leave_residual(x))
        return x if self.residual_dtype is None else x.to(self.residual_dtype)

    def _is_one_call(self, embed: Any, images: Tensor) -> bool:
        """Whether everything from the images to the positions still is what one call does; told once if not."""
        if not isinstance(images, Tensor):  # torch.fx
            return False
        reason = why_not_plain(embed, PatchEmbed)
        if reason:
            return not is_given_up(f"patch_embed {reason}")
        norm = attribute(embed, "norm")
        if not isinstance(norm, NORMS):
            reason = f"patch_embed.norm is a {full_name(type(norm))}, which may look across patches"
        elif why_observed(norm):
            reason = f"patch_embed.norm {why_observed(norm)}"
        elif type(self)._pos_embed is not VisionTransformer._pos_embed or "_pos_embed" in self.__dict__:
            reason = "_pos_embed was replaced"
        elif not embed.may_fuse(images):
            return False
        return not is_given_up(reason or self._why_other_tables(*embed.grid_size))

    def _why_other_tables(self, lines: int, columns: int) -> str:
        """Why positions, class and register tokens are not what the call takes, "" if they are."""
        rows = 0
        for name in ("cls_token", "reg_token", "pos_embed"):
            table = attribute(self, name)
            if table is None:
                continue
            reason = why_not_plain_tensor(table)
            if reason:
                return f"{name} {reason}"
            shape = table.shape
            if name == "pos_embed":
                rows = lines * columns + (0 if self.no_embed_class else rows)
            if len(shape) != 3 or shape[0] != 1 or (name == "pos_embed" and shape[1] != rows):
                return f"{name} has shape {shape_of(table)}"
            rows += shape[1]
        return ""

    def _choose_patches(self, batch: int, patches: int, device: torch.device) -> Tensor | None:
        """Patches to project, where they can be chosen beforehand: nobody looks at all of them in between."""
        drop = attribute(self, "patch_drop")
        if type(drop) is not PatchDropout or why_observed(drop) or not isinstance(self.patch_embed.norm, nn.Identity):
            return None
        return None if why_not_plain(self.pos_drop, nn.Dropout) else drop.choose(batch, patches, device)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """What `patch_embed` returns, with its positions, behind class and register tokens: as timm does it."""
        table: Tensor | None = self.pos_embed
        if self.dynamic_img_size:
            table = None if table is None else self._resampled(table, x.shape[1:3])
            x = x.flatten(1, 2)
        x = _placed(x, self.cls_token, self.reg_token, table, self.no_embed_class)
        return x if table is None else self.pos_drop(x)

    def _positions(self, grid: Sequence[int], own: Sequence[int]) -> Tensor | None:
        """The positions of this grid, [1, N, D] or [1, R+N, D]."""
        table = self.pos_embed
        is_own = grid[0] == own[0] and grid[1] == own[1]
        if table is None or is_own or (not self.dynamic_img_size and grid[0] * grid[1] == own[0] * own[1]):
            return table  # without dynamic_img_size also for another grid of as many patches, as timm does it
        return self._resampled(table, grid)

    def _resampled(self, table: Tensor, grid: Sequence[int]) -> Tensor:
        own, rows = self.patch_embed.grid_size, self._positioned_prefix_tokens
        return resample_pos_embed(table, grid, own, num_prefix_tokens=rows)

    def _prefix(self) -> Tensor | None:
        """Class and register tokens, [1, R, D]."""
        if self.cls_token is None or self.reg_token is None:
            return self.reg_token if self.cls_token is None else self.cls_token
        return torch.cat([self.cls_token, self.reg_token], dim=1)

    def _token_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """What torch's promotion makes of projection, prefix and positions, unless `residual_dtype` says otherwise.

        Under autocast the projection comes in autocast's dtype and the float32 parameters promote the sum.
        """
        if self.residual_dtype is not None:
            return self.residual_dtype
        dtype = autocast_dtype(device) or dtype
        for parameter in (self.cls_token, self.reg_token, self.pos_embed):
            if parameter is not None:
                dtype = torch.promote_types(dtype, parameter.dtype)
        return dtype

    def _leave_residual(self, x: Tensor) -> Tensor:
        """Tokens as a norm with this model's weights takes them."""
        return x if self.residual_dtype is None else to_module_dtype(x, self.patch_embed)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("torch.jit.script can't compile fastvit's models; torch.jit.trace and torch.export can")

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor | list[Tensor] | tuple[Tensor, ...], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Images [B, C, H, W], or a list of images of any sizes, to logits [B, num_classes]."""
        if isinstance(x, (list, tuple)):
            require(attn_mask is None and not is_causal, "attn_mask, is_causal: a list of images takes neither")
            return self.forward_packed(x)
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, H, W] to the normed tokens of the last block, [B, R+N, D]."""
        rotary = self._rotary(x.shape[2:], x.device)
        x = self._embed(x)
        if attn_mask is None and not is_causal and not self._is_recomputed(0):
            x = self._run_blocks(x, **rotary)
        else:
            for index, block in enumerate(self.blocks):
                x = self._run_block(index, block, x, attn_mask, is_causal, **rotary)
        return self.norm(self._leave_residual(x))

    def forward_packed(self, images: Sequence[Tensor]) -> Tensor:
        """Images [C, H_i, W_i] of any sizes to logits [B, num_classes], in one sequence without padding.

        Each has the result it would have alone, to rounding, and so have the gradients: positions resampled to its
        own grid, as with `dynamic_img_size`, class and register tokens, attention and pooling of its own. Dropout and
        stochastic depth draw other numbers than a batch would.

        Raises:
            ValueError, TypeError: as :func:`fastvit.functional.patch_embed_packed`; a model without pooling.
        """
        return packed.logits(self, images)

    def forward_features_packed(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The normed tokens of the last block [Σ(R+N_i), D], and offsets [B+1] int32: image i has the rows from
        offsets[i] to offsets[i+1]."""
        return packed.features(self, images)

    def _rotary(self, size: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """What blocks are given for images of this height and width, with pos_embed="rotary"."""
        if self.pos_embed_kind != "rotary" or not len(self.blocks):
            return {}
        grid, heads = self.patch_embed.dynamic_feat_size(size), self.num_heads
        options: dict[str, Any] = {"num_prefix_tokens": self.num_prefix_tokens, "device": device}
        return {"rotary": rotary_2d(grid, self.embed_dim // heads, **options)}

    def _run_blocks(self, x: Tensor, **rotary: Tensor) -> Tensor:
        """All blocks one after another."""
        reason = why_not_plain(self.blocks, nn.Sequential)
        setup = None if reason else Setup.of(x, None, self.residual_dtype is not None)
        if setup is not None:
            return run_blocks(self.blocks, x, setup, **rotary)
        if not rotary:
            return self.blocks(x)
        # A sequence gives its parts nothing but a tensor.
        require(not reason, f"blocks: with pos_embed='rotary' they are called one by one, and the whole {reason}")
        for block in self.blocks:
            x = block(x, **rotary)
        return x

    def _is_recomputed(self, index: int) -> bool:
        """Whether the block is, in the backward pass."""
        limit = self.checkpointed_blocks
        return self.grad_checkpointing and (limit is None or index < limit)

    def _run_block(
        self, index: int, block: nn.Module, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **rotary: Tensor
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            return block(x, attn_mask=attn_mask, is_causal=is_causal, **rotary)
        if self._is_recomputed(index):
            return checkpoint(functools.partial(block, **rotary), x, use_reentrant=False)
        return block(x, **rotary)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, R+N, D] to features [B, D], or to themselves where there is no pooling."""
        if pool_type is None:
            pool_type = self.global_pool
        else:
            check_pool(pool_type, self.has_class_token)
        if self.attn_pool is not None:
            pool_type = "map"
        elif pool_type == "map":
            raise ValueError("global_pool: 'map' needs a model built with it")
        if pool_type in ("", "token"):
            return x[:, 0] if pool_type else x
        x = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(x)
        if pool_type == "avg":
            return x.mean(dim=1)
        largest = x.amax(dim=1)
        return largest if pool_type == "max" else 0.5 * (largest + x.mean(dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` to logits, or with `pre_logits` to what the head would see."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """What the blocks put out, as dense features.

        Args:
            x: [B, C, H, W].
            indices: the last so many blocks, these blocks (negative: from the end), or None for all.
            return_prefix_tokens: pair every map with its class and register tokens, [B, R, D].
            norm: apply the final norm to every map.
            stop_early: skip the blocks behind the last one taken.
            output_fmt: "NCHW", [B, D, rows, columns], or "NLC", [B, N, D].
            intermediates_only: return the list alone, without the final tokens.
            output_dict: return a dictionary with "image_intermediates", "image_intermediates_prefix" and
                "image_features" instead.

        Returns:
            (final tokens [B, R+N, D], list of maps), or as the arguments say.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: {output_fmt!r} is not known; accepted: 'NCHW', 'NLC'")
        taken = block_indices(len(self.blocks), indices)
        size = x.shape[2:]
        rotary = self._rotary(size, x.device)
        x = self._embed(x)
        rows, columns = self.patch_embed.dynamic_feat_size(size)
        if output_fmt == "NCHW" and x.shape[1] != self.num_prefix_tokens + rows * columns:
            raise ValueError(f"output_fmt: 'NCHW' needs all of {rows} x {columns} patches and no other; use 'NLC'")
        maps: list[Tensor] = []
        for index, block in enumerate(list(self.blocks)[: max(taken) + 1 if stop_early else None]):
            x = self._run_block(index, block, x, attn_mask, is_causal, **rotary)
            if index in taken:
                maps.append(self.norm(self._leave_residual(x)) if norm else x)

        prefix_tokens = [tokens[:, : self.num_prefix_tokens] for tokens in maps]
        maps = [tokens[:, self.num_prefix_tokens :] for tokens in maps]
        if output_fmt == "NCHW":
            # Not by unflatten, which torch.compile can't trace where a default device is set.
            grids = [tokens.reshape(len(tokens), rows, columns, tokens.shape[2]) for tokens in maps]
            maps = [grid.permute(0, 3, 1, 2).contiguous() for grid in grids]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        final = None if intermediates_only else self.norm(self._leave_residual(x))
        if output_dict:
            named = {"image_intermediates_prefix": prefix_tokens if with_prefix else None, "image_features": final}
            return {"image_intermediates": maps, **{name: value for name, value in named.items() if value is not None}}
        found = list(zip(maps, prefix_tokens, strict=True)) if with_prefix else maps
        return found if intermediates_only else (final, found)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """The maps of :meth:`forward_intermediates` under DINO's name and arguments."""
        options: dict[str, Any] = {"output_fmt": "NCHW" if reshape else "NLC", "intermediates_only": True}
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, attn_mask=attn_mask, **options)

    def get_attention_maps(self, x: Tensor, indices: int | Sequence[int] | None = None) -> list[Tensor]:
        """The softmax weights of the blocks' attention, computed in the open beside the fused call.

        Args:
            x: [B, C, H, W].
            indices: the last so many blocks, these blocks (negative: from the end), or None for all.

        Returns:
            One [B, heads, T, T] float tensor a block, T = R+N: row i holds what token i looks at and sums to one.
        """
        taken = block_indices(len(self.blocks), indices)
        rotary = self._rotary(x.shape[2:], x.device)
        x = self._embed(x)
        maps: list[Tensor] = []
        block: Any
        for index, block in enumerate(list(self.blocks)[: max(taken) + 1]):
            if index in taken:
                maps.append(block.attn.attention_map(block.norm1(self._leave_residual(x)), **rotary))
            if index < max(taken):
                x = block(x, **rotary)
        return maps


@torch.fx.wrap
def _placed(
    x: Tensor, cls_token: Tensor | None, reg_token: Tensor | None, table: Tensor | None, no_embed_class: bool
) -> Tensor:
    """[B, N, D] to [B, R+N, D], by torch's additions, which take more forms of tables than a fused call. One step to
    torch.fx."""
    prefix = [rows.expand(x.shape[0], -1, -1) for rows in (cls_token, reg_token) if rows is not None]
    x = _positioned(x, table) if no_embed_class else x
    x = torch.cat([*prefix, x], dim=1) if prefix else x
    return x if no_embed_class else _positioned(x, table)


def _positioned(x: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return x
    check_tensor("pos_embed", table)
    fits = table.dim() < 2 or table.shape[-2] in (1, x.shape[1])
    require(fits, f"pos_embed: shape {shape_of(table)} does not fit {x.shape[1]} tokens")
    return x + table
