"""Tiny models of every supported class, with random weights everywhere, and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.peers import import_peer

SIZE = 32  # pixels
PATCH = 8
WIDTH = 48
HEADS = 3
CLASSES = 5

Size = tuple[int, int]  # height, width
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Entry:
    """One class in one setting."""

    library: str
    name: str
    setting: str  # in words, which no other of its library has
    build: Build
    call: Callable[[nn.Module, Tensor], Any] = lambda model, images: model(images)
    channels: int = 3
    sizes: tuple[Size, ...] = ((SIZE, SIZE),)
    uint8: bool = True  # whether it takes raw pixels

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"

    def model(self) -> nn.Module:
        """A fresh model with random weights, in eval mode.

        Raises:
            ImportError: the library is not here, or is of a version without this class.
        """
        torch.manual_seed(0)
        model = self.build().eval()
        randomise(model)
        return model

    def images(self, size: Size | None = None, batch: int = 2) -> Tensor:
        """Normalised floats, [B, C, H, W]."""
        generator = torch.Generator().manual_seed(1)
        height, width = size or self.sizes[0]
        return torch.randn(batch, self.channels, height, width, generator=generator)

    def outputs(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Every float tensor the model returns."""
        torch.manual_seed(2)  # masks and dropout
        return tensors(self.call(model, images))


def randomise(model: nn.Module) -> None:
    """Random numbers in place of zeros and ones, which would hide faults."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.std(correction=0)) < 1e-3:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def tensors(value: Any) -> list[Tensor]:
    """The float tensors inside tuples, dictionaries and outputs of transformers, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


# timm


def _timm(name: str = "vit_tiny_patch16_224", **options: Any) -> Build:
    """A model by timm's name for it, made tiny."""
    arguments = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS}

    def build() -> nn.Module:
        timm: Any = import_peer("timm")
        if not timm.is_model(name):
            raise ImportError(f"timm {timm.__version__} has no {name}")
        return timm.create_model(name, **{**arguments, "num_classes": CLASSES, **options})

    return build


def _timm_class(path: str, **options: Any) -> Build:
    """A model by its class, for those that take other arguments than a Vision Transformer."""
    module, _, name = path.rpartition(".")
    arguments = {"img_size": SIZE, "num_classes": CLASSES}
    return lambda: getattr(import_peer(f"timm.models.{module}"), name)(**{**arguments, **options})


def _naflex(**options: Any) -> Build:
    arguments = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "reg_tokens": 2}

    def build() -> nn.Module:
        module: Any = import_peer("timm.models.naflexvit")
        config = module.NaFlexVitCfg(**{**arguments, "pos_embed_grid_size": (4, 4), **options})
        return module.NaFlexVit(config, num_classes=CLASSES)

    return build


