"""Transformer blocks of other libraries on the trunk's ops: what their mixins share."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from fastvit.branches import has_own_branch, whole
from fastvit.guards import attribute
from fastvit.interop.host import Settings, why_not_methods
from fastvit.interop.surgery import Mixin
from fastvit.stream import Setup, Stream
from fastvit.trunk import Half, Names, half_of, kept, run_blocks, run_half, why_not_half

__all__ = ["Blocks", "TrunkBlock"]


class TrunkBlock(Mixin):
    """A block whose additions and norms are calls of :func:`fastvit.functional.add_norm`.

    A subclass names the classes it stands in for and the parts of their halves. Every call is the host's own where
    the ops can't run, and a part of it is the host's own where that part is more than what the ops do.
    """

    hosts: ClassVar[tuple[str, ...]]  # classes by their full names
    overrides: ClassVar[tuple[str, ...]] = ("forward",)

    form: ClassVar[tuple[Names, Names]]

    fastvit_settings: Settings

    def options(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the host's forward is given besides tokens, by the names that attention has for it."""
        return {**dict(zip(self._argument_names, args, strict=False)), **kwargs} if args else kwargs

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why this module can't be changed, "" if it can: its class had other parts in another version."""
        missing = [name for half in cls.form for name in half[:2] if attribute(module, name) is None]
        return f"it has no {', '.join(missing)}" if missing else ""

    @classmethod
    def learn(cls, module: Any) -> None:
        """Tell the trunk of classes of the host's that this module has inside, where they are known by name alone."""

    @staticmethod
    def call(module: Any, x: Any, **options: Any) -> Any:
        """A branch as it is."""
        return whole(module, x, **options)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        setup = self.setup(x)
        if setup is None:
            return super().forward(x, *args, **kwargs)
        stream = self._run(Stream(x), setup, self.options(*args, **kwargs), ends=True)
        return stream.tensor(setup)

    def stream(self, stream: Stream, setup: Setup) -> Stream | None:
        """The same between blocks that nobody watches; None where a call is the host's own."""
        return None if why_not_methods(self) else self._run(stream, setup, self.options())

    def setup(self, x: Any) -> Setup | None:
        """How the ops are called on tokens; None where a call is the host's own."""
        if why_not_methods(self):
            return None
        settings = self.fastvit_settings
        keeps_dtype = settings.residual_dtype is not None and getattr(x, "dtype", None) is settings.residual_dtype
        return Setup.of(x, settings.backend, keeps_dtype)

    def _run(self, stream: Stream, setup: Setup, options: dict[str, Any], ends: bool = False) -> Stream:
        make = functools.partial(self._halves, setup, options, ends)
        is_plain = all(value is None for value in options.values())
        for half in kept(self, (setup, ends, *options), make) if is_plain else make():
            stream = run_half(stream, half, setup)
        return stream

    def _halves(self, setup: Setup, options: dict[str, Any], ends: bool = False) -> tuple[Half, Half]:
        attention, mlp = self.form
        last = setup._replace(ends=ends)
        return half_of(self, attention, setup, self.call, **options), half_of(self, mlp, last, self.call)

    @classmethod
    def parts(cls, module: Any) -> list[str]:
        """What of this block is ours, in words."""
        kinds = zip(cls.form, ("attention", "MLP"), strict=True)
        return ["additions", "norms", *(kind for half, kind in kinds if has_own_branch(attribute(module, half.branch)))]

    @classmethod
    def why_not(cls, module: Any) -> str:
        """What of this block runs as it is at present, and why; "" where all is ours."""
        reasons = [why_not_methods(module), *map(why_not_half, module._halves(Setup(), {}))]
        return "; ".join(reason for reason in reasons if reason)


class Blocks(Mixin):
    """A sequence of such blocks: what one is to add is added by the next."""

    overrides = ("forward",)

    fastvit_settings: Settings

    def forward(self, input: Any) -> Any:
        first: Any = next(iter(self._modules.values()), None)
        setup = first.setup(input) if isinstance(first, TrunkBlock) else None
        if setup is None or why_not_methods(self):
            return super().forward(input)
        return run_blocks(self._modules.values(), input, setup)
