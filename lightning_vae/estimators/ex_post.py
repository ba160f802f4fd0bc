"""An ex-post density: a Gaussian or a mixture fitted to the aggregate posterior of a trained model, to sample from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch import distributions as td

from ..callbacks.metrics.aggregate_posterior import aggregate_moments
from ..checks import check_number, integer_from

_ITERATIONS = 1000  # of expectation maximisation
_SINGULAR = 1e-9  # the least eigenvalue of a correlation matrix that is not taken for rounding


@dataclass(frozen=True, eq=False)
class ExPostDensity:
    """A mixture of C Gaussians with full covariances in the place of the prior, fitted after the training.

    Decoded samples of it resemble the data where q(z) is far from the prior, as at a beta far below 1. It is no part
    of the model: the ELBO and the rate are those under the prior.

    The fields are all of its state, as plain tensors: ``torch.save(vars(density), path)`` loads with
    ``ExPostDensity(**torch.load(path))``.

    Attributes:
        weights: Of the components, shape ``(C,)``, float64.
        means: Shape ``(C, k)``, float64.
        covariances: Shape ``(C, k, k)``, float64.

    References:
        Ghosh et al., "From Variational to Deterministic Autoencoders", ICLR 2020, section 4.

    Example::

        >>> density = ExPostDensity.of_moments(torch.tensor([[-1.0], [1.0]]), torch.tensor([[3.0], [3.0]]))
        >>> density.means, density.covariances
        (tensor([[0.]], dtype=torch.float64), tensor([[[4.]]], dtype=torch.float64))
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @classmethod
    def fit(cls, z: Tensor, components: int = 1, seed: int = 0) -> Self:
        """Fit the density to samples of q(z): one of each posterior, not the posterior means.

        Args:
            z: Latents, shape ``(N, k)``, N greater than k.
            components: Number of Gaussians C. One is fitted in closed form, several by expectation maximisation with
                scikit-learn, which adds a millionth of q(z)'s variances to theirs.
            seed: Seed of the start of the latter.

        Raises:
            ValueError: If the latents have another shape, are too few or not finite, or lie on a plane.
        """
        check_number("components", components, "an integer of at least 1", integer_from(1))
        check_number("seed", seed, "an integer of at least 0", integer_from(0))
        if z.ndim != 2 or len(z) <= max(z.shape[1], components) or not torch.isfinite(z).all():
            raise ValueError(
                "`z` must hold finite latents of shape (N, k), N greater than k and the number of components, got "
                f"shape {tuple(z.shape)}."
            )
        z = z.detach().double().cpu()
        moments = aggregate_moments(z, torch.zeros_like(z))
        gaussian = cls._checked(moments.mean, moments.covariance)
        if components == 1:
            return gaussian
        from sklearn.mixture import GaussianMixture

        # `reg_covar` is absolute, so the fit is to latents of unit variance.
        scale = moments.covariance.diagonal().sqrt()
        mixture = GaussianMixture(components, max_iter=_ITERATIONS, random_state=seed)
        mixture.fit(((z - moments.mean) / scale).numpy())
        means, covariances = torch.as_tensor(mixture.means_), torch.as_tensor(mixture.covariances_)
        return cls(
            torch.as_tensor(mixture.weights_), means * scale + moments.mean, covariances * torch.outer(scale, scale)
        )

    @classmethod
    def of_moments(cls, mean: Tensor, variance: Tensor) -> Self:
        r"""Return the Gaussian with the moments of q(z), the mixture of M diagonal Gaussian posteriors.

        .. math:: m = \tfrac1M \textstyle\sum_n \mu_n, \qquad
            C = \tfrac1M \sum_n (\mu_n - m)(\mu_n - m)^\top + \mathrm{diag}(\sigma_n^2)

        No other Gaussian gives these posteriors a lower rate.

        Args:
            mean: Means of the posteriors, shape ``(M, k)``.
            variance: Their variances, shape ``(M, k)``.

        Raises:
            ValueError: If the shapes are not these, a variance is negative, or the posteriors lie on a plane.
        """
        moments = aggregate_moments(mean, variance)
        return cls._checked(moments.mean, moments.covariance)

    def distribution(self) -> td.Distribution:
        """Return the density, batch shape ``()`` and event shape ``(k,)``."""
        if len(self.weights) == 1:
            return td.MultivariateNormal(self.means[0], self.covariances[0], validate_args=False)
        components = td.MultivariateNormal(self.means, self.covariances, validate_args=False)
        return td.MixtureSameFamily(td.Categorical(self.weights, validate_args=False), components, validate_args=False)

    @classmethod
    def _checked(cls, mean: Tensor, covariance: Tensor) -> Self:
        """Return a single Gaussian, after checking that it has a density."""
        scale = covariance.diagonal().sqrt()
        correlation = covariance / torch.outer(scale, scale)
        if not torch.isfinite(correlation).all() or torch.linalg.eigvalsh(correlation)[0] < _SINGULAR:
            raise ValueError(
                "The latents lie on a plane, so their Gaussian has no density: a dimension does not vary, or is a sum "
                "of others. Fit samples of q(z), not the posterior means, which do not vary in unused dimensions."
            )
        return cls(mean.new_ones(1), mean[None], covariance[None])
