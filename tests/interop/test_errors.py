"""What can't be accelerated says why, in one line, and stays as it was; what the library refuses it still refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.interop import Unsupported
from fastvit.interop.host import normalised
from tests.interop.subjects import LIBRARIES, MEAN, STD, build, entry, expect_close, launched, pair, raw_images
from tests.interop.zoo import SIZE, tensors
from tests.libraries import peer

TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 1,
    "num_heads": 3,
    "num_classes": 5,
}


def snapshot(model: nn.Module) -> list[tuple[type, dict[str, Any]]]:
    return [(type(module), dict(module.__dict__)) for module in model.modules()]


def expect_refused(model: nn.Module, error: type[Exception], message: str, **arguments: Any) -> None:
    """An error of one line, and a model that is as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=message) as raised:
        fastvit.accelerate(model, **arguments)
    assert "\n" not in str(raised.value)
    assert snapshot(model) == before


def hybrid() -> nn.Module:
    return peer("timm").create_model("vit_tiny_r_s16_p8_224", img_size=64, embed_dim=48, depth=1, num_heads=3)


def overlapping() -> nn.Module:
    model = peer("timm").create_model("vit_tiny_patch16_224", **TINY)
    model.patch_embed.proj = nn.Conv2d(3, 48, 8, stride=4)
    return model


def convolutional_stem() -> nn.Module:
    vit = peer("torchvision.models.vision_transformer")
    stem = [vit.ConvStemConfig(16, 3, 2)] * 3
    return vit.VisionTransformer(SIZE, 8, 1, 3, 48, 96, conv_stem_configs=stem)


