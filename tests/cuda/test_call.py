"""What the extension's ops raise, as it arrives from the package's: with stubs in place of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvit import backend, functional

BOTH_WAYS = ("patch_embed", "add_position", "add_norm", "bias_act")
OPS = (*(f"{op}{way}_cuda" for op in BOTH_WAYS for way in ("", "_backward")), "split_heads_backward_cuda")
NO_MEMORY = (
    "fastvit: can't allocate 4096 bytes: out of memory?",  # of a torch that does not say why
    "fastvit: can't allocate 4096 bytes: CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of",
    "fastvit: CUDA refuses a launch of 7 x 1 blocks of 128 threads and 0 bytes of shared memory: out of memory",
)
OTHERS = (
    "fastvit: can't allocate 4096 bytes: CUDA error: an illegal memory access was encountered",
    "fastvit: CUDA refuses a launch of 7 x 1 blocks of 128 threads and 0 bytes of shared memory: invalid argument",
    "bias: expected [out of memory], got [7]",
)


class Library:
    """Ops that raise, each once it is named; the others return what has the shape of their results."""

    def __init__(self) -> None:
        self.raised: dict[str, Exception] = {}

    def op(self, name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if name in self.raised:
                raise self.raised[name]
            return result(*arguments)

        return run


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """In place of the extension, for tensors on the CPU."""
    stub = Library()
    results: dict[str, Callable[..., Any]] = {
        "patch_embed_cuda": lambda images, weight, *_: images.new_zeros(1, 4, weight.shape[0]),
        "patch_embed_backward_cuda": lambda grad, _, images, weight, *__: (
            torch.zeros_like(images), torch.zeros_like(weight), grad.new_zeros(weight.shape[0]), grad.new_zeros(0)
        ),
        "add_position_cuda": lambda tokens, *_: torch.zeros_like(tokens),
        "add_position_backward_cuda": lambda grad: torch.zeros_like(grad[0]),
        "add_norm_cuda": lambda residual, *_: (
            torch.zeros_like(residual), torch.zeros_like(residual), residual.new_zeros(2, 4)
        ),
        "add_norm_backward_cuda": lambda total, *_: (
            torch.zeros_like(total), total.new_zeros(0), total.new_zeros(1, total.shape[-1])
        ),
        "bias_act_cuda": lambda x, *_: torch.zeros_like(x),
        "bias_act_backward_cuda": lambda d_out, x, *_: (torch.zeros_like(x), x.new_zeros(0), x.new_zeros(x.shape[-1])),
        "split_heads_backward_cuda": lambda d_q, *_: (d_q.new_zeros(1, 4, 3 * 5), d_q.new_zeros(3 * 5)),
    }  # fmt: skip
    for name, result in results.items():
        monkeypatch.setattr(torch.ops.fastvit, name, stub.op(name, result), raising=False)
    monkeypatch.setitem(backend._REASONS, "cuda", lambda device_type: "")
    return stub


def run(name: str, transform: Callable[[Callable], Callable] = lambda function: function) -> None:
    """Forward and backward of the function that calls the op of this name."""
    if name.startswith("patch_embed"):
        inputs = torch.randn(1, 3, 8, 8), torch.randn(5, 3, 4, 4)
        function: Callable[..., Tensor] = functional.patch_embed
    elif name.startswith("add_norm"):
        inputs = torch.randn(1, 4, 5), torch.randn(5)
        branch = torch.randn(1, 4, 5)

        def function(residual: Tensor, weight: Tensor, backend: str) -> Tensor:
            return functional.add_norm(residual, branch, weight=weight, eps=1e-6, backend=backend)[1]

    elif name.startswith("bias_act"):
        inputs = torch.randn(1, 4, 5), torch.randn(5)
        function = functional.bias_act
    elif name.startswith("split_heads"):
        inputs = torch.randn(1, 4, 3 * 5), torch.randn(3 * 5)

        def function(qkv: Tensor, bias: Tensor, backend: str) -> Tensor:
            return torch.cat(functional.split_heads(qkv, bias, 1, backend=backend))

    else:
        inputs = torch.randn(1, 4, 5), torch.randn(4, 5)
        function = functional.add_position
    for tensor in inputs:
        tensor.requires_grad_()
    transform(lambda *tensors: function(*tensors, backend="cuda"))(*inputs).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("message", NO_MEMORY)
def test_no_memory_is_torchs_own_error(library: Library, name: str, message: str) -> None:
    run(name)
    library.raised[name] = RuntimeError(message)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(name)
    assert str(error.value) == message and error.value.__cause__ is library.raised[name]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("message", OTHERS)
def test_other_errors_pass_unchanged(library: Library, name: str, message: str) -> None:
    library.raised[name] = RuntimeError(message)
    with pytest.raises(RuntimeError) as error:
        run(name)
    assert type(error.value) is RuntimeError and str(error.value) == message


def test_without_gradients_too(library: Library) -> None:
    """Where the dispatcher is passed by."""
    library.raised["patch_embed_cuda"] = RuntimeError(NO_MEMORY[0])
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        functional.patch_embed(torch.randn(1, 3, 8, 8), torch.randn(5, 3, 4, 4), backend="cuda")


@pytest.mark.parametrize("name", OPS)
def test_in_a_compiled_function(library: Library, name: str) -> None:
    def compiled(function: Callable) -> Callable:
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    run(name, compiled)
    library.raised[name] = RuntimeError(NO_MEMORY[1])
    with pytest.raises(torch.OutOfMemoryError, match="^" + NO_MEMORY[1][:60]):
        run(name, compiled)
