"""Threads: as many as PyTorch may use, and the same bits with any number of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastvit import functional, native

ROWS, WIDTH = (4, 197), 200  # several chunks of rows, and a tail


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    if native.why_unavailable("cpu"):
        pytest.skip(native.why_unavailable("cpu"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(op: str) -> list[torch.Tensor]:
    """Of an op and its gradients, of the same numbers each time."""
    torch.manual_seed(0)
    x = torch.randn(*ROWS, WIDTH, requires_grad=True)
    vectors = [torch.randn(WIDTH, requires_grad=True) for _ in range(3)]
    if op == "patch_embed":
        images = torch.randint(256, (9, 3, 64, 64), dtype=torch.uint8)
        weight, table = torch.randn(WIDTH, 3, 8, 8, requires_grad=True), torch.randn(64, WIDTH, requires_grad=True)
        options = {"pos_embed": table, "mean": [0.5] * 3, "std": [0.2] * 3, "backend": "native"}
        found, given = [functional.patch_embed(images, weight, vectors[0], **options)], [weight, vectors[0], table]
    elif op == "patch_embed_packed":
        images = [torch.randint(256, (3, 8 * (1 + i % 5), 8 * (1 + i % 7)), dtype=torch.uint8) for i in range(30)]
        rows = sum(image[0].numel() // 64 for image in images)  # a grid would be resampled by PyTorch
        weight, table = torch.randn(WIDTH, 3, 8, 8, requires_grad=True), torch.randn(rows, WIDTH, requires_grad=True)
        found = [functional.patch_embed_packed(images, weight, vectors[0], pos_embed=table, backend="native")[0]]
        given = [weight, vectors[0], table]
    elif op == "add_position":
        table = torch.randn(ROWS[1], WIDTH, requires_grad=True)
        found, given = [functional.add_position(x, table, backend="native")], [x, table]
    elif op == "add_norm":
        branch = torch.randn(*ROWS, WIDTH, requires_grad=True)
        bias, weight, scale = vectors
        found = list(functional.add_norm(x, branch, bias, scale=scale, weight=weight, eps=1e-6, backend="native"))
        given = [x, branch, *vectors]
    elif op == "bias_act":
        found, given = [functional.bias_act(x, vectors[0], backend="native")], [x, vectors[0]]
    else:
        qkv, bias = torch.randn(*ROWS, 3 * WIDTH, requires_grad=True), torch.randn(3 * WIDTH, requires_grad=True)
        found = functional.attention if op == "attention" else functional.split_heads
        found = found(qkv, bias, 4, backend="native")
        found, given = [found] if op == "attention" else list(found), [qkv, bias]
    gradients = torch.autograd.grad(found, given, [torch.randn_like(tensor) for tensor in found])
    return [*found, *gradients]


@pytest.mark.parametrize("op", native.ops())
def test_the_same_bits_with_any_number(op: str) -> None:
    torch.set_num_threads(1)
    alone = results(op)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(alone, results(op), strict=True)), count
