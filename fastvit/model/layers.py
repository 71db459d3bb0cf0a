"""The parts of a transformer block, with timm's names and numerics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit import branches, trunk
from fastvit.model.initialisation import trunc_normal_
from fastvit.positions import rotate
from fastvit.stream import Setup, Stream

__all__ = [
    "Attention",
    "AttentionPool",
    "Block",
    "DropPath",
    "GluMlp",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "PatchDropout",
    "RmsNorm",
    "activation_layer",
    "autocast_dtype",
    "first_parameter",
    "norm_layer_of",
    "to_module_dtype",
]

# What builds a module: a class, a functools.partial of one, or any function that returns a module.
Layer = Callable[..., Any]


class LayerNorm(nn.LayerNorm):
    """Layer norm with eps = 1e-6, the value of the original ViT."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)


class RmsNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang and Sennrich, 2019) with eps = 1e-6."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=affine, device=device, dtype=dtype)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class GELUTanh(nn.GELU):
    """GELU by its tanh approximation."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


_NORMS: dict[str, Layer] = {"layernorm": LayerNorm, "rmsnorm": RmsNorm}
_ACTIVATIONS: dict[str, Layer] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def norm_layer_of(norm: str | Layer | None, name: str = "norm_layer") -> Layer | None:
    """The norm a name stands for; a class or function is returned as it is."""
    return _named(name, norm, _NORMS)


def activation_layer(activation: str | Layer | None) -> Layer | None:
    """The activation a name stands for; a class or function is returned as it is."""
    return _named("act_layer", activation, _ACTIVATIONS)


def _named(name: str, layer: str | Layer | None, known: dict[str, Layer]) -> Layer | None:
    if isinstance(layer, str):
        if not layer:
            return None
        if layer not in known:
            raise ValueError(f"{name}: {layer!r} is not known; accepted: a class, or one of {', '.join(known)}")
        return known[layer]
    if layer is not None and not callable(layer):
        raise ValueError(f"{name}: expected a class or a name, got {layer!r}")
    return layer


class LayerScale(nn.Module):
    """A learned factor a channel on a residual branch (Touvron et al., 2021)."""

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): a sample skips the branch with probability `drop_prob`."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(kept)
        return x * mask.div_(kept)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:0.3f}"


class PatchDropout(nn.Module):
    """Keeps a random share of the patches, another in each sample (Liu et al., 2023). It has no tensors."""

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def choose(self, batch: int, patches: int, device: torch.device) -> Tensor | None:
        """Patch indices to keep, [B, N_keep] int64 in random order; None where every patch stays."""
        if self.prob == 0.0 or not self.training:
            return None
        kept = max(1, int(patches * (1.0 - self.prob)))
        return torch.argsort(torch.randn(batch, patches, device=device), dim=-1)[:, :kept]

    def forward(self, x: Tensor) -> Tensor:
        """[B, R+N, D] to [B, R+N_keep, D]; for tokens that were made before patches could be chosen."""
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        keep = self.choose(patches.shape[0], patches.shape[1], x.device)
        if keep is None:
            return x
        return torch.cat([prefix, patches.gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)

    def extra_repr(self) -> str:
        return f"prob={self.prob}"


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    gated = False

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer | None = None,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        inner = hidden_features // 2 if self.gated else hidden_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(inner, **factory) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(inner, in_features, bias=bias, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class GluMlp(Mlp):
    """An MLP with a gate (Shazeer, 2020): one linear layer makes both halves, and one of them gates the other."""

    gated = True

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Layer = nn.Sigmoid, gate_last: bool = True, **rest: Any
    ) -> None:
        if hidden_features % 2 != 0:
            raise ValueError(f"hidden_features: {hidden_features} must be even, one half gates the other")
        super().__init__(in_features, hidden_features, act_layer, **rest)
        self.gate_last = gate_last

    def init_weights(self) -> None:
        """Start with the gate nearly open: its weights close to zero, its bias one."""
        half = self.fc1.out_features // 2
        if self.fc1.bias is not None:
            nn.init.ones_(self.fc1.bias[half:])
        nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        x = first * self.act(second) if self.gate_last else self.act(first) * second
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


class Attention(nn.Module):
    """Multi-head self-attention over torch's scaled_dot_product_attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Layer = LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        if dim % num_heads != 0:
            raise ValueError(f"num_heads: {num_heads} does not divide the width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rotary: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, T, D] to the same; `rotary` [2, T, D/heads], as of `fastvit.positions.rotary_2d`, or [2, B, 1, T,
        D/heads]."""
        q, k, v = self._heads(x, rotary)
        x = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        x = x.transpose(1, 2).flatten(2)  # [B, T, D]
        return self.proj_drop(self.proj(self.norm(x)))

    def attention_map(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """The softmax weights, [B, heads, T, T], rows summing to one; no dropout."""
        q, k, _ = self._heads(x, rotary)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        return scores.float().softmax(dim=-1)

    def _heads(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D/heads]
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rotary is None else (rotate(q, rotary), rotate(k, rotary), v)


class AttentionPool(nn.Module):
    """A learned query attends to the tokens, and an MLP follows: the pooling of SigLIP (Zhai et al., 2023)."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        norm_layer: Layer = LayerNorm,
        act_layer: Layer = nn.GELU,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, 2 * dim, **factory)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(0.0)
        self.norm = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, **factory)
        self.init_weights()

    def init_weights(self) -> None:
        """A truncated normal of variance 1 / D for the query."""
        with torch.no_grad():
            trunc_normal_(self.latent).mul_(self.latent.shape[2] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, D] to features [B, D]."""
        batch, tokens, dim = x.shape
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # [B, heads, 1, D/heads]
        x = self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, 1, dim)))
        return (x + self.mlp(self.norm(x)))[:, 0]


class Block(nn.Module):
    """A transformer block: norm, attention, residual, norm, MLP, residual.

    `residual_dtype` keeps the residual stream in that dtype. Without it the sums promote as torch does, which under
    autocast, with float32 tokens coming in, is a float32 stream.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Layer = nn.GELU,
        norm_layer: Layer = LayerNorm,
        mlp_layer: Layer = Mlp,
        attn_layer: Layer = Attention,
        depth: int = 0,
        residual_dtype: torch.dtype | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_dtype = residual_dtype

        self.norm1 = norm_layer(dim, **factory)
        self.attn = attn_layer(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **factory,
        )
        self.ls1 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm2 = norm_layer(dim, **factory)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **factory,
        )
        self.ls2 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: Tensor | None = None,
        *,
        run: Callable[[Block, Any], Any] | None = None,
    ) -> Tensor:
        """Tokens [B, T, D] to the same; `rotary` as of :class:`Attention`.

        With `run`, what `run(self, x)` gives, whatever `x` is: for those who run the block's parts by themselves, but
        need the call, whose hooks gather the parameters of a sharded block.
        """
        if run is not None:
            return run(self, x)
        turned = {} if rotary is None else {"rotary": rotary}
        setup = Setup.of(x, None, self.residual_dtype is not None)
        if setup is not None:
            options = {"attn_mask": attn_mask, "is_causal": is_causal} if attn_mask is not None or is_causal else {}
            return self._run(Stream(x), setup, True, **options, **turned).tensor(setup)
        branch = self.attn(self.norm1(self._branch_input(x)), attn_mask=attn_mask, is_causal=is_causal, **turned)
        x = self._add(x, self.drop_path1(self.ls1(branch)))
        branch = self.mlp(self.norm2(self._branch_input(x)))
        return self._add(x, self.drop_path2(self.ls2(branch)))

    def stream(self, stream: Stream, setup: Setup, **options: Any) -> Stream | None:
        """The same on the residual stream; None for a class whose forward is another one."""
        return self._run(stream, setup, **options) if type(self).forward is _BLOCK else None

    def _run(self, stream: Stream, setup: Setup, ends: bool = False, **options: Any) -> Stream:
        """On the residual stream, which `ends` here or goes on; options of attention by name."""
        make = functools.partial(self._halves, setup, ends, options)
        for half in make() if options else trunk.kept(self, (setup, ends), make):
            stream = trunk.run_half(stream, half, setup)
        return stream

    def _halves(self, setup: Setup, ends: bool, options: dict[str, Any]) -> tuple[trunk.Half, trunk.Half]:
        first, second = trunk.TIMM
        last = setup._replace(ends=ends)
        return trunk.half_of(self, first, setup, **options), trunk.half_of(self, second, last)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        # A float32 LayerScale or norm would promote the stream, so the branch comes down to it, never the reverse.
        return x + branch if self.residual_dtype is None else x + branch.to(x.dtype)

    def _branch_input(self, x: Tensor) -> Tensor:
        return x if self.residual_dtype is None else to_module_dtype(x, self)


_BLOCK = Block.forward
trunk.TAKING_RUN.add(_BLOCK)

branches.know(
    scales={LayerScale.forward: "gamma"},
    drop_paths=[DropPath.forward],
    branches={Attention.forward: branches.ATTENTION, Mlp.forward: branches.MLP, GluMlp.forward: branches.MLP},
    acts={QuickGELU.forward: lambda _: "quick_gelu"},
)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype on this kind of device, None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def to_module_dtype(x: Tensor, module: nn.Module) -> Tensor:
    """`x` in the dtype of the module's parameters, unless autocast settles dtypes anyway."""
    like = first_parameter(module)
    return x if like is None else _to_dtype(x, like.dtype)


@torch.fx.wrap
def _to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if autocast_dtype(x.device) is not None else x.to(dtype)


def first_parameter(module: nn.Module) -> Tensor | None:
    """The first parameter that holds floats, also of a replica of DataParallel, in which they are plain tensors."""
    for member in module.modules():
        parameters: Any = member._parameters or getattr(member, "_former_parameters", {})
        for tensor in parameters.values():
            if tensor is not None and tensor.is_floating_point():
                return tensor
    return None
