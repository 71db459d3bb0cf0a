"""Faults planted in a backend at run time: what the validator must catch to be worth trusting.

    with planted("bias dropped", backend="cpu"):
        assert validate(backends=["cpu"]).failed

Each fault is a small, plausible mistake. A test plants every one and expects failures in the quantities it spoils.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit import backend as backends

Forward = Callable[..., Tensor]
Backward = Callable[..., Any]
# Places of the arguments of a backend's patch_embed `forward` and `backward`.
WEIGHT, BIAS, POSITIONS, MEAN, KEEP = 1, 2, 3, 5, 7
GRAD, BACKWARD_KEEP, PREFIX_ROWS = 0, 5, 7


@dataclass(frozen=True)
class Fault:
    """A mistake in one op: `forward` and `backward` run the backend's own function and spoil it."""

    name: str
    op: str
    spoils: str  # a quantity of the report in which the mistake must show
    forward: Callable[[Forward, tuple[Any, ...]], Tensor] | None = None
    backward: Callable[[Backward, tuple[Any, ...]], Any] | None = None


@contextmanager
def planted(name: str, backend: str = "cpu") -> Iterator[Fault]:
    """Run the block with one of FAULTS in a backend."""
    fault = FAULTS[name]
    module = importlib.import_module(f"{backends._PACKAGES[backend]}.{fault.op}")
    original = module.forward, module.backward
    forward, backward = original
    spoil_forward, spoil_backward = fault.forward, fault.backward
    if spoil_forward is not None:
        module.forward = lambda *arguments: spoil_forward(forward, arguments)  # type: ignore[attr-defined]
    if spoil_backward is not None:
        module.backward = lambda *arguments: spoil_backward(backward, arguments)  # type: ignore[attr-defined]
    backends.implementation.cache_clear()
    try:
        yield fault
    finally:
        module.forward, module.backward = original  # type: ignore[attr-defined]
        backends.implementation.cache_clear()


def _replaced(arguments: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:place], value, *arguments[place + 1 :])


def _bias_dropped(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    return forward(*_replaced(arguments, BIAS, None))


def _last_position_shifted(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    positions = arguments[POSITIONS]
    if positions is None or positions.shape[0] < 2:
        return forward(*arguments)
    positions = positions.clone()
    positions[-1] = positions[-2]
    return forward(*_replaced(arguments, POSITIONS, positions))


def _last_column_wrong(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    out = forward(*arguments).clone()
    out[..., -1] *= 1.25
    return out


def _one_token_zeroed(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    out = forward(*arguments).clone()
    out[-1:, out.shape[1] // 2] = 0
    return out


def _last_token_not_written(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    result = forward(*arguments)
    out = torch.empty_like(result)
    out.view(-1)[: out.numel() - out.shape[-1]] = result.reshape(-1)[: out.numel() - out.shape[-1]]
    return out


def _keep_ignored(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    keep = arguments[KEEP]
    if keep is None:
        return forward(*arguments)
    return forward(*_replaced(arguments, KEEP, torch.arange(keep.shape[1], device=keep.device).expand_as(keep)))


def _channels_of_the_mean_swapped(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    mean = arguments[MEAN]
    return forward(*_replaced(arguments, MEAN, None if mean is None else tuple(mean)[::-1]))


def _patch_flattened_in_another_order(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    weight = arguments[WEIGHT]
    return forward(*_replaced(arguments, WEIGHT, weight.flip(-1)))


def _output_rounded_twice(forward: Forward, arguments: tuple[Any, ...]) -> Tensor:
    # fp32 results through bf16: the kind of slip that looks right to the eye.
    return forward(*arguments).to(torch.bfloat16).to(arguments[-1])


def _row_gradient_off_by_a_batch(backward: Backward, arguments: tuple[Any, ...]) -> Any:
    result = backward(*arguments)
    grad = arguments[GRAD]
    if isinstance(result, Tensor):  # add_position
        return result - grad[-1:].sum(0, dtype=torch.float32)
    d_images, d_weight, d_bias, d_rows = result
    if arguments[BACKWARD_KEEP] is None and d_rows.numel():
        d_rows = d_rows - grad[-1:].sum(0, dtype=torch.float32)
    return d_images, d_weight, d_bias, d_rows


def _bias_gradient_counts_the_prefix(backward: Backward, arguments: tuple[Any, ...]) -> Any:
    d_images, d_weight, d_bias, d_rows = backward(*arguments)
    if d_bias.numel():
        d_bias = d_bias + arguments[GRAD][:, : arguments[PREFIX_ROWS]].float().sum((0, 1))
    return d_images, d_weight, d_bias, d_rows


def _last_weight_row_scaled(backward: Backward, arguments: tuple[Any, ...]) -> Any:
    d_images, d_weight, d_bias, d_rows = backward(*arguments)
    d_weight = d_weight.clone()
    d_weight[-1:] *= 1.1
    return d_images, d_weight, d_bias, d_rows


def _last_pixel_row_has_no_gradient(backward: Backward, arguments: tuple[Any, ...]) -> Any:
    d_images, d_weight, d_bias, d_rows = backward(*arguments)
    if d_images.numel():
        d_images = d_images.clone()
        d_images[:, :, -1] = 0
    return d_images, d_weight, d_bias, d_rows


_EMBED, _ADD = "patch_embed", "add_position"
FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("bias dropped", _EMBED, "forward", _bias_dropped),
        Fault("last patch's position shifted", _EMBED, "forward", _last_position_shifted),
        Fault("last column wrong", _EMBED, "forward", _last_column_wrong),
        Fault("one token zeroed", _EMBED, "forward", _one_token_zeroed),
        Fault("last token not written", _EMBED, "forward", _last_token_not_written),
        Fault("keep ignored", _EMBED, "forward", _keep_ignored),
        Fault("channels of the mean swapped", _EMBED, "forward", _channels_of_the_mean_swapped),
        Fault("patch flattened in another order", _EMBED, "forward", _patch_flattened_in_another_order),
        Fault("fp32 output rounded through bf16", _EMBED, "forward", _output_rounded_twice),
        Fault("dPos off by a batch", _EMBED, "d_pos_embed", None, _row_gradient_off_by_a_batch),
        Fault("dBias counts the prefix", _EMBED, "d_bias", None, _bias_gradient_counts_the_prefix),
        Fault("last weight row's gradient scaled", _EMBED, "d_weight", None, _last_weight_row_scaled),
        Fault("last pixel row without gradient", _EMBED, "d_images", None, _last_pixel_row_has_no_gradient),
        Fault("add_position: last column wrong", _ADD, "forward", _last_column_wrong),
        Fault("add_position: one token zeroed", _ADD, "forward", _one_token_zeroed),
        Fault("add_position: dPos off by a batch", _ADD, "d_pos_embed", None, _row_gradient_off_by_a_batch),
    )
}
