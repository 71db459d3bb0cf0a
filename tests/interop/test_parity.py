"""The same model with `fastvit.accelerate` and without, for every class and setting of the zoo.

What is measured here fills the table of docs/interop.md, see support_table.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastvit
from tests.interop import support_table
from tests.interop.comparing import Pair, bfloat16_gradients, bfloat16_outputs, float32_errors, ratio
from tests.interop.subjects import launched
from tests.interop.zoo import ENTRIES, Entry

Record = Callable[[str, Any], None]

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)


@every_entry
def test_float32(entry: Entry, record_property: Record) -> None:
    """Outputs within 1e-5 and gradients within 1e-4, in eval and train mode, at every size, for three batch sizes."""
    pair = Pair.of(entry)
    errors = []
    for size in entry.sizes:
        for train, batch in ((False, 3), (True, 2)):
            pair.train(train)
            errors.append(float32_errors(pair, entry.images(size, batch)))
    pair.train(False)
    errors.append(float32_errors(pair, entry.images(batch=1)))
    outputs, grads = (max(kind) for kind in zip(*errors, strict=True))
    record_property(*support_table.figure(entry, outputs=outputs, gradients=grads))


@every_entry
def test_bfloat16_autocast(entry: Entry, record_property: Record) -> None:
    """At most twice the library's own error against float64."""
    outputs, found = bfloat16_outputs(Pair.of(entry), entry.images(batch=32).double())
    bfloat16_gradients(found)
    record_property(*support_table.figure(entry, autocast=ratio(outputs)))


@every_entry
@pytest.mark.parametrize("autocast", [False, True])
def test_as_many_random_numbers_are_drawn(entry: Entry, autocast: bool) -> None:
    """Masks, dropout and dropped paths: the generator stands where the library would have left it."""
    pair = Pair.of(entry)
    pair.train(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = pair.want(entry.images())
        state = torch.get_rng_state()
        got = pair.got(entry.images())
    assert torch.get_rng_state().equal(state)
    assert [output.dtype for output in got] == [output.dtype for output in want]


@every_entry
def test_nothing_but_the_code_changes(entry: Entry) -> None:
    """state_dict, parameters, buffers and class are the same objects, before and after."""
    untouched = Pair.of(entry).untouched
    model = copy.deepcopy(untouched)
    before, classes = contents(model), [type(module) for module in model.modules()]
    fastvit.accelerate(model)
    assert contents(model) == before
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    assert str(model) == str(untouched)
    untouched.load_state_dict(model.state_dict(), strict=True)


def contents(model: nn.Module) -> dict[str, Any]:
    """Names in their order, and where everything lies: no tensor is added, none moved."""
    state = model.state_dict()
    return {
        "state_dict": [(name, value.data_ptr(), value.dtype, value.shape) for name, value in state.items()],
        "parameters": [(name, id(value), value.requires_grad) for name, value in model.named_parameters()],
        "buffers": [(name, id(value)) for name, value in model.named_buffers()],
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
    }


@every_entry
def test_page_says_what_is_true(entry: Entry, record_property: Record) -> None:
    """The row of docs/interop.md, but for its figures."""
    facts = support_table.facts(entry, Pair.of(entry).untouched)
    record_property(*support_table.figure(entry, **facts))
    if not support_table.is_written():
        row = support_table.row_of_page(entry)
        assert row == facts, f"write it anew: {support_table.COMMAND}"


def test_page_has_a_row_for_every_entry() -> None:
    if not support_table.is_written():
        rows = [(row["library"], row["setting"]) for row in support_table.rows_of_page()]
        assert rows == [(entry.library, entry.setting) for entry in ENTRIES], support_table.COMMAND


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit", "transformers-vit"])
def test_takes_no_time(name: str) -> None:
    """Under 50 ms; the best of three, since others may be running here."""
    model = Pair.of(next(entry for entry in ENTRIES if str(entry) == name)).untouched
    assert min(milliseconds(model) for _ in range(3)) < 50


def milliseconds(model: nn.Module) -> float:
    start = time.perf_counter()
    fastvit.accelerate(model)
    elapsed = 1000 * (time.perf_counter() - start)
    fastvit.restore(model)
    return elapsed


def test_the_untouched_model_makes_no_call_of_ours() -> None:
    """So that a count of one means what it says."""
    pair = Pair.of(ENTRIES[0])
    launched()
    pair.want(ENTRIES[0].images())
    assert launched() == 0
