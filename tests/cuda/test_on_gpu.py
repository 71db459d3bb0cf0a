"""The extension on a GPU: devices, streams and graphs. What it computes, tests/ops and tests/kernels hold to the
reference."""

from __future__ import annotations

import pytest
import torch

cuda = pytest.importorskip("fastvit.cuda")
reason = cuda.why_unavailable("cuda")
pytestmark = pytest.mark.skipif(reason != "", reason=reason)


def tensors(device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, pos_embed, and the sum."""
    tokens, positions = torch.randn(2, 5, 8, device=device), torch.randn(5, 8, device=device)
    return tokens, positions, tokens + positions


def test_tensors_must_be_on_one_device() -> None:
    tokens, positions, _ = tensors()
    with pytest.raises(RuntimeError, match="^pos_embed: on another device than tokens; they must match"):
        torch.ops.fastvit.add_position_cuda(tokens, positions.cpu(), None, torch.float32)


def test_runs_on_the_current_stream() -> None:
    tokens, positions, expected = tensors()
    late = torch.zeros_like(tokens)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, in which a kernel on any other stream would have read zeros
        late.copy_(tokens)
        found = torch.ops.fastvit.add_position_cuda(late, positions, None, torch.float32)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    tokens, positions, expected = tensors("cuda:1")
    assert torch.equal(torch.ops.fastvit.add_position_cuda(tokens, positions, None, torch.float32), expected)
    assert torch.cuda.current_device() == 0


def test_is_captured_in_a_graph() -> None:
    tokens, positions, _ = tensors()
    torch.ops.fastvit.add_position_cuda(tokens, positions, None, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.fastvit.add_position_cuda(tokens, positions, None, torch.float32)
    tokens.mul_(2)
    graph.replay()
    assert torch.equal(found, tokens + positions)
