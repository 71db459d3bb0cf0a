"""How a library names and stores a model's tensors, as tables that are read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

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
    "packed",
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


def packed(*names: str) -> Stored:
    """Parts that lie one after the other in our tensor's first dimension, such as query, key and value."""
    return Stored(names, lambda parts: torch.cat(list(parts)), lambda tensor: tensor.chunk(len(names)))


def reshaped(name: str, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor] | None = None) -> Stored:
    """One tensor in another arrangement."""
    writes = None if write is None else lambda tensor: [write(tensor)]
    return Stored((name,), lambda parts: read(parts[0]), writes)


# Our name to the library's. "#" is the number of a block, "*" is "weight" or "bias", "**" is anything.
Table = Mapping[str, "str | Stored"]


@dataclass(frozen=True)
class Layout:
    """One library's names.

    Attributes:
        schema: "timm", "torchvision", "huggingface", "huggingface-v5", "jax" or "big_vision".
        family: what the model is where nothing says more.
        encoder: names of the encoder, behind one of `prefixes`.
        head: names of the classifier, without a prefix, unless `head_has_prefix`.
        older: names of earlier versions, and what they are called now.
        unused: names of the encoder's tensors that do not enter its output; kept for the way back.
        beside: names of other parts of a larger model; left out.
        refused: names that are understood but have no place in FastViT, and why.
        projection: the head has no bias.
    """

    schema: str
    family: str
    encoder: Table
    head: Table
    prefixes: tuple[str, ...] = ("",)
    head_has_prefix: bool = False
    older: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    projection: bool = False

    def split(self, name: str, prefix: str) -> tuple[str | None, str | None]:
        """A file's name as the encoder's table and as the head's has it; None where it can't be one of theirs."""
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        return inside, inside if self.head_has_prefix else name

    def join(self, ours: str, name: str, prefix: str) -> str:
        """The full name in a file."""
        return name if ours.startswith("head.") and not self.head_has_prefix else prefix + name

    def find(self, name: str, prefix: str) -> _Place | None:
        """Where a file's tensor goes, None if it has no place."""
        inside, outside = self.split(name, prefix)
        return (inside and self._find(self._encoder, inside)) or (outside and self._find(self._head, outside)) or None

    def stored(self, ours: str) -> tuple[Stored, str, str] | None:
        """How our tensor is stored, with the number of its block and "weight" or "bias"; None: it can't be."""
        for pattern, where in (*self.encoder.items(), *self.head.items()):
            match = _pattern(pattern).fullmatch(ours)
            if match:
                groups = match.groupdict()
                return _as_stored(where), groups.get("block") or "", groups.get("kind") or ""
        return None

    def _find(self, rows: Sequence[tuple[re.Pattern[str], str, int]], name: str) -> _Place | None:
        name = self._renamed(name)
        for pattern, ours, part in rows:
            match = pattern.fullmatch(name)
            if match:
                groups = match.groupdict()
                return _Place(_filled(ours, groups.get("block") or "", groups.get("kind") or ""), part)
        return None

    def _renamed(self, name: str) -> str:
        for pattern, now in self.older.items():
            match = _pattern(pattern).fullmatch(name)
            if match:
                groups = match.groupdict()
                return _filled(now, groups.get("block") or "", groups.get("kind") or "")
        return name

    @cached_property
    def _encoder(self) -> list[tuple[re.Pattern[str], str, int]]:
        return list(_rows(self.encoder))

    @cached_property
    def _head(self) -> list[tuple[re.Pattern[str], str, int]]:
        return list(_rows(self.head))


@dataclass(frozen=True)
class _Place:
    """Our tensor's name, and which part of it."""

    ours: str
    part: int


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
        if place is not None:
            slots = parts.setdefault(place.ours, {})
            if place.part in slots:
                found.misshapen.append(f"{name}: {slots[place.part][0]} is the same tensor by another name")
            else:
                slots[place.part] = (name, tensor)
            continue
        candidates = [inside for inside in (layout.split(name, prefix)[0], name) if inside is not None]
        reason = next((layout.refused[key] for key in layout.refused if _any_matches([key], candidates)), "")
        if reason:
            found.refused[name] = reason
        elif _any_matches(layout.unused, candidates):
            found.unused[candidates[0]] = tensor
        elif _any_matches(layout.beside, candidates):
            found.beside.append(name)
        else:
            found.unknown.append(name)
    for ours, slots in parts.items():
        _assemble(layout, prefix, ours, slots, found)
    return found


def _assemble(layout: Layout, prefix: str, ours: str, slots: dict[int, tuple[str, Tensor]], found: Names) -> None:
    """Put our tensor together from its parts in the file."""
    where = layout.stored(ours)
    if where is None:
        raise CheckpointError(f"{ours}: the table of {layout.schema} names it only in one direction")
    stored, block, kind = where
    names = [layout.join(ours, _filled(name, block, kind), prefix) for name in stored.names]
    if len(slots) < len(names):
        found.incomplete += [name for part, name in enumerate(names) if part not in slots]
        return
    try:
        found.state[ours] = stored.read([slots[part][1] for part in range(len(names))])
    except Refusal as refusal:
        found.refused.update({slots[part][0]: str(refusal) for part in range(len(names))})
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
        where = layout.stored(ours)
        write = where and where[0].write
        if where is None or write is None:
            lost.append(ours)
            continue
        stored, block, kind = where
        for name, part in zip(stored.names, write(tensor), strict=True):
            out[layout.join(ours, _filled(name, block, kind), prefix)] = part.contiguous()
    if lost:
        raise CheckpointError(f"{layout.schema}: has no place for {', '.join(lost)}")
    return out


def names_of(layout: Layout, prefix: str, ours: str) -> list[str]:
    """What our tensor is called in a file; our own name where the layout has none."""
    where = layout.stored(ours)
    if where is None:
        return [ours]
    stored, block, kind = where
    return [layout.join(ours, _filled(name, block, kind), prefix) for name in stored.names]


def _rows(table: Table) -> Iterator[tuple[re.Pattern[str], str, int]]:
    for ours, where in table.items():
        for part, name in enumerate(_as_stored(where).names):
            yield _pattern(name), ours, part


def _as_stored(where: str | Stored) -> Stored:
    if isinstance(where, Stored):
        return where
    return Stored((where,), lambda parts: parts[0], lambda tensor: [tensor])


def _filled(pattern: str, block: str, kind: str) -> str:
    return pattern.replace("#", block).replace("*", kind)


def _any_matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(_pattern(pattern).fullmatch(name) for pattern in patterns for name in names)


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    groups = {"**": ".*", "#": r"(?P<block>\d+)", "*": "(?P<kind>weight|bias)"}
    return re.compile(
        re.sub(r"\\\*\\\*|\\#|\\\*", lambda found: groups[found[0].replace("\\", "")], re.escape(pattern))
    )
