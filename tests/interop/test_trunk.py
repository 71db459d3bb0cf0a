"""Blocks of other libraries on the trunk's ops: the library's results, whatever is done to a block afterwards."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit import backend as backends
from fastvit import stream
from fastvit.backend import available_backends, use_backend
from fastvit.interop.trunk import Blocks, TrunkBlock
from fastvit.peers import import_peer
from tests.interop.subjects import OUTPUTS, build, error, expect_close, expect_same_gradients, gradients, launched
from tests.interop.zoo import ENTRIES, Entry, randomise, tensors
from tests.libraries import skipped_without_library

DEPTH, WIDTH, HEADS, SIZE = 3, 48, 3, 32
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
OF_TRANSFORMERS = {
    "image_size": SIZE, "patch_size": 8, "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
}  # fmt: skip


def timm_vit(**options: Any) -> Any:
    return import_peer("timm").models.vision_transformer.VisionTransformer(**SMALL, **options)


def torchvision_vit(**options: Any) -> Any:
    vit = import_peer("torchvision").models.vision_transformer
    return vit.VisionTransformer(SIZE, 8, DEPTH, HEADS, WIDTH, 2 * WIDTH, num_classes=5, **options)


def dinov2(**options: Any) -> Any:
    peer = import_peer("transformers")
    return peer.Dinov2Model(peer.Dinov2Config(**OF_TRANSFORMERS, **options))


MODELS: dict[str, Callable[[], Any]] = {
    "timm": lambda: timm_vit(init_values=0.3, drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1),
    "timm, no dropout": lambda: timm_vit(init_values=0.3, drop_path_rate=0.3),
    "torchvision": lambda: torchvision_vit(dropout=0.1, attention_dropout=0.1),
    "transformers": lambda: dinov2(drop_path_rate=0.3, layerscale_value=0.3, hidden_dropout_prob=0.1),
}


def pair(make: Callable[[], Any], **arguments: Any) -> tuple[Any, Any]:
    """An accelerated model, its trunk on the CPU, and an untouched one; both train."""
    torch.manual_seed(0)
    with skipped_without_library():
        untouched = make().train()
    randomise(untouched)
    return fastvit.accelerate(copy.deepcopy(untouched), **{"backend": "cpu", **arguments}), untouched


def expect_the_same(accelerated: Any, untouched: Any, images: Tensor | None = None) -> None:
    images = torch.randn(2, 3, SIZE, SIZE) if images is None else images
    results = []
    for model in (accelerated, untouched):
        torch.manual_seed(1)
        outputs = tensors(model(images))
        results.append((outputs, gradients(model, [output for output in outputs if output.requires_grad])))
    (got, mine), (want, theirs) = results
    expect_close(got, want)
    expect_same_gradients(mine, theirs)


def blocks_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TrunkBlock)]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_class_gives_the_librarys_results(entry: Entry) -> None:
    untouched = build(str(entry))
    accelerated = fastvit.accelerate(copy.deepcopy(untouched), backend="cpu")
    blocks = blocks_of(accelerated)
    if not blocks:
        pytest.skip(f"the blocks of {entry} are of no form that is known")
    assert len(blocks) == sum(len(found.paths) for found in fastvit.report(accelerated).trunk)
    results = []
    for model in (accelerated, untouched):
        launched("add_norm")
        outputs = entry.outputs(model, entry.images())
        assert (launched("add_norm") > 0) == (model is accelerated)
        results.append((outputs, gradients(model, [output for output in outputs if output.requires_grad])))
    (got, mine), (want, theirs) = results
    expect_close(got, want)
    expect_same_gradients(mine, theirs)
    state = untouched.state_dict()
    assert accelerated.state_dict().keys() == state.keys()
    fastvit.restore(accelerated)
    assert [type(module) for module in accelerated.modules()] == [type(module) for module in untouched.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_training_has_the_same_losses(name: str) -> None:
    """Fifty steps with random numbers in every place where a block has some."""
    accelerated, untouched = pair(MODELS[name])
    images, losses = torch.randn(8, 3, SIZE, SIZE), []
    for model in (accelerated, untouched):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            output = tensors(model(images))[0]
            loss = (output.flatten(1) - images.flatten(1)[:, : output.flatten(1).shape[1]]).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
        losses[-1].append(torch.rand(()))  # the generator is where it would be
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-3, atol=1e-5)
    assert losses[0][-1] == losses[1][-1] and losses[0][0] > losses[0][-2]


@pytest.mark.parametrize("name", ["timm, no dropout", "torchvision"])
def test_between_blocks_nothing_is_added_by_itself(name: str) -> None:
    accelerated, untouched = pair(MODELS[name])
    assert isinstance(blocks_of(accelerated)[0], TrunkBlock)
    assert any(isinstance(module, Blocks) for module in accelerated.modules())
    launched("add_norm")
    expect_the_same(accelerated, untouched)
    assert launched("add_norm") == 2 * DEPTH


def hook_on_a_block(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1].register_forward_hook(lambda _, inputs, output: heard.append((inputs[0], output)))


def hook_on_attention(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1].attn.register_forward_hook(lambda _, inputs, output: heard.append((inputs[0], output)))


def hook_on_a_norm(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1].norm2.register_forward_hook(lambda _, inputs, output: heard.append((inputs[0], output)))


def hook_on_a_linear_layer(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[0].mlp.fc2.register_forward_hook(lambda _, inputs, output: heard.append((inputs[0], output)))


def hook_on_layer_scale(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[0].ls1.register_forward_hook(lambda _, inputs, output: heard.append((inputs[0], output)))


def hook_on_drop_path(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[2].drop_path1.register_forward_hook(lambda _, x, output: heard.append((x[0], output)))


def blocks_in_order(model: Any) -> Any:
    return model.blocks


class Adapter(nn.Module):
    """What LoRA and its like put around a linear layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features, bias=False)  # type: ignore[arg-type]
        nn.init.constant_(self.more.weight, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.more(x)


def adapters(model: Any, heard: list[Any]) -> None:
    block = blocks_in_order(model)[1]
    block.attn.proj, block.mlp.fc2, block.attn.qkv = (
        Adapter(m) for m in (block.attn.proj, block.mlp.fc2, block.attn.qkv)
    )


def a_norm_of_ones_own(model: Any, heard: list[Any]) -> None:
    class Halved(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    blocks_in_order(model)[1].norm1 = Halved(WIDTH)


def a_forward_on_the_module(model: Any, heard: list[Any]) -> None:
    mlp = blocks_in_order(model)[1].mlp
    mlp.forward = lambda x: F.relu(x)


def a_block_of_ones_own(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1] = nn.Sequential(nn.LayerNorm(WIDTH, eps=0.1), nn.Tanh())


def another_eps(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1].norm1.eps = 0.5


def another_share_dropped(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1].drop_path1.drop_prob = 0.6


def weight_norm(model: Any, heard: list[Any]) -> None:
    torch.nn.utils.parametrizations.weight_norm(blocks_in_order(model)[1].mlp.fc2)


def checkpointing(model: Any, heard: list[Any]) -> None:
    model.set_grad_checkpointing(True)


def attention_by_hand(model: Any, heard: list[Any]) -> None:
    blocks_in_order(model)[1].attn.fused_attn = False


CHANGES = (
    hook_on_a_block, hook_on_attention, hook_on_a_norm, hook_on_a_linear_layer, hook_on_layer_scale, hook_on_drop_path,
    adapters, a_norm_of_ones_own, a_forward_on_the_module, a_block_of_ones_own, another_eps, another_share_dropped,
    weight_norm, checkpointing, attention_by_hand,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_afterwards_holds(change: Callable[[Any, list[Any]], None]) -> None:
    accelerated, untouched = pair(MODELS["timm, no dropout"])
    heard: tuple[list[Any], list[Any]] = ([], [])
    for model, list_ in zip((accelerated, untouched), heard, strict=True):
        torch.manual_seed(3)
        change(model, list_)
    expect_the_same(accelerated, untouched)
    assert len(heard[0]) == len(heard[1])
    for mine, theirs in zip(*heard, strict=True):
        for got, want in zip(mine, theirs, strict=True):
            assert got.dtype == want.dtype and error(got, want) < OUTPUTS


def test_report_names_what_runs_as_it_is() -> None:
    accelerated, _ = pair(MODELS["timm, no dropout"])
    assert not fastvit.report(accelerated).trunk[0].whole
    hook_on_attention(accelerated, [])
    a_norm_of_ones_own(accelerated, [])
    (found,) = fastvit.report(accelerated).trunk
    assert found.module == "timm.models.vision_transformer.Block" and len(found.paths) == DEPTH
    assert found.whole == {"blocks.1": f"a norm is a {__name__}.a_norm_of_ones_own.<locals>.Halved; attn has hooks"}
    assert "as the library has it in blocks.1: a norm is a tests.interop.test_trunk" in str(fastvit.report(accelerated))


def test_a_cpu_without_ops_of_its_own_runs_the_librarys_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._REASONS, "native", lambda device_type: "left out of this test")
    monkeypatch.setattr(stream, "LEAST_ON_A_CPU", 1)
    torch.manual_seed(0)
    model = fastvit.accelerate(timm_vit())
    images = torch.randn(2, 3, SIZE, SIZE)
    launched("add_norm")
    model(images)
    with use_backend("cpu"):
        model(images)
    assert launched("add_norm") == 0
    fastvit.accelerate(model, backend="cpu")(images)
    assert launched("add_norm") == 2 * DEPTH
    fastvit.accelerate(model, backend="cpu", trunk=False)
    model(images)
    assert launched("add_norm") == 0 and not blocks_of(model)


def test_a_cpu_with_ops_of_its_own_runs_the_blocks_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = available_backends("cpu")["native"]
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(backends, "_environment", None)
    accelerated, untouched = pair(MODELS["timm, no dropout"], backend=None)
    launched("add_norm")
    expect_the_same(accelerated, untouched)
    assert launched("add_norm") == 0, "too few tokens"
    monkeypatch.setattr(stream, "LEAST_ON_A_CPU", 1)
    expect_the_same(accelerated, untouched)
    assert launched("add_norm") > 0
    with use_backend("cpu"):
        expect_the_same(accelerated, untouched)
    assert launched("add_norm") == 0


@pytest.mark.parametrize("name", ["timm, no dropout", "torchvision", "transformers"])
def test_copies_and_pickles_stay_accelerated(name: str) -> None:
    accelerated, untouched = pair(MODELS[name])
    kept = io.BytesIO()
    torch.save(accelerated, kept)
    kept.seek(0)
    for other in (copy.deepcopy(accelerated), torch.load(kept, weights_only=False)):
        assert len(blocks_of(other)) == DEPTH
        expect_the_same(other, untouched)


def test_a_narrow_stream_stays_narrow_with_layer_scale() -> None:
    accelerated, _ = pair(MODELS["timm, no dropout"], residual_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = accelerated.forward_intermediates(torch.randn(2, 3, SIZE, SIZE), output_fmt="NLC")
    assert {tokens.dtype for tokens in found} == {torch.bfloat16}


def test_masks_and_intermediates() -> None:
    accelerated, untouched = pair(lambda: timm_vit())
    images, mask = torch.randn(2, 3, SIZE, SIZE), torch.ones(17, 17).tril().bool()
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        assert error(accelerated(images, **options), untouched(images, **options)) < OUTPUTS
    got, want = (tensors(list(model.forward_intermediates(images))) for model in (accelerated, untouched))
    assert max(error(*both) for both in zip(got, want, strict=True)) < OUTPUTS


@pytest.mark.parametrize("name", ["timm, no dropout", "torchvision"])
def test_compiles_whole_and_once_for_all_batch_sizes(name: str) -> None:
    accelerated, untouched = pair(lambda: timm_vit(init_values=0.3) if name.startswith("timm") else torchvision_vit())
    graphs: list[list[str]] = []  # of a graph's ops

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(accelerated, backend=compiler, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        images = torch.randn(batch, 3, SIZE, SIZE)
        got, want = compiled(images), untouched(images)
        expect_close([got], [want])
        expect_same_gradients(gradients(accelerated, [got]), gradients(untouched, [want]))
    (ops,) = [graph for graph in graphs if graph]  # that of the model's door has none
    assert sum("add_norm" in op for op in ops) == 2 * DEPTH


def test_compiled_without_gradients_and_exported_blocks_are_the_librarys() -> None:
    accelerated, untouched = pair(MODELS["timm, no dropout"])
    accelerated.eval(), untouched.eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    torch._dynamo.reset()
    launched("add_norm")
    with torch.no_grad():
        assert error(torch.compile(accelerated, backend="eager", fullgraph=True)(images), untouched(images)) < OUTPUTS
    assert launched("add_norm") == 0
    program = torch.export.export(accelerated, (images,))
    assert not [node for node in program.graph.nodes if "add_norm" in str(node.target)]
