"""The total correlation of the aggregate posterior (beta-TCVAE), and the decomposition of the rate it is a part of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from ..checks import check_number, integer_from
from ..posteriors import PosteriorHead
from .base import Step, Term, check_several


class Decomposition(NamedTuple):
    """The three parts of the mean rate, each a scalar in nats.

    Attributes:
        mutual_information: KL(q(x, z) || q(x) q(z)), the information that z has about x.
        total_correlation: KL(q(z) || prod_j q(z_j)), the dependence of the latent dimensions.
        dimension_wise_kl: sum_j KL(q(z_j) || p(z_j)).
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise_kl: Tensor


def decompose(log_densities: Tensor, log_prior: Tensor, weights: Tensor | None = None) -> Decomposition:
    r"""Decompose the mean rate of a batch into mutual information, total correlation and dimension-wise KL.

    With :math:`q(z_n) = \sum_m w_{nm} \prod_j q(z_{nj}|x_m)` and :math:`q(z_{nj}) = \sum_m w_{nm} q(z_{nj}|x_m)`:

    .. math::
        MI &= \tfrac1B \textstyle\sum_n \left[ \log q(z_n|x_n) - \log q(z_n) \right] \\
        TC &= \tfrac1B \textstyle\sum_n \left[ \log q(z_n) - \sum_j \log q(z_{nj}) \right] \\
        DW &= \tfrac1B \textstyle\sum_n \left[ \sum_j \log q(z_{nj}) - \log p(z_n) \right]

    Their sum is the rate at these samples, :math:`\tfrac1B \sum_n \log q(z_n|x_n) - \log p(z_n)`, for any weights.

    Args:
        log_densities: ``[n, m, j]``: log q(z_nj | x_m), shape ``(B, B, k)``; see :func:`pairwise_log_densities`.
        log_prior: log p(z_n), shape ``(B,)``.
        weights: Of the posteriors in the mixture, shape ``(B, B)``; see :func:`minibatch_weights`. ``None`` weighs all
            alike, as is right where the batch holds all the data.

    Returns:
        Nats. Gradients flow to the posteriors, the samples and the prior.

    Raises:
        ValueError: If the shapes are not these.

    References:
        Chen et al., "Isolating Sources of Disentanglement in VAEs", NeurIPS 2018, equation 2.
    """
    size = len(log_densities)
    if weights is None:
        weights = log_densities.new_full((size, size), 1 / size)
    own, joint, product = _log_mixtures(log_densities, weights)
    if log_prior.shape != own.shape:
        raise ValueError(f"`log_prior` must have shape {tuple(own.shape)}, got {tuple(log_prior.shape)}.")
    return Decomposition((own - joint).mean(), (joint - product).mean(), (product - log_prior).mean())


