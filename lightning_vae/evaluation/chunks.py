"""The observations of a loader and their latents, some at a time, so that memory stays bounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import rank_and_processes
from ..vae import VAE

# Numbers of data that are decoded at once, whatever K and the batch size. Few on a CPU, so that what the layers compute
# stays in its cache.
_NUMBERS_AT_ONCE = {"cpu": 2**17}
_ELSEWHERE = 2**22


def batches(
    vae: VAE, loader: Iterable[Any], most: float = math.inf
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yield the data in the networks' scale, their binarisation, the indices and the labels, on the model's device.

    Batches of more observations than are decoded at once, or than `most`, come in parts.
    """
    rows = int(min(decoded_at_once(vae), most))
    position = 0
    rank, processes = rank_and_processes()
    for number, batch in enumerate(loader):
        x = vae._observations(batch, check=number == 0)
        given = batch if isinstance(batch, Mapping) else {}
        label = given.get("label")
        # Without an index, in the order in which DistributedSampler deals them.
        index = given["index"] if "index" in given else torch.arange(position, position + len(x)) * processes + rank
        position += len(x)
        if not isinstance(label, Tensor) or label.ndim != 1 or label.is_floating_point():  # no classes
            label = None
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            data, indices = vae._to_network_scale(x[part].to(vae.device)), index[part].to(vae.device).long()
            observed = vae.likelihood.observe(data, indices)
            yield data, observed, indices, None if label is None else label[part].to(vae.device)


def decoded_at_once(vae: VAE) -> int:
    """Return the number of latents that are decoded at a time."""
    return max(1, _NUMBERS_AT_ONCE.get(vae.device.type, _ELSEWHERE) // math.prod(vae.shape))


def in_parts(vae: VAE, z: Tensor, observed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield latents of shape ``(S, B, k)``, flat and some at a time, each beside its observation of the B."""
    flat = z.flatten(0, 1)
    for part in torch.arange(len(flat), device=z.device).split(decoded_at_once(vae)):
        yield flat[part], observed[part % len(observed)]


def log_likelihood(vae: VAE, observed: Tensor, z: Tensor) -> Tensor:
    """Compute log p(x|z) of each of ``(S, B)`` latents, z of shape ``(S, B, k)``, in nats, float64."""
    parts = [vae.decode(part).log_prob(x).double() for part, x in in_parts(vae, z, observed)]
    return torch.cat(parts).view(len(z), -1)


def decoded_means(vae: VAE, z: Tensor) -> list[Tensor]:
    """Decode latents of shape ``(N, k)`` to flat means, some at a time."""
    return [vae.decode(part).mean.flatten(1) for part in z.split(decoded_at_once(vae))]
