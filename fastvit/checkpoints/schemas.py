"""Checkpoints in our names and out of them: `recognise` reads, `to_schema` writes."""

from __future__ import annotations

from fastvit.checkpoints.arguments import model_arguments, nearest_variant
from fastvit.checkpoints.recognition import Recognised, recognise
from fastvit.checkpoints.targets import SCHEMAS, to_schema

__all__ = ["SCHEMAS", "Recognised", "model_arguments", "nearest_variant", "recognise", "to_schema"]
