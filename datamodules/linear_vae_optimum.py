"""The optimum of a linear VAE in closed form."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checks import at_least, check_number, integer_from, is_positive


@dataclass(frozen=True)
class LinearVAEOptimum:
    """A linear VAE at its optimum, in nats per observation, with the latent dimensions in descending order of rate.

    Attributes:
        loss: The smallest loss, `distortion + beta * (sum of max(free_bits, rate of a dimension))`.
        rate: KL(q(z|x) || p(z)).
        distortion: Expected negative log-likelihood, constants included.
        rate_per_dimension: Rate of each latent dimension.
        posterior_mean_variance: Variance over the data of each posterior mean (the *activity* of a latent dimension).
        active_units: Number of latent dimensions with a rate above zero.
        squared_error: Expected squared distance between an observation and its reconstruction from a posterior sample.
    """

    loss: float
    rate: float
    distortion: float
    rate_per_dimension: tuple[float, ...]
    posterior_mean_variance: tuple[float, ...]
    active_units: int
    squared_error: float


def linear_vae_optimum(
    eigenvalues: Sequence[float],
    latent_dim: int,
    variance: float,
    beta: float = 1.0,
    free_bits: float = 0.0,
) -> LinearVAEOptimum:
    r"""Compute the optimum of a linear VAE on centred data whose covariance has the given eigenvalues.

    The model is :math:`x \mid z \sim N(Wz + \mu, \sigma^2 I)` with a standard normal prior and the posterior
    :math:`N(V(x - \mu), D)`, D diagonal. With :math:`s = \beta \sigma^2` a direction of variance
    :math:`\lambda_i > s` gets a latent dimension of its own:

    .. math::
        KL_i = \tfrac12 \log(\lambda_i / s), \quad Var(E[z_i]) = 1 - s / \lambda_i, \quad
        E(x_i - \hat x_i)^2 = s

    and the others collapse, each adding :math:`\lambda_i` to the squared error. At `beta = 1` the loss is the exact
    negative log-likelihood of probabilistic PCA (Lucas et al. 2019, "Don't Blame the ELBO!", arXiv:1911.02469; for any
    `beta`, Wang and Ziyin 2022, arXiv:2205.04009).

    `free_bits` is the floor of each dimension's mean rate. A dimension at the floor has a signal-to-noise ratio of
    :math:`e^{2 \cdot \text{free\_bits}} - 1` at no extra cost, and need not spend it on one direction. Together the
    dimensions at the floor spread it over the remaining directions by water-filling,
    :math:`1 + m_i \propto \sqrt{\lambda_i}`, with a squared error of :math:`\lambda_i / (1 + m_i)` in each. With two or
    more dimensions at the floor this error is smaller than with one direction for each. The rates are
    :math:`\max(\text{free\_bits}, KL_i)`, except where a smaller rate of the last dimension above the floor gives a
    smaller loss: at the floor, or where it shares directions with the others. Each case has a closed form. The one with
    the smallest loss is returned; numerical minimisation over V and D agrees.

    Args:
        eigenvalues: Eigenvalues of the covariance, positive, in any order.
        latent_dim: Number of latent dimensions.
        variance: Variance of the Gaussian likelihood.
        beta: Weight of the rate.
        free_bits: Floor of each latent dimension's mean rate, in nats.

    Raises:
        ValueError: If an option is out of range.

    Example::

        >>> optimum = linear_vae_optimum((5, 3, 1.5, 0.8, 0.3, 0.1), latent_dim=4, variance=0.4)
        >>> round(optimum.loss, 5), round(optimum.rate, 4), optimum.active_units
        (8.54253, 3.2778, 4)
    """
    check_eigenvalues(eigenvalues)
    check_number("latent_dim", latent_dim, "at least 1", integer_from(1))
    check_number("variance", variance, "positive", is_positive)
    check_number("beta", beta, "positive", is_positive)
    check_number("free_bits", free_bits, "at least 0", at_least(0))

    spectrum = sorted(eigenvalues, reverse=True)

    def optimum(rates: list[float], squared_error: float) -> LinearVAEOptimum:
        distortion = len(spectrum) / 2 * math.log(2 * math.pi * variance) + squared_error / (2 * variance)
        return LinearVAEOptimum(
            loss=distortion + beta * sum(rates),
            rate=sum(rates),
            distortion=distortion,
            rate_per_dimension=tuple(rates),
            posterior_mean_variance=tuple(-math.expm1(-2 * rate) for rate in rates),
            active_units=sum(rate > 0 for rate in rates),
            squared_error=squared_error,
        )

    solutions = _solutions(spectrum, latent_dim, beta * variance, free_bits)
    return min((optimum(*solution) for solution in solutions), key=lambda optimum: optimum.loss)


def check_eigenvalues(eigenvalues: Sequence[float]) -> None:
    """Raise a ValueError unless there are eigenvalues, all of them positive."""
    allowed = "one or more positive numbers"
    check_number("eigenvalues", list(eigenvalues), allowed, lambda given: bool(given) and all(map(is_positive, given)))


def _solutions(
    spectrum: Sequence[float], latent_dim: int, level: float, floor: float
) -> Iterator[tuple[list[float], float]]:
    """Yield rates and squared error of each candidate for the optimum, for eigenvalues in descending order."""
    floor_signal = math.expm1(2 * floor)
    above_floor = sum(eigenvalue > level * (1 + floor_signal) for eigenvalue in spectrum[:latent_dim])
    own = [0.5 * math.log(eigenvalue / level) for eigenvalue in spectrum[:above_floor]]
    for alone in range(above_floor + 1):  # dimensions with a direction of their own
        others = latent_dim - alone
        shared, unreached = spectrum[alone:latent_dim], sum(spectrum[latent_dim:])
        error = alone * level + _water_filled_error(shared, others * floor_signal) + unreached
        yield own[:alone] + [floor] * others, error

        # One of the others rises above the floor: its signal is `level * scale**2 - 1`, as 1 + m_i = scale * root l_i.
        for count in range(1, len(shared) + 1):
            roots = [math.sqrt(eigenvalue) for eigenvalue in shared[:count]]
            discriminant = sum(roots) ** 2 - 4 * level * ((others - 1) * floor_signal + count - 1)
            scale = (sum(roots) + math.sqrt(max(discriminant, 0.0))) / (2 * level)
            rate = 0.5 * math.log(level * scale**2)
            if discriminant >= 0 and rate > floor and scale * roots[-1] >= 1 and scale * level <= roots[0]:
                error = alone * level + sum(roots) / scale + sum(shared[count:]) + unreached
                yield [*own[:alone], rate, *[floor] * (others - 1)], error


def _water_filled_error(eigenvalues: Sequence[float], signal: float) -> float:
    """Minimise the sum of l_i / (1 + m_i) over m_i >= 0 with sum `signal`, for l_i in descending order."""
    for count in range(len(eigenvalues), 0, -1):
        roots = [math.sqrt(eigenvalue) for eigenvalue in eigenvalues[:count]]
        scale = (signal + count) / sum(roots)  # 1 + m_i = scale * root of l_i
        if count == 1 or scale * roots[-1] >= 1:  # a single one takes all the signal, whatever the rounding
            return sum(roots) / scale + sum(eigenvalues[count:])
    return 0.0