def timm_model(name: str) -> Callable[[], nn.Module]:
    """A model of timm in its full size, without memory."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return peer("timm").create_model(name)

    return build


def first_convolution(model: str, path: str, kernel: int, stride: int) -> str:
    return (
        f"no patch embedding that is known was found in this {model}: its first convolution, {path}, has kernel "
        rf"\({kernel}, {kernel}\) and stride \({stride}, {stride}\): its patches overlap; accepted: models of timm"
    )


def replaced_forward() -> nn.Module:
    model = build("torchvision-vit")
    model.forward = model.forward
    return model


def our_own() -> nn.Module:
    return nn.Sequential(fastvit.VisionTransformer(**TINY))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (hybrid, "patch_embed is a HybridEmbed: its tokens come from a network of its own"),
        (overlapping, r"proj has kernel \(8, 8\) and stride \(4, 4\): its patches overlap"),
        (convolutional_stem, "conv_proj is a convolutional stem"),
        (timm_model("pvt_v2_b0"), first_convolution("PyramidVisionTransformerV2", "patch_embed.proj", 7, 4)),
        (timm_model("mvitv2_tiny"), first_convolution("MultiScaleVit", "patch_embed.proj", 7, 4)),
        (timm_model("pit_ti_224"), first_convolution("PoolingVisionTransformer", "patch_embed.conv", 16, 8)),
        (timm_model("efficientformer_l1"), first_convolution("EfficientFormer", "stem.conv1", 3, 2)),
        (timm_model("levit_128s"), first_convolution("LevitDistilled", "stem.conv1.linear", 3, 2)),
        (timm_model("visformer_tiny"), "patch_embed1 .*: proj takes feature maps, not images: 16 channels in patches"),
        (lambda: nn.Conv2d(3, 4, 1, stride=2), "in this Conv2d: its first convolution, the model, has .* lie apart"),
        (replaced_forward, "its forward was replaced on the module itself"),
        (our_own, "VisionTransformer is FastViT's own and fused already"),
        (lambda: nn.Linear(3, 4), "no patch embedding that is known was found in this Linear"),
    ],
)
def test_model_that_is_not_for_us(model: Callable[[], nn.Module], reason: str):
    expect_refused(model(), Unsupported, f"^model: .*{reason}")


@pytest.mark.parametrize("function", [fastvit.accelerate, fastvit.restore, fastvit.report])
@pytest.mark.parametrize("value", [3, None, nn.Linear])
def test_no_module(function, value):
    with pytest.raises(TypeError, match="^model: expected a torch.nn.Module, got"):
        function(value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mean": MEAN}, ValueError, "mean, std: give both or neither"),
        ({"std": STD}, ValueError, "mean, std: give both or neither"),
        ({"mean": MEAN[:2], "std": STD[:2]}, ValueError, "mean: 2 values, expected 3"),
        ({"mean": MEAN, "std": (0.0, 1.0, 1.0)}, ValueError, "std: .* must be greater than zero"),
        ({"mean": (float("nan"), 0.0, 0.0), "std": STD}, ValueError, "mean: .* must be finite"),
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, ValueError, r"mean: .*0\.\.1 scale"),
        ({"mean": "imagenet", "std": STD}, TypeError, "mean: expected 3 floats"),
        ({"backend": "xla"}, ValueError, "backend: unknown backend 'xla'; known: reference, cpu"),
        (
            {"residual_dtype": torch.int8},
            ValueError,
            "residual_dtype: torch.int8 is not known; accepted",
        ),
    ],
)
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("accelerated", [False, True])
def test_bad_arguments(name, arguments, error, message, accelerated):
    """Also where the model is accelerated already, with arguments that stay."""
    model = build(name)
    if accelerated:
        fastvit.accelerate(model, mean=MEAN, std=STD)
    expect_refused(model, error, message, **arguments)


def test_raw_images_where_patches_come_cut():
    model = build("transformers-siglip2")
    expect_refused(model, Unsupported, "embeddings takes no raw uint8 images: its processor", mean=MEAN, std=STD)


def test_raw_images_where_the_loss_compares_with_them():
    vit = peer("transformers.models.vit.modeling_vit")
    config = vit.ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, encoder_stride=8
    )
    model = vit.ViTForMaskedImageModeling(config).eval()
    untouched = copy.deepcopy(model)
    fastvit.accelerate(model, mean=MEAN, std=STD)
    images = entry("timm-vit").images()
    mask = torch.arange(16)[None].expand(2, -1) % 3 == 0
    want = untouched(pixel_values=images, bool_masked_pos=mask)
    got = model(pixel_values=images, bool_masked_pos=mask)
    expect_close([got.loss, got.reconstruction], [want.loss, want.reconstruction])
    want = untouched(pixel_values=normalised(raw_images(), MEAN, STD), bool_masked_pos=mask)
    for raw in (raw_images(), raw_images().permute(0, 2, 3, 1)):
        got = model(pixel_values=raw, bool_masked_pos=mask)
        expect_close([got.loss, got.reconstruction], [want.loss, want.reconstruction])
    assert launched() == 0


def wrapped_forward(model: nn.Module) -> None:
    """As tools do that put autocast or a compiler around a model."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def test_raw_images_where_the_forward_before_the_embeddings_was_replaced():
    """The library's forward inside casts pixels to floats."""
    model, untouched = build("transformers-dinov2").base_model, build("transformers-dinov2").base_model
    wrapped_forward(model)
    fastvit.accelerate(model, mean=MEAN, std=STD)
    expect_close(tensors(model(raw_images())), tensors(untouched(normalised(raw_images(), MEAN, STD))))


@pytest.mark.parametrize("name", ["timm-vit", "transformers-vit"])
def test_replaced_forward_that_calls_what_changes(name):
    model, untouched = build(name), build(name)
    wrapped_forward(model)
    fastvit.accelerate(model, mean=MEAN, std=STD)
    assert not fastvit.report(model).refusals
    expect_close(
        entry(name).outputs(model, raw_images()), entry(name).outputs(untouched, normalised(raw_images(), MEAN, STD))
    )
    assert launched() == 1


