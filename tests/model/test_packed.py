"""Lists of images of any sizes: each has the result, and gives the gradients, that it would alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fastvit
from fastvit import stream
from fastvit.backend import launch_counts, why_unavailable
from fastvit.model import packed
from fastvit.model.layers import Attention, Block, DropPath, GluMlp, LayerNorm

SIZES = [(32, 48), (16, 16), (48, 32), (32, 48), (64, 32), (16, 80)]


@pytest.fixture(params=["modules", "ops"], autouse=True)
def by_ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether blocks run by the trunk's ops, as they do where there are more tokens."""
    if request.param == "ops":
        if reason := why_unavailable("native", "cpu"):
            pytest.skip(f"without the library for the processor no model runs by ops here: {reason}")
        monkeypatch.setattr(stream, "LEAST_ON_A_CPU", 0)
    return request.param == "ops"


def make(**options: Any) -> fastvit.VisionTransformer:
    torch.manual_seed(0)
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    model = fastvit.VisionTransformer(**{**small, "dynamic_img_size": True, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # of no scale that hides an error
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() < 2 else 0.15))
    return model


def images(uint8: bool = False, sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    if uint8:
        return [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    return [torch.randn(3, *size) for size in sizes]


def gradients(model: nn.Module, out: Tensor, grad: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(out, parameters, grad, allow_unused=True)
    return [torch.zeros(1) if each is None else each for each in found]


def hold(model: fastvit.VisionTransformer, given: list[Tensor]) -> None:
    """One packed sequence against the images one by one."""
    alone = torch.cat([model(image[None]) for image in given])
    at_once = model(given)
    torch.testing.assert_close(at_once, alone, rtol=1e-5, atol=2e-5)
    grad = torch.randn_like(alone)
    for ours, theirs in zip(gradients(model, at_once, grad), gradients(model, alone, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()) + 1e-7)


VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"global_pool": "avg", "class_token": False},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 2, "pool_include_prefix": True, "global_pool": "avgmax"},
    "sines and cosines": {"pos_embed": "sincos"},
    "rotary positions": {"pos_embed": "rotary", "reg_tokens": 2, "qk_norm": True},
    "no positions": {"pos_embed": "", "class_token": False, "global_pool": "max"},
    "norms everywhere": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "pre_norm": True},
    "LayerScale, SwiGLU": {"init_values": 0.1, "mlp_layer": GluMlp},
    "norm between projection and position": {"embed_norm_layer": nn.LayerNorm},
    "padded images": {"dynamic_img_pad": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_image_has_the_result_that_it_has_alone(name: str) -> None:
    sizes = [(30, 48), (17, 16), *SIZES] if name == "padded images" else SIZES
    hold(make(**VARIANTS[name]), images(sizes=sizes))


@pytest.mark.parametrize("options", [{}, {"dynamic_img_pad": True}, {"copy_images": True}])
def test_raw_images(options: dict[str, Any]) -> None:
    sizes = [*SIZES, (33, 20)] if "dynamic_img_pad" in options else SIZES
    hold(make(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), **options), images(uint8=True, sizes=sizes))


def test_the_embedding_is_one_call() -> None:
    before = launch_counts()
    make()(images())
    made = {key: count - before.get(key, 0) for key, count in launch_counts().items() if "patch_embed" in key[0]}
    assert [op for (op, _), count in made.items() if count] == ["patch_embed_packed"] and sum(made.values()) == 1


def test_the_blocks_are_run_by_the_ops(by_ops: bool) -> None:
    """One call for all images of what they are: additions with the norms behind them, and gradients of heads."""
    model = make(drop_path_rate=0.1)
    before = launch_counts()
    model(images()).sum().backward()
    made = {op: count - before.get((op, "native"), 0) for (op, _), count in launch_counts().items()}
    expected = {"add_norm": 4, "add_norm_backward": 4, "split_heads_backward": 2, "bias_act": 2}
    assert {op: made.get(op, 0) for op in expected} == (expected if by_ops else dict.fromkeys(expected, 0))


def _hooked(model: fastvit.VisionTransformer) -> None:
    model.patch_embed.register_forward_hook(lambda _, __, out: 2 * out)
    model.blocks[0].attn.register_forward_hook(lambda _, __, out: out + 1)
    model.blocks[1].register_forward_hook(lambda _, __, out: out - 1)


class OwnBlock(Block):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x, **options) + x.mean(1, keepdim=True)


class AcrossTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(1, keepdim=True)


def _own_block(model: fastvit.VisionTransformer) -> None:
    model.blocks[1].__class__ = OwnBlock


def _parts_across_tokens(model: fastvit.VisionTransformer) -> None:
    model.blocks[0].norm1 = model.blocks[1].mlp.act = model.norm = AcrossTokens()


def _drops_across_tokens(model: fastvit.VisionTransformer) -> None:
    model.pos_drop = model.patch_drop = model.norm_pre = AcrossTokens()


def _hooks_that_count_on_batches(model: fastvit.VisionTransformer) -> None:
    for module in (model.blocks[0].attn.qkv, model.blocks[1].mlp.fc1, model.norm, model.blocks):
        module.register_forward_hook(lambda _, __, out: out + out[:, :1])


class OwnSteps(fastvit.VisionTransformer):
    def forward_features(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward_features(x, **options) * x.mean()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x, pre_logits) + x.mean((1, 2))[:, None]


class OwnEmbedding(fastvit.VisionTransformer):
    def _embed(self, images: Tensor) -> Tensor:
        return super()._embed(images).flip(1)


class OwnPositions(fastvit.VisionTransformer):
    def _positions(self, grid: Any, own: Any) -> Any:
        return 2 * super()._positions(grid, own)  # type: ignore[operator]


class OwnResampling(fastvit.VisionTransformer):
    def _resampled(self, table: Tensor, grid: Any) -> Tensor:
        return super()._resampled(table, grid).flip(1)


def _own_positions(model: fastvit.VisionTransformer) -> None:
    model.__class__ = OwnPositions


def _own_resampling(model: fastvit.VisionTransformer) -> None:
    model.__class__ = OwnResampling


def _own_steps(model: fastvit.VisionTransformer) -> None:
    model.__class__ = OwnSteps


def _own_embedding(model: fastvit.VisionTransformer) -> None:
    model.__class__ = OwnEmbedding


class OwnNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean(-2, keepdim=True)


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.5 * super().forward(x).mean(-2, keepdim=True)