def minibatch_weights(
    batch_size: int, data_size: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """Return the weights with which a batch's posteriors stand for those of all the data.

    A sample's own posterior has weight 1/N, each other one (N - 1) / (N (B - 1)). The mixture that a sample sees is
    then unbiased over random batches, and exact if the batch holds all the data. It is the mean, over the choice of
    the special column, of the stratified weights of Chen et al., with less variance.

    Args:
        batch_size: Number of observations B in the batch, at least 2.
        data_size: Number of observations N in the data set, at least B.
        dtype: Type of the result.
        device: Device of the result.

    Returns:
        Shape ``(B, B)``: row n holds the weights for the sample of observation n, and sums to 1.

    Raises:
        ValueError: If a size is out of range.

    References:
        Chen et al., "Isolating Sources of Disentanglement in VAEs", NeurIPS 2018, appendix C.2.
    """
    check_number("batch_size", batch_size, "an integer of at least 2", integer_from(2))
    remedy = "Give the number of observations in the data set."
    allowed = f"an integer of at least the {batch_size} observations of the batch"
    check_number("data_size", data_size, allowed, integer_from(batch_size), remedy)
    other = (data_size - 1) / (data_size * (batch_size - 1))
    weights = torch.full((batch_size, batch_size), other, dtype=dtype, device=device)
    return weights.fill_diagonal_(1 / data_size)


def pairwise_log_densities(posterior: Distribution, z: Tensor) -> Tensor:
    """Compute the log-density of each latent under each posterior, for each dimension.

    Args:
        posterior: q(z|x), factorised: batch shape ``(B, k)`` and no event dimension.
        z: Latents, shape ``(B, k)``.

    Returns:
        ``[n, m, j]``: log q(z_nj | x_m) in nats, shape ``(B, B, k)``.

    Raises:
        ValueError: If the posterior is joint, or the latents have another shape.
    """
    if posterior.event_shape or len(posterior.batch_shape) != 2:
        raise ValueError(
            "The total correlation needs a density for each latent dimension, so `posterior` must be factorised, with "
            f"batch shape (B, k) and no event dimension, got batch shape {tuple(posterior.batch_shape)} and event "
            f"shape {tuple(posterior.event_shape)}. Choose a posterior without event dimensions, such as a diagonal "
            "Gaussian; unwrap `Independent` with `.base_dist`."
        )
    if z.shape != posterior.batch_shape:
        raise ValueError(f"`z` must have shape {tuple(posterior.batch_shape)}, got {tuple(z.shape)}.")
    return posterior.log_prob(z[:, None])


class TotalCorrelation(Term):
    r"""Make the latent dimensions independent: the total correlation KL(q(z) || prod_j q(z_j)), in nats (beta-TCVAE).

    The rate contains the total correlation once, so with ``beta`` at 1 the loss is that of beta-TCVAE with its
    :math:`\beta = 1 + w`, ``w`` the weight.

    The aggregate posterior q(z) is that of a data set, seen through the batch with :func:`minibatch_weights`. The
    mixture is unbiased, but its logarithm isn't: with small batches and narrow posteriors the estimate is far too
    large, so train with batches of some hundreds. With several processes each uses its own batch.

    Args:
        weight: Weight of the term in the loss.
        data_size: Number N of observations in the training set. ``None`` takes that of the step, which a stream lacks.

    Raises:
        ValueError: If an option is out of range; in a step, if the posterior is joint, the batch holds one
            observation, or N is not known.

    References:
        Chen et al., "Isolating Sources of Disentanglement in VAEs", NeurIPS 2018, equation 4.
    """

    def __init__(self, weight: float = 1.0, data_size: int | None = None) -> None:
        super().__init__(weight)
        if data_size is not None:
            check_number("data_size", data_size, "an integer of at least 2, or None", integer_from(2))
        self.data_size = data_size

    @override
    def check(self, head: PosteriorHead | None) -> None:
        if head is not None and (head.is_joint or head.classes):
            raise ValueError(
                "The term `TotalCorrelation` needs a density for each latent dimension, so `posterior` must be "
                f"factorised, got {type(head).__name__}. Choose one such as DiagonalGaussian, or another term."
            )

    @override
    def forward(self, step: Step) -> Tensor:
        log_densities = pairwise_log_densities(step.posterior, step.z)
        check_several("TotalCorrelation", len(step.z))
        data_size = step.data_size if self.data_size is None else self.data_size
        if data_size is None:
            raise ValueError(
                "`TotalCorrelation` needs the number of observations in the training set, which is not known here, as "
                "with a stream. Give it: `TotalCorrelation(data_size=...)`."
            )
        weights = minibatch_weights(len(step.z), data_size, log_densities.dtype, log_densities.device)
        _, joint, product = _log_mixtures(log_densities, weights)
        return (joint - product).mean()


def _log_mixtures(log_densities: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log q(z_n|x_n), log q(z_n) and sum_j log q(z_nj), each of shape ``(B,)``."""
    if log_densities.ndim != 3 or len(log_densities) != log_densities.shape[1]:
        raise ValueError(f"`log_densities` must have shape (B, B, k), got {tuple(log_densities.shape)}.")
    if weights.shape != log_densities.shape[:2]:
        raise ValueError(f"`weights` must have shape {tuple(log_densities.shape[:2])}, got {tuple(weights.shape)}.")
    joint, log_weights = log_densities.sum(-1), weights.log()
    marginals = (log_densities + log_weights[..., None]).logsumexp(1)
    return joint.diagonal(), (joint + log_weights).logsumexp(1), marginals.sum(-1)
