"""Resampled tables against what the libraries make of theirs, in programs that are traced, in models; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import grids
from fastvit.grids import axis_matrix, resample_grids
from fastvit.positions import resample_pos_embed
from tests.libraries import peer

SIZES = [(6, 4), (3, 9), (7, 7), (6, 4), (2, 2), (8, 10)]


def expect_close(got: Tensor, want: Tensor) -> None:
    """Of tables of unit size, to rounding of float32: the libraries' own weights differ from torch's by some."""
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=5e-5)


# The libraries


def test_timm(device):
    resample: Any = peer("timm.layers").resample_abs_pos_embed
    table = torch.randn(7, 7, 16, device=device)
    for interpolation, antialias in (("bicubic", True), ("bicubic", False), ("bilinear", True)):
        options: dict[str, Any] = {"interpolation": interpolation, "antialias": antialias}
        want = [
            resample(table.flatten(0, 1)[None], list(size), [7, 7], num_prefix_tokens=0, **options)[0] for size in SIZES
        ]
        expect_close(resample_grids(table, SIZES, **options), torch.cat(want))


def test_timm_naflexvit(device):
    timm: Any = peer("timm.models.naflexvit")
    config = timm.NaFlexVitCfg(patch_size=4, embed_dim=16, depth=1, num_heads=2, pos_embed_grid_size=(7, 7))
    embeds = timm.NaFlexVit(config, num_classes=0).to(device).embeds
    nn.init.normal_(embeds.pos_embed)
    longest = max(rows * columns for rows, columns in SIZES)
    coordinates = torch.zeros(len(SIZES), longest, 2, dtype=torch.long, device=device)
    for image, (rows, columns) in zip(coordinates, SIZES, strict=True):
        image[: rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(device)
    positions = torch.zeros(len(SIZES), longest, 16, device=device)
    embeds._apply_learned_naflex_pos_embed(positions, patch_coord=coordinates)
    want = [image[: rows * columns] for image, (rows, columns) in zip(positions, SIZES, strict=True)]
    got = resample_grids(embeds.pos_embed[0], SIZES, interpolation="bicubic", antialias=True)
    expect_close(got, torch.cat(want))


def test_siglip2(device):
    module: Any = peer("transformers.models.siglip2.modeling_siglip2")
    table = torch.randn(7, 7, 16, device=device)
    longest = max(rows * columns for rows, columns in SIZES)
    shapes = torch.tensor(SIZES, device=device)
    found = module.Siglip2VisionEmbeddings.resize_positional_embeddings(table, shapes, max_length=longest)
    want = [image[: rows * columns] for image, (rows, columns) in zip(found, SIZES, strict=True)]
    expect_close(resample_grids(table, SIZES, interpolation="bilinear", antialias=True), torch.cat(want))


@pytest.mark.parametrize(
    ("path", "prefix", "antialias"),
    [
        ("dinov2.modeling_dinov2.Dinov2", "dinov2.configuration_dinov2.Dinov2Config", False),
        (
            "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters",
            "dinov2_with_registers.configuration_dinov2_with_registers.Dinov2WithRegistersConfig",
            True,
        ),
    ],
)
def test_dinov2(path, prefix, antialias, device):
    module, _, name = path.rpartition(".")
    configured, _, config = prefix.rpartition(".")
    embeddings_class = getattr(peer(f"transformers.models.{module}"), f"{name}Embeddings")
    options = {"hidden_size": 16, "image_size": 28, "patch_size": 4}
    embeddings = embeddings_class(getattr(peer(f"transformers.models.{configured}"), config)(**options)).to(device)
    nn.init.normal_(embeddings.position_embeddings)
    want = []
    for rows, columns in SIZES:
        tokens = torch.empty(1, 1 + rows * columns, 16, device=device)
        found = embeddings.interpolate_pos_encoding(tokens, 4 * rows, 4 * columns)
        want.append(found[0, 1:])
    table = embeddings.position_embeddings[0, 1:].unflatten(0, (7, 7))
    expect_close(resample_grids(table, SIZES, interpolation="bicubic", antialias=antialias), torch.cat(want))


def test_qwen3_vl(device):
    utils: Any = peer("transformers.models.qwen3_vl.modeling_qwen3_vl")
    sizes = [(6, 4), (4, 10), (8, 8), (6, 4), (2, 2), (7, 7)]
    table = torch.randn(7, 7, 16, device=device)
    if not hasattr(utils, "get_vision_interpolation_indices_and_weights"):
        pytest.skip("this version of transformers has Qwen3-VL's interpolation elsewhere")
    shapes = torch.tensor([(1, rows, columns) for rows, columns in sizes], device=device)
    indices, weights = utils.get_vision_interpolation_indices_and_weights(shapes, 7, "bilinear", True)
    want = (table.flatten(0, 1)[indices] * weights[:, :, None]).sum(1)
    options: dict[str, Any] = {"interpolation": "bilinear", "antialias": False, "align_corners": True}
    expect_close(resample_grids(table, sizes, **options), want)


# Programs that are traced


class Resampling(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1 + 12, 4, device=device))

    def forward(self, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        one = resample_pos_embed(self.table, size, (3, 4))
        many = resample_grids(self.table[0, 1:].unflatten(0, (3, 4)), [size, (3, 4), (2, 2), size])
        return one, many, axis_matrix(size[0], 3, device=self.table.device)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("kept_before", [False, True])
def test_compiles_whole_at_several_sizes(dynamic, kept_before, device):
    torch._dynamo.reset()  # which allows a function only so many graphs, and has one for each size
    model = Resampling(device)
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((5, 6), (2, 7), (3, 4), (5, 6)):
        grids._kept.cache_clear()
        if kept_before:
            model(size)
        got = compiled(size)
        if not kept_before:
            assert not grids._kept.cache_info().currsize
        want = model(size)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        gradients = [
            torch.autograd.grad(both[0].square().sum() + both[1].square().sum(), model.table)[0] for both in (got, want)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict, device):
    class OfImages(Resampling):
        def forward(self, images: Tensor) -> Any:
            return super().forward((images.shape[2], images.shape[3]))

    model = OfImages(device)
    for height, width in ((5, 6), (2, 7)):
        images = torch.randn(2, 3, height, width, device=device)
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (images,), dynamic_shapes=(batch,), strict=strict)
        for one, other in zip(program.module()(images[:1]), model(images), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_exports_for_any_size(device):
    """Of one table: the size stays a symbol, and no matrix becomes a constant."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 12, 4, device=device))

        def forward(self, images: Tensor) -> Tensor:
            return resample_pos_embed(self.table, images.shape[2:], (3, 4), num_prefix_tokens=0)

    model = One()
    sides = {2: torch.export.Dim("height", min=5, max=64), 3: torch.export.Dim("width", min=5, max=64)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 9, 8, device=device),), dynamic_shapes=(sides,))
        for height, width in ((9, 8), (6, 30)):
            images = torch.randn(2, 3, height, width, device=device)
            torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced(device):
    table = torch.randn(1, 12, 4, device=device)
    traced = torch.jit.trace(lambda table: resample_pos_embed(table, (5, 6), (3, 4), num_prefix_tokens=0), table)
    other = torch.randn(1, 12, 4, device=device)
    torch.testing.assert_close(
        traced(other), resample_pos_embed(other, (5, 6), (3, 4), num_prefix_tokens=0), rtol=0, atol=1e-5
    )
    assert "upsample" in str(traced.inlined_graph)


