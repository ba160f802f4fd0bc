"""The observations of a loader, as an evaluation looks at them, in one process or several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..vae import VAE
from .chunks import decoded_at_once


def batches(
    vae: VAE, loader: Iterable[Any], most: float = math.inf
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield the data in the networks' scale, what is observed of them, the indices and the labels, on the device.

    Batches of more observations than are decoded at once, or than `most`, come in parts.
    """
    rows = int(min(decoded_at_once(vae), most))
    position = 0
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed() else (0, 1)
    for number, batch in enumerate(loader):
        x = vae._observations(batch, check=number == 0)
        given = batch if isinstance(batch, Mapping) else {}
        label = given.get("label")
        # Without an index, in the order they come, as DistributedSampler deals them.
        index = given["index"] if "index" in given else torch.arange(position, position + len(x)) * processes + rank
        position += len(x)
        if not isinstance(label, Tensor) or label.ndim != 1 or label.is_floating_point():  # no classes
            label = None
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            data, indices = vae._to_network_scale(x[part].to(vae.device)), index[part].to(vae.device).long()
            observed = vae.likelihood.observe(data, indices)
            yield data, observed, indices, None if label is None else label[part].to(vae.device)


def over_processes(value: float, weight: float, device: torch.device) -> float:
    """Average what each process measured on its share of the data, weighted by its size."""
    if not distributed():
        return value
    sums = torch.tensor([value * weight if weight else 0.0, weight], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


def distributed() -> bool:
    """Tell whether there are several processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
