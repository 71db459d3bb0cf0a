"""What a process holds of a model that is trained, counted from its shapes: the table of docs/training.md.

`python -m tests.docs.memory_table` prints it, for its place between MARKS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastvit
from fastvit.training import TrainOptions
from fastvit.training.distributed import Team
from fastvit.training.sharding import Memory, count_memory, spread

MARKS = "<!-- counted -->\n", "<!-- /counted -->\n"
MODELS = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "ViT-g/14": "vit_giant_patch14_224",
}
WORLDS = (1, 8, 64)
CLASSES = 1000


@contextmanager
def first_of(world: int) -> Iterator[Team]:
    """The first of so many processes, without the others: what it would send goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Team(torch.device("cpu"), rank=0, world=world, local_world=world)
    finally:
        dist.destroy_process_group()


def counted(name: str, world: int) -> Memory:
    """Of the first process, which has the largest shards."""
    with torch.device("meta"):
        model = fastvit.create_model(name, num_classes=CLASSES)
    with first_of(world) as team:
        spread(model, TrainOptions(shard="full"), team)
        return count_memory(model)


def table() -> str:
    headings = ["model", "parameters", "gradients", "averages", *(f"over {world}" for world in WORLDS), "gathered"]
    headings[4] = "in one process"
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for title, name in MODELS.items():
        held = {world: counted(name, world) for world in WORLDS}
        whole = held[1]
        parts = (whole.parameters, whole.gradients, whole.optimizer, *(held[world].held for world in WORLDS))
        lines.append([title, *map(gigabytes, parts), gigabytes(held[WORLDS[-1]].gathered)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


if __name__ == "__main__":
    print(table(), end="")
