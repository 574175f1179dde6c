"""What the processes of a distributed run tell each other; alone, each of these is the plain thing."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, in rank order, with gradients, and where this process's rows begin."""
    if world_size() == 1:
        return rows, 0
    return _Gather.apply(rows), dist.get_rank() * len(rows)


def world_size() -> int:
    """How many processes train together; 1 where none was asked for."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks. Before they have met, their launcher's word counts."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    told = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    return int(next((rank for rank in told if rank is not None), 0)) == 0


class _Gather(torch.autograd.Function):
    """Own function because torch.distributed.nn is deprecated, and most gathers in use drop the gradient that
    other processes have for one's rows or scale it by 1 / world size."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)  # sum: every process's loss counts these rows
        first = dist.get_rank() * ctx.count
        return gradient[first : first + ctx.count]


def mean_over_processes(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mean of a number that every process has, without gradients."""
    value = value.detach().to(dtype, copy=True)
    if world_size() > 1:
        dist.all_reduce(value)
    return value / world_size()