def _entries_of_timm() -> list[Entry]:
    sizes = ((SIZE, SIZE), (SIZE + 16, SIZE), (SIZE, SIZE + 24))
    entries: list[Entry] = []

    def add(name: str, setting: str, build: Build, **more: Any) -> None:
        entries.append(Entry("timm", name, setting, build, **more))

    add("vit", "ViT", _timm())
    add("vit-avg", "ViT, no class token, mean of the patches", _timm(global_pool="avg", class_token=False))
    add("vit-map", "ViT, no class token, attention pooling", _timm(global_pool="map", class_token=False))
    add("vit-registers", "ViT, 4 register tokens", _timm(reg_tokens=4))
    add("vit-no-embed-class", "ViT, positions for patches alone", _timm(reg_tokens=2, no_embed_class=True))
    add("vit-rectangle", "ViT, rectangular patches", _timm(img_size=(32, 24), patch_size=(8, 4)), sizes=((32, 24),))
    add("vit-dynamic-size", "ViT, any size", _timm(dynamic_img_size=True, reg_tokens=1), sizes=sizes)
    padded = _timm(dynamic_img_size=True, dynamic_img_pad=True)
    add("vit-dynamic-size-pad", "ViT, any size, padded", padded, sizes=((SIZE, SIZE), (37, 45)))
    add("vit-no-positions", "ViT, no positions", _timm(pos_embed="none"))
    add("vit-pre-norm", "ViT, norm before the blocks, no bias", _timm(pre_norm=True))
    add("vit-patch-dropout", "ViT, patch and position dropout", _timm(patch_drop_rate=0.5, pos_drop_rate=0.1))
    add("vit-one-channel", "ViT, one channel", _timm(in_chans=1), channels=1)
    add("deit", "DeiT", _timm("deit_tiny_patch16_224"))
    add("deit-distilled", "DeiT, distilled", _timm("deit_tiny_distilled_patch16_224"))
    add("deit3", "DeiT III", _timm("deit3_small_patch16_224"))
    add("flexivit", "FlexiViT", _timm("flexivit_small"))
    add("dinov2", "DINOv2", _timm("vit_small_patch14_dinov2"))
    add("dinov2-registers", "DINOv2, registers", _timm("vit_small_patch14_reg4_dinov2"))
    add("clip-vision", "CLIP's tower", _timm("vit_base_patch16_clip_224"))
    add("clip-quickgelu-vision", "CLIP's tower, QuickGELU", _timm("vit_base_patch16_clip_quickgelu_224"))
    add("siglip-vision", "SigLIP's tower", _timm("vit_base_patch16_siglip_224"))
    add("eva02", "EVA-02", _timm("eva02_tiny_patch14_224"))
    add("eva-patch-dropout", "EVA-02, patch dropout", _timm("eva02_tiny_patch14_224", patch_drop_rate=0.5))
    add("eva-dynamic-size", "EVA-02, any size", _timm("eva02_tiny_patch14_224", dynamic_img_size=True), sizes=sizes)
    add("dinov3", "DINOv3", _timm("vit_small_patch16_dinov3"))
    add("pe-core", "PE core", _timm("vit_pe_core_tiny_patch16_384"))
    add("vit-rope-mixed", "ViT, mixed rotary positions", _timm("vit_small_patch16_rope_mixed_224"))
    add("beit", "BEiT", _timm("beit_base_patch16_224"))
    add("beit-positions", "BEiT, absolute positions too", _timm("beit_base_patch16_224", use_abs_pos_emb=True))
    convolution = _naflex(embed_proj_type="conv")
    add("naflexvit-conv", "NaFlexViT, a convolution as projection", convolution, sizes=(*sizes, (37, 45)))
    factorized = _naflex(pos_embed="factorized")
    add("naflexvit-factorized", "NaFlexViT, positions by row and column", factorized, sizes=sizes)
    linear = _naflex(embed_proj_type="linear")
    add("naflexvit-linear", "NaFlexViT, linear projection", linear, sizes=sizes)
    add("naflexvit-patches", "NaFlexViT, patches of several shapes", linear, call=_call_naflex, uint8=False)
    return entries + _entries_with_projection_of_timm()


def _entries_with_projection_of_timm() -> list[Entry]:
    """Models that have timm's patch embedding, and a way of their own behind it."""
    tiny = {"patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS}
    swin = {"window_size": 2, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 3)}
    twins = {"embed_dims": (24, 48), "depths": (1, 2), "num_heads": (2, 3), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}
    mixer = {"patch_size": PATCH, "embed_dim": WIDTH, "num_blocks": 2}
    nest = {"patch_size": 4, "num_levels": 2, "embed_dims": (24, 48), "num_heads": (2, 3), "depths": (1, 1)}
    relative = _timm_class("vision_transformer_relpos.VisionTransformerRelPos", depth=2, **tiny)
    sam = _timm_class("vision_transformer_sam.VisionTransformerSAM", depth=2, neck_chans=16, **tiny)
    convit = _timm_class("convit.ConVit", depth=2, local_up_to_layer=1, **{**tiny, "embed_dim": 16})
    found = {
        "vit-patch-norm": ("ViT, norm behind the projection", _timm(embed_norm_layer=nn.LayerNorm)),
        "vit-relpos": ("ViT, relative positions", relative),
        "sam-vision": ("SAM's tower", sam),
        "cait": ("CaiT", _timm_class("cait.Cait", depth=1, **tiny)),
        "convit": ("ConViT", convit),
        "swin": ("Swin", _timm_class("swin_transformer.SwinTransformer", **swin)),
        "swinv2": ("Swin V2", _timm_class("swin_transformer_v2.SwinTransformerV2", **swin)),
        "nest": ("NesT", _timm_class("nest.Nest", **nest)),
        "mixer": ("MLP-Mixer", _timm_class("mlp_mixer.MlpMixer", **mixer)),
    }
    entries = [Entry("timm", name, setting, build) for name, (setting, build) in found.items()]
    any_size = ((SIZE, SIZE), (37, 45))
    for name, setting, wss in (("twins-pcpvt", "Twins-PCPVT", None), ("twins-svt", "Twins-SVT", (4, 2))):
        entries.append(Entry("timm", name, setting, _timm_class("twins.Twins", wss=wss, **twins), sizes=any_size))
    return entries


