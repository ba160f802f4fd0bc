"""Sums and means over the processes of a run, each of which holds a share of the batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .objective import ELBOTerms, FreeBitsAverage, FreeBitsPer, free_bits

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class BatchMeans(NamedTuple):
    """Means over the global batch that make up the loss, in nats, each a scalar.

    Attributes:
        distortion: Mean of ``-log p(x|z)``.
        rate: Mean of the rate, without gradient.
        floored_rate: Mean of the floored rate.
        size: Number of observations.
    """

    distortion: Tensor
    rate: Tensor
    floored_rate: Tensor
    size: int | Tensor


def batch_means(
    terms: ELBOTerms, threshold: Tensor | float, per: FreeBitsPer = "dimension", average: FreeBitsAverage = "batch"
) -> BatchMeans:
    """Average the terms of the ELBO over the global batch of all processes, and floor the rate.

    Args:
        terms: The terms of this process's observations.
        threshold: As in :func:`lightning_vae.free_bits`.
        per: As in :func:`lightning_vae.free_bits`.
        average: As in :func:`lightning_vae.free_bits`. With ``"batch"`` the floor acts on the mean over all processes.

    Raises:
        ValueError: If a single process has no observations. Of several processes some may have none.
    """
    distortion, rates = terms
    floored = free_bits(rates, threshold, per, average)
    if not several_processes():
        if not len(rates):
            raise ValueError("A training batch must hold at least one observation, got an empty one. Fix the loader.")
        return BatchMeans(distortion.mean(), rates.detach().sum() / len(rates), floored, len(rates))
    columns = (distortion[:, None], floored.expand(len(distortion), 1), rates)
    means, count = mean_and_count(torch.cat(columns, dim=1))
    floored = free_bits(means[None, 2:], threshold, per) if average == "batch" else means[1]
    return BatchMeans(means[0], means[2:].detach().sum(), floored, count)


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


def rank_and_processes(trainer: Trainer | None) -> tuple[int, int]:
    """Return this process's rank and the number of processes; ``(0, 1)`` outside a group.

    Args:
        trainer: The Trainer that runs, if any. One of a single process works alone, whatever group it is started in.
    """
    if not in_group() or (trainer is not None and trainer.world_size == 1):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


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
        # Before torch 2.8 the group holds the interpreter's lock while it waits for its threads, and a thread that is
        # freeing a tensor needs that lock.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()
