"""transformers' attention, whose three projections become one product where it is what is known, and nowhere else."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit
from fastvit.backend import launch_counts, reset_launch_counts
from fastvit.interop import huggingface_blocks as of_layers
from fastvit.peers import import_peer
from tests.interop import kept
from tests.interop.kept import BF16, TOKENS, WIDTH, expect_the_same
from tests.interop.test_kept import Adapter, another_class, doubled
from tests.libraries import peer

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 64}  # fmt: skip
MODELS: dict[str, Callable[[Any], Any]] = {
    "ViT": lambda peer: peer.ViTModel(peer.ViTConfig(**SIZES, attention_probs_dropout_prob=0.2)),
    "ViT, no biases": lambda peer: peer.ViTModel(peer.ViTConfig(**SIZES, qkv_bias=False)),
    "BEiT": lambda peer: peer.BeitModel(peer.BeitConfig(**SIZES, use_absolute_position_embeddings=True)),
    "CLIP": lambda peer: peer.CLIPVisionModel(peer.CLIPVisionConfig(**SIZES, attention_dropout=0.2)),
    "SigLIP": lambda peer: peer.SiglipVisionModel(peer.SiglipVisionConfig(**SIZES)),
}
autocast = lambda: torch.autocast("cpu", BF16)  # noqa: E731


class Alone(nn.Module):
    """A block, called as each of its models does."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.block(x, mask)


def pair(name: str) -> tuple[Any, Any]:
    """A block of an accelerated model, and an untouched one; both train."""
    torch.manual_seed(0)
    untouched = MODELS[name](peer("transformers")).train()
    kept.randomise(untouched)
    ours = fastvit.accelerate(copy.deepcopy(untouched), backend="cpu")
    found = [Alone(next(m for m in model.modules() if has_attention(m))) for model in (ours, untouched)]
    vars(found[1])["is_untouched"] = True
    return found[0], found[1]


def has_attention(module: Any) -> bool:
    return any(hasattr(part, "q_proj") for part in module._modules.values())


def attention(block: Any) -> Any:
    return next(part for part in block.block._modules.values() if hasattr(part, "q_proj"))


def is_packed(block: Any, tokens: int = TOKENS, around: Any = autocast, mask: Tensor | None = None) -> bool:
    """Whether one product makes queries, keys and values."""
    reset_launch_counts()
    with around():
        out = block(torch.randn(3, tokens, WIDTH), mask)
    (out[0] if isinstance(out, tuple) else out).float().sum().backward()
    return any(name in ("split_heads_backward", "attention_backward") for name, _ in launch_counts())


