"""The rivals: they get our weights and our data, and the best of their settings is what counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from fastvit.benchmarks import models, rivals
from fastvit.benchmarks.contenders import ours, yardstick
from fastvit.benchmarks.model import Setup, _build_rival, _truth
from fastvit.benchmarks.patch_embed import Shape, task_of
from fastvit.benchmarks.problem import BOTH, FORWARD, Contender, Problem, Unavailable, compiled, measure
from fastvit.validation.tolerance import relative_error
from tests.libraries import peer

CPU = torch.device("cpu")
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "huggingface": "transformers"}


@pytest.mark.parametrize("kept", [1.0, 0.25])
@pytest.mark.parametrize("precision", ["float32", "uint8 to float32", "uint8 to bfloat16, autocast"])
@pytest.mark.parametrize("name", ["ours", "timm", "torchvision", "huggingface", "conv2d", "linear"])
def test_all_make_the_same_tokens(name: str, precision: str, kept: float) -> None:
    peer(LIBRARIES.get(name, "torch"))
    if kept < 1 and name in LIBRARIES:
        pytest.skip("the libraries' embeddings know no mask")
    inputs = task_of(Shape("Ti", 2, image=32), precision, CPU, kept=kept).inputs
    solution = ours("patch_embed", inputs, "cpu") if name == "ours" else getattr(rivals, name)(inputs)
    truth, plain_error = yardstick("patch_embed", inputs)
    tokens = solution.tokens()
    assert relative_error(tokens, truth) <= 2 * plain_error + 4 * torch.finfo(torch.float32).eps
    gradients = torch.autograd.grad(tokens, solution.parameters, inputs.grad.to(tokens.dtype))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_models_have_our_weights_and_the_residual_dtype_asked_for(name: str, residual: torch.dtype) -> None:
    peer(LIBRARIES.get(name, "torch"))
    setup = Setup("Ti", 2, CPU, residual, {"depth": 1, "num_classes": 10})
    images, _ = setup.data()
    ours, theirs = setup.make(models.ours).eval(), setup.make(models.RIVALS[name]).eval()
    seen: list[torch.dtype] = []
    for module in (ours, theirs):
        norm = [child for child in module.modules() if isinstance(child, nn.LayerNorm)][0]
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.no_grad(), setup.autocast():
        expected, found = ours(images), theirs(images)
    assert seen == [residual, residual]
    assert relative_error(found, expected) < 0.02


def test_models_are_made_on_their_device() -> None:
    """And not moved there: a CPU would take seconds to draw the numbers of each."""
    seen: list[str] = []

    def build(model: str, residual: torch.dtype | None) -> nn.Module:
        seen.append(torch.empty(1).device.type)
        return nn.Linear(1, 1)

    Setup("Ti", 1, torch.device("meta")).make(build)
    assert seen == ["meta"] and torch.empty(1).device == CPU


@pytest.mark.parametrize("name", ["ours", *LIBRARIES])
def test_no_model_draws_its_numbers_elsewhere(name: str) -> None:
    """Weights that some library made on the CPU all the same would not fit those made on the device."""
    peer(LIBRARIES.get(name, "torch"))
    module = Setup("Ti", 1, torch.device("meta"), torch.bfloat16, {"depth": 1}).make(getattr(models, name))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_a_model_with_other_weights_is_not_timed() -> None:
    """What a mistake in the translation of weights would be: one parameter that is another's."""
    peer("timm")
    setup = Setup("Ti", 2, CPU, overrides={"depth": 1, "num_classes": 10})
    images, labels = setup.data()
    labels %= 10

    def swapped(*arguments: object, **keywords: object) -> nn.Module:
        model = models.timm(*arguments, **keywords)  # type: ignore[arg-type]
        block = model.blocks[0]  # type: ignore[union-attr, index]
        block.norm1.weight.data.mul_(1.01)
        return model

    with pytest.raises(Unavailable, match="does not compute the same: output"):
        _build_rival(swapped, setup, images, labels, FORWARD, lambda: _truth(setup, images, labels), "")


def test_the_best_setting_counts_and_a_yardstick_is_no_rival() -> None:
    def call(size: int) -> Callable[[], object]:
        tensor = torch.ones(size, size)
        return lambda: tensor @ tensor

    contenders = [
        Contender("fastvit:cpu", lambda: call(64)),
        Contender("slow", lambda: call(700)),
        Contender("slow", lambda: call(400), "compiled"),
        Contender("quick", lambda: call(300)),
        Contender("part", lambda: call(2), whole=False),
    ]
    rows = measure(Problem("op", "shape", "float32", "NCHW", BOTH, contenders, lambda backend: ""), CPU, 0.2)
    ours = rows[0]
    median = {row.provider: row.median_us for row in rows}
    assert set(ours.ratios) == {"slow", "quick", "part"} and ours.best_rival == "quick"
    assert ours.median_us and median["slow compiled"] and median["slow compiled"] < (median["slow"] or 0)
    assert ours.ratios["slow"] == pytest.approx(median["slow compiled"] / ours.median_us, rel=1e-3)
    assert ours.headline == ours.ratios["quick"]
    assert [row.rival for row in rows] == ["", "slow", "slow", "quick", "part"]


def test_every_contender_is_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders are closures of the same code, of which torch.compile keeps a few versions and then gives up."""
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend=counter, dynamic=False))

    def contender(layer: nn.Module) -> Callable[[], torch.Tensor]:
        x = torch.ones(2, 3)
        return lambda: layer(x)

    count = torch._dynamo.config.recompile_limit + 4
    torch._dynamo.reset()
    calls = [compiled(contender(nn.Linear(3, width)), CPU) for width in range(1, count + 1)]
    assert [call().shape[1] for call in calls] == list(range(1, count + 1))
    assert counter.frame_count == count
    torch._dynamo.reset()
