"""How a model is spread over the processes of a run: whole in each, or in shards, by PyTorch's FSDP2.

Each block is a unit of its own, gathered for its call and freed behind it; what is outside the blocks is one more.
Parameters are gathered as they are stored, in float32, and autocast takes them from there: a sharded run has the
numbers of an unsharded one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .distributed import Team
from .errors import OptionError
from .options import TrainOptions

# What of torch.distributed is imported at the top takes seconds, which a bad option would wait for.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


def spread(model: nn.Module, options: TrainOptions, team: Team) -> Any:
    """`model` as the loop calls it, on the device of `team`: as it is, in DDP or, in place, in shards; compiled."""
    if options.checkpoint_blocks:
        _recompute(model, options)
    if options.shard == "none":
        model.to(team.device)
        wrapped = model if team.world == 1 else _replicated(model)
        return torch.compile(wrapped) if options.compile else wrapped
    from torch.distributed.fsdp import fully_shard

    # A block may give a view, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = mesh_of(options, team)
    blocks: Any = model.blocks
    for block in blocks:
        if options.compile:
            block.compile()
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, shard_placement_fn=partial(_placement, mesh.size(-1)))


def _replicated(model: nn.Module) -> nn.Module:
    """In DDP, whose buckets are the gradients themselves rather than copies of them."""
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def _placement(ways: int, parameter: nn.Parameter) -> Shard | None:
    """Positions and tokens have one row only: they are cut by the width."""
    from torch.distributed.tensor import Shard

    if parameter.shape[0] > 1 or parameter.shape[-1] % ways:
        return None
    return Shard(parameter.ndim - 1)


def _recompute(model: Any, options: TrainOptions) -> None:
    depth = len(model.blocks)
    if options.checkpoint_blocks > depth:
        accepted = f"a whole number from 0 to the blocks of {options.model}, {depth}"
        raise OptionError("checkpoint_blocks", options.checkpoint_blocks, accepted)
    model.set_grad_checkpointing()
    model.checkpointed_blocks = options.checkpoint_blocks


def mesh_of(options: TrainOptions, team: Team) -> DeviceMesh:
    """The processes that hold one model in shards, "shard", and with `--shard hybrid` copies of that, "replicate"."""
    from torch.distributed.device_mesh import init_device_mesh

    if options.shard == "full":
        return init_device_mesh(team.device.type, (team.world,), mesh_dim_names=("shard",))
    size = options.shard_size or team.local_world
    if team.world % size:
        accepted = f"a divisor of the {team.world} processes (the default is those of one machine, {team.local_world})"
        raise OptionError("shard_size", size, accepted)
    return init_device_mesh(team.device.type, (team.world // size, size), mesh_dim_names=("replicate", "shard"))


def gather_nothing(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass left gathered, so that every parameter is a shard again."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> list[Any]:
    """The modules whose parameters are gathered at once."""
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class Memory:
    """What a process holds of a model between two steps, in bytes, and what is gathered of it for one unit at most.

    Counted from shapes. Activations, and with them autocast's copies of weights, come on top.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def held(self) -> int:
        return self.parameters + self.gradients + self.optimizer

    def words(self) -> str:
        each = f"{_megabytes(self.parameters)} of parameters, {_megabytes(self.gradients)} of gradients, "
        each += f"{_megabytes(self.optimizer)} of AdamW's averages: {_megabytes(self.held)}"
        return f"{each} (counted), and {_megabytes(self.gathered)} gathered at a time"


def count_memory(model: nn.Module) -> Memory:
    """Of a model with AdamW, which keeps two averages of each parameter.

    Gathered are two units at a time, since the next one's parameters are on their way while one is at work.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained = sum(map(_bytes, parameters))
    units = _units(model)
    inner = {parameter for unit in units if unit is not model for parameter in unit.parameters()}
    own = [[*unit.parameters()] for unit in units if unit is not model]
    own += [[parameter for parameter in model.parameters() if parameter not in inner]] if units else []
    sizes = sorted(sum(parameter.nbytes for parameter in unit) for unit in own)
    return Memory(sum(map(_bytes, model.parameters())), trained, 2 * trained, sum(sizes[-2:]))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _bytes(tensor: Tensor) -> int:
    return local(tensor).nbytes
