"""The public ops: they check their arguments once, settle dtypes and backend, and call the registered torch op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastvit import backend as backends
from fastvit import checks, ops, reference
from fastvit.cut_patches import ends_of, views, weight_for
from fastvit.grids import position_rows
from fastvit.native.attention import MOST_TOKENS
from fastvit.ops import Op
from fastvit.ops.add_norm import Arguments as NormArguments
from fastvit.ops.add_norm import norm_alone
from fastvit.ops.split_heads import SplitHeads, split
from fastvit.transfer import to_device
from fastvit.tuning import FORWARD, TRAINING

__all__ = ["add_norm", "add_position", "attention", "bias_act", "patch_embed", "patch_embed_packed", "split_heads"]

_PATCH_EMBED, _PATCH_EMBED_PACKED, _PATCH_EMBED_SIZED = (
    ops.OPS[name] for name in ("patch_embed", "patch_embed_packed", "patch_embed_sized")
)
_ADD_POSITION, _ADD_NORM, _BIAS_ACT, _ATTENTION = (
    ops.OPS[name] for name in ("add_position", "add_norm", "bias_act", "attention")
)


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
        backend: "reference", "cpu", "native", "triton", "cuda" or "emulated"; default: the fastest in the tuning table
            of this device (:mod:`fastvit.tuning`), without one the best that can run here.

    uint8 pixels are always divided by 255, before mean and std; floats are not. The projection is computed at the
    weight's precision, or autocast's. Differentiable, any number of times, in images (floats), weight, bias, pos_embed
    and prefix. Under torch.func's transforms and forward-mode AD the reference runs, where no backend is forced.

    Returns:
        [B, R+N, D], or [B, R+N_keep, D] with `keep`.

    Raises:
        ValueError: a shape, value or device that does not fit; the message names the argument. An index in `keep`
            that is out of range raises on a CPU; on a GPU, where looking would mean waiting, its token is NaN.
        TypeError: an unsupported dtype or kind of argument.
        RuntimeError: the forced backend can't run here, or not under torch.func's transforms and forward-mode AD.
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

    problem = (images.dtype, compute_dtype, dtype, shape, keep is not None)
    rows = batch * (patches if keep is None else keep.shape[1])
    arguments = (images, weight, bias, pos_embed, prefix, keep, means, stds, compute_dtype, dtype)
    return _run(_PATCH_EMBED, arguments, backend, problem, rows)


def patch_embed_packed(
    images: Sequence[Tensor] | Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[tuple[int, int]] | Tensor | None = None,
    order: str = "CPP",
    still: bool = False,
    merge: int = 1,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn images of any sizes into one sequence of tokens, image behind image, in one pass over their pixels.

    What :func:`patch_embed` does, without a padded batch, a loop or a wait: the packed sequences of NaViT (Dehghani et
    al., 2023). Images are read where they lie.

    Args:
        images: a list of [C, H_i, W_i], uint8 or float, of one dtype, each in either layout; H_i and W_i are multiples
            of the patch. Or one tensor, with `sizes`: the pixels of all images [Σ C·H_i·W_i], one [C, H_i, W_i] behind
            the other; or patches that a processor has cut: [ΣN_i, C·P_h·P_w], image behind image, or
            [B, N_max, C·P_h·P_w] with those that are padding behind an image's own, which are not read.
        weight: [D, C, P_h, P_w], laid out as the convolution's; for cut patches of T frames, whose values are
            C·T·P_h·P_w, [D, C, T, P_h, P_w] (Qwen2-VL).
        bias: [D].
        sizes: rows and columns of patches of each image, where `images` is one tensor: numbers of Python, or a tensor
            [B, 2] of whole numbers on the host, for images behind each other. Compiled, numbers are constants, and so
            is how many there are; one program with a tensor serves all batches (a single image has one of its own),
            and can be differentiated once.
        order: of the values of a cut patch: "CPP", as the weight has them, or "PPC" (NaFlexViT, SigLIP 2).
        still: whether the frames of a cut patch are all the same: then one of them is read, and multiplied by the sum
            of the weight over them. The others' values are not looked at.
        merge: patches come in windows of merge × merge, those of a window next to each other (Qwen2-VL), and so the
            positions of a grid do.
        pos_embed: [h, w, D], the learned positions of a grid, resampled to that of each image; or [ΣN_i, D], a row for
            every patch.
        prefix: [R, D] or [1, R, D], class and register tokens; they become the first R rows of every image and have no
            position.
        interpolation, antialias, align_corners: of the positions, as in :func:`fastvit.grids.resample_grids`.
        mean, std: one float a channel, in the 0..1 scale: (x − mean) / std. A tensor is read once (a wait on a GPU).
        dtype: of the tokens; default: autocast's where it is on, else the weight's.
        backend: "reference", "cpu", "native", "triton", "cuda" or "emulated"; default: the fastest in the tuning table
            of this device (:mod:`fastvit.tuning`), without one the best that can run here.

    Returns:
        Tokens [Σ(R+N_i), D], and offsets [B+1] int32 on the weight's device: image i has the rows from offsets[i] to
        offsets[i+1]. The tokens are differentiable, any number of times, in images (floats), weight, bias, pos_embed
        and prefix. Under torch.func's transforms and forward-mode AD the reference runs, where no backend is forced.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`patch_embed`; the message names the image by its index.
    """
    if torch.jit.is_tracing() and not isinstance(sizes, Tensor):
        raise RuntimeError(
            "images, sizes: torch.jit.trace would keep the sizes of these images for all others; give it one tensor of "
            "all images, and one of their sizes"
        )
    if sizes is None:
        checks.require(not still and merge == 1, "still, merge: of patches that are cut already, with sizes, alone")
        listed = checks.check_packed_images(images, weight, bias)
        grids = [(image.shape[1] // weight.shape[2], image.shape[2] // weight.shape[3]) for image in listed]
    else:
        checks.check_cut_weight(weight, order, still)
        images = checks.check_one_tensor(images, weight, bias, still, merge)
        if images.dim() > 1:
            mean, std = _of_values(mean, std, weight, order, still)
        if isinstance(sizes, Tensor):
            checks.check_sizes(sizes, images)
            if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(sizes) is not Tensor:  # no values yet
                layout = (order, still, merge, interpolation, antialias, align_corners)
                return _by_sizes(images, weight, bias, sizes, layout, pos_embed, prefix, (mean, std), dtype, backend)
        grids = checks.check_grids(sizes, images, weight)
        checks.check_windows(merge, grids)
        listed, weight = views(images, weight, grids, still), weight_for(images, weight, order, still)
    patches = sum(rows * columns for rows, columns in grids)
    prefix, means, stds = _tables(weight, pos_embed, prefix, mean, std, patches)
    table, starts = position_rows(pos_embed, grids, interpolation, antialias, align_corners, merge)
    compute_dtype = _autocast_dtype(weight) or weight.dtype
    dtype = _token_dtype(dtype, compute_dtype)

    pixels = listed[0].dtype if listed else weight.dtype
    problem = (pixels, compute_dtype, dtype, weight.shape, False)
    arguments = (weight, bias, table, prefix, listed, starts, means, stds, compute_dtype, dtype)
    tokens = _run(_PATCH_EMBED_PACKED, arguments, backend, problem, patches)
    return tokens, to_device(ends_of(grids, prefix), torch.int32, weight.device)


def _tables(
    weight: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, mean: Any, std: Any, patches: int
) -> tuple[Tensor | None, Any, Any]:
    """What goes with a weight [D, C, P_h, P_w] for so many patches, checked: the prefix as rows, means and stds."""
    prefix = checks.rows_of("prefix", prefix, weight.shape[0], "weight", weight)
    means, stds = checks.normalisation(mean, std, weight.shape[1])
    if pos_embed is not None:
        checks.check_packed_positions(pos_embed, weight, patches)
    return prefix, means, stds


def _by_sizes(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Tensor,
    layout: tuple[Any, ...],
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    normalisation: tuple[Any, Any],
    dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`patch_embed_packed` in a program that is compiled for all sizes: these are looked at when it runs."""
    kernel = weight_for(images, weight, *layout[:2])
    patches = checks.patches_in(images.shape, weight.shape)
    prefix, means, stds = _tables(kernel, pos_embed, prefix, *normalisation, patches)
    compute_dtype = _autocast_dtype(weight) or weight.dtype
    dtype = _token_dtype(dtype, compute_dtype)
    problem = (images.dtype, compute_dtype, dtype, kernel.shape, False)
    listed = (weight, bias, pos_embed, prefix, [images], dtype)
    name = _backend(_PATCH_EMBED_PACKED, listed, backend, problem, patches)
    if name == "reference":
        raise RuntimeError(
            "sizes: compiled as a tensor, they are known to no code of plain PyTorch, the backend 'reference', which "
            "also serves float64, torch.func's transforms, forward-mode AD and ONNX; give Python numbers"
        )
    arguments = (weight, bias, pos_embed, prefix, images, sizes, *layout, means, stds, compute_dtype, dtype, name)
    return _PATCH_EMBED_SIZED(*arguments)


def _of_values(mean: Any, std: Any, weight: Tensor, order: str, still: bool) -> tuple[Any, Any]:
    """Mean and std of each value of a cut patch, whose channels stand together or in turn; of each channel for the one
    frame of a still."""
    means, stds = checks.normalisation(mean, std, weight.shape[1])
    area = 1 if still else math.prod(weight.shape[2:])
    return tuple(
        None if values is None else [v for v in values for _ in range(area)] if order == "CPP" else list(values) * area
        for values in (means, stds)
    )  # type: ignore[return-value]


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
        backend: "reference", "cpu", "native", "triton", "cuda" or "emulated"; default: the fastest in the tuning table
            of this device (:mod:`fastvit.tuning`), without one the best that can run here.

    Returns:
        [B, R+N, D]. Differentiable, any number of times, in tokens, pos_embed and prefix.

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

    problem = (tokens.dtype, table.dtype, dtype, (dim,), False)
    return _run(_ADD_POSITION, (tokens, table, prefix, dtype), backend, problem, batch * patches)


def add_norm(
    residual: Tensor,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    keep: Tensor | None = None,
    weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float,
    rms: bool = False,
    residual_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a transformer block's branch to the residual stream, and normalise the sum, in one pass.

        sum = residual + keep · scale · (branch + bias)
        normed = layer_norm(sum), or rms_norm(sum)

    The sum is made in float32 and rounded once; the norm is that of the rounded sum, with statistics in float32, and
    rounded once. Layer norm as of Ba et al., 2016; RMS norm as of Zhang and Sennrich, 2019, equation 4.

    Args:
        residual: [..., D] float16, bfloat16, float32 or float64; D from 1 to 8192.
        branch: the residual's shape, any of these dtypes. None: the norm alone.
        bias: [D], that of the linear layer that made the branch, which then runs without it: so that its gradient
            falls out of this op's backward.
        scale: [D], LayerScale's.
        keep: [B] float32, B being the residual's first size: DropPath's factor of every sample, 0 or 1/(kept share).
            It has no gradient.
        weight, norm_bias: [D], the norm's.
        eps: under the root.
        rms: whether the norm is RMS norm.
        residual_dtype: of the sum; default: what torch's addition would give.
        dtype: of the normed sum; default: autocast's where it is on, else the sum's.
        backend: "reference", "cpu", "native", "triton", "cuda" or "emulated"; default: the fastest in the tuning table
            of this device (:mod:`fastvit.tuning`), without one the best that can run here.

    Returns:
        (sum, normed), both [..., D]; without a branch the sum is `residual`, not a copy. Differentiable, any number of
        times, in all tensors but `keep`.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`patch_embed`.
    """
    return call_add_norm(
        settle_add_norm(
            residual, branch, bias, scale, keep, weight, norm_bias, eps, rms, residual_dtype, dtype, backend
        )
    )


def call_add_norm(call: NormArguments) -> tuple[Tensor, Tensor]:
    """:func:`add_norm` of arguments that are settled."""
    total, normed, _ = _call(norm_alone if call.branch is None else _ADD_NORM, call)
    return total if total.shape == call.residual.shape else call.residual, normed


def settle_add_norm(
    residual: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
    backend: str | None,
) -> NormArguments:
    """The op's arguments from those of :func:`add_norm`, checked, with dtypes and backend settled."""
    checks.check_residual_and_branch(residual, branch)
    for name, vector in (("bias", bias), ("scale", scale), ("weight", weight), ("norm_bias", norm_bias)):
        checks.check_vector(name, vector, residual)
    checks.check_factors(branch, bias, scale, keep, residual)
    if eps < 0:
        raise ValueError(f"eps: {eps} must not be negative")
    sum_dtype = residual.dtype
    if branch is not None:
        sum_dtype = torch.promote_types(sum_dtype, branch.dtype)
        sum_dtype = sum_dtype if scale is None else torch.promote_types(sum_dtype, scale.dtype)
        sum_dtype = _token_dtype(residual_dtype, sum_dtype, "residual_dtype")
    elif residual_dtype not in (None, residual.dtype):
        raise ValueError(f"residual_dtype: without a branch the sum is the residual itself, in {residual.dtype}")
    dtype = _token_dtype(dtype, _autocast_dtype(residual) or sum_dtype)

    dim = residual.shape[-1]
    problem = (residual.dtype, residual.dtype if branch is None else branch.dtype, dtype, (dim,), scale is not None)
    arguments = (residual, branch, bias, scale, keep, weight, norm_bias, eps, rms, sum_dtype, dtype)
    return NormArguments(*arguments, _backend(_ADD_NORM, arguments, backend, problem, residual.numel() // dim))


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    act: str = "gelu",
    *,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_last: bool | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """What stands between the products of an MLP, plain or gated, in one pass.

        out = act(x + bias)                     Mlp
        out = act(x + bias) · (up + up_bias)    SwiGLU, GEGLU, with two linear layers
        out = act(gate) · up                    SwiGLUPacked, GluMlp: gate and up are the halves of x + bias

    Made in float32 and rounded once. The linear layers run without their biases, whose gradients fall out of this
    op's backward; it keeps its arguments and nothing else. GELU as of Hendrycks and Gimpel, 2016, with erf, with tanh
    or as x · sigmoid(1.702 x), quick_gelu (OpenAI's CLIP); SiLU is x · sigmoid(x); gates as of Shazeer, 2020.

    Args:
        x: [..., F] float16, bfloat16, float32 or float64, F from 1 to 65536; [..., 2F] with `gate_last`.
        bias: as long as a row of x.
        act: "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu".
        up: [..., F] in x's dtype, the product of a second linear layer (timm's `fc1_x`, `up_proj` elsewhere); x is
            then the gate's (`fc1_g`, `gate_proj`).
        up_bias: [F], that of this layer.
        gate_last: which half of x goes through `act`, named as in timm's GluMlp: the first if False (DINOv2,
            SwiGLUPacked), the second if True. None: x is not packed.
        dtype: of the result; default: x's.
        backend: "reference", "cpu", "native", "triton", "cuda" or "emulated"; default: the fastest in the tuning table
            of this device (:mod:`fastvit.tuning`), without one the best that can run here.

    Returns:
        [..., F]. Differentiable, any number of times, in all tensors.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`patch_embed`.
    """
    checks.check_products(x, bias, up, up_bias, gate_last)
    checks.require(act in checks.ACTS, f"act: unknown {act!r}; known: {', '.join(checks.ACTS)}")
    dtype = _token_dtype(dtype, x.dtype)

    features = x.shape[-1]
    is_gated = up is not None or gate_last is not None
    problem = (x.dtype, x.dtype if bias is None else bias.dtype, dtype, (features,), is_gated)
    return _run(_BIAS_ACT, (x, bias, up, up_bias, act, gate_last, dtype), backend, problem, x.numel() // features)


def act_backend(
    like: Tensor, weight: Tensor, bias: Tensor | None, requested: str | None, dtype: torch.dtype, trained: bool
) -> str:
    """The backend that :func:`bias_act` takes for x [..., F] of this dtype, the product of `like` and a weight [F, D];
    "" where the bias [F] does not fit, which the op says better."""
    features = weight.shape[0]
    if bias is not None and (bias.shape != (features,) or bias.dtype not in checks.FLOAT_DTYPES):
        return ""
    mode, parameters = TRAINING if trained else FORWARD, dtype if bias is None else bias.dtype
    problem = ("bias_act", mode, dtype, parameters, dtype, (features,), False)
    return _choose(like.device, (like, bias), dtype, requested, problem, like.numel() // like.shape[-1])


def split_heads(
    qkv: Tensor, bias: Tensor | None, num_heads: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads as views, whose gradients come back as one tensor and a bias's gradient.

    Forward reads and writes nothing. Backward brings the gradients of q, k and v, whatever their strides, to the packed
    gradient of `qkv` and sums that for the bias, in one pass, where PyTorch's own stacks them and sums afterwards.
    What normalises or turns queries and keys, and any attention, goes behind it.

    The bias is that of the linear layer that made `qkv`, which adds it in its product, where it costs nothing, and
    leaves its gradient to this op:

        qkv = F.linear(x, weight, bias.detach())
        q, k, v = split_heads(qkv, bias, num_heads)

    Its values are not read here. Added without `detach`, its gradient would count twice; not added, or not passed on
    to the product at all, it would be the gradient of something that was never added.

    Args:
        qkv: [B, T, 3D] float16, bfloat16, float32 or float64: of each token all queries, then keys, then values, each
            H heads of D/H, as timm and DINOv2 pack them.
        bias: [3D], part of qkv already; None where the layer has none, or its gradient is not wanted here.
        num_heads: H, a divisor of D.
        backend: "reference", "cpu", "native", "triton", "cuda" or "emulated", for the backward; default: the fastest
            in the tuning table of this device (:mod:`fastvit.tuning`), without one the best that can run here.

    Returns:
        q, k, v, [B, H, T, D/H]. Differentiable, any number of times, in qkv and bias.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`patch_embed`.
    """
    checks.check_heads(qkv, bias, num_heads)
    return _split_heads(qkv, bias, num_heads, backend)


def _split_heads(
    qkv: Tensor, bias: Tensor | None, num_heads: int, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    name = _heads_backend(qkv, bias, num_heads, backend)
    is_exported = torch.compiler.is_exporting()
    if is_exported and _mode((qkv, bias)) == FORWARD:
        bias = None  # it is there for its gradient alone
    if name == "reference" or is_exported or torch.jit.is_tracing():  # programs are of standard operators
        return reference.split_heads(qkv, bias, num_heads)
    return SplitHeads.apply(qkv, bias, num_heads, name)


def _heads_backend(qkv: Tensor, bias: Tensor | None, num_heads: int, requested: str | None) -> str:
    width = qkv.shape[-1]
    parameters = qkv.dtype if bias is None else bias.dtype
    problem = ("split_heads", _mode((qkv, bias)), qkv.dtype, parameters, qkv.dtype, (width,), False)
    return _choose(qkv.device, (qkv, bias), qkv.dtype, requested, problem, qkv.numel() // width * num_heads)


def attention(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Self-attention between its two products: :func:`split_heads`, and PyTorch's own attention.

    Which of PyTorch's kernels runs, how it rounds and how it draws random numbers is as ever. On a CPU, up to 640
    tokens that all attend to each other are an op of their own, whose gradient comes packed. Vaswani et al., 2017.

    Args:
        qkv, bias, num_heads, backend: as in :func:`split_heads`; the bias is part of qkv already.
        scale: of the scores; default: 1/√(D/H).
        attn_mask, is_causal: as in :func:`torch.nn.functional.scaled_dot_product_attention`.
        dropout: share of the weights that are dropped, in evaluation too.

    Returns:
        [B, T, D], ready for the projection. Differentiable in qkv and bias, as often as PyTorch's own attention is.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`patch_embed`.
    """
    checks.check_heads(qkv, bias, num_heads)
    if attn_mask is None and not dropout and not is_causal:
        name = _attention_backend(qkv, bias, num_heads, backend)
        if name:
            _tell_counter()
            return _ATTENTION(qkv, bias, num_heads, _scale(scale, qkv, num_heads), name)[0]
    q, k, v = _split_heads(qkv, bias, num_heads, backend)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


class SettledAttention(NamedTuple):
    """:func:`attention` of qkv of one form, checked."""

    run: Callable[[Tensor, Tensor | None], Tensor]  # of qkv and bias
    of_heads: Callable[[Tensor, Tensor, Tensor], Tensor] | None  # of queries, keys and values, where it goes by these
    backend: str  # of the gradient of what splits them


def settle_attention(
    qkv: Tensor, bias: Tensor | None, num_heads: int, requested: str | None, *, dropout: float = 0.0, **options: Any
) -> SettledAttention:
    """:func:`attention` of qkv and bias like these, checked and with a backend chosen, where nothing watches ops."""
    checks.check_heads(qkv, bias, num_heads)
    name = "" if dropout or options else _attention_backend(qkv, bias, num_heads, requested)
    if name:
        scale = _scale(None, qkv, num_heads)
        return SettledAttention(lambda qkv, bias: _ATTENTION(qkv, bias, num_heads, scale, name)[0], None, "")
    name = _heads_backend(qkv, bias, num_heads, requested)

    def of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
        return out.transpose(1, 2).flatten(2)

    if name == "reference":
        return SettledAttention(lambda qkv, bias: of_heads(*reference.split_heads(qkv, bias, num_heads)), None, "")
    return SettledAttention(lambda qkv, bias: of_heads(*split(qkv, bias, num_heads, name)), of_heads, name)


def _scale(scale: float | None, qkv: Tensor, num_heads: int) -> float:
    if not isinstance(scale, (int, float, type(None))):
        raise TypeError(f"scale: expected a number, got {scale!r}")
    return (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale


def _attention_backend(qkv: Tensor, bias: Tensor | None, num_heads: int, requested: str | None) -> str:
    """The backend that has attention as one op; "" where it is put together: on a GPU, or PyTorch's is looked for."""
    batch, tokens, width = qkv.shape
    if qkv.device.type != "cpu" or qkv.dtype == torch.float64 or tokens > MOST_TOKENS:
        return ""
    if _autocast_dtype(qkv) not in (None, qkv.dtype):
        return ""  # PyTorch's would be cast
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not may_stand_in():
        return ""
    forced = backends.forced(requested)
    if forced is not None and not backends.has_op(forced, "attention"):
        return ""
    parameters = qkv.dtype if bias is None else bias.dtype
    problem = ("attention", _mode((qkv, bias)), qkv.dtype, parameters, qkv.dtype, (width,), False)
    name = _choose(qkv.device, (qkv, bias), qkv.dtype, requested, problem, batch * tokens * num_heads)
    return "" if name == "reference" else name


def may_stand_in() -> bool:
    """Whether torch's attention is its own and free to choose: by sdpa_kernel's setting, which holds on a CPU too, and
    not replaced by another library's."""
    is_torchs = F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    return is_torchs and torch.backends.cuda.flash_sdp_enabled()


def _run(op: Op, arguments: tuple[Any, ...], requested: str | None, problem: tuple[Any, ...], rows: int) -> Any:
    """Choose a backend and call the op; arguments as in :func:`_backend`."""
    return _call(op, (*arguments, _backend(op, arguments, requested, problem, rows)))


def _backend(op: Op, arguments: tuple[Any, ...], requested: str | None, problem: tuple[Any, ...], rows: int) -> str:
    """The backend for a call.

    Args:
        arguments: the op's, but for the backend: tensors first, the result's dtype last.
        requested: a backend's name; None: whichever suits.
        problem: the fields of :class:`fastvit.tuning.Problem` behind op and mode.
        rows: of tokens, in the batch.
    """
    _tell_counter()
    tensors = ops.flat(arguments[: op.tensors])
    problem = (op.name, _mode(tensors), *problem)
    return _choose(arguments[0].device, tensors, arguments[-1], requested, problem, rows)


def _call(op: Op, arguments: tuple[Any, ...]) -> Any:
    """By the shortest way; the backend is the last of the arguments."""
    if arguments[-1] != "reference":
        return op(*arguments)
    if ops.is_plain(*ops.flat(arguments[: op.tensors])):
        op.check(*arguments)
    return op.plain(*arguments)


def _tell_counter() -> None:
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        ops.tell_counter()  # which may be what watches


def _choose(
    device: torch.device,
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    requested: str | None,
    problem: tuple[Any, ...],
    rows: int | None,
) -> str:
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
            return "reference"  # a file of ONNX knows standard operators alone
        rows, is_transformed = None, backends.under_transforms()
    else:
        is_transformed = torch._C._are_functorch_transforms_active()
    name = backends.choose(requested, device, _any_float64(tensors, dtype), problem, rows)
    if name == "reference" or not (is_transformed or forward_ad._current_level >= 0 and _any_dual(tensors)):
        return name
    if backends.is_forced(requested):
        raise RuntimeError(
            f"backend {name!r} does not work under torch.func transforms (grad, vmap, jvp, per-sample gradients) "
            "or forward-mode AD; backend='reference' does, and is chosen where none is forced"
        )
    return "reference"


def _any_dual(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a tensor has a tangent, which only torch's own ops hand on."""
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _mode(tensors: Sequence[Tensor | None]) -> str:
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


def _token_dtype(dtype: torch.dtype | None, default: torch.dtype, name: str = "dtype") -> torch.dtype:
    if dtype is None:
        return default
    checks.check_dtype(name, dtype, checks.FLOAT_DTYPES)
    return dtype


def _any_float64(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return True
    return dtype == torch.float64
