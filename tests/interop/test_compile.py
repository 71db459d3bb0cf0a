"""torch.compile before and after: whole graphs, with one op in them, compiled no more often than the library's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.interop.host import normalised
from tests.interop.subjects import (
    LIBRARIES,
    MEAN,
    STD,
    build,
    entry,
    expect_close,
    expect_same_gradients,
    gradients,
    launched,
    pair,
    raw_images,
)
from tests.interop.zoo import tensors

# Up to torch 2.12 the compiler fails in the checks of transformers itself, with the library's embeddings too.
_FAILS_IN_THE_LIBRARY = pytest.mark.xfail(
    torch.__version__ < "2.13", raises=torch._dynamo.exc.InternalTorchDynamoError, reason="torch.compile before 2.13"
)

# One of every mixin that is not in LIBRARIES.
OTHERS = (
    "timm-dinov3",
    "timm-beit",
    "timm-swin",
    "timm-vit-dynamic-size-pad",
    "timm-naflexvit-linear",
    "transformers-deit-interpolated",
    "transformers-dinov2-registers",
    "transformers-dinov3",
    "transformers-clip",
    "transformers-idefics3",
    "transformers-pixtral-whole",
    pytest.param("transformers-siglip2", marks=_FAILS_IN_THE_LIBRARY),
)


class Graphs:
    """A backend that runs graphs as they are and counts those it was given with an op in them: what runs at the door of
    a compiled model is a graph of its own, without one."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += any(node.op.startswith("call") for node in graph.graph.nodes)
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expect_like_the_library(name: str, model: Any, untouched: nn.Module, images: Tensor) -> None:
    """Outputs and gradients of one step, made with one launch."""
    is_raw = images.dtype == torch.uint8
    want = entry(name).outputs(untouched, normalised(images, MEAN, STD) if is_raw else images)
    launched()
    got = entry(name).outputs(model, images)
    assert launched() == 1
    expect_close(got, want)
    expect_same_gradients(
        {key.removeprefix("_orig_mod."): value for key, value in gradients(model, got).items()},
        gradients(untouched, want),
    )


@pytest.mark.parametrize("name", LIBRARIES)
def test_compiled_whole_and_once_for_all_batch_sizes(name):
    model, untouched = pair(name, mean=MEAN, std=STD)
    graphs = Graphs()
    compiled: Any = torch.compile(model, fullgraph=True, backend=graphs)
    for batch in (2, 3, 5):
        images = raw_images(batch)
        torch._dynamo.mark_dynamic(images, 0)
        expect_like_the_library(name, compiled, untouched, images)
    assert graphs.count == 1


@pytest.mark.parametrize("name", LIBRARIES)
def test_compiled_as_often_as_the_library(name):
    """Without being told which size changes: once for the first batch, once more for all others."""
    counts = []
    for model in pair(name):
        torch._dynamo.reset()
        graphs = Graphs()
        compiled: Any = torch.compile(model, fullgraph=True, backend=graphs)
        for batch in (2, 3, 5, 7):
            compiled(entry(name).images(batch=batch))
        counts.append(graphs.count)
    assert counts[0] == counts[1] == 2


@pytest.mark.parametrize("name", ["timm-vit-dynamic-size", "transformers-vit-interpolated", "transformers-dinov2"])
def test_trained_at_several_sizes(name):
    """By the compiler's own partitioning, which needs a gradient of the resampling that it can trace."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for batch, height, width in ((2, 32, 32), (3, 40, 56), (2, 64, 32)):
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        got = entry(name).outputs(compiled, images)
        want = entry(name).outputs(untouched, normalised(images, MEAN, STD))
        expect_close(got, want)
        found, wanted = gradients(model, got), gradients(untouched, want)
        # A graph has zeros for what its outputs do not depend on.
        expect_same_gradients({key: found[key] for key in wanted}, wanted)
        assert not any(found[key].any() for key in found.keys() - wanted.keys())


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_compile_whole(name):
    model, untouched = pair(name)
    model.compile(fullgraph=True, backend=Graphs())
    expect_like_the_library(name, model, untouched, entry(name).images(entry(name).sizes[-1]))


@pytest.mark.parametrize("name", LIBRARIES)
def test_traced_to_gradients(name):
    """Through AOTAutograd, which traces the backward op too."""
    model, untouched = pair(name, mean=MEAN, std=STD)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    expect_like_the_library(name, compiled, untouched, raw_images())


@pytest.mark.full
def test_with_the_default_compiler():
    model, untouched = pair("timm-vit", mean=MEAN, std=STD)
    expect_like_the_library("timm-vit", torch.compile(model, fullgraph=True), untouched, raw_images())


@pytest.mark.parametrize(
    ("name", "inner"), [("timm-vit", True), ("timm-vit", False), ("torchvision-vit", False), ("transformers-vit", True)]
)
def test_accelerated_and_restored_after_it_was_compiled(name, inner):
    """The wrapper, or the model inside: graphs made before must not be used any more."""
    model, untouched = build(name), build(name)
    compiled: Any = torch.compile(model, fullgraph=True, backend=Graphs())
    images = entry(name).images()
    compiled(images)
    assert launched() == 0
    subject = model if inner else compiled
    assert fastvit.accelerate(subject) is subject and type(compiled).__name__ == "OptimizedModule"
    assert [change.path for change in fastvit.report(subject).changes if change.fuses]
    expect_like_the_library(name, compiled, untouched, images)
    fastvit.accelerate(subject, mean=MEAN, std=STD)
    expect_like_the_library(name, compiled, untouched, raw_images())
    fastvit.restore(subject)
    launched()
    expect_close(tensors(compiled(images)), tensors(untouched(images)))
    assert launched() == 0


def test_autocast_inside_a_graph():
    model, untouched = pair("timm-vit")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = entry("timm-vit").images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, graph, library = model(images), compiled(images), untouched(images)
    assert graph.dtype == eager.dtype == library.dtype
    expect_close([graph], [eager], 2e-2)
    expect_close([graph], [library], 2e-2)