# Models


@pytest.mark.parametrize("library", ["fastvit", "timm"])
def test_no_step_of_a_model_interpolates_anew(library, monkeypatch, device):
    options: dict[str, Any] = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    if library == "fastvit":
        model: Any = fastvit.VisionTransformer(**options, dynamic_img_size=True).to(device)
    else:
        model = peer("timm.models.vision_transformer").VisionTransformer(**options, dynamic_img_size=True).to(device)
        fastvit.accelerate(model)
    images = [torch.randn(2, 3, *size, device=device) for size in ((40, 16), (32, 24), (24, 24))]
    want = [model(batch) for batch in images]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("interpolated anew")

    monkeypatch.setattr(F, "interpolate", refuse)
    for batch, wanted in zip(images, want, strict=True):
        got = model(batch)
        assert torch.equal(got, wanted)
        got.sum().backward()


# Bad input


TABLE = torch.zeros(3, 4, 2)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: resample_grids(TABLE.numpy(), [(2, 2)]), TypeError, ("table", "ndarray")),
        (lambda: resample_grids(TABLE[0], [(2, 2)]), ValueError, ("table", "[4, 2]")),
        (lambda: resample_grids(TABLE[:0], [(2, 2)]), ValueError, ("table", "[0, 4, 2]")),
        (lambda: resample_grids(TABLE.int(), [(2, 2)]), TypeError, ("table", "int32")),
        (lambda: resample_grids(TABLE, torch.tensor([[2, 2]])), TypeError, ("sizes", "Tensor", "tolist")),
        (lambda: resample_grids(TABLE, [torch.tensor([2, 2])]), TypeError, ("sizes", "Tensor", "tolist")),
        (lambda: resample_grids(TABLE, [(torch.tensor(2), 2)]), TypeError, ("sizes", "tensor(2)")),
        (lambda: resample_grids(TABLE, 3), TypeError, ("sizes", "int")),
        (lambda: resample_grids(TABLE, (3, 4)), TypeError, ("sizes", "pairs", "int")),
        (lambda: resample_grids(TABLE, [(2, 2, 2)]), ValueError, ("sizes", "(2, 2, 2)")),
        (lambda: resample_grids(TABLE, [(2, 2), (0, 3)]), ValueError, ("sizes", "0")),
        (lambda: resample_grids(TABLE, [(2.0, 2)]), TypeError, ("sizes", "2.0")),
        (lambda: resample_grids(TABLE, [(True, 2)]), TypeError, ("sizes", "True")),
        (lambda: resample_grids(TABLE, [(2, 2)], interpolation="linear"), ValueError, ("interpolation", "linear")),
        (lambda: resample_grids(TABLE, [(2, 2)], interpolation="nearest"), ValueError, ("antialias", "nearest")),
        (lambda: resample_grids(TABLE, [(2, 2)], antialias=None), TypeError, ("antialias", "None")),
        (lambda: resample_grids(TABLE, [(2, 2)], align_corners="no"), TypeError, ("align_corners", "no")),
        (lambda: resample_grids(TABLE, [(6, 8)], scales=[(2.0, 2.5)]), ValueError, ("scales", "2.5", "10", "8")),
        (lambda: resample_grids(TABLE, [(6, 8)], scales=[]), ValueError, ("scales", "0", "1")),
        (lambda: resample_grids(TABLE, [(6, 8)], scales=[(2, float("nan"))]), ValueError, ("scales", "nan")),
        (lambda: resample_grids(TABLE, [(6, 8)], scales=[("2", 2)]), TypeError, ("scales", "'2'")),
        (lambda: axis_matrix(0, 3), ValueError, ("new", "0")),
        (lambda: axis_matrix(3, -1), ValueError, ("old", "-1")),
        (lambda: axis_matrix(3, 2.0), TypeError, ("old", "2.0")),  # type: ignore[arg-type]
        (lambda: axis_matrix(3, 2, dtype=torch.float16), TypeError, ("dtype", "float16")),
        (lambda: axis_matrix(3, 2, scale=2.0), ValueError, ("scale", "2.0", "4", "3")),
        (
            lambda: axis_matrix(4, 2, interpolation="area", antialias=False, align_corners=True),
            ValueError,
            ("align_corners", "bilinear"),
        ),
    ],
)
def test_bad_input(call, kind, words):
    with pytest.raises(kind) as raised:
        call()
    for word in words:
        assert word in str(raised.value)
