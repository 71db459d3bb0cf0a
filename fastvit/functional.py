"""The public ops: they check their arguments once, settle dtypes and backend, and call the registered torch op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvit import backend as backends
from fastvit import checks, ops, reference
from fastvit.tuning import FORWARD, TRAINING

__all__ = ["add_position", "patch_embed"]


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Turn raw images into a finished token sequence in one pass over the pixels.

    Patches are flattened in (C, P_h, P_w) order, projected, given their bias and position, and written behind
    the prefix rows. Sums are made in float32 and rounded once. This is the patch embedding of the Vision
    Transformer (Dosovitskiy et al., 2021, section 3.1, equation 1), with the loader's normalisation included.

    Args:
        images: [B, C, H, W] uint8, float16, bfloat16, float32 or float64. NCHW and channels_last are both read in
            place, with any batch stride; H and W are multiples of the patch.
        weight: [D, C, P_h, P_w], laid out as the convolution's.
        bias: [D].
        pos_embed: [N, D] (patches only) or [R+N, D] (prefix rows too); a leading 1 is allowed.
        prefix: [R, D] or [1, R, D], class and register tokens; they become rows 0..R-1 of every sample.
        mean, std: one float a channel, in the 0..1 scale: (x − mean) / std. A tensor is read once (a wait on a GPU).
        keep: [B, N_keep] int64; only these patches are projected (masked autoencoders, patch dropout), and each
            keeps its own position. A patch may be repeated.
        dtype: of the tokens; default: autocast's where it is on, else the weight's.
        backend: "reference", "cpu", "triton", "cuda" or "emulated"; default: the fastest in the tuning table of this
            device (:mod:`fastvit.tuning`), without one the best that can run here.

    uint8 pixels are always divided by 255, before mean and std; floats are not. The projection is computed at the
    weight's precision, or autocast's. Differentiable once in images (floats), weight, bias, pos_embed and prefix.

    Returns:
        [B, R+N, D], or [B, R+N_keep, D] with `keep`.

    Raises:
        ValueError: a shape, value or device that does not fit; the message names the argument. An index in `keep`
            that is out of range raises on a CPU; on a GPU, where looking would mean waiting, its token is NaN.
        TypeError: an unsupported dtype or kind of argument.
        RuntimeError: the forced backend can't run here.
    """
    checks.check_images_and_weight(images, weight, bias)
    batch, channels, height, width = images.shape
    shape = weight.shape
    dim, _, patch_height, patch_width = shape
    pos_embed = checks.rows_of("pos_embed", pos_embed, dim, "weight", weight)
    prefix = checks.rows_of("prefix", prefix, dim, "weight", weight)
    patches = (height // patch_height) * (width // patch_width)
    checks.check_positions(pos_embed, prefix, patches)
    checks.check_keep(keep, images)
    means, stds = checks.normalisation(mean, std, channels)
    compute_dtype = _autocast_dtype(weight) or weight.dtype
    dtype = _token_dtype(dtype, compute_dtype)

    device = images.device
    mode = _mode(weight, images, bias, pos_embed, prefix)
    problem = ("patch_embed", mode, images.dtype, compute_dtype, dtype, shape, keep is not None)
    rows = None if torch.compiler.is_compiling() else batch * (patches if keep is None else keep.shape[1])
    float64 = _any_float64(images, weight, bias, pos_embed, prefix, dtype)
    name = _choose(backend, device, float64, problem, rows)
    if name == "reference":
        if keep is not None and device.type == "cpu" and not torch.compiler.is_compiling():
            checks.check_keep_range(keep, patches)
        return ops.plain_patch_embed(images, weight, bias, pos_embed, prefix, keep, means, stds, compute_dtype, dtype)
    is_plain = mode == FORWARD and ops.is_plain(images, weight, bias, pos_embed, prefix, keep)
    run = ops.run_patch_embed if is_plain else ops.patch_embed
    return run(images, weight, bias, pos_embed, prefix, keep, means, stds, compute_dtype, dtype, name)


def add_position(
    tokens: Tensor,
    pos_embed: Tensor,
    *,
    prefix: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add positions to tokens from elsewhere (a CNN stem) and prepend the prefix rows, in one pass.

    Args:
        tokens: [B, N, D] float16, bfloat16, float32 or float64.
        pos_embed: [N, D] (tokens only) or [R+N, D] (prefix rows too); a leading 1 is allowed.
        prefix: [R, D] or [1, R, D]; they become rows 0..R-1 of every sample.
        dtype: of the result; default: autocast's where it is on, else the tokens'.
        backend: "reference", "cpu", "triton", "cuda" or "emulated"; default: the fastest in the tuning table of this
            device (:mod:`fastvit.tuning`), without one the best that can run here.

    Returns:
        [B, R+N, D]. Differentiable once in tokens, pos_embed and prefix.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`patch_embed`.
    """
    checks.check_tensor("tokens", tokens)
    checks.check_tensor("pos_embed", pos_embed)
    if tokens.dim() != 3:
        raise ValueError(f"tokens: expected 3 dimensions [B, N, D], got {tokens.dim()}: {checks.shape_of(tokens)}")
    checks.check_dtype("tokens", tokens.dtype, checks.FLOAT_DTYPES)
    batch, patches, dim = tokens.shape
    table = checks.rows_of("pos_embed", pos_embed, dim, "tokens", tokens)
    assert table is not None
    prefix = checks.rows_of("prefix", prefix, dim, "tokens", tokens)
    checks.check_positions(table, prefix, patches)
    dtype = _token_dtype(dtype, _autocast_dtype(tokens) or tokens.dtype)

    mode = _mode(tokens, table, prefix)
    problem = ("add_position", mode, tokens.dtype, table.dtype, dtype, (dim,), False)
    rows = None if torch.compiler.is_compiling() else batch * patches
    name = _choose(backend, tokens.device, _any_float64(tokens, table, prefix, dtype), problem, rows)
    if name == "reference":
        return reference.add_position(tokens, table, prefix=prefix, dtype=dtype)
    is_plain = mode == FORWARD and ops.is_plain(tokens, table, prefix)
    run = ops.run_add_position if is_plain else ops.add_position
    return run(tokens, table, prefix, dtype, name)


def _choose(
    backend: str | None, device: torch.device, float64: bool, problem: tuple[Any, ...], rows: int | None
) -> str:
    if rows is None and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "reference"  # a file of ONNX knows standard operators alone
    name = backends.choose(backend, device, float64, problem, rows)
    if name != "reference" and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"backend {name!r} does not work under torch.func transforms (grad, vmap, jvp, per-sample gradients); "
            "backend='reference' does"
        )
    return name


def _mode(*tensors: Tensor | None) -> str:
    """Whether gradients will be wanted: the fastest forward need not have the fastest backward."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return TRAINING
    return FORWARD


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is on and applies; like torch's, it leaves float64 alone."""
    device_type = tensor.device.type
    if device_type == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _token_dtype(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    if dtype is None:
        return default
    checks.check_dtype("dtype", dtype, checks.FLOAT_DTYPES)
    return dtype


def _any_float64(*items: Tensor | torch.dtype | None) -> bool:
    for item in items:
        if item is not None and (item if isinstance(item, torch.dtype) else item.dtype) == torch.float64:
            return True
    return False
