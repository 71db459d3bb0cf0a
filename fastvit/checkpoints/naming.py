"""How a library names and stores a model's tensors, as tables that are read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastvit.checkpoints.errors import CheckpointError

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


# What a layout says of names that are none of the model's, where it gives no reason to refuse them:
UNUSED = "unused"  # the encoder's, but they do not enter its output; kept for the way back
BESIDE = "beside"  # of other parts of a larger model; left out


@dataclass(frozen=True, eq=False)
class Layout:
    """All that is particular to one library's form of a model.

    Attributes:
        schema: "timm", "torchvision", "huggingface", "huggingface-v5", "jax" or "big_vision".
        family: what the model is where nothing says more.
        table: its names; those of the encoder, but not those of the head, stand behind `prefix`.
        older: names of earlier versions or of a model's own code, and ours for them.
        others: names that are understood and not the model's: `UNUSED`, `BESIDE`, or why FastViT has no place for them.
        fixed: arguments that its classes have in any case.
        assumed: arguments that its code takes where nothing says otherwise.
    """

    schema: str
    family: str
    table: Table
    prefix: str = ""
    older: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)

    def find(self, name: str) -> tuple[str, int] | None:
        """Our name for a file's tensor, and which part of it that is; None if it has no place."""
        for pattern, ours, part in _rows(self):
            if match := pattern.fullmatch(name):
                return _filled(ours, match), part
        return None

    def stored(self, ours: str) -> Stored | None:
        """How our tensor is stored, under its full names in a file; None: it can't be."""
        for pattern, where in self.table.items():
            if match := _pattern(pattern).fullmatch(ours):
                stored = _as_stored(where)
                return replace(stored, names=tuple(_filled(self.full(ours, name), match) for name in stored.names))
        return None

    def names_of(self, ours: str) -> tuple[str, ...]:
        """What our tensor is called in a file; our own name where the layout has none."""
        stored = self.stored(ours)
        return (ours,) if stored is None else stored.names

    def meaning(self, name: str) -> str:
        """What `others` says of a file's tensor; "" where it is unknown."""
        short = name.removeprefix(self.prefix)
        return next((meaning for key, meaning in self.others.items() if _pattern(key).fullmatch(short)), "")

    def full(self, ours: str, name: str) -> str:
        """The full name in a file."""
        return name if ours.startswith("head.") else self.prefix + name


@dataclass(frozen=True)
class Names:
    """A state_dict, sorted by a layout.

    Attributes:
        state: the tensors in our names.
        unused: tensors that do not enter the encoder's output, in the layout's names; kept for the way back.
        beside: names of other parts of a larger model, which are left out.
        unknown: names that mean nothing to FastViT.
        refused: names that are understood but have no place in FastViT, and why.
        missing: names that the model needs and the file lacks.
        misshapen: names whose shape is not the model's, or that were found twice, with what is wrong.
    """

    state: State = field(default_factory=dict)
    unused: State = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)


def read_names(layout: Layout, state: Mapping[str, Tensor]) -> Names:
    """Sort a file's tensors; those of the model come in our names and our arrangement."""
    found = Names()
    parts: dict[str, dict[int, str]] = {}
    for name, tensor in state.items():
        if place := layout.find(name):
            ours, part = place
            first = parts.setdefault(ours, {}).setdefault(part, name)
            if first != name:
                found.misshapen.append(f"{name}: {first} is the same tensor by another name")
        elif (meaning := layout.meaning(name)) == UNUSED:
            found.unused[name.removeprefix(layout.prefix)] = tensor
        elif meaning == BESIDE:
            found.beside.append(name)
        elif meaning:
            found.refused[name] = meaning
        else:
            found.unknown.append(name)
    for ours, names in parts.items():
        _assemble(layout, ours, names, state, found)
    return found


def _assemble(layout: Layout, ours: str, names: Mapping[int, str], state: Mapping[str, Tensor], found: Names) -> None:
    """Put our tensor together from its parts in the file."""
    stored = layout.stored(ours)
    assert stored is not None, f"{ours}: the table of {layout.schema} names it only in one direction"
    if len(names) < len(stored.names):
        found.missing.extend(name for part, name in enumerate(stored.names) if part not in names)
        return
    in_order = {names[part]: state[names[part]] for part in range(len(names))}
    try:
        found.state[ours] = stored.read(list(in_order.values()))
    except Refusal as refusal:
        found.refused.update(dict.fromkeys(in_order, str(refusal)))
    except (RuntimeError, IndexError):
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in in_order.items())
        found.misshapen.append(f"{shapes}: not the shape of {ours}")


def write_names(layout: Layout, prefix: str, state: Mapping[str, Tensor]) -> State:
    """Our tensors in a library's names, the encoder's behind `prefix`, and in its arrangement.

    Raises:
        CheckpointError: the library has no place for a tensor; names all of them.
    """
    layout = replace(layout, prefix=prefix)
    out: State = {}
    lost: list[str] = []
    for ours, tensor in state.items():
        stored = layout.stored(ours)
        if stored is None or stored.write is None:
            lost.append(ours)
            continue
        out |= {name: part.contiguous() for name, part in zip(stored.names, stored.write(tensor), strict=True)}
    if lost:
        raise CheckpointError(f"{layout.schema}: has no place for {', '.join(lost)}")
    return out


@cache
def _rows(layout: Layout) -> list[tuple[re.Pattern[str], str, int]]:
    """The table with patterns of a file's names first, older names too: pattern, our name, part."""
    rows = [
        (name, ours, part) for ours, where in layout.table.items() for part, name in enumerate(_as_stored(where).names)
    ]
    rows += [(name, ours, 0) for name, ours in layout.older.items()]
    return [(_pattern(layout.full(ours, name)), ours, part) for name, ours, part in rows]


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


@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    groups = {"**": ".*", "#": r"(?P<block>\d+)", "*": "(?P<kind>weight|bias)"}
    return re.compile(
        re.sub(r"\\\*\\\*|\\#|\\\*", lambda found: groups[found[0].replace("\\", "")], re.escape(pattern))
    )
