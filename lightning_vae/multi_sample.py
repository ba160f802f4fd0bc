"""The multi-sample bound (IWAE), with the doubly reparameterised gradient for the encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .balancing import scale_gradient
from .checks import check_number, integer_from
from .objective import checked_number
from .posteriors import PosteriorHead


class MultiSampleBound(NamedTuple):
    """The bound of a batch, in nats, and the samples that it is from.

    Attributes:
        bound: Lower bound of log p(x) from K samples, without gradient, shape ``(B,)``.
        loss: What to minimise: ``-bound`` in value, shape ``(B,)``.
        z: The samples, shape ``(K, B, k)``.
        log_likelihood: log p(x|z) of each, shape ``(K, B)``.
    """

    bound: Tensor
    loss: Tensor
    z: Tensor
    log_likelihood: Tensor


def multi_sample_bound(
    posterior: Distribution,
    prior: Distribution,
    log_likelihood: Callable[[Tensor], Tensor],
    samples: int,
    z: Tensor | None = None,
    beta: Tensor | float = 1.0,
) -> MultiSampleBound:
    r"""Compute the importance-weighted bound from K samples, and a loss whose gradient has little noise at any K.

    .. math::
        L_K = \log \tfrac1K \textstyle\sum_k w_k, \qquad
        \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    It is at most log p(x) on average, and rises with K. At K = 1 it is the ELBO. With the normalised weights
    :math:`\tilde w_k = w_k / \sum_i w_i`, the loss has the gradients

    .. math::
        -\sum_k \tilde w_k \, \nabla_\theta \log w_k \quad \text{for decoder and prior}, \qquad
        -\sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k} \, \nabla_\phi z_k \quad \text{for the encoder.}

    With a weight on the rate, as in annealing, :math:`\log w_k = \log p(x|z_k) + \beta (\log p(z_k) - \log q(z_k|x))`,
    and the encoder's :math:`\tilde w_k^2` becomes :math:`(1 - \beta) \tilde w_k + \beta \tilde w_k^2`. At K = 1 this is
    distortion + beta * rate; above, it is a bound of log p(x) at beta = 1 only.

    Both are unbiased. The first is that of the plain bound. The plain gradient of the encoder drowns in noise as K
    grows (Rainforth et al. 2018). The second does not, and is exactly 0 for each sample where the posterior is exact.

    Args:
        posterior: q(z|x) with reparameterised samples: factorised, batch shape ``(B, k)``; or joint, batch shape
            ``(B,)`` and event shape ``(k,)``.
        prior: p(z) or p(z|c), which broadcasts to it; the joint one of a factorised posterior too.
        log_likelihood: Function from latents of shape ``(K, B, k)`` to log p(x|z), shape ``(K, B)``.
        samples: Number of samples K.
        z: The samples, shape ``(K, B, k)``, as at evaluation, where noise is fixed; ``None`` draws them.
        beta: Weight of the rate.

    Raises:
        ValueError: If ``samples`` is out of range, the posterior has no reparameterised samples or parameters that are
            not tensors, or a log-density has another shape than ``(K, B)``.

    References:
        Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, equations 8 and 14; Tucker et
        al., "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", ICLR 2019; Rainforth et al.,
        "Tighter Variational Bounds are Not Necessarily Better", ICML 2018.
    """
    check_number("samples", samples, "an integer of at least 1", integer_from(1))
    if not isinstance(beta, Tensor):
        checked_number("beta", beta)
    _check_reparameterised(posterior)
    drawn = posterior.rsample(Size((samples,))) if z is None else z
    z = drawn.view_as(drawn)  # the hook below is for this use of the samples alone
    log_weights, log_likelihoods = _log_weights(posterior, prior, log_likelihood, z, beta)

    bound = log_weights.detach().logsumexp(0) - math.log(samples)
    normalised = log_weights.detach().softmax(0)
    share = 1 - beta + beta * normalised
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * share.view(*share.shape, *[1] * (gradient.ndim - 2)))
    weighted = (normalised * log_weights).sum(0)
    return MultiSampleBound(bound, weighted.detach() - weighted - bound, drawn, log_likelihoods)


def checked_samples(
    samples: int | None, head: PosteriorHead | None, terms: Any, capacity_weight: float | None, **floor: Any
) -> int:
    """Return the number of samples that a model is trained with, 1 for the ELBO.

    Args:
        samples: The model's ``importance_samples``.
        head: Its posterior head, if it has one.
        terms: The terms that are added to its loss.
        capacity_weight: The weight of its capacity.
        **floor: The options of the floor of its rate; ``None`` if they are not given.

    Raises:
        ValueError: If the number is out of range, or the bound of so many samples can't be combined with the others.
    """
    if samples is None:
        return 1
    check_number("importance_samples", samples, "an integer of at least 1, or None for the ELBO", integer_from(1))
    if samples == 1:
        return 1
    if terms or capacity_weight is not None:
        raise ValueError(
            "`importance_samples` above 1 can't be combined with `terms` or a `capacity_weight`, which belong to the "
            "ELBO."
        )
    for name, value in floor.items():
        if value:
            raise ValueError(
                f"`importance_samples` is {samples}: the multi-sample bound has no floor of the rate, got "
                f"`{name}={value}`. Leave it out, or train on the ELBO."
            )
    if head is not None and head.classes:
        raise ValueError(
            f"`importance_samples` is {samples}: the multi-sample bound needs a posterior over real numbers, got "
            f"`posterior` {type(head).__name__}. Choose a Gaussian posterior, or train on the ELBO."
        )
    return samples


def _log_weights(
    posterior: Distribution,
    prior: Distribution,
    log_likelihood: Callable[[Tensor], Tensor],
    z: Tensor,
    beta: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Return the log-weights, without the score of the posterior, and the log-likelihoods in them, each ``(K, B)``."""
    shape = z.shape[:2]
    log_likelihoods = log_likelihood(z)
    if log_likelihoods.shape != shape:
        raise ValueError(
            f"`log_likelihood` must return a number for each sample and observation, of shape {tuple(shape)}, got "
            f"{tuple(log_likelihoods.shape)}."
        )
    log_prior = _summed("prior", prior.log_prob(z), shape)
    # Without gradients in its own parameters, the posterior's density still depends on them through z.
    fixed: Distribution = scale_gradient("posterior", posterior, 0.0)
    log_ratio = log_prior - _summed("posterior", fixed.log_prob(z), shape)
    return log_likelihoods + beta * log_ratio, log_likelihoods


def _summed(name: str, log_density: Tensor, shape: torch.Size) -> Tensor:
    if log_density.shape[:2] != shape:
        raise ValueError(
            f"`{name}` must have a log-density for each sample and observation, of shape {tuple(shape)} or with more "
            f"axes, got {tuple(log_density.shape)}."
        )
    return log_density.flatten(2).sum(-1) if log_density.ndim > 2 else log_density


def _check_reparameterised(posterior: Distribution) -> None:
    is_discrete = False
    with suppress(NotImplementedError):  # a distribution need not say its support
        is_discrete = bool(getattr(posterior.support, "is_discrete", False))
    if not posterior.has_rsample or is_discrete:
        raise ValueError(
            "The multi-sample bound needs a posterior with reparameterised samples (`rsample`) of real numbers, got "
            f"{type(posterior).__name__}. Choose a Gaussian posterior, or train on the ELBO."
        )
