"""The maximum mean discrepancy between the aggregate posterior and the prior (InfoVAE)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from ..checks import check_number, is_positive
from ..noise import sample_by_index
from .base import Step, Term, check_several

Kernel = Callable[[Tensor], Tensor]
_PRIOR_SEED = 0x9A105EED  # other numbers than those of the posterior's sample


def rbf(squared_distance: Tensor, h: float) -> Tensor:
    """Compute the Gaussian kernel ``exp(-|a - b|^2 / (2 h))``.

    Args:
        squared_distance: ``|a - b|^2``, any shape.
        h: Variance of the kernel.

    Raises:
        ValueError: If h is not positive and finite.
    """
    check_number("h", h, "positive and finite", is_positive)
    return (squared_distance / (-2 * h)).exp()


def inverse_multiquadric(squared_distance: Tensor, c: float) -> Tensor:
    """Compute the inverse multiquadric kernel ``C / (C + |a - b|^2)``, whose tails are heavier than a Gaussian's.

    Args:
        squared_distance: ``|a - b|^2``, any shape.
        c: The constant C, the squared distance at which the kernel is 1/2.

    Raises:
        ValueError: If C is not positive and finite.
    """
    check_number("c", c, "positive and finite", is_positive)
    return c / (c + squared_distance)


def squared_mmd(a: Tensor, b: Tensor, kernel: Kernel) -> Tensor:
    r"""Estimate the squared maximum mean discrepancy of two distributions from samples, without bias.

    .. math::
        \frac{1}{n (n - 1)} \sum_{i \ne j} k(a_i, a_j) + \frac{1}{m (m - 1)} \sum_{i \ne j} k(b_i, b_j)
        - \frac{2}{n m} \sum_{i, j} k(a_i, b_j)

    It may be negative, as an estimate of 0 must be.

    Args:
        a: Samples of one distribution, shape ``(n, k)``, n at least 2.
        b: Samples of the other, shape ``(m, k)``, m at least 2.
        kernel: Function of squared distances, such as ``partial(rbf, h=2.0)``.

    Returns:
        A scalar, in the kernel's unit: for kernels of height 1 at most 2.

    Raises:
        ValueError: If the shapes are not these.

    References:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, lemma 6, the U-statistic.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"`a` and `b` must have shapes (n, k) and (m, k), n and m at least 2, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    between = kernel(_squared_distances(a, b)).mean()
    return _mean_of_pairs(a, kernel) + _mean_of_pairs(b, kernel) - 2 * between


class MMD(Term):
    r"""Draw the aggregate posterior q(z) to the prior: their squared maximum mean discrepancy (InfoVAE, WAE).

    The estimate compares the batch's samples of the posterior with as many samples of the prior by
    :func:`squared_mmd`. Unlike more weight on the rate, it does not take information from z. The loss of InfoVAE with
    its :math:`\alpha` and :math:`\lambda` is ``beta`` :math:`= 1 - \alpha` and ``weight`` :math:`= \alpha + \lambda -
    1`; a ``beta`` of 0 is the WAE.

    The noise of the prior's samples is a hash of z, so an evaluation can be repeated. With several processes the
    estimate is that of each process's batch, and the mean over the processes remains unbiased.

    Args:
        weight: Weight of the term in the loss.
        kernel: ``"imq"``, :func:`inverse_multiquadric`, or ``"rbf"``, :func:`rbf`.
        scale: C of the inverse multiquadric, or h of the Gaussian kernel. The default fits k latent dimensions of
            standard deviation 1: C = 2k, h = k.

    Raises:
        ValueError: If an option is out of range; in a step, if the batch holds one observation.

    References:
        Zhao, Song and Ermon, "InfoVAE", AAAI 2019, section 3.2 and equation 6; Tolstikhin et al., "Wasserstein
        Auto-Encoders", ICLR 2018, algorithm 2, for the inverse multiquadric with C = 2k.
    """

    def __init__(self, weight: float = 1.0, kernel: Literal["imq", "rbf"] = "imq", scale: float | None = None) -> None:
        super().__init__(weight)
        if kernel not in ("imq", "rbf"):
            raise ValueError(f"`kernel` must be 'imq' or 'rbf', got {kernel!r}.")
        if scale is not None:
            check_number("scale", scale, "positive and finite, or None", is_positive)
        self.kernel, self.scale = kernel, scale

    @override
    def forward(self, step: Step) -> Tensor:
        check_several("MMD", len(step.z))
        z, drawn = step.z.flatten(1), sample_prior(step.prior, step.z).flatten(1)
        width = z.shape[1]
        if self.kernel == "rbf":
            return squared_mmd(z, drawn, partial(rbf, h=width if self.scale is None else self.scale))
        return squared_mmd(z, drawn, partial(inverse_multiquadric, c=2 * width if self.scale is None else self.scale))


def sample_prior(prior: Distribution, z: Tensor) -> Tensor:
    """Draw as many latents from the prior as there are in ``z``, with noise that is a hash of ``z``.

    The same latents give the same sample, and the random state stays as it is; a prior without an inverse CDF is
    sampled with fresh noise.

    Args:
        prior: p(z) or p(z|c): its batch and event shape together are the shape of ``z``, or one latent's.
        z: Latents, shape ``(B, k)``.

    Returns:
        The shape of ``z``, differentiable in the prior's parameters.

    Raises:
        ValueError: If the prior's samples have another shape.
    """
    hash_ = z.detach().float().view(torch.int32).sum(dtype=torch.int64)
    drawn = sample_by_index(prior, torch.arange(len(z), device=z.device) + hash_, seed=_PRIOR_SEED)
    if drawn.shape != z.shape:
        raise ValueError(
            f"The prior must have a sample for each latent, of shape {tuple(z.shape)}, got {tuple(drawn.shape)}."
        )
    return drawn


def _mean_of_pairs(samples: Tensor, kernel: Kernel) -> Tensor:
    values = kernel(_squared_distances(samples, samples))
    return (values.sum() - values.diagonal().sum()) / (len(samples) * (len(samples) - 1))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # By a product of matrices, the default, the distance of near points would be lost to rounding.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
