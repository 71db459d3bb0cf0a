"""The demonstration: the package's main job on real images, with a report of what came out."""

from __future__ import annotations

from .run import run_demo

__all__ = ["run_demo"]
