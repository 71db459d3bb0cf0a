"""torch.export and ONNX: graphs with our op, or with standard operators alone."""

from __future__ import annotations

import io
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fastvit
from fastvit import functional
from fastvit.interop.host import normalised
from tests.interop.subjects import LIBRARIES, MEAN, STD, entry, expect_close, pair, raw_images
from tests.interop.zoo import tensors

OP = "fastvit.patch_embed.default"


def ops_of(program: ExportedProgram) -> list[str]:
    """FastViT's ops in a program."""
    return [str(node.target) for node in program.graph.nodes if "fastvit" in str(node.target)]


def images_for(raw: bool, batch: int = 2) -> Tensor:
    return raw_images(batch) if raw else entry("timm-vit").images(batch=batch)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_exported_program_has_the_op_once_and_equals_eager(name, raw):
    model, _ = pair(name, mean=MEAN, std=STD)
    program = export(model, (images_for(raw),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    assert ops_of(program) == [OP]
    assert program.state_dict.keys() == model.state_dict().keys()
    for batch in (1, 2, 5):
        images = images_for(raw, batch)
        with torch.no_grad():
            expect_close(tensors(program.module()(images)), entry(name).outputs(model, images))


@pytest.mark.parametrize("name", LIBRARIES)
def test_strict_export(name):
    """Through the compiler's front end, which reads the code of the mixins."""
    model, _ = pair(name, mean=MEAN, std=STD)
    program = export(model, (images_for(True),), strict=True)
    assert ops_of(program) == [OP]
    with torch.no_grad():
        expect_close(tensors(program.module()(images_for(True))), entry(name).outputs(model, images_for(True)))


def test_saved_program_without_our_ops(tmp_path):
    """The table turns a program, also one that comes from a file, into convolution, additions and concatenation."""
    model, _ = pair("timm-vit", mean=MEAN, std=STD)
    file = io.BytesIO()
    torch.export.save(export(model, (images_for(True),), dynamic_shapes=({0: Dim("batch")},)), file)
    file.seek(0)
    program = torch.export.load(file)
    assert ops_of(program) == [OP]
    program = program.run_decompositions(fastvit.ops.decompositions())
    assert ops_of(program) == []
    run = onnx_runtime(program, path=tmp_path / "model.onnx")
    for batch in (2, 5):
        with torch.no_grad():
            want = [model(images_for(True, batch))]
        expect_close([program.module()(images_for(True, batch))], want)
        expect_close(run(images_for(True, batch)), want)


class Everything(nn.Module):
    """Both ops with all that they can be given."""

    def __init__(self, dtype: torch.dtype, raw: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 24, 8, 8, dtype=dtype)
        self.positions = nn.Parameter(torch.randn(18, 24, dtype=dtype))
        self.prefix = nn.Parameter(torch.randn(2, 24, dtype=dtype))
        self.normalisation: dict[str, Any] = {"mean": MEAN, "std": STD} if raw else {}

    def forward(self, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.proj.weight, self.proj.bias
        tokens = functional.patch_embed(
            images, weight, bias, pos_embed=self.positions, prefix=self.prefix, keep=keep, **self.normalisation
        )
        patches = functional.patch_embed(images, weight, **self.normalisation)
        positioned = functional.add_position(patches, self.positions[2:], prefix=self.prefix, dtype=torch.float32)
        return tokens, patches, positioned


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decompositions_of_both_ops(dtype, raw):
    model = Everything(dtype, raw)
    arguments = images_for(raw), torch.randint(0, 16, (2, 5))
    program = export(model, arguments)
    assert ops_of(program) == [OP, OP, "fastvit.add_position.default"]
    program = program.run_decompositions(fastvit.ops.decompositions())
    assert ops_of(program) == []
    # The backend sums in another order; at half precision that may move a rounding.
    got, want = tensors(program.module()(*arguments)), tensors(model(*arguments))
    expect_close(got, want, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert [tensor.stride() for tensor in got] == [tensor.stride() for tensor in want]


def onnx_runtime(model: Any, arguments: tuple[Any, ...] = (), *, path: Path, **options: Any) -> Any:
    """Export to a file, which a session of ONNX Runtime then reads, and nothing else."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
    torch.onnx.export(model, arguments, path, dynamo=True, verbose=False, **options)
    # Functions of torch's exporter are allowed beside ONNX's own operators: the file holds their bodies.
    known = {"", *(function.domain for function in onnx.load(path).functions)}
    assert {node.domain for node in onnx.load(path).graph.node} <= known
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return run


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_onnx_file_runs_and_equals_eager(name, raw, tmp_path):
    """One line, no table, whatever the backend; the pixels go in as they came where mean and std are known."""
    model, untouched = pair(name, mean=MEAN, std=STD, backend="cpu")
    options = {"dynamic_shapes": ({0: Dim("batch")},)} if raw else {}
    run = onnx_runtime(model, (images_for(raw),), path=tmp_path / "model.onnx", **options)
    for batch in (1, 2, 5) if raw else (2,):
        images = images_for(raw, batch)
        host_images = normalised(images, MEAN, STD) if raw else images
        with torch.no_grad():
            expect_close(run(images), entry(name).outputs(untouched, host_images))


def test_onnx_file_of_our_own_model(tmp_path):
    model = fastvit.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, mean=MEAN, std=STD)
    run = onnx_runtime(model.eval(), (images_for(True),), path=tmp_path / "model.onnx")
    with torch.no_grad():
        expect_close(run(images_for(True)), [model(images_for(True))])
