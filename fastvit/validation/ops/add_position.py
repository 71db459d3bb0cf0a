"""`add_position` as the validator knows it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvit.validation import faults
from fastvit.validation.cases import Case, Draw, Inputs
from fastvit.validation.faults import Arguments, Fault, Run
from fastvit.validation.ops import Op, Tensors


@dataclass(frozen=True)
class AddPositionCase(Case[Inputs]):
    """One input of `add_position`, all but the tokens' dtype."""

    patches: int = 9
    layout: str = "contiguous"  # contiguous, sliced_batch, sliced_rows, from_nchw
    prefix: int = 1
    positions: str = "all"  # patches (N rows), all (R+N rows)

    def make(self, draw: Draw) -> Inputs:
        shape = (self.batch, self.patches, self.width)
        return Inputs(
            tensors={
                "tokens": draw.laid_out(shape, self.layout),
                **tables(draw, self.patches, self.prefix, self.width, self.positions, self.table_dtype(draw.compute)),
            },
            grad=draw.normal(self.batch, self.prefix + self.patches, self.width, dtype=self.dtype or draw.compute),
            compute=draw.compute,
            dtype=self.dtype,
            copied=self.prefix,
        )


def tables(draw: Draw, patches: int, prefix: int, width: int, positions: str, dtype: torch.dtype) -> Tensors:
    """Positions (for `positions` see `PatchEmbedCase`) and prefix rows, of unit scale."""
    rows = patches + (prefix if positions == "all" else 0)
    return {
        "pos_embed": None if positions == "none" else draw.normal(rows, width, dtype=dtype),
        "prefix": draw.normal(prefix, width, dtype=dtype) if prefix else None,
    }


def plain(inputs: Inputs, tensors: Tensors) -> Tensor:
    """cat and add, as eager PyTorch promotes them."""
    tokens = tensors["tokens"]
    assert tokens is not None
    return place(tokens, tensors["pos_embed"], tensors["prefix"], None).to(inputs.out)


def place(tokens: Tensor, pos_embed: Tensor | None, prefix: Tensor | None, keep: Tensor | None) -> Tensor:
    """Positions and prefix rows, then the kept patches: [B, N, D] → [B, R+N, D]."""
    patches = tokens.shape[1]
    prefix_rows = 0 if prefix is None else prefix.shape[0]
    on_prefix = pos_embed is not None and prefix_rows > 0 and pos_embed.shape[0] == prefix_rows + patches
    if pos_embed is not None and not on_prefix:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if pos_embed is not None and on_prefix:
        tokens = tokens + pos_embed
    if keep is None:
        return tokens
    batch, width = tokens.shape[0], tokens.shape[2]
    first = torch.arange(prefix_rows, device=keep.device).expand(batch, -1)
    rows = torch.cat([first, keep + prefix_rows], dim=1)
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, width))


def _row_gradient_off_by_a_batch(run: Run, arguments: Arguments) -> Tensor:
    return run(arguments) - arguments["grad"][-1:].sum(0, dtype=torch.float32)


_A = AddPositionCase
OP = Op(
    tiny=(
        _A("class token, positions everywhere"),
        _A("five prefix rows, positions on patches", prefix=5, positions="patches", width=193),
        _A("no prefix, width 63", prefix=0, positions="patches", width=63),
        _A("width 1", patches=16, width=1),
        _A("width 1023, sliced batch", width=1023, layout="sliced_batch"),
        _A("sliced rows", layout="sliced_rows", width=80),
        _A("tokens from a feature map", layout="from_nchw", patches=16),
        _A("empty batch", batch=0),
        _A("one token, one sample", batch=1, patches=1, width=96),
        _A("fp32 positions", parameters="mixed"),
        _A("fp32 tokens out", out="float32"),
    ),
    large=(
        _A("ViT-S, batch 16", batch=16, patches=196, width=384),
        _A("ViT-B, five registers", batch=4, patches=256, width=768, prefix=5, positions="patches"),
    ),
    quick=3,
    plain=plain,
    faults=(
        Fault("add_position: last column wrong", "forward", forward=faults.last_column_wrong),
        Fault("add_position: one token zeroed", "forward", forward=faults.one_token_zeroed),
        Fault("add_position: dPos off by a batch", "d_pos_embed", backward=_row_gradient_off_by_a_batch),
    ),
)
