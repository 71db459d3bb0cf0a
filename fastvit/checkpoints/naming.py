"""How a library names and stores a model's tensors, as tables that are read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvit.checkpoints.errors import CheckpointError

__all__ = [
    "Layout",
    "Names",
    "Refusal",
    "State",
    "Stored",
    "Table",
    "names_of",
    "read_names",
    "reshaped",
    "write_names",
]

State = dict[str, Tensor]


class Refusal(Exception):
    """Raised by a reader: the tensor is understood, and FastViT has no place for it; says why."""


@dataclass(frozen=True)
class Stored:
    """Where one tensor of ours lies in a checkpoint: under one name or in parts, perhaps in another arrangement.

    `write` is None where a library's files are only read.
    """

    names: tuple[str, ...]
    read: Callable[[Sequence[Tensor]], Tensor]
    write: Callable[[Tensor], Sequence[Tensor]] | None = None


def reshaped(name: str, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor] | None = None) -> Stored:
    """One tensor in another arrangement."""
    writes = None if write is None else lambda tensor: [write(tensor)]
    return Stored((name,), lambda parts: read(parts[0]), writes)


# Our name to the library's. "#" is the number of a block, "*" is "weight" or "bias", "**" is anything, and "{q,k,v}"
# names parts that lie one after the other in our tensor's first dimension.
Table = Mapping[str, "str | Stored"]


@dataclass(frozen=True, eq=False)
class Layout:
    """All that is particular to one library's form of a model.

    Attributes:
        schema: "timm", "torchvision", "huggingface", "huggingface-v5", "jax" or "big_vision".
        family: what the model is where nothing says more.
        table: its names; those of the encoder stand behind one of `prefixes`, those of the head do not, unless
            `head_has_prefix`.
        older: names of earlier versions or of a model's own code, and ours for them.
        unused: names of the encoder's tensors that do not enter its output; kept for the way back.
        beside: names of other parts of a larger model; left out.
        refused: names that are understood but have no place in FastViT, and why.
        fixed: arguments that its classes have in any case.
        assumed: arguments that its code takes where nothing says otherwise.
        projection: the head has no bias.
    """

    schema: str
    family: str
    table: Table
    prefixes: tuple[str, ...] = ("",)
    head_has_prefix: bool = False
    older: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    projection: bool = False

    def find(self, name: str, prefix: str) -> tuple[str, int] | None:
        """Our name for a file's tensor, and which part of it that is; None if it has no place."""
        for pattern, ours, part in _rows(self, prefix):
            if match := pattern.fullmatch(name):
                return _filled(ours, match), part
        return None

    def stored(self, ours: str, prefix: str) -> tuple[Stored, list[str]] | None:
        """How our tensor is stored, and its names in a file; None: it can't be."""
        for pattern, where in self.table.items():
            if match := _pattern(pattern).fullmatch(ours):
                stored = _as_stored(where)
                return stored, [_filled(self.join(ours, name, prefix), match) for name in stored.names]
        return None

    def join(self, ours: str, name: str, prefix: str) -> str:
        """The full name in a file."""
        return name if ours.startswith("head.") and not self.head_has_prefix else prefix + name


@dataclass
class Names:
    """A state_dict, sorted by a layout.

    Attributes:
        state: our names.
        unused, beside, unknown: names in the file; of `unused` the tensors too, under the layout's names.
        refused: names in the file, and why.
        incomplete, misshapen: what is wrong with tensors that were found in part or twice, or do not go together.
    """

    state: State = field(default_factory=dict)
    unused: State = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)


def read_names(layout: Layout, prefix: str, state: Mapping[str, Tensor]) -> Names:
    """Sort a file's tensors; those of the model come in our names and our arrangement."""
    found = Names()
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for name, tensor in state.items():
        place = layout.find(name, prefix)
        if place is None:
            _sort_out(layout, prefix, name, tensor, found)
            continue
        slots = parts.setdefault(place[0], {})
        if place[1] in slots:
            found.misshapen.append(f"{name}: {slots[place[1]][0]} is the same tensor by another name")
        else:
            slots[place[1]] = (name, tensor)
    for ours, slots in parts.items():
        _assemble(layout, prefix, ours, slots, found)
    return found


