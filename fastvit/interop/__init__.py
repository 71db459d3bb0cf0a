"""FastViT inside models of timm, torchvision and transformers."""

from fastvit.interop.acceleration import Unsupported, accelerate, report, restore
from fastvit.interop.reporting import Change, Refusal, Report

__all__ = ["Change", "Refusal", "Report", "Unsupported", "accelerate", "report", "restore"]
