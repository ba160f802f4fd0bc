"""Random numbers tied to an observation rather than to a point in the run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_POSTERIOR_SEED = 0x9057E101  # unlikely to be chosen as a likelihood's seed


def uniform_by_index(index: Tensor, size: int, seed: int = 0) -> Tensor:
    """Draw uniform numbers in (0, 1) that depend only on the seed, the observation's index and the position.

    Evaluation uses them for binarisation and for the posterior sample. Each observation is thus evaluated with the same
    noise by every method, in any order, with any batch size and number of processes, and a validation pass does not
    touch the random state of training.

    Args:
        index: Indices of the observations, int64, shape ``(B,)``.
        size: Number of draws per observation.
        seed: Different seeds give independent draws.

    Returns:
        float32, shape ``(B, size)``, on the device of ``index``; multiples of 2**-24, never 0 or 1.
    """
    seeds = _mix(torch.full_like(index, seed & _MASK).to(torch.int32))
    rows = _mix((seeds + (index & _MASK) * _GOLDEN + (index >> 32)).to(torch.int32))
    columns = (torch.arange(1, size + 1, device=index.device) * _GOLDEN).to(torch.int32)
    bits = _mix(rows[:, None] + columns[None, :])
    # 23 bits plus a half are exact in float32, named explicitly because half precision changes the default dtype.
    return _shifted(bits, 9).to(torch.float32).add_(0.5).div_(2**23)


def sample_by_index(posterior: Distribution, index: Tensor, number: int = 0) -> Tensor:
    """Sample a posterior by inverse transform of noise tied to the observation.

    Args:
        posterior: q(z|x), with batch shape ``(B, k)``. If it has no inverse CDF, it is sampled with fresh noise.
        index: Indices of the observations, int64, shape ``(B,)``.
        number: Which of the observation's independent samples to draw; the ELBO at evaluation uses the first.

    Returns:
        Latents, shape ``(B, k)``.
    """
    uniform = uniform_by_index(index, posterior.batch_shape[-1], seed=_POSTERIOR_SEED + number)
    try:
        return posterior.icdf(uniform)
    except NotImplementedError:
        return posterior.rsample()


def _mix(key: Tensor) -> Tensor:
    """Scramble int32 keys in place with the finaliser of MurmurHash3; the products overflow on purpose."""
    key.bitwise_xor_(_shifted(key, 16)).mul_(0x85EBCA6B - 2**32)
    key.bitwise_xor_(_shifted(key, 13)).mul_(0xC2B2AE35 - 2**32)
    return key.bitwise_xor_(_shifted(key, 16))


def _shifted(key: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros (a logical shift)."""
    return (key >> bits).bitwise_and_(0xFFFFFFFF >> bits)
