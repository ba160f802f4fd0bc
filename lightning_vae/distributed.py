"""The mean over a global batch, of which each process holds a share."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """Average over the observations of all processes' batches, as if one process had them all.

    The value is the global mean, the same in every process. The gradient reaches this process's own observations, and
    is scaled so that what DDP or FSDP makes of it, the mean of the processes' gradients, is the global mean's, however
    uneven the shares are. So whatever is computed from it is right too, a floor for one:
    ``free_bits(mean_over_processes(kl_per_dimension)[None], 0.5)``.

    Args:
        values: One row per observation of this process, shape ``(B, k)``.

    Returns:
        Shape ``(k,)``; with one process, the mean over the rows.
    """
    return mean_and_count(values)[0] if several_processes() else values.mean(0)


def mean_and_count(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`mean_over_processes` does, and the number of all processes' observations, in one exchange."""
    sums = values.sum(0)
    totals = torch.cat([sums.detach(), sums.new_full((1,), len(values))])
    torch.distributed.all_reduce(totals)
    count = totals[-1]
    share = sums * (torch.distributed.get_world_size() / count)
    return share - share.detach() + totals[:-1] / count, count


def several_processes() -> bool:
    """Tell whether several processes train together."""
    return in_group() and torch.distributed.get_world_size() > 1


def rank_and_processes() -> tuple[int, int]:
    """Return this process's number and how many there are; ``(0, 1)`` outside of a group."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if in_group() else (0, 1)


def sum_over_processes(sums: Tensor) -> Tensor:
    """Add up a tensor over the processes, in place."""
    if in_group():
        torch.distributed.all_reduce(sums)
    return sums


def in_group() -> bool:
    """Tell whether this process is in a group, be it of one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_processes() -> None:
    """Leave the group of processes, if there is one, before the interpreter ends.

    One of gloo's threads may hold a tensor of the last exchange for a moment longer than the run does, and a thread
    that lets go of a tensor while the interpreter ends aborts the process. Lightning itself sees to NCCL's alone.
    """
    if in_group():
        torch.distributed.destroy_process_group()