# torchvision


def _torchvision(**options: Any) -> Build:
    def build() -> nn.Module:
        vit: Any = import_peer("torchvision.models.vision_transformer")
        return vit.VisionTransformer(SIZE, PATCH, 2, HEADS, WIDTH, 96, num_classes=CLASSES, **options)

    return build


def _entries_of_torchvision() -> list[Entry]:
    return [
        Entry("torchvision", "vit", "ViT, dropout", _torchvision(dropout=0.1)),
        Entry(
            "torchvision", "vit-representation", "ViT, a layer before the head", _torchvision(representation_size=24)
        ),
    ]


# transformers


TINY_TOWER = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "attn_implementation": "sdpa",
}


def _found(module: str, name: str) -> Any:
    """A class of transformers, by the name of its folder."""
    path = f"transformers.models.{module}"
    found = getattr(import_peer(path), name, None)
    if found is None:
        raise ImportError(f"{path} of this version has no {name}")
    return found


def _transformers(module: str, config: str, model: str, **options: Any) -> Build:
    return lambda: _found(module, model)(_found(module, config)(**{**TINY_TOWER, **options}))


def _clip_with_both_towers() -> nn.Module:
    text = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "max_position_embeddings": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = _found("clip", "CLIPConfig")(text_config=text | ends, vision_config=TINY_TOWER, projection_dim=16)
    return _found("clip", "CLIPModel")(config)


def _call_with_text(model: nn.Module, images: Tensor) -> Any:
    words = torch.tensor([[0, 5, 7, 1]]).expand(images.shape[0], -1)
    return model(input_ids=words, pixel_values=images)


def _call_interpolated(model: nn.Module, images: Tensor) -> Any:
    return model(pixel_values=images, interpolate_pos_encoding=True)


