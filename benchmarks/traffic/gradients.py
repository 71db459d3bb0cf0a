"""Gradients as autograd gives them, walked node by node from Python.

PyTorch's own engine orders work by the streams of a GPU, and refuses tensors of one where there is none. The nodes
themselves don't: here they are run in the engine's order, with what the engine does between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Grads = dict[Any, dict[int, Tensor]]  # node → number of its input → gradient


def gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None],
    **_: Any,
) -> tuple[Tensor | None, ...]:
    """What `torch.autograd.grad` returns with `allow_unused=True`: a gradient for each input, None for unused ones."""
    given: Any = ([x] if isinstance(x, Tensor) else x for x in (outputs, inputs, grad_outputs))
    outputs, inputs, grad_outputs = given
    starts = [get_gradient_edge(output) for output in outputs]
    ends = [get_gradient_edge(value) for value in inputs]
    wanted = {end.node for end in ends}
    needed = _leading_to(wanted, [start.node for start in starts])
    grads: Grads = {}
    with torch.no_grad():
        for start, grad in zip(starts, grad_outputs, strict=True):
            _add(grads, start.node, start.output_nr, grad)
        # A node is made after those that it hands its gradients to.
        for node in sorted(needed, key=lambda node: node._sequence_nr(), reverse=True):
            if node in grads:
                arrived = grads[node] if node in wanted else grads.pop(node)
                for (child, number), grad in _run(node, arrived):
                    if child in needed or child in wanted:
                        _add(grads, child, number, grad)
    return tuple(grads.get(end.node, {}).get(end.output_nr) for end in ends)


def _leading_to(wanted: set[Any], starts: Sequence[Any]) -> set[Any]:
    """The nodes from which one that is wanted can be reached."""
    leads: dict[Any, bool] = {}
    stack = [(node, False) for node in starts]
    while stack:
        node, has_children = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if has_children:
            leads[node] = any(child in wanted or leads.get(child, False) for child in children)
        elif node not in leads:
            leads[node] = False
            stack += [(node, True), *((child, False) for child in children)]
    return {node for node, does in leads.items() if does}


def _add(grads: Grads, node: Any, number: int, grad: Tensor | None) -> None:
    """Hand a gradient to a node: in the shape and the dtype of what the node has made, added to what is there."""
    if grad is None:
        return
    made = node._input_metadata[number]
    if grad.shape != made.shape:
        grad = grad.sum_to_size(made.shape)
    if grad.dtype != made.dtype:
        grad = grad.to(made.dtype)
    known = grads.setdefault(node, {})
    known[number] = grad if number not in known else known[number] + grad


def _run(node: Any, given: dict[int, Tensor]) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """A node's gradients, each with the node it goes to and the number of the input there."""
    grads = [given.get(number) for number in range(len(node._input_metadata))]
    is_of_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    if not is_of_python:
        results = node(*grads)
        results = results if isinstance(results, tuple) else (results,)
        return list(zip(node.next_functions, results, strict=True))
    if not getattr(node, "keeps_none", False):  # noted by fake_gpu
        grads = [_zeros(m) if g is None else g for g, m in zip(grads, node._input_metadata, strict=True)]
    results = node.apply(*grads)
    results = results if isinstance(results, tuple) else (results,)
    # Its edges are those of tensors alone, its results those of all arguments.
    kept = [result for result, needs in zip(results, node.needs_input_grad, strict=True) if needs]
    return list(zip([edge for edge in node.next_functions if edge[0] is not None], kept, strict=True))


def _zeros(made: Any) -> Tensor:
    return torch.zeros(made.shape, dtype=made.dtype, device=made.device)
