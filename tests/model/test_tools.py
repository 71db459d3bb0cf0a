"""torch.compile, torch.export, copies, pickles and checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastvit

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, images):
    model.zero_grad()
    output = model(images)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "qk_norm": True, "init_values": 0.1},
        {"mean": MEAN, "std": STD, "class_token": False, "global_pool": "max", "pos_embed": "none"},
        {"dynamic_img_size": True, "dynamic_img_pad": True, "mean": MEAN, "std": STD, "img_size": 24},
    ],
)
def test_compiles_to_one_graph_that_takes_every_batch(arguments, tiny):
    model = tiny(depth=1, **arguments)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # Batches 0 and 1 are always their own graphs in torch; the others share one, made when the second size comes.
    for batch in (2, 3, 5):
        images = torch.rand(batch, 3, 24, 32)
        if "mean" in arguments:
            images = (images * 255).to(torch.uint8)
        expected = step(model, images)
        for got, want in zip(step(compiled, images), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_compiles_dynamic_from_the_start(tiny):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tiny(depth=1), fullgraph=True, dynamic=True, backend=counter)
    compiled(torch.randn(2, 3, 24, 32))
    first = counter.frame_count  # may be two: torch starts over when it makes a float a constant
    for batch in (3, 7):
        assert compiled(torch.randn(batch, 3, 24, 32)).shape == (batch, 7)
    assert counter.frame_count == first


@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16])
def test_compiles_under_autocast_with_drops_and_checkpointing(residual_dtype, tiny, device):
    model = tiny(depth=1, patch_drop_rate=0.5, drop_path_rate=0.2, residual_dtype=residual_dtype, init_values=0.1)
    model.set_grad_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        output = compiled(torch.randn(2, 3, 24, 32))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("is_default", [True, False], ids=["default_device", "no_default"])
def test_compiles_other_methods(tiny, device, is_default):
    model = tiny(reg_tokens=1).eval()
    images = torch.randn(2, 3, 24, 32)

    def features(images):
        return model.forward_intermediates(images, 1, stop_early=True), model.get_attention_maps(images)

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    with torch.device(device) if is_default else nullcontext():
        torch.testing.assert_close(compiled(images), features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_compiles_with_inductor(tiny):
    model = tiny(reg_tokens=1)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (2, 4):
        images = torch.randn(batch, 3, 24, 32)
        for got, want in zip(step(compiled, images), step(model, images), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"mean": MEAN, "std": STD, "reg_tokens": 2}])
def test_exports_with_any_batch(arguments, tiny):
    model = tiny(**arguments).eval()
    images = torch.rand(2, 3, 24, 32)
    if "mean" in arguments:
        images = (images * 255).to(torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 2, 9):
        more = images.repeat(5, 1, 1, 1)[:size]
        torch.testing.assert_close(loaded(more), model(more), rtol=1e-4, atol=1e-5)
    assert sum("patch_embed" in str(node.target) for node in program.graph.nodes if node.op == "call_function") == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, tiny):
    model = tiny(mean=MEAN, std=STD, pos_embed="sincos", reg_tokens=1, drop_path_rate=0.1).eval()
    images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
    expected = model(images)
    other: Any
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is fastvit.VisionTransformer
    assert torch.equal(other(images), expected)
    with torch.no_grad():
        other.get_parameter("head.bias").add_(1)
    assert torch.equal(model(images), expected)  # it is a copy
    other.train()
    torch.nn.functional.cross_entropy(other(images), torch.tensor([0, 1])).backward()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign, tiny):
    model, other = tiny(reg_tokens=2), tiny(reg_tokens=2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    images = torch.randn(2, 3, 24, 32)
    assert torch.equal(model(images), other(images))


def test_from_the_meta_device(tiny):
    with torch.device("meta"):
        model = tiny()
    assert model(torch.randn(2, 3, 24, 32, device="meta")).shape == (2, 7)
    source = tiny()
    model.load_state_dict(source.state_dict(), assign=True)
    images = torch.randn(2, 3, 24, 32)
    assert torch.equal(model(images), source(images))


def test_wrapped_for_activation_checkpointing(tiny):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, source = tiny(), tiny()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    assert model.state_dict().keys() == source.state_dict().keys()
    model.load_state_dict(source.state_dict())
    images = torch.randn(2, 3, 24, 32)
    assert torch.equal(model(images), source(images))


def test_channels_last_and_float64(tiny):
    model = tiny()
    images = torch.randn(2, 3, 24, 32)
    expected = model(images)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    double = model.double()(images.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-5)


FX = {
    "plain": {},
    "any_size": {"dynamic_img_size": True, "dynamic_img_pad": True, "reg_tokens": 1, "no_embed_class": True},
    "pooled": {"global_pool": "map", "class_token": False, "embed_norm_layer": "layernorm", "pre_norm": True},
    "narrow": {"residual_dtype": torch.bfloat16, "drop_path_rate": 0.1},
}


@pytest.mark.parametrize("setting", FX)
def test_feature_extraction_by_torch_fx(setting, timm, tiny):
    from fastvit.peers import import_peer

    extraction: Any = import_peer("torchvision.models.feature_extraction")
    model = tiny(mean=MEAN, std=STD, **FX[setting]).eval()
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = extraction.create_feature_extractor(model, ["blocks.1", "head"])
    images = torch.randint(0, 256, (3, 3, 24, 32), dtype=torch.uint8)
    for pixels in (images, torch.randn(2, 3, 24, 32)):
        output = model(pixels)
        found = features(pixels)
        for got, want in ((found["head"], output), (found["blocks.1"], seen[-1])):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2 if setting == "narrow" else 1e-5)
    if setting == "any_size":
        other = torch.randint(0, 256, (1, 3, 33, 30), dtype=torch.uint8)
        torch.testing.assert_close(features(other)["head"], model(other), rtol=1e-3, atol=1e-5)
        return
    with pytest.raises(ValueError, match="images: 16 x 48, the model takes 24 x 32"):
        features(torch.randn(1, 3, 16, 48))  # as many patches


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.(trace|script|save|load)")
@pytest.mark.parametrize("setting", ["plain", "any_size", "pooled"])
def test_traces_by_jit_are_for_any_batch_and_need_no_fastvit(setting, tiny):
    model = tiny(mean=MEAN, std=STD, **FX[setting]).eval()
    images = torch.randint(0, 256, (5, 3, 24, 32), dtype=torch.uint8)
    traced = torch.jit.trace(model, images[:2])
    assert "fastvit::" not in str(traced.inlined_graph)
    for batch in (1, 5):
        torch.testing.assert_close(traced(images[:batch]), model(images[:batch]), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_onnx_by_the_exporter_that_traces(tiny, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model = tiny(mean=MEAN, std=STD, reg_tokens=1).eval()
    images = torch.randint(0, 256, (5, 3, 24, 32), dtype=torch.uint8)
    path = str(tmp_path / "model.onnx")
    axes = {"images": {0: "batch"}}
    torch.onnx.export(model, (images[:2],), path, dynamo=False, input_names=["images"], dynamic_axes=axes)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (output,) = session.run(None, {"images": images[:batch].cpu().numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(images[:batch]).detach().cpu(), rtol=1e-4, atol=1e-5)


def test_script_is_refused_in_words(tiny):
    for model in (tiny(), torch.nn.Sequential(tiny())):
        with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile .* torch.jit.trace"):
            torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:fastvit. .*a hook on every module")
def test_the_flop_counter_counts_what_it_counts_of_timm(pair_with_timm):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair_with_timm():
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 24, 32)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_compiled_and_trained_at_several_sizes(tiny):
    """The positions of each are resampled, and have a gradient."""
    model = tiny(dynamic_img_size=True)
    compiled = torch.compile(model, backend="aot_eager")
    for batch, height, width in ((2, 24, 32), (3, 40, 16), (2, 32, 32)):
        images = torch.randn(batch, 3, height, width)
        for got, want in zip(step(compiled, images), step(model, images), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_a_sample(tiny):
    """By torch.func: as many calls of one image give the same."""
    model, images = tiny(), torch.randn(3, 3, 24, 32)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for number, image in enumerate(images):
        want = torch.autograd.grad(model(image[None]).square().sum(), list(model.parameters()))
        for one, other in zip(found.values(), want, strict=True):
            torch.testing.assert_close(one[number], other, rtol=1e-3, atol=1e-5)
