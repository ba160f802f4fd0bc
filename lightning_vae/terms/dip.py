"""The covariance penalties of DIP-VAE."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from typing_extensions import override

from ..objective import checked_number
from ..posteriors import PosteriorHead
from .base import Step, Term, check_several

_Gaussian = Normal | MultivariateNormal | LowRankMultivariateNormal


def dip_penalty(covariance: Tensor, off_diagonal: float = 1.0, diagonal: float = 1.0) -> Tensor:
    r"""Compute how far a covariance is from the identity.

    .. math:: \lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d \sum_i (C_{ii} - 1)^2

    Args:
        covariance: C, shape ``(k, k)``.
        off_diagonal: :math:`\lambda_{od}`.
        diagonal: :math:`\lambda_d`.

    Returns:
        A scalar, without a unit.

    Raises:
        ValueError: If the covariance is not square, or a weight is negative or not finite.

    References:
        Kumar, Sattigeri and Balakrishnan, "Variational Inference of Disentangled Latent Concepts from Unlabeled
        Observations", ICLR 2018, equations 6 and 7.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"`covariance` must have shape (k, k), got {tuple(covariance.shape)}.")
    off_diagonal, diagonal = checked_number("off_diagonal", off_diagonal), checked_number("diagonal", diagonal)
    variances = covariance.diagonal()
    correlated = (covariance - variances.diag()).square().sum()
    return off_diagonal * correlated + diagonal * (variances - 1).square().sum()


class DIP(Term):
    r"""Draw the covariance of the latents to the identity (DIP-VAE I and II). Without a unit.

    Variant II takes the covariance of the aggregate posterior, :math:`C = Cov_x(\mu) + E_x[\Sigma]`, variant I that of
    the posterior means alone, :math:`C = Cov_x(\mu)`; see :func:`dip_penalty`. Variant I draws the variance of every
    mean to 1, which leaves no room for the posterior's own: the rate rises.

    The covariance is that of the batch, with the divisor B. On a small batch it is noisy, and its squares are biased
    upwards: train with batches of some hundreds. With several processes each uses its own batch.

    Args:
        weight: Weight of the term in the loss.
        variant: ``"I"`` or ``"II"``.
        off_diagonal: Weight of the squared covariances, :math:`\lambda_{od}`.
        diagonal: Weight of the squared deviations of the variances from 1, :math:`\lambda_d`. Usual is ten times
            ``off_diagonal`` in variant I, and the same in variant II.

    Raises:
        ValueError: If an option is out of range; in a step, if the posterior is not Gaussian or the batch holds one
            observation.

    References:
        Kumar, Sattigeri and Balakrishnan, "Variational Inference of Disentangled Latent Concepts from Unlabeled
        Observations", ICLR 2018, equations 6 and 7.
    """

    def __init__(
        self,
        weight: float = 1.0,
        variant: Literal["I", "II"] = "II",
        off_diagonal: float = 1.0,
        diagonal: float = 1.0,
    ) -> None:
        super().__init__(weight)
        if variant not in ("I", "II"):
            raise ValueError(f"`variant` must be 'I' or 'II', got {variant!r}.")
        self.variant = variant
        self.off_diagonal = checked_number("off_diagonal", off_diagonal)
        self.diagonal = checked_number("diagonal", diagonal)

    @override
    def check(self, head: PosteriorHead | None) -> None:
        if head is not None and head.classes:
            raise ValueError(
                f"The term `DIP` needs a Gaussian posterior, got `posterior` {type(head).__name__}. Choose a Gaussian "
                "posterior, or `MMD`."
            )

    @override
    def forward(self, step: Step) -> Tensor:
        posterior = _gaussian(step.posterior)
        check_several("DIP", len(posterior.mean))
        covariance = _covariance_of_means(posterior.mean)
        if self.variant == "II":
            covariance = covariance + _mean_covariance(posterior)
        return dip_penalty(covariance, self.off_diagonal, self.diagonal)


def _gaussian(posterior: Distribution) -> _Gaussian:
    """Return a posterior over vectors as a Gaussian."""
    base = posterior.base_dist if isinstance(posterior, Independent) else posterior
    if not isinstance(base, _Gaussian) or base.mean.ndim != 2:
        raise ValueError(
            "`DIP` needs the mean and the covariance of a Gaussian posterior over vectors, a `Normal` of batch shape "
            f"(B, k) or a `MultivariateNormal`, got {type(base).__name__} of batch shape {tuple(base.batch_shape)}. "
            "Choose a Gaussian posterior, or `MMD`."
        )
    return base


def _covariance_of_means(means: Tensor) -> Tensor:
    centred = means - means.mean(0)
    with torch.autocast(means.device.type, enabled=False):  # three digits are too few to square
        return centred.T @ centred / len(means)


def _mean_covariance(posterior: _Gaussian) -> Tensor:
    if isinstance(posterior, Normal):
        return posterior.variance.mean(0).diag()
    return posterior.covariance_matrix.mean(0)
