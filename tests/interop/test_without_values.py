"""Models without values yet, on the meta device or of fake tensors: accelerated as those are that have them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

import fastvit
from tests.interop.comparing import built
from tests.interop.subjects import LIBRARIES, build, entry, everything_agrees, pair
from tests.interop.zoo import ENTRIES, Entry

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)


def materialise(model: nn.Module, source: nn.Module) -> None:
    """Memory on the CPU, and in it the values of another model of the same class."""
    model.to_empty(device="cpu")
    # Uninitialised memory may happen to hold what is right.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.load_state_dict(source.state_dict())
    buffers = dict(source.named_buffers())
    for name, buffer in model.named_buffers():  # which a state_dict may lack
        buffer.copy_(buffers[name])


@every_entry
def test_built_on_the_meta_device(entry: Entry):
    """Accelerated before there is memory; then it has the weights, results and gradients of an untouched model."""
    untouched = built(entry)
    with torch.device("meta"):
        model = entry.build().eval()
        fastvit.accelerate(model)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    materialise(model, untouched)
    everything_agrees(str(entry), model, untouched)


@pytest.mark.parametrize("name", LIBRARIES)
def test_forward_on_the_meta_device(name: str):
    model, _ = pair(name)
    outputs = entry(name).outputs(model.to("meta"), entry(name).images().to("meta"))
    assert outputs[0].is_meta and outputs[0].shape == (2, 5)


# Not all: some classes keep tensors in caches of the process, which fake ones must not get into.
@pytest.mark.parametrize("name", [*LIBRARIES, "transformers-clip", "transformers-siglip"])
def test_fake_tensors(name: str):
    """Outputs as the library would have them, but for their values."""
    untouched, known = build(name), entry(name)
    want = known.outputs(untouched, known.images())
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(untouched)
    with mode:
        got = known.outputs(fastvit.accelerate(model), known.images())
    assert [(one.shape, one.dtype) for one in got] == [(one.shape, one.dtype) for one in want]


def test_fake_tensors_elsewhere_are_no_trouble():
    """A model with values, accelerated while something else is fake."""
    model, untouched = build("transformers-clip"), build("transformers-clip")
    with FakeTensorMode():
        fastvit.accelerate(model)
    everything_agrees("transformers-clip", model, untouched)
