"""Parameters that lie in parts on several processes: FSDP, FSDP2 and DeepSpeed's ZeRO-3.

A pass through a module gathers its parameters from all processes, and waits for all of them. So either all run it, or
none: where one process could do without a pass, the others have to agree.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward pass of `module` gathers parameters from other processes."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def agreed(decision: bool, module: nn.Module, like: Tensor) -> bool:
    """Whether all processes have decided for something that lets `module` run less; by itself where it is not sharded.

    All processes must ask the same questions in the same order. `like` is a tensor on the device that computes.
    """
    return not most(int(not decision), module, like)


def most(number: int, module: nn.Module, like: Tensor) -> int:
    """The largest `number` of all processes if `module` is sharded, else this one's."""
    if not is_sharded(module):
        return number
    shared = torch.tensor(number, device=like.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter; one that ZeRO-3 has partitioned is empty otherwise."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
