"""Sums and means over the processes of a run, each of which holds a share of the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """Average over the observations of all processes' batches, as if one process had them all.

    The value is the global mean, the same in every process. The gradient flows to this process's own observations. It
    is scaled so that the mean of the processes' gradients, which DDP and FSDP compute, is the gradient of the global
    mean, however uneven the shares are. Functions of the mean, such as a floor, then have the right gradient too:
    ``free_bits(mean_over_processes(kl_per_dimension)[None], 0.5)``.

    Args:
        values: One row per observation of this process, shape ``(B, k)``.

    Returns:
        Shape ``(k,)``; with one process, the mean over the rows.
    """
    return mean_and_count(values)[0] if several_processes() else values.mean(0)


def mean_and_count(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`mean_over_processes` and the total number of observations, in one exchange."""
    sums = values.sum(0)
    totals = sum_over_processes(torch.cat([sums.detach(), sums.new_full((1,), len(values))]))
    count = totals[-1]
    share = sums * (torch.distributed.get_world_size() / count)
    return share - share.detach() + totals[:-1] / count, count


def sum_over_processes(sums: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if in_group():
        torch.distributed.all_reduce(sums)
    return sums


def rank_and_processes() -> tuple[int, int]:
    """Return this process's rank and the number of processes; ``(0, 1)`` outside a group."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if in_group() else (0, 1)


def several_processes() -> bool:
    """Return whether several processes train together."""
    return in_group() and torch.distributed.get_world_size() > 1


def in_group() -> bool:
    """Return whether this process is in a group, even a group of one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_processes() -> None:
    """Destroy the process group, if there is one, before the interpreter exits.

    A gloo thread may hold a tensor of the last exchange slightly longer than the run lasts, and a thread that frees a
    tensor while the interpreter exits aborts the process. Lightning itself cleans up only after NCCL.
    """
    if in_group():
        torch.distributed.destroy_process_group()