class OwnIdentity(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(-2, keepdim=True)


def _subclasses_across_tokens(model: fastvit.VisionTransformer) -> None:
    model.norm.__class__ = model.blocks[0].norm1.__class__ = OwnNorm
    model.blocks[0].mlp.fc1.__class__ = model.blocks[1].attn.proj.__class__ = OwnLinear
    model.pos_drop = model.norm_pre = model.blocks[1].ls1 = OwnIdentity()


CHANGES = [
    _hooked, _own_block, _parts_across_tokens, _drops_across_tokens, _hooks_that_count_on_batches, _own_steps,
    _own_embedding, _own_positions, _own_resampling, _subclasses_across_tokens,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_runs_as_it_is(change: Callable[[fastvit.VisionTransformer], None]) -> None:
    model = make()
    change(model)
    hold(model, images())


@pytest.mark.parametrize("kind", [Attention, Block, nn.LayerNorm])
def test_a_forward_that_is_replaced_in_its_class_runs(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = kind.forward

    def changed(self: nn.Module, x: Tensor, *given: Any, **options: Any) -> Tensor:
        return shipped(self, x, *given, **options) - 0.5 * x.mean(-2, keepdim=True)

    model = make()
    before = model(images())
    monkeypatch.setattr(kind, "forward", changed)
    hold(model, images())
    assert not torch.allclose(model(images()), before, atol=1e-3)


def test_images_of_several_dtypes_are_refused_before_any_is_padded() -> None:
    model = make(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), dynamic_img_pad=True)
    given = [torch.rand(3, 30, 32), torch.zeros(3, 30, 32, dtype=torch.uint8)]
    with pytest.raises((TypeError, ValueError), match="images"):
        model(given)


def test_rotary_positions_are_an_images_own() -> None:
    """Also where a block takes batches of images with as many tokens, whose grids differ."""
    model = make(pos_embed="rotary")
    _own_block(model)
    hold(model, images(sizes=[(32, 48), (48, 32), (16, 96), (32, 48)]))


def test_features_come_in_the_order_of_the_images() -> None:
    model, given = make(reg_tokens=1), images()
    tokens, offsets = model.forward_features_packed(given)
    assert offsets.tolist() == [0, 8, 11, 19, 27, 37, 44]
    for i, image in enumerate(given):
        torch.testing.assert_close(
            tokens[offsets[i] : offsets[i + 1]], model.forward_features(image[None])[0], rtol=1e-5, atol=2e-5
        )


def test_under_autocast_and_with_checkpoints() -> None:
    model, given = make(), images()
    plain = gradients(model, model(given), torch.ones(6, 7))
    model.set_grad_checkpointing()
    for ours, theirs in zip(gradients(model, model(given), torch.ones(6, 7)), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        at_once, alone = model(given), torch.cat([model(image[None]) for image in given])
    assert at_once.dtype == alone.dtype and (at_once - alone).norm() < 0.02 * alone.norm()


def test_depth_is_dropped_image_by_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = make(drop_path_rate=0.5).train(), images()
    model.blocks[0].drop_path1 = DropPath(0.5)
    seen: list[Tensor] = []
    shipped = packed._drop_path

    def noted(drop: nn.Module, branch: Tensor, packing: packed.Packing) -> Tensor:
        dropped = shipped(drop, branch, packing)
        if drop is model.blocks[0].drop_path1:
            seen.append(dropped)
        return dropped

    monkeypatch.setattr(packed, "_drop_path", noted)
    for _ in range(40):
        model.forward_features_packed(given)
    kept = set()
    for dropped in seen:
        assert dropped.dim() == 2  # all images at once
        by_image = dropped.norm(dim=1).split(sorted(1 + h * w // 256 for h, w in SIZES))
        assert all(bool((each == 0).all() or (each > 0).all()) for each in by_image)
        kept.add(tuple(bool(each[0] > 0) for each in by_image))
    assert len(seen) == 40 and len(kept) > 10


def test_patches_are_dropped_image_by_image() -> None:
    model = make(patch_drop_rate=0.5).train()
    tokens, offsets = model.forward_features_packed(images())
    assert offsets.diff().tolist() == [1 + max(1, h * w // 512) for h, w in SIZES] and offsets[-1] == len(tokens)


def test_it_trains() -> None:
    model, given, labels = make().train(), images(uint8=True), torch.arange(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(50):
        loss = nn.functional.cross_entropy(model(given), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_a_compiled_model_runs_lists_as_they_are() -> None:
    """Rather than compile a program for nearly every batch, and with blocks that are compiled by themselves."""
    model, counter = make(), CompileCounter()
    torch._dynamo.reset()
    compiled, by_block = torch.compile(copy.deepcopy(model), backend=counter), copy.deepcopy(model)
    for block in by_block.blocks:
        block.compile(backend="eager", dynamic=True)
    for sizes in (SIZES, SIZES[:2], SIZES[1:], SIZES[::-1], SIZES * 2):
        given = images(sizes=sizes)
        expected = model(given)
        for ours in (compiled, by_block):
            torch.testing.assert_close(ours(given), expected, rtol=1e-5, atol=2e-5)
    assert counter.frame_count == 0


def test_no_images() -> None:
    model = make()
    assert model([]).shape == (0, 7)
    tokens, offsets = model.forward_features_packed([])
    assert tokens.shape == (0, 48) and offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "given", "kind", "message"),
    [
        ({}, [torch.randn(3, 32, 32), torch.randn(1, 3, 32, 32)], ValueError, r"images\[1\]: expected 3 dimensions"),
        ({}, [torch.randn(3, 32, 32), torch.randn(3, 40, 32)], ValueError, r"images\[1\]: height 40 is not a positive"),
        ({}, [torch.randn(3, 32, 32), torch.randn(3, 32, 30)], ValueError, r"images\[1\]: width 30 is not a positive"),
        ({}, [torch.randn(3, 32, 32), torch.randn(3, 8, 32)], ValueError, r"images\[1\]: height 8 is not a positive"),
        ({}, [torch.randn(3, 32, 32), torch.randn(4, 16, 16)], ValueError, r"images\[1\]: 4 channels, but weight"),
        ({}, [torch.randn(3, 32, 32), None], TypeError, r"images\[1\]: expected a torch.Tensor, got NoneType"),
        ({"global_pool": ""}, [torch.randn(3, 32, 32)], ValueError, "global_pool: '' gives tokens"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], given: list[Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(**options)(given)
    with pytest.raises(ValueError, match="attn_mask, is_causal"):
        make(**options)(given, is_causal=True)


def test_a_copy_does_the_same() -> None:
    model, given = make(), images()
    assert torch.equal(copy.deepcopy(model)(given), model(given))
