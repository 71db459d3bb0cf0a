"""Which images a step has, and which of them each process works on at once.

A step is settled for all processes together, in parts for as many as the run began with. So a run goes on with the same
steps on another number of processes, of which each then works on more parts of a step, or on smaller ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

Places = list[int]  # of images, in the order of an epoch
Step = list[Places]  # in parts, dealt out in turn


class Part(NamedTuple):
    """What a process works on at once.

    Attributes:
        places: at least one.
        share: of the images of the whole step, 0 to 1. With 0, another process has images left and this one none: it
            goes along with one that does not count, since all must take part in what they do together.
    """

    places: Places
    share: float


def training_steps(length: int, most: int, ways: int) -> list[Step]:
    """An epoch of `length` images in as few steps as can be, of the same size but for one image.

    Each has `ways` parts of `most` images at most.
    """
    count = math.ceil(length / (most * ways))
    cuts = [index * length // count for index in range(count + 1)]
    return [[list(range(start + way, end, ways)) for way in range(ways)] for start, end in pairwise(cuts)]


def packed_training_steps(tokens: Sequence[int], most: int, ways: int) -> list[Step]:
    """An epoch of images of so many `tokens`, each `most` at most, in as few steps as this order allows.

    Each has `ways` parts of `most` tokens at most: where there are too few, the parts of the most images are halved.
    """
    parts = packed(range(len(tokens)), tokens, most)
    while len(parts) % ways and len(largest := max(parts, key=len)) > 1:
        place, half = parts.index(largest), len(largest) // 2
        parts[place : place + 1] = [largest[:half], largest[half:]]
    parts += [[]] * (-len(parts) % ways)
    return [parts[start : start + ways] for start in range(0, len(parts), ways)]


def packed(order: Sequence[int], tokens: Sequence[int], most: int) -> list[Places]:
    """The images of `order` in as few batches of `most` tokens as this order allows, as even as they can be.

    Args:
        order: images by place.
        tokens: of each image by place, `most` at most.
    """
    sums = [0, *accumulate(tokens[index] for index in order)]

    def cuts(budget: int) -> list[int]:
        """Where batches begin and end that each take what `budget` has room for."""
        found = [0]
        while found[-1] < len(order):
            found.append(bisect_right(sums, sums[found[-1]] + budget) - 1)
        return found

    fewest = len(cuts(most))
    # The least budget that makes no more batches: the last one is no remainder of a few images.
    least = max((tokens[index] for index in order), default=most)
    budget = least + bisect_left(range(least, most), True, key=lambda budget: len(cuts(budget)) <= fewest)
    return [list(order[start:end]) for start, end in pairwise(cuts(budget))]


def parts_of(step: Step, rank: int = 0, world: int = 1) -> list[Part]:
    """What process `rank` of `world` works on, in as many parts as every other one; over all, each image once."""
    pieces = world // math.gcd(len(step), world)
    smaller = [part[piece::pieces] for part in step for piece in range(pieces)]
    total, spare = sum(map(len, step)), next(filter(None, step), [])[:1]
    return [Part(places or spare, len(places) / total) for places in smaller[rank::world]]


def evaluation_parts(length: int, most: int, *, rank: int = 0, world: int = 1) -> list[Part]:
    """This process's share of a set in batches of `most` images at most; as many in every process."""
    size = max(1, min(most, math.ceil(length / world)))
    return _dealt([list(range(start, min(start + size, length))) for start in range(0, length, size)], rank, world)


def packed_evaluation_parts(tokens: Sequence[int], most: int, *, rank: int = 0, world: int = 1) -> list[Part]:
    """The same in batches of `most` tokens at most, of images of so many `tokens` each."""
    return _dealt(packed(range(len(tokens)), tokens, most), rank, world)


def _dealt(batches: Step, rank: int, world: int) -> list[Part]:
    return parts_of(batches + [[]] * (-len(batches) % world), rank, world)
