"""Random numbers tied to an observation rather than to a point in the run."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    OneHotCategorical,
)
from torch.nn import functional as F  # noqa: N812

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


def sample_by_index(distribution: Distribution, index: Tensor, number: int = 0, seed: int = _POSTERIOR_SEED) -> Tensor:
    """Sample latents by inverse transform of noise tied to the observation.

    A Gaussian with a full covariance is transformed by its Cholesky factor. The class of each group of categories is
    that whose cumulative probability the noise falls into, and so is the component of a mixture. A distribution
    without such a transform is sampled with fresh noise.

    Args:
        distribution: q(z|x), with the observations along its first axis; or p(z), which has no such axis.
        index: Indices of the observations, int64, shape ``(B,)``.
        number: Which of the observation's independent samples to draw; the ELBO at evaluation uses the first.
        seed: Different seeds give independent draws; the default is that of the posterior.

    Returns:
        Latents, shape ``(B, k)``; ``(B, G, C)`` for groups of categories.
    """
    uniform = uniform_by_index(index, _draws(distribution), seed=seed + number)
    try:
        return _inverse_transform(distribution, uniform)
    except NotImplementedError:
        is_prior = len(distribution.batch_shape + distribution.event_shape) == 1
        draw = distribution.rsample if distribution.has_rsample else distribution.sample
        return draw(index.shape if is_prior else torch.Size())


def component(mixture: MixtureSameFamily, chosen: Tensor) -> Distribution:
    """Return the chosen components of a mixture as one distribution.

    Args:
        mixture: A mixture without a batch of its own, of ``Independent`` or joint components.
        chosen: Numbers of the components, any shape.

    Raises:
        NotImplementedError: If the mixture has a batch.
    """
    if mixture.batch_shape:
        raise NotImplementedError("A batch of mixtures has no components in common.")
    base = mixture.component_distribution
    while isinstance(base, Independent):
        base = base.base_dist
    parameters = {name: value[chosen] for name, value in vars(base).items() if name in base.arg_constraints}
    made: Distribution = type(base)(**parameters, validate_args=False)
    return made


def _draws(distribution: Distribution) -> int:
    """Return how many uniform numbers make one sample."""
    if isinstance(distribution, Independent):
        return _draws(distribution.base_dist)
    if isinstance(distribution, MixtureSameFamily):
        return _draws(distribution.component_distribution) + 1
    shape = distribution.batch_shape if isinstance(distribution, OneHotCategorical) else ()
    return (shape or distribution.batch_shape + distribution.event_shape)[-1]


def _inverse_transform(distribution: Distribution, uniform: Tensor) -> Tensor:
    if isinstance(distribution, Independent):
        return _inverse_transform(distribution.base_dist, uniform)
    if isinstance(distribution, MultivariateNormal | LowRankMultivariateNormal):
        noise = (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).to(distribution.loc)  # as torch's `Normal.icdf`
        return distribution.loc + (distribution.scale_tril @ noise[..., None]).squeeze(-1)
    if isinstance(distribution, OneHotCategorical):
        probs = distribution.probs
        one_hot = F.one_hot(_class_of(probs, uniform), probs.shape[-1]).to(probs)
        return one_hot + (probs - probs.detach()) if distribution.has_rsample else one_hot
    if isinstance(distribution, MixtureSameFamily):
        chosen = _class_of(distribution.mixture_distribution.probs, uniform[:, -1])
        return _inverse_transform(component(distribution, chosen), uniform[:, :-1])
    return distribution.icdf(uniform)


def _class_of(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return the classes whose cumulative probabilities uniform numbers fall into, in the shape of the numbers."""
    # The last sum is 1 but for rounding, and is left out.
    return (uniform[..., None] > probs.cumsum(-1)[..., :-1]).sum(-1)


def _mix(key: Tensor) -> Tensor:
    """Scramble int32 keys in place with the finaliser of MurmurHash3; the products overflow on purpose."""
    key.bitwise_xor_(_shifted(key, 16)).mul_(0x85EBCA6B - 2**32)
    key.bitwise_xor_(_shifted(key, 13)).mul_(0xC2B2AE35 - 2**32)
    return key.bitwise_xor_(_shifted(key, 16))


def _shifted(key: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros (a logical shift)."""
    return (key >> bits).bitwise_and_(0xFFFFFFFF >> bits)
