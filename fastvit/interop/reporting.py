"""What was accelerated in a model, in words and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastvit.guards import full_name
from fastvit.interop.host import Fused, listed

__all__ = ["Change", "Refusal", "Report", "Trunk"]


@dataclass(frozen=True)
class Change:
    """A module whose tokens come from one call of :func:`fastvit.functional.patch_embed`."""

    path: str  # inside the model, "" for the model itself
    module: str  # the library's class, by its full name
    fuses: str  # what became one call
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    residual_dtype: str | None
    backend: str | None
    unfused: str  # why calls run the library's own code at present, "" where they don't

    @classmethod
    def of(cls, path: str, module: Any, mixin: type[Fused]) -> Change:
        settings = module.fastvit_settings
        return cls(
            path,
            full_name(module._own_class),
            listed(mixin.parts(module)),
            settings.mean,
            settings.std,
            None if settings.residual_dtype is None else str(settings.residual_dtype),
            settings.backend,
            mixin.why_not(module),
        )

    def __str__(self) -> str:
        lines = [f"{self.path or 'the model'} ({self.module}): {self.fuses} in one call"]
        if self.mean is not None:
            lines.append(f"  takes raw uint8 images, normalised with mean {self.mean}, std {self.std}")
        if self.residual_dtype is not None:
            lines.append(f"  tokens are {self.residual_dtype} under autocast")
        if self.backend is not None:
            lines.append(f"  on backend {self.backend}")
        if self.unfused:
            lines.append(f"  not at present: {self.unfused}, so that calls run the library's own code")
        return "\n".join(lines)


@dataclass(frozen=True)
class Trunk:
    """Blocks of one class that run by the trunk's ops, such as :func:`fastvit.functional.add_norm`."""

    module: str  # the library's class, by its full name
    parts: str  # what of a block, in words
    paths: tuple[str, ...]
    whole: dict[str, str]  # by the path of a block: which of its parts run as they are at present, and why

    def __str__(self) -> str:
        count = f"{len(self.paths)} block{'s' if len(self.paths) > 1 else ''}"
        lines = [f"{count}, {self.paths[0]} to {self.paths[-1]} ({self.module}): {self.parts} by the trunk's ops, "]
        lines[0] += "where they pay or a backend is forced"
        reasons: dict[str, list[str]] = {}
        for path, reason in self.whole.items():
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            where = "in all" if len(paths) == len(self.paths) else f"in {', '.join(paths)}"
            lines.append(f"  as the library has it {where}: {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Refusal:
    """A module that looked like one for us, and why it is not."""

    path: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.module}): {self.reason}"


@dataclass(frozen=True)
class Report:
    """What :func:`fastvit.accelerate` did to a model."""

    model: str
    changes: tuple[Change, ...]
    refusals: tuple[Refusal, ...]
    trunk: tuple[Trunk, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        places = {0: "not accelerated", 1: "accelerated in one place"}
        count = len(self.changes)
        lines = [f"{self.model}: {places.get(count, f'accelerated in {count} places')}", *map(str, self.changes)]
        lines += map(str, self.trunk)
        if self.refusals:
            lines += ["left as they are:", *(f"  {refusal}" for refusal in self.refusals)]
        return "\n".join(lines)
