"""Position tables: the fixed sine/cosine one, and resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastvit
from fastvit.positions import resample_pos_embed, rotary_2d, rotate, sincos_2d


def mae_table(size: int, dim: int) -> np.ndarray:
    """The square table as MAE writes it: x before y, sines before cosines."""

    def one(dim: int, positions: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
        angles = np.einsum("m,d->md", positions.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    x, y = np.meshgrid(np.arange(size, dtype=np.float64), np.arange(size, dtype=np.float64))
    return np.concatenate([one(dim // 2, x), one(dim // 2, y)], axis=1)


@pytest.mark.parametrize(("size", "dim"), [(1, 4), (7, 32), (14, 192)])
def test_sincos_is_the_table_of_mae(size, dim):
    table = sincos_2d((size, size), dim, num_prefix_tokens=1, dtype=torch.float64)
    assert table.shape == (1 + size * size, dim)
    assert table[0].abs().sum() == 0
    np.testing.assert_allclose(table[1:].cpu().numpy(), mae_table(size, dim), rtol=0, atol=1e-12)


def test_sincos_by_hand():
    table = sincos_2d((2, 3), 8, dtype=torch.float64).reshape(2, 3, 8)
    y, x = 1, 2
    expected = [math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100)]
    expected += [math.sin(y), math.sin(y / 100), math.cos(y), math.cos(y / 100)]
    torch.testing.assert_close(table[y, x], torch.tensor(expected, dtype=torch.float64))
    assert sincos_2d((2, 3), 8).dtype == torch.float32
    assert sincos_2d((2, 3), 8, temperature=20.0).ne(sincos_2d((2, 3), 8)).any()


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14)])
def test_rotary_positions_are_those_of_timm(grid, timm):
    from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

    theirs = RotaryEmbeddingCat(32, in_pixels=False, feat_shape=grid).get_embed()
    x = torch.randn(2, 3, grid[0] * grid[1], 32)
    ours = rotary_2d(grid, 32, num_prefix_tokens=2)
    torch.testing.assert_close(rotate(x, ours[:, 2:]), apply_rot_embed_cat(x, theirs), rtol=1e-5, atol=1e-5)
    prefix = torch.randn(2, 32)
    assert torch.equal(rotate(prefix, ours[:, :2]), prefix)
    assert rotate(x.bfloat16(), ours[:, 2:]).dtype == torch.bfloat16


def test_rotary_products_go_by_distances_alone():
    queries, keys = torch.randn(2, 16, dtype=torch.float64)
    table = rotary_2d((5, 6), 16).double().unflatten(1, (5, 6))

    def product(of_query, of_key):
        return rotate(queries, table[:, of_query[0], of_query[1]]) @ rotate(keys, table[:, of_key[0], of_key[1]])

    torch.testing.assert_close(product((0, 1), (2, 4)), product((2, 2), (4, 5)), rtol=1e-6, atol=1e-6)
    assert not torch.isclose(product((0, 1), (2, 4)), product((0, 1), (4, 2)))


def rotary_model(**options):
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = fastvit.VisionTransformer(**{**small, "pos_embed": "rotary", "global_pool": "avg", **options}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)  # so that attention prefers some tokens to others
    return model


def test_a_rotary_model_sees_where_patches_are():
    """Whichever way its blocks run; and the maps and features that it is asked for are those of its forward."""
    model, images = rotary_model(class_token=False), torch.randn(2, 3, 32, 32)
    alone = model(images)
    assert not torch.allclose(alone, model(images.flip(3).unflatten(3, (4, 8)).flip(4).flatten(3)), atol=1e-3)
    model.pos_embed_kind = "none"
    assert not torch.allclose(alone, model(images), atol=1e-3)
    model.pos_embed_kind = "rotary"
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images), alone)
    final, maps = model.forward_intermediates(images, 1)
    torch.testing.assert_close(final, model.forward_features(images))
    attention = model.get_attention_maps(images)[1]
    assert attention.shape == (2, 3, 16, 16) and maps[0].shape == (2, 48, 4, 4)
    masked = model.forward_features(images, attn_mask=torch.zeros(16, 16))
    torch.testing.assert_close(masked, final, rtol=1e-5, atol=1e-5)


def test_a_rotary_model_compiles_whole():
    model, images = rotary_model(dynamic_img_size=True), torch.randn(2, 3, 32, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for given in (images, torch.randn(3, 3, 40, 32)):
        torch.testing.assert_close(compiled(given), model(given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 8}, "num_heads: pos_embed='rotary' needs heads of a multiple of 4 values, not 6"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate: pos_embed='rotary' has no positions for some of the patches"),
    ],
)
def test_bad_rotary_models(options, message):
    with pytest.raises(ValueError, match=message):
        rotary_model(**options)


def test_watched_sequences_have_no_rotary_positions():
    model = rotary_model()
    model.blocks.register_forward_hook(lambda *_: None)
    for given in (torch.randn(1, 3, 32, 32), [torch.randn(3, 32, 32)]):
        with pytest.raises(ValueError, match="blocks: with pos_embed='rotary' they are called one by one"):
            model(given)


def expect_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To the rounding of float32 sums, which in bfloat16 may fall to the other side."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    eps = torch.finfo(ours.dtype).eps
    assert (ours - theirs).abs().max() <= 8 * eps * theirs.abs().max()
    if ours.dtype == torch.bfloat16:
        assert (ours != theirs).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (7, 7)), ((7, 7), (3, 5)), ((4, 6), (8, 3)), ((4, 6), (6, 4)), ((1, 1), (2, 2))]
)
def test_resampling_is_that_of_timm(dtype, prefix, old, new, timm):
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, prefix + old[0] * old[1], 24, dtype=dtype)
    ours = resample_pos_embed(table, new, old, num_prefix_tokens=prefix)
    theirs = resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)
    assert ours.dtype == dtype
    expect_close(ours, theirs)
    assert torch.equal(ours[:, :prefix], table[:, :prefix])
    assert torch.equal(resample_pos_embed(table[0], new, old, num_prefix_tokens=prefix), ours[0])
    if old[0] == old[1]:
        assert torch.equal(resample_pos_embed(table, new, num_prefix_tokens=prefix), ours)
        expect_close(
            resample_pos_embed(table, new, num_prefix_tokens=prefix, interpolation="bilinear", antialias=False),
            resample_abs_pos_embed(
                table, list(new), num_prefix_tokens=prefix, interpolation="bilinear", antialias=False
            ),
        )


def test_its_own_grid_is_the_identity():
    table = torch.randn(1, 1 + 12, 8)
    assert resample_pos_embed(table, (3, 4), (3, 4)) is table


@pytest.mark.parametrize(("old", "new"), [((2, 8), (4, 4)), ((4, 4), (2, 8)), ((2, 8), (8, 2))])
def test_as_many_patches_on_another_grid_are_other_positions(old, new):
    table = sincos_2d(old, 16, num_prefix_tokens=1)
    resampled = resample_pos_embed(table, new, old)
    assert resampled.shape == table.shape
    assert not torch.allclose(resampled[1:], table[1:], atol=0.1)


def test_resampling_keeps_the_picture():
    # A ramp stays a ramp, in the direction it had.
    ramp = torch.linspace(0, 1, 8)[:, None].expand(8, 4).reshape(1, 32, 1)
    larger = resample_pos_embed(ramp, (16, 8), (8, 4), num_prefix_tokens=0).reshape(16, 8)
    assert (larger.diff(dim=0)[2:-2] > 0).all()
    assert larger.diff(dim=1).abs().max() < 1e-5


def test_resampling_is_differentiable():
    table = torch.randn(1, 1 + 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resample_pos_embed(t, (4, 5), (2, 3)), table)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: sincos_2d((0, 3), 8), ("grid", "0")),
        (lambda: sincos_2d((2,), 8), ("grid", "2")),
        (lambda: sincos_2d((2, 2), 6), ("dim", "6", "4")),
        (lambda: sincos_2d((2, 2), 8, num_prefix_tokens=-1), ("num_prefix_tokens", "-1")),
        (lambda: sincos_2d((2, 2), 8, temperature=0.0), ("temperature", "0")),
        (lambda: resample_pos_embed(torch.zeros(2, 5, 4), (2, 2)), ("pos_embed", "[2, 5, 4]")),
        (lambda: resample_pos_embed(torch.zeros(5), (2, 2)), ("pos_embed", "[5]")),
        (lambda: resample_pos_embed(torch.zeros(1, 7, 4), (2, 2)), ("pos_embed", "6", "old_grid")),
        (lambda: resample_pos_embed(torch.zeros(1, 1, 4), (2, 2)), ("pos_embed", "0")),
        (lambda: resample_pos_embed(torch.zeros(1, 7, 4), (2, 2), (2, 2)), ("old_grid", "2 x 2", "6")),
        (lambda: resample_pos_embed(torch.zeros(1, 5, 4), (0, 2)), ("new_grid", "(0, 2)")),
    ],
)
def test_bad_input(call, names):
    with pytest.raises(ValueError) as raised:
        call()
    for name in names:
        assert name in str(raised.value)
