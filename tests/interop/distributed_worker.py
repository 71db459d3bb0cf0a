"""One of two processes of test_distributed.py; run as a script: distributed_worker.py RANK FOLDER MODEL..."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

import fastvit
from fastvit.interop import Unsupported
from fastvit.interop.host import normalised
from tests.interop.subjects import MEAN, STD, build, entry, expect_close, expect_same_gradients, launched, raw_images

WORLD = 2


def sharded(model: nn.Module) -> nn.Module:
    """Every block on its own, the rest with the root."""
    mesh = init_device_mesh("cpu", (WORLD,))
    blocks = [module for module in model.modules() if type(module).__name__ in ("Block", "EncoderBlock", "ViTLayer")]
    assert len(blocks) == 2
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)
    return model


def sharded_finely(model: nn.Module) -> nn.Module:
    """The projection on its own too: it gathers its weight when it is called, so called it must be."""
    path = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    fully_shard(model.get_submodule(path), mesh=init_device_mesh("cpu", (WORLD,)))
    return sharded(model)


def step(name: str, model: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gathered gradients of one step."""
    model.zero_grad()
    outputs = entry(name).outputs(model, images)
    sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    found = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[key] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return outputs, found


def check(name: str, rank: int, wrap: Callable[[nn.Module], nn.Module], before: bool, launches: int) -> nn.Module:
    """Floats and raw images, accelerated before or after it is wrapped, then restored."""
    untouched = build(name)
    model = copy.deepcopy(untouched)
    if before:
        fastvit.accelerate(model, mean=MEAN, std=STD)
    untouched, model = wrap(untouched), wrap(model)
    if not before:
        fastvit.accelerate(model, mean=MEAN, std=STD)
    # Other images in each process, so that gradients must meet.
    raw = raw_images(4)[rank::WORLD]
    floats = normalised(raw, MEAN, STD)
    want = step(name, untouched, floats)
    for images in (floats, raw):
        launched()
        got = step(name, model, images)
        assert launched() == launches
        expect_close(got[0], want[0])
        expect_same_gradients(got[1], want[1])
    fastvit.restore(model)
    assert not fastvit.report(model).changes
    assert [type(module).__name__ for module in model.modules()] == [type(m).__name__ for m in untouched.modules()]
    got = step(name, model, floats)
    assert launched() == 0
    expect_close(got[0], want[0])
    expect_same_gradients(got[1], want[1])
    return model


def check_all(name: str, rank: int) -> None:
    for before in (True, False):
        check(name, rank, DistributedDataParallel, before, launches=1)
        model = check(name, rank, sharded, before, launches=1)
        assert isinstance(model, FSDPModule)
    check(name, rank, sharded_finely, True, launches=0)
    try:
        fastvit.accelerate(sharded_finely(build(name)))
    except Unsupported as refusal:
        assert "FSDPConv2d, not torch.nn.modules.conv.Conv2d itself" in str(refusal)
    else:
        raise AssertionError("a projection that is sharded on its own was accelerated")


def main() -> None:
    rank, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    for name in names:
        check_all(name, rank)
        print(name, "is done", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
