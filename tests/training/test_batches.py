"""Which images go together in a step: every one once, whoever works on it, in parts within their limits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvit.training.batches import (
    Step,
    evaluation_parts,
    packed,
    packed_evaluation_parts,
    packed_training_steps,
    parts_of,
    training_steps,
)

worlds = st.integers(1, 6)


def images_of(steps: list[Step]) -> list[list[int]]:
    return [sorted(itertools.chain(*step)) for step in steps]


def check_parts(step: Step, world: int) -> None:
    """Every image once, as many parts for each process, and shares that add up."""
    dealt = [parts_of(step, rank, world) for rank in range(world)]
    assert len({len(parts) for parts in dealt}) == 1
    every = [part for parts in dealt for part in parts]
    assert all(part.places for part in every)
    seen = sorted(place for part in every if part.share for place in part.places)
    assert seen == images_of([step])[0]
    assert all(part.share in (0, len(part.places) / len(seen)) for part in every)
    assert sum(part.share for part in every) == pytest.approx(1)


@given(length=st.integers(1, 200), most=st.integers(1, 12), ways=worlds, world=worlds)
def test_steps_of_images(length: int, most: int, ways: int, world: int) -> None:
    steps = training_steps(length, most, ways)
    assert list(itertools.chain(*images_of(steps))) == list(range(length))
    assert len(steps) == -(-length // (most * ways))
    sizes = [sum(map(len, step)) for step in steps]
    assert max(sizes) - min(sizes) <= 1
    for step in steps:
        assert len(step) == ways and max(map(len, step)) <= most
        check_parts(step, world)


@given(tokens=st.lists(st.integers(1, 30), min_size=1, max_size=40), more=st.integers(0, 90), ways=worlds, world=worlds)
def test_steps_of_tokens(tokens: list[int], more: int, ways: int, world: int) -> None:
    most = max(tokens) + more
    steps = packed_training_steps(tokens, most, ways)
    assert sorted(itertools.chain(*images_of(steps))) == list(range(len(tokens)))
    for step in steps:
        assert len(step) == ways and all(sum(tokens[place] for place in part) <= most for part in step)
        check_parts(step, world)


def test_as_many_processes_as_planned_have_the_parts_as_they_are() -> None:
    (step,) = training_steps(12, 3, 4)
    assert [[part.places for part in parts_of(step, rank, 4)] for rank in range(4)] == [[part] for part in step]
    assert [[part.places for part in parts_of(step, rank, 2)] for rank in range(2)] == [step[0::2], step[1::2]]
    halves = [part.places for rank in range(8) for part in parts_of(step, rank, 8)]
    assert sorted(map(len, halves)) == [1, 1, 1, 1, 2, 2, 2, 2]


@given(length=st.integers(1, 100), most=st.integers(1, 20), world=worlds)
def test_every_test_image_once_over_all_processes(length: int, most: int, world: int) -> None:
    tokens = [1 + index % 3 for index in range(length)]
    for parts, limit in (
        ([evaluation_parts(length, most, rank=rank, world=world) for rank in range(world)], most),
        ([packed_evaluation_parts(tokens, most + 2, rank=rank, world=world) for rank in range(world)], most + 2),
    ):
        assert len({len(mine) for mine in parts}) == 1
        seen = [place for mine in parts for part in mine if part.share for place in part.places]
        assert sorted(seen) == list(range(length))
        assert all(len(part.places) <= limit for mine in parts for part in mine)


def fewest_batches(lengths: list[int], most: int) -> tuple[int, int]:
    """By trying all: how few parts of at most `most` a sequence falls into, and then the least largest of them."""
    best = {0: (0, 0)}
    for end in range(1, len(lengths) + 1):
        parts = [(start, sum(lengths[start:end])) for start in range(end)]
        best[end] = min((best[i][0] + 1, max(best[i][1], total)) for i, total in parts if total <= most)
    return best[len(lengths)]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=14), more=st.integers(0, 60))
def test_batches_are_as_few_and_as_even_as_the_order_allows(lengths: list[int], more: int) -> None:
    most = max(lengths) + more
    order = list(range(len(lengths)))[::-1]
    batches = packed(order, lengths, most)
    assert [index for batch in batches for index in batch] == order
    totals = [sum(lengths[index] for index in batch) for batch in batches]
    assert (len(batches), max(totals)) == fewest_batches(lengths[::-1], most)
