"""What torch expects of an op: opcheck, fakes, autograd's rules, torch.compile without breaks or recompilation."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import functional
from fastvit.backend import launch_counts, use_backend

OPS = torch.ops.fastvit
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def make(device: str, *, uint8: bool = False, batch: int = 2, grad: bool = True) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (batch, 3, 8, 12), dtype=torch.uint8) if uint8 else torch.randn(batch, 3, 8, 12)
    tensors = {
        "images": images,
        "weight": torch.randn(16, 3, 4, 4) * 0.1,
        "bias": torch.randn(16),
        "pos_embed": torch.randn(7, 16),
        "prefix": torch.randn(1, 16),
    }
    return {name: t.to(device).requires_grad_(grad and t.is_floating_point()) for name, t in tensors.items()}


def call(tensors: dict[str, Tensor], **kwargs: Any) -> Tensor:
    tensors = dict(tensors)
    return functional.patch_embed(tensors.pop("images"), tensors.pop("weight"), **tensors, **kwargs)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("keep", [False, True], ids=["all", "keep"])
def test_opcheck_patch_embed(backend: str, device: str, uint8: bool, keep: bool) -> None:
    t = make(device, uint8=uint8)
    kept = torch.tensor([[0, 5, 5], [3, 2, 1]], device=device) if keep else None
    args = (*t.values(), kept, *IMAGENET, torch.float32, torch.float32, backend)
    torch.library.opcheck(OPS.patch_embed.default, args, test_utils=CHECKS)
    grad = torch.randn(2, 4 if keep else 7, 16, device=device)
    needs = [not uint8, True, True, True]
    plain = {name: tensor.detach() for name, tensor in t.items()}
    args = (grad, plain["images"], plain["weight"], kept, *IMAGENET, torch.float32, 1, needs, backend)
    torch.library.opcheck(OPS.patch_embed_backward.default, args, test_utils=CHECKS)


def test_opcheck_add_position(backend: str, device: str) -> None:
    t = make(device)
    tokens = torch.randn(2, 6, 16, device=device, requires_grad=True)
    torch.library.opcheck(
        OPS.add_position.default, (tokens, t["pos_embed"], t["prefix"], torch.float32, backend), test_utils=CHECKS
    )
    grad = torch.randn(2, 7, 16, device=device)
    torch.library.opcheck(OPS.add_position_backward.default, (grad, backend), test_utils=CHECKS)


def test_opcheck_prepare_weight(device: str) -> None:
    t = make(device, grad=False)
    for dtype in (torch.float32, torch.bfloat16):
        for uint8 in (False, True):
            args = (t["weight"], t["bias"], *IMAGENET, uint8, dtype)
            torch.library.opcheck(OPS.prepare_weight.default, args, test_utils=CHECKS)


def test_gradcheck_through_the_reference() -> None:
    t = {name: tensor.detach().double().requires_grad_() for name, tensor in make("cpu").items()}
    keep = torch.tensor([[0, 5, 5], [3, 2, 1]])
    for kept in (None, keep):

        def run(*tensors: Tensor, kept: Tensor | None = kept) -> Tensor:
            return call(dict(zip(t, tensors, strict=True)), mean=IMAGENET[0], std=IMAGENET[1], keep=kept)

        assert torch.autograd.gradcheck(run, tuple(t.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, tuple(t.values()), fast_mode=True)

    def add(tokens: Tensor, pos_embed: Tensor, prefix: Tensor) -> Tensor:
        return functional.add_position(tokens, pos_embed, prefix=prefix)

    tokens = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(add, (tokens, t["pos_embed"], t["prefix"]), fast_mode=True)


def test_only_the_gradients_asked_for_are_computed(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastvit.ops.patch_embed")  # the package's attribute is the op itself
    seen: list[list[bool]] = []
    op = module.patch_embed_backward

    def spy(*args: Any) -> Any:
        seen.append(list(args[8]))
        return op(*args)

    monkeypatch.setattr(module, "patch_embed_backward", spy)
    t = make(device)
    for names in (["weight"], ["bias"], ["prefix"], ["images"], ["pos_embed", "bias"]):
        inputs = {name: tensor.detach().requires_grad_(name in names) for name, tensor in t.items()}
        call(inputs, backend=backend).square().sum().backward()
        assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [
            name for name in inputs if name in names
        ]
    assert seen == [
        [False, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
        [True, False, False, False],
        [False, False, True, True],
    ]


def test_gradients_share_no_memory(device: str, backend: str) -> None:
    t = make(device)
    needs = [True] * 4
    plain = {name: tensor.detach() for name, tensor in t.items()}
    grad = torch.randn(2, 7, 16, device=device)
    out = OPS.patch_embed_backward(
        grad, plain["images"], plain["weight"], None, None, None, torch.float32, 1, needs, backend
    )
    pointers = [tensor.untyped_storage().data_ptr() for tensor in (*out, grad)]
    assert len(set(pointers)) == len(pointers)
    assert [tuple(tensor.shape) for tensor in out] == [(2, 3, 8, 12), (16, 3, 4, 4), (16,), (7, 16)]
    none = OPS.patch_embed_backward(
        grad, plain["images"], plain["weight"], None, None, None, torch.float32, 1, [False] * 4, backend
    )
    assert [tensor.numel() for tensor in none] == [0] * 4


def compile_counting(function: Callable[..., Tensor], **options: Any) -> tuple[Callable[..., Tensor], list[int]]:
    """torch.compile with no graph break allowed, and the list that grows with every graph compiled."""
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[int] = []

    def compiler(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler), **options), graphs


def test_compiles_whole_and_once_for_all_batch_sizes(device: str, backend: str) -> None:
    parameters = make(device, uint8=True)

    def step(images: Tensor) -> Tensor:
        tensors = {**parameters, "images": images}
        return call(tensors, mean=IMAGENET[0], std=IMAGENET[1], backend=backend).square().sum()

    compiled, graphs = compile_counting(step, dynamic=True)
    compiled(make(device, uint8=True, batch=2)["images"]).backward()
    first = len(graphs)
    for batch in (3, 4, 7, 8):
        images = make(device, uint8=True, batch=batch)["images"]
        for tensor in parameters.values():
            tensor.grad = None
        compiled(images).backward()
        grads = [tensor.grad for tensor in parameters.values()]
        for tensor in parameters.values():
            tensor.grad = None
        step(images).backward()
        for mine, tensor in zip(grads, parameters.values(), strict=True):
            assert (mine is None and tensor.grad is None) or torch.equal(mine, tensor.grad)
    assert len(graphs) == first


def test_compiles_under_autocast_with_the_eager_result(device: str, backend: str) -> None:
    t = make(device)
    for dtype in (torch.bfloat16, torch.float16):

        def run(images: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            with torch.autocast(device, dtype):
                return call({**t, "images": images}, backend=backend)

        compiled, _ = compile_counting(run)
        eager = run(t["images"])
        assert eager.dtype == dtype
        assert torch.equal(compiled(t["images"]), eager)


def test_changing_the_forced_backend_is_noticed_by_compiled_code(device: str, backend: str) -> None:
    t = make(device)
    compiled, _ = compile_counting(lambda images: call({**t, "images": images}))
    with use_backend(backend):
        compiled(t["images"])
        assert launch_counts() == {("patch_embed", backend): 1}
    with use_backend("reference"):
        compiled(t["images"])
    assert launch_counts() == {("patch_embed", backend): 1}


def test_backward_uses_the_backend_of_its_forward(device: str, backend: str) -> None:
    t = make(device)
    with use_backend(backend):
        loss = call(t).square().sum()
    thread = threading.Thread(target=loss.backward)  # after the scope has ended, in another thread
    thread.start()
    thread.join()
    assert launch_counts() == {("patch_embed", backend): 1, ("patch_embed_backward", backend): 1}
    assert t["weight"].grad is not None


def test_exports(device: str, backend: str) -> None:
    class Embed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = torch.nn.Conv2d(3, 16, 4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return functional.patch_embed(images, self.proj.weight, self.proj.bias, backend=backend)

    module, images = Embed().to(device), torch.randn(2, 3, 8, 12, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        images = torch.randn(size, 3, 8, 12, device=device)
        assert torch.equal(program.module()(images), module(images))


def test_fake_and_meta_shapes() -> None:
    meta = {name: tensor.to("meta") for name, tensor in make("cpu", grad=False).items()}
    assert call(meta).shape == (2, 7, 16)
    keep = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    out = call(meta, keep=keep, dtype=torch.bfloat16)
    assert out.shape == (2, 4, 16) and out.dtype == torch.bfloat16
