"""The log-likelihood by importance sampling."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ..callbacks.metrics.running_moments import merge_moments, moments, standard_error


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    r"""Compute the importance-weighted lower bound of each observation's log-likelihood.

    .. math::
        L_K = \log \frac{1}{K} \sum_k w_k, \qquad
        \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    In expectation it rises with K towards :math:`\log p(x)`; at K = 1 it is the ELBO. Where the posterior is exact
    every weight is p(x), and so is the bound at any K.

    Args:
        log_weights: In nats, of shape ``(K, B)``.

    Returns:
        Nats, of shape ``(B,)``, float64.

    Raises:
        ValueError: If the log-weights have another shape, or there are none.

    References:
        Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2015, equation 8.
    """
    _check(log_weights)
    return log_weights.double().logsumexp(dim=0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Compute the effective number of K samples, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, from 1 to K.

    It is K where all weights are equal, as with the exact posterior, and 1 where one weight carries the sum. Below
    about 10, single samples dominate the bound, which is then still far from the log-likelihood.

    Args:
        log_weights: In nats, of shape ``(K, B)``.

    Returns:
        Of shape ``(B,)``, float64.

    Raises:
        ValueError: If the log-weights have another shape, or there are none.

    References:
        Kong, Liu and Wong, "Sequential Imputations and Bayesian Missing Data Problems", JASA 1994.
    """
    _check(log_weights)
    log_weights = log_weights.double()
    weights = (log_weights - log_weights.amax(dim=0)).exp()  # the largest is 1, so that equal weights are exact
    return (weights.sum(dim=0).square() / weights.square().sum(dim=0)).clamp(1, len(weights))


def _check(log_weights: Tensor) -> None:
    if log_weights.ndim != 2 or not len(log_weights):
        raise ValueError(f"`log_weights` must have shape (K, B), K at least 1, got {tuple(log_weights.shape)}.")


class LogLikelihood(NamedTuple):
    """An estimate of the mean log-likelihood, in nats per observation.

    Attributes:
        value: Mean of the importance-weighted bounds.
        standard_error: Standard error of that mean, from the spread over the observations.
        effective_sample_size: Mean over the observations, from 1 to K.
    """

    value: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


class ImportanceWeightedLikelihood(Metric):
    """Estimate the mean log-likelihood of the data by importance sampling; see :func:`importance_weighted_bound`.

    As input to ``forward`` and ``update`` the metric accepts ``log_weights`` of shape ``(K, B)``.
    As output of ``forward`` and ``compute`` it returns a :class:`LogLikelihood`.

    Args:
        kwargs: Options of :class:`torchmetrics.Metric`.

    Example::

        >>> metric = ImportanceWeightedLikelihood()
        >>> metric.update(torch.tensor([[-1.0, -3.0], [-1.0, -3.0]]))
        >>> metric.compute().value, metric.compute().effective_sample_size
        (tensor(-2., dtype=torch.float64), tensor(2., dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    state: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("state", torch.zeros(3, 2, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, log_weights: Tensor) -> None:
        """Add the log-weights of a batch."""
        log_weights = log_weights.detach()
        rows = torch.stack([importance_weighted_bound(log_weights), effective_sample_size(log_weights)], dim=1)
        self.state = merge_moments(torch.stack([self.state, moments(rows)]))

    def compute(self) -> LogLikelihood:
        """Return the estimate with its error and effective sample size."""
        value, size = self.state[1]
        return LogLikelihood(value, standard_error(self.state)[0], size)