def _sort_out(layout: Layout, prefix: str, name: str, tensor: Tensor, found: Names) -> None:
    """Note what a tensor is that is none of the model's."""
    candidates = {name, name.removeprefix(prefix)}
    reason = next((why for pattern, why in layout.refused.items() if _any_matches([pattern], candidates)), "")
    if reason:
        found.refused[name] = reason
    elif _any_matches(layout.unused, candidates):
        found.unused[name.removeprefix(prefix)] = tensor
    elif _any_matches(layout.beside, candidates):
        found.beside.append(name)
    else:
        found.unknown.append(name)


def _assemble(layout: Layout, prefix: str, ours: str, slots: dict[int, tuple[str, Tensor]], found: Names) -> None:
    """Put our tensor together from its parts in the file."""
    where = layout.stored(ours, prefix)
    if where is None:
        raise CheckpointError(f"{ours}: the table of {layout.schema} names it only in one direction")
    stored, names = where
    if len(slots) < len(names):
        found.incomplete += [name for part, name in enumerate(names) if part not in slots]
        return
    in_order = [slots[part] for part in range(len(names))]
    try:
        found.state[ours] = stored.read([tensor for _, tensor in in_order])
    except Refusal as refusal:
        found.refused.update({name: str(refusal) for name, _ in in_order})
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in slots.values())
        found.misshapen.append(f"{shapes}: not the shape of {ours}")


def write_names(layout: Layout, prefix: str, state: Mapping[str, Tensor]) -> State:
    """Our tensors in a library's names and arrangement.

    Raises:
        CheckpointError: the library has no place for a tensor; names all of them.
    """
    out: State = {}
    lost: list[str] = []
    for ours, tensor in state.items():
        where = layout.stored(ours, prefix)
        if where is None or where[0].write is None:
            lost.append(ours)
            continue
        for name, part in zip(where[1], where[0].write(tensor), strict=True):
            out[name] = part.contiguous()
    if lost:
        raise CheckpointError(f"{layout.schema}: has no place for {', '.join(lost)}")
    return out


def names_of(layout: Layout, prefix: str, ours: str) -> list[str]:
    """What our tensor is called in a file; our own name where the layout has none."""
    where = layout.stored(ours, prefix)
    return [ours] if where is None else where[1]


@cache
def _rows(layout: Layout, prefix: str) -> list[tuple[re.Pattern[str], str, int]]:
    """The table with patterns of a file's names first, older names too: pattern, our name, part."""
    rows = [
        (_pattern(layout.join(ours, name, prefix)), ours, part)
        for ours, where in layout.table.items()
        for part, name in enumerate(_as_stored(where).names)
    ]
    return rows + [(_pattern(layout.join(ours, name, prefix)), ours, 0) for name, ours in layout.older.items()]


def _as_stored(where: str | Stored) -> Stored:
    if isinstance(where, Stored):
        return where
    start, brace, rest = where.partition("{")
    if not brace:
        return Stored((where,), lambda parts: parts[0], lambda tensor: [tensor])
    inside, _, end = rest.partition("}")
    names = tuple(start + part + end for part in inside.split(","))
    return Stored(names, lambda parts: torch.cat(list(parts)), lambda tensor: tensor.chunk(len(names)))


def _filled(pattern: str, match: re.Match[str]) -> str:
    groups = match.groupdict()
    return pattern.replace("#", groups.get("block") or "").replace("*", groups.get("kind") or "")


def _any_matches(patterns: Sequence[str], names: set[str]) -> bool:
    return any(_pattern(pattern).fullmatch(name) for pattern in patterns for name in names)


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    groups = {"**": ".*", "#": r"(?P<block>\d+)", "*": "(?P<kind>weight|bias)"}
    return re.compile(
        re.sub(r"\\\*\\\*|\\#|\\\*", lambda found: groups[found[0].replace("\\", "")], re.escape(pattern))
    )