@pytest.fixture(params=MODELS)
def blocks(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return pair(request.param)


def test_it_is_the_librarys(blocks: Any) -> None:
    """Results, gradients and random numbers, in the library's own dtypes."""
    for around in (kept.nullcontext, autocast):
        assert is_packed(blocks[0], around=around)
        expect_the_same(*blocks, around=around)
    for block in blocks:
        block.eval()
    expect_the_same(*blocks)


def test_frozen(blocks: Any) -> None:
    for frozen in (["q_proj"], ["k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]):
        for block in blocks:
            block.requires_grad_(True)
            for name in frozen:
                getattr(attention(block), name).requires_grad_(False)
        expect_the_same(*blocks)


def test_where_a_copy_does_not_pay(blocks: Any) -> None:
    """Of weights that autocast need not cast, for fewer tokens than features."""
    assert not is_packed(blocks[0], tokens=WIDTH // 3 - 1, around=kept.nullcontext)
    expect_the_same(*blocks, torch.randn(3, WIDTH // 3 - 1, WIDTH))
    blocks[0].bfloat16()
    assert not is_packed(blocks[0])


def test_a_mask(blocks: Any) -> None:
    mask = torch.zeros(3, 1, TOKENS, TOKENS).masked_fill(torch.rand(TOKENS, TOKENS) < 0.3, -1e4)
    assert not is_packed(blocks[0], mask=mask)
    x = torch.randn(3, TOKENS, WIDTH)
    ours, theirs = (block.eval()(x, mask) for block in blocks)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def by_hand(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """Another attention than torch's."""
    return F.scaled_dot_product_attention(query, key, 2 * value, scale=options["scaling"]).transpose(1, 2), None


class Interface:
    def get_interface(self, name: str, default: Any) -> Any:
        return by_hand


def of(name: str, do: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda part: do(getattr(part, name))


def library(part: Any) -> Any:
    return importlib.import_module(type(part).__module__)


def interface(part: Any) -> Any:
    return library(part).ALL_ATTENTION_FUNCTIONS


def renamed(part: Any, *names: str) -> str:
    return next(name for name in names if hasattr(part, name))


# What changes in attention, and whether ours still runs.
CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "eager": (lambda part: setattr(part.config, "_attn_implementation", "eager"), False),
    "scale": (lambda part: setattr(part, renamed(part, "scale", "scaling"), 0.7), True),
    "heads": (lambda part: setattr(part, "head_dim", 8), True),
    "more heads than fit": (lambda part: setattr(part, "head_dim", 7), False),
    "dropout": (lambda part: setattr(part, renamed(part, "dropout", "attention_dropout"), 0.5), True),
    "causal": (lambda part: setattr(part, "is_causal", True), False),
    "data": (of("k_proj", lambda m: setattr(m.weight, "data", torch.randn_like(m.weight))), True),
    "in place": (of("v_proj", lambda m: m.weight.data.mul_(1.5)), True),
    "parameter": (of("q_proj", lambda m: setattr(m, "weight", nn.Parameter(torch.randn_like(m.weight)))), True),
    "no bias": (of("v_proj", lambda m: setattr(m, "bias", None)), True),
    "adapter": (of("q_proj", lambda m: another_class(m, Adapter)), False),
    "forward": (of("k_proj", lambda m: setattr(m, "forward", lambda x: 2 * F.linear(x, m.weight))), False),
    "hook": (of("v_proj", lambda m: m.register_forward_hook(lambda _, inputs, out: 2 * out)), False),
    "one of bfloat16": (of("k_proj", lambda m: m.bfloat16()), False),
}
# What changes for all attention of a class.
OF_ALL: dict[str, Callable[[Any, Any], Any]] = {
    "another interface": lambda part, patch: patch.setattr(library(part), "ALL_ATTENTION_FUNCTIONS", Interface()),
    "sdpa is another": lambda part, patch: patch.setitem(interface(part)._global_mapping, "sdpa", by_hand),
    "its forward": lambda part, patch: patch.setattr(type(part), "forward", doubled(type(part).forward)),
}


@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "has run"])
@pytest.mark.parametrize("change", [*CHANGES, *OF_ALL])
def test_a_change(blocks: Any, change: str, has_run: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After which the block does what the library's does."""
    if has_run:
        expect_the_same(*blocks)
    is_ours = False
    if change in OF_ALL:
        OF_ALL[change](attention(blocks[0]), monkeypatch)
    else:
        do, is_ours = CHANGES[change]
        for block in blocks:
            torch.manual_seed(3)
            do(attention(block))
    try:
        assert is_packed(blocks[0], around=kept.nullcontext) == is_ours
    except (RuntimeError, ValueError):
        assert not is_ours  # the library's error
    expect_the_same(*blocks)


def test_forwards_are_known() -> None:
    """Of the version that is here; another's may be written otherwise, and runs as it is."""
    import_peer("transformers")
    for layer in of_layers.TRUNK:
        for host in layer.hosts:
            module, _, name = host.rpartition(".")
            found: Any = vars(importlib.import_module(module))
            prefix = name.removesuffix("EncoderLayer").removesuffix("Layer")
            kind = found.get(f"{prefix}Attention")
            if kind is not None and prefix != "DINOv3ViT":  # which turns queries and keys
                assert of_layers.fingerprint(kind.forward) in of_layers._ATTENTIONS, host


def test_a_fingerprint_is_of_what_is_done() -> None:
    def one(x: Tensor) -> Tensor:
        return 2 * x

    def same(x: Tensor) -> Tensor:
        """Which says more."""
        # And more.
        return 2 * x

    def other(x: Tensor) -> Tensor:
        return 3 * x

    same.__code__ = same.__code__.replace(co_name="one")
    marks = [of_layers.fingerprint(function) for function in (one, same, other, len)]
    assert marks[0] and marks[3] == "" and len(set(marks)) == 4  # a name is part of it
