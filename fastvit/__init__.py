"""FastViT: from raw image pixels to Vision Transformer tokens in one kernel, and the ViT around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastvit import functional, ops
from fastvit._version import __version__
from fastvit.backend import available_backends, use_backend

if TYPE_CHECKING:
    from fastvit.model import VisionTransformer, create_model

__all__ = [
    "VisionTransformer",
    "__version__",
    "available_backends",
    "create_model",
    "functional",
    "ops",
    "use_backend",
]

_FROM_MODEL = ("VisionTransformer", "create_model")


def __getattr__(name: str) -> Any:
    # The model is imported on first use, so that `import fastvit` stays quick for those who want the ops alone.
    if name in _FROM_MODEL:
        from fastvit import model

        return getattr(model, name)
    raise AttributeError(f"module 'fastvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM_MODEL})