def test_subclass_with_features_of_its_own():
    """Its patch embedding alone is accelerated, and the report says why."""
    timm: Any = peer("timm.models.vision_transformer")

    class Mine(timm.VisionTransformer):
        def forward_features(self, x: Tensor, **options: Any) -> Tensor:
            return 2 * super().forward_features(x, **options)

    untouched = Mine(**TINY).eval()
    model = fastvit.accelerate(copy.deepcopy(untouched))
    report = fastvit.report(model)
    assert [change.path for change in report.changes] == ["patch_embed"]
    assert [(refusal.path, refusal.reason) for refusal in report.refusals] == [
        ("", "Mine has a forward_features of its own")
    ]
    assert "Mine has a forward_features of its own" in str(report)
    expect_close([model(entry("timm-vit").images())], [untouched(entry("timm-vit").images())])
    assert launched() == 1


INNER = {
    "timm-vit": "patch_embed",
    "torchvision-vit": "encoder",
    "transformers-vit": "vit.embeddings.patch_embeddings",
}


@pytest.mark.parametrize("name", INNER)
def test_subclass_inside_with_a_forward_of_its_own(name):
    """What one call would pass over is not what the library does."""
    model = build(name)
    inner = model.get_submodule(INNER[name])
    base: Any = type(inner)

    class Mine(base):
        def forward(self, *args: Any, **options: Any) -> Any:
            return 2 * super().forward(*args, **options)

    inner.__class__ = Mine
    expect_refused(model, Unsupported, "the Mine in it has a forward of its own")


def test_unchanged_subclass_is_accelerated_whole():
    timm: Any = peer("timm.models.vision_transformer")

    class Mine(timm.VisionTransformer):
        def loss(self, images: Tensor) -> Tensor:
            return self(images).sum()

    untouched = Mine(**TINY).eval()
    model = fastvit.accelerate(copy.deepcopy(untouched))
    assert isinstance(model, Mine) and [change.path for change in fastvit.report(model).changes] == [""]
    expect_close([model.loss(entry("timm-vit").images())], [untouched.loss(entry("timm-vit").images())])
    assert launched() == 1


BAD_IMAGES = {
    "taller": torch.randn(2, 3, 40, 32),
    "no whole patch": torch.randn(2, 3, 33, 32),
    "smaller": torch.randn(2, 3, 24, 24),
    "smaller than a patch": torch.randn(2, 3, 3, 32),
    "one channel": torch.randn(2, 1, 32, 32),
    "four channels": torch.randn(2, 4, 32, 32),
    "no batch": torch.randn(3, 32, 32),
    "integers": torch.ones(2, 3, 32, 32, dtype=torch.int64),
    "uint8 without mean": raw_images(),
    "five dimensions": torch.randn(2, 3, 1, 32, 32),
}


def message_of(model: nn.Module, images: Any) -> tuple[str, str]:
    try:
        model(images)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    "name",
    [
        *LIBRARIES,
        "transformers-dinov2",
        "timm-dinov3",
        "timm-twins-svt",
        "transformers-clip",
        "timm-naflexvit-conv",
        "timm-naflexvit-linear",
    ],
)
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_get_the_library_s_own_error(name, kind):
    model, untouched = pair(name)
    want = message_of(untouched, BAD_IMAGES[kind])
    assert message_of(model, BAD_IMAGES[kind]) == want
    if name in ("timm-vit", "torchvision-vit") and kind != "no batch":
        assert want[0]  # transformers casts, and some models take any size


@pytest.mark.parametrize("name", LIBRARIES)
def test_raw_images_of_a_bad_shape(name):
    """The library's error about the floats they would have become."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    for shape in ((2, 3, 40, 32), (2, 4, 32, 32)):
        raw = torch.randint(0, 256, shape, dtype=torch.uint8)
        got, want = message_of(model, raw), message_of(untouched, torch.randn(shape))
        assert got[0] and (got == want or shape[1] == 4)


def test_torch_script_says_what_to_do():
    model, _ = pair("timm-vit")
    with pytest.raises(RuntimeError, match="can't compile an accelerated VisionTransformer: call fastvit.restore"):
        torch.jit.script(model)


def test_second_derivatives_are_the_librarys():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def penalty(model: Any) -> Tensor:
        images = entry("timm-vit").images().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), model.patch_embed.proj.weight)[0]

    model, untouched = pair("timm-vit")
    expect_close([penalty(model)], [penalty(untouched)], 1e-4)
