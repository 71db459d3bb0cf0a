"""Validation: every backend, or a kernel of one's own, held to the float64 reference."""

from __future__ import annotations

from fastvit.validation.cases import Case, Inputs, cases_for, make_inputs, photographs
from fastvit.validation.ops.add_norm import AddNormCase, AddNormInputs
from fastvit.validation.ops.add_position import AddPositionCase
from fastvit.validation.ops.attention import AttentionCase, AttentionInputs
from fastvit.validation.ops.bias_act import BiasActCase, BiasActInputs
from fastvit.validation.ops.patch_embed import PatchEmbedCase, PatchEmbedInputs
from fastvit.validation.ops.split_heads import SplitHeadsCase, SplitHeadsInputs
from fastvit.validation.primitives import check_primitives
from fastvit.validation.report import Report, Row
from fastvit.validation.runner import Progress, poisoned, validate, validate_function
from fastvit.validation.tolerance import Comparison, assert_close, compare, relative_error

__all__ = [
    "AddNormCase",
    "AddNormInputs",
    "AddPositionCase",
    "AttentionCase",
    "AttentionInputs",
    "BiasActCase",
    "BiasActInputs",
    "Case",
    "Comparison",
    "Inputs",
    "PatchEmbedCase",
    "PatchEmbedInputs",
    "Progress",
    "Report",
    "Row",
    "SplitHeadsCase",
    "SplitHeadsInputs",
    "assert_close",
    "cases_for",
    "check_primitives",
    "compare",
    "make_inputs",
    "photographs",
    "poisoned",
    "relative_error",
    "validate",
    "validate_function",
]
