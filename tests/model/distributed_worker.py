"""One of two processes of test_distributed.py; run as a script: distributed_worker.py CHECK RANK FOLDER."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastvit

WORLD = 2


def build() -> fastvit.VisionTransformer:
    torch.manual_seed(0)
    return fastvit.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, reg_tokens=1
    )


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 3, 16, 16), torch.randint(0, 5, (8,))


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def expect_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def check_ddp(rank: int) -> None:
    """Two processes with half the batch each end where one process with all of it ends."""
    images, labels = data()
    alone = build()
    train(alone, images, labels)
    model = nn.parallel.DistributedDataParallel(build())
    train(model, images[rank::WORLD], labels[rank::WORLD])
    expect_same(model.module.state_dict(), alone.state_dict())


def check_fsdp(rank: int) -> None:
    """Sharded with fully_shard, the patch embedding on its own: its hooks gather the weight before the one call."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    images, labels = data()
    alone = build()
    train(alone, images, labels)
    model = build()
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model.patch_embed, *model.blocks, model):
        fully_shard(module, mesh=mesh)
    assert model.patch_embed.proj.weight.to_local().shape[0] == 32 // WORLD
    train(model, images[rank::WORLD], labels[rank::WORLD])
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    expect_same(whole, copy.deepcopy(alone.state_dict()))


def check_packed(rank: int) -> None:
    """Images of several sizes, of which the processes have other numbers: each block is gathered once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(2)
    images = [torch.randn(3, 8 * rows, 16) for rows in (1, 2, 3, 4)]
    mine = images[:3] if rank == 0 else images[3:]

    def sharded(parts: bool) -> fastvit.VisionTransformer:
        torch.manual_seed(0)
        model = fastvit.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, dynamic_img_size=True
        )
        whole = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in model.blocks:
            for module in (block.attn, block.mlp) if parts else (block,):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.whole = [whole]  # type: ignore[assignment]
        return model

    model: Any = sharded(parts=False)
    torch.testing.assert_close(model(mine), model.whole[0](mine), rtol=1e-4, atol=1e-5)
    for refused in (sharded(parts=True), model):
        if refused is model:
            model.blocks[1].register_forward_hook(lambda *_: None)
        try:
            refused(mine)
        except ValueError as error:
            assert "is a unit of fully_shard that would be called once for each size" in str(error)
        else:
            raise AssertionError("not refused")


def main() -> None:
    check, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{check}"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    {"ddp": check_ddp, "fsdp": check_fsdp, "packed": check_packed}[check](rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
