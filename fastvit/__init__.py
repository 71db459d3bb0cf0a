"""FastViT: from raw image pixels to Vision Transformer tokens in one kernel, and the ViT around it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastvit import functional, ops
from fastvit._version import __version__
from fastvit.backend import available_backends, use_backend

if TYPE_CHECKING:
    from fastvit.checkpoints import load_pretrained
    from fastvit.interop import accelerate, report, restore
    from fastvit.model import VisionTransformer, create_model

__all__ = [
    "VisionTransformer",
    "__version__",
    "accelerate",
    "available_backends",
    "create_model",
    "functional",
    "load_pretrained",
    "ops",
    "report",
    "restore",
    "use_backend",
]

# Imported on first use, so that `import fastvit` stays quick for those who want the ops alone.
_LAZY = {
    "VisionTransformer": "fastvit.model",
    "accelerate": "fastvit.interop",
    "create_model": "fastvit.model",
    "load_pretrained": "fastvit.checkpoints",
    "report": "fastvit.interop",
    "restore": "fastvit.interop",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