def _cut(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [B, N, P·P·C] as processors cut them, rows and columns of each sample, which every one but the first has
    fewer of, and which patches these are."""
    batch, channels, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    patches = images.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.tensor([[rows, columns], *([[rows - 1, columns]] * (batch - 1))])
    mask = torch.arange(rows * columns)[None] < shapes.prod(1)[:, None]
    return patches.reshape(batch, rows * columns, -1), shapes, mask


def _call_siglip2(model: nn.Module, images: Tensor) -> Any:
    patches, shapes, mask = _cut(images)
    return model(pixel_values=patches, pixel_attention_mask=mask.long(), spatial_shapes=shapes)


def _size(images: Tensor) -> Size:
    """Of images in either layout."""
    height, width = images.shape[2:] if images.shape[1] == 3 else images.shape[1:3]
    return height, width


def _call_with_mask(model: nn.Module, images: Tensor) -> Any:
    """A padded batch, with a mask of each image's own patches."""
    height, width = _size(images)
    mask = torch.ones(images.shape[0], height // PATCH, width // PATCH, dtype=torch.bool)
    mask[1:, -1] = False
    mask[2:, :, -1:] = False
    return model(images, patch_attention_mask=mask)


def _call_with_sizes(model: nn.Module, images: Tensor) -> Any:
    """A padded batch, with the size of each image."""
    sizes = torch.tensor([_size(images)] * images.shape[0])
    sizes[1:, 1] -= PATCH
    sizes[2:, 0] -= PATCH
    return model(images, image_sizes=sizes)


def _call_kimi(model: nn.Module, images: Tensor) -> Any:
    batch, channels, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    cut = images.reshape(batch, channels, rows, PATCH, columns, PATCH)
    patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # [N, C, P, P]
    return model(patches, grid_thw=_grids(batch, rows, columns))


def _grids(batch: int, rows: int, columns: int) -> Tensor:
    """Frames, rows and columns: the last image has another shape, and of three the first two are a clip."""
    frames = [1] * batch if batch < 3 else [2] + [1] * (batch - 2)
    grids = [[count, rows, columns] for count in frames]
    grids[-1] = [1, 2, rows * columns // 2]
    return torch.tensor(grids)


def _call_qwen(model: nn.Module, images: Tensor) -> Any:
    """Its patches: both frames the same, in blocks of two rows and columns, which are merged behind the tower."""
    batch, channels, height, width = images.shape
    rows, columns = height // PATCH, width // PATCH
    frames = images[:, None].expand(-1, 2, -1, -1, -1)
    cut = frames.reshape(batch, 2, channels, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(batch * rows * columns, -1)  # [N, C·T·P·P]
    return model(patches, grid_thw=_grids(batch, rows, columns))


def _call_naflex(model: nn.Module, images: Tensor) -> Any:
    patches, shapes, mask = _cut(images)
    numbers = torch.arange(patches.shape[1])[None]
    coordinates = torch.stack([numbers // shapes[:, 1:], numbers % shapes[:, 1:]], -1) * mask[..., None]
    return model({"patches": patches, "patch_coord": coordinates, "patch_valid": mask})


def _entries_of_transformers() -> list[Entry]:
    sizes = ((SIZE, SIZE), (SIZE + 16, SIZE))
    odd_sizes = (*sizes, (37, 45))
    free = {"call": _call_interpolated, "sizes": sizes}
    dropout = {"hidden_dropout_prob": 0.1}  # none is these libraries' default
    entries: list[Entry] = []

    def add(name: str, setting: str, build: Build, **more: Any) -> None:
        entries.append(Entry("transformers", name, setting, build, **more))

    def tower(family: str, config: str, model: str, **options: Any) -> Build:
        return _transformers(family, config, model, **options)

    add("vit", "ViT classifier", tower("vit", "ViTConfig", "ViTForImageClassification", num_labels=CLASSES))
    add("vit-interpolated", "ViT, any size", tower("vit", "ViTConfig", "ViTModel", **dropout), **free)
    teacher = tower("deit", "DeiTConfig", "DeiTForImageClassificationWithTeacher", num_labels=CLASSES)
    add("deit", "DeiT, distilled classifier", teacher)
    add("deit-interpolated", "DeiT, any size", tower("deit", "DeiTConfig", "DeiTModel", **dropout), **free)
    dinov2 = tower("dinov2", "Dinov2Config", "Dinov2ForImageClassification", num_labels=CLASSES, **dropout)
    add("dinov2", "DINOv2 classifier", dinov2, sizes=odd_sizes)
    backbone = tower("dinov2", "Dinov2Config", "Dinov2Backbone", out_features=["stage1", "stage2"])
    add("dinov2-backbone", "DINOv2, feature maps", backbone, sizes=sizes)
    with_registers = tower("dinov2_with_registers", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", **dropout)
    add("dinov2-registers", "DINOv2, registers", with_registers, sizes=sizes)
    dinov3 = tower("dinov3_vit", "DINOv3ViTConfig", "DINOv3ViTModel", num_register_tokens=4)
    add("dinov3", "DINOv3", dinov3, sizes=sizes)
    decoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    add("vit-mae", "MAE with decoder and loss", tower("vit_mae", "ViTMAEConfig", "ViTMAEForPreTraining", **decoder))
    add("vit-mae-encoder", "MAE, any size", tower("vit_mae", "ViTMAEConfig", "ViTMAEModel"), **free)
    add("siglip", "SigLIP's tower", tower("siglip", "SiglipVisionConfig", "SiglipVisionModel"))
    add(
        "siglip-interpolated",
        "SigLIP's tower, any size",
        tower("siglip", "SiglipVisionConfig", "SiglipVisionModel"),
        **free,
    )
    projected = tower("clip", "CLIPVisionConfig", "CLIPVisionModelWithProjection", projection_dim=16)
    add("clip", "CLIP's tower, projected", projected)
    add("clip-interpolated", "CLIP's tower, any size", tower("clip", "CLIPVisionConfig", "CLIPVisionModel"), **free)
    add("clip-with-text", "CLIP, both towers", _clip_with_both_towers, call=_call_with_text)
    relative = tower("beit", "BeitConfig", "BeitModel", use_relative_position_bias=True)
    add("beit", "BEiT, relative positions", relative, sizes=sizes)
    absolute = tower("beit", "BeitConfig", "BeitModel", use_absolute_position_embeddings=True, **dropout)
    add("beit-positions", "BEiT, absolute positions", absolute)
    add("data2vec-vision", "Data2Vec", tower("data2vec", "Data2VecVisionConfig", "Data2VecVisionModel"), sizes=sizes)
    siglip2 = tower("siglip2", "Siglip2VisionConfig", "Siglip2VisionModel", num_patches=16)
    add("siglip2", "SigLIP 2, images of several shapes", siglip2, call=_call_siglip2, uint8=False)
    idefics3 = tower("idefics3", "Idefics3VisionConfig", "Idefics3VisionTransformer")
    add("idefics3", "Idefics 3's tower", idefics3, call=_call_with_mask, sizes=odd_sizes)
    smolvlm = tower("smolvlm", "SmolVLMVisionConfig", "SmolVLMVisionTransformer")
    add("smolvlm", "SmolVLM's tower, images of one shape", smolvlm, sizes=odd_sizes)
    pixtral = tower("pixtral", "PixtralVisionConfig", "PixtralVisionModel")
    add("pixtral", "Pixtral's tower", pixtral, call=_call_with_sizes, sizes=odd_sizes)
    add("pixtral-whole", "Pixtral's tower, images of one shape", pixtral, sizes=odd_sizes)
    kimi = tower(
        "kimi_k25.modeling_kimi_k25", "Kimi_K25VisionConfig", "Kimi_K25VisionModel", pos_emb_height=6, pos_emb_width=6
    )
    add("kimi-k2.5", "Kimi K2.5's tower", kimi, call=_call_kimi, sizes=sizes, uint8=False)
    cut = {"call": _call_qwen, "sizes": sizes, "uint8": False}
    narrow = {"depth": 2, "num_heads": HEADS, "hidden_size": WIDTH, "out_hidden_size": 32, "window_size": 2 * PATCH}
    qwen2 = tower(
        "qwen2_vl.modeling_qwen2_vl",
        "Qwen2VLVisionConfig",
        "Qwen2VisionTransformerPretrainedModel",
        **narrow,
        embed_dim=WIDTH,
    )
    add("qwen2-vl", "Qwen2-VL's tower", qwen2, **cut)
    qwen25 = {"config": "Qwen2_5_VLVisionConfig", "model": "Qwen2_5_VisionTransformerPretrainedModel"}
    add("qwen2.5-vl", "Qwen2.5-VL's tower", tower("qwen2_5_vl", **qwen25, **narrow, fullatt_block_indexes=[1]), **cut)
    of_positions = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
    add(
        "qwen3-vl",
        "Qwen3-VL's tower",
        tower("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionModel", **narrow, **of_positions),
        **cut,
    )
    return entries


ENTRIES = [*_entries_of_timm(), *_entries_of_torchvision(), *_entries_of_transformers()]
