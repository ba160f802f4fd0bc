"""One of each likelihood, with the values that it has a density for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightning_vae import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretisedLogistic,
    DiscretisedLogisticMixture,
    Gaussian,
    Laplace,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
)


@dataclass(frozen=True)
class Case:
    constructor: Callable[..., Likelihood]
    levels: int | None = None
    interval: tuple[float, float] | None = None
    """What a continuous density is integrated over; ``None`` for counts and levels."""
    has_own_mean: bool = False
    """True if ``mean`` is documented as something else than the mean."""

    def make(self, shape: tuple[int, ...]) -> Likelihood:
        """In float64, with parameters away from their start."""
        likelihood = self.constructor(shape, self.levels).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in likelihood.parameters():
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
        return likelihood

    def values(self) -> Tensor:
        """All values of a discrete one, up to where nothing is left; some of a continuous one."""
        if self.interval is not None:
            return torch.linspace(0, 1, 7, dtype=torch.float64)
        if self.levels is not None:
            return torch.arange(self.levels, dtype=torch.float64) / (self.levels - 1)
        return torch.arange(2000, dtype=torch.float64)

    def nodes(self, centre: float) -> tuple[Tensor, Tensor]:
        """Points and weights, in the order of the points, that sum or integrate a function over all values."""
        if self.interval is None:
            return self.values(), torch.ones(len(self.values()), dtype=torch.float64)
        if self.interval == (0, 1):
            x, weight = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(200))
            return (x + 1) / 2, weight / 2
        # A double exponential on each side of the centre, where there may be a kink (Takahasi and Mori 1974).
        t = torch.arange(-3.5, 3.5, 0.02, dtype=torch.float64)
        x = (math.pi / 2 * t.sinh()).exp()
        weight = 0.02 * math.pi / 2 * t.cosh() * x
        return torch.cat([centre - x.flip(0), centre + x]), torch.cat([weight.flip(0), weight])


LINE = (-torch.inf, torch.inf)
CASES = {
    "bernoulli": Case(Bernoulli, levels=2),
    "continuous_bernoulli": Case(ContinuousBernoulli, interval=(0, 1)),
    "gaussian_fixed": Case(partial(Gaussian, variance=0.3), interval=LINE),
    "gaussian": Case(Gaussian, interval=LINE),
    "gaussian_per_dimension": Case(partial(Gaussian, variance="per_dimension"), interval=LINE),
    "gaussian_per_pixel": Case(partial(Gaussian, variance="per_pixel"), interval=LINE),
    "laplace": Case(Laplace, interval=LINE),
    "laplace_fixed": Case(partial(Laplace, scale=0.4), interval=LINE),
    "student": Case(StudentT, interval=LINE),
    "student_fixed": Case(partial(StudentT, degrees_of_freedom=2.5, scale=2), interval=LINE),
    "logistic": Case(DiscretisedLogistic, levels=17, has_own_mean=True),
    "logistic_mixture": Case(DiscretisedLogisticMixture, levels=17, has_own_mean=True),
    "categorical": Case(Categorical, levels=5),
    "poisson": Case(Poisson),
    "poisson_with_zeros": Case(partial(Poisson, zero_inflated=True)),
    "negative_binomial": Case(NegativeBinomial),
    "negative_binomial_with_zeros": Case(partial(NegativeBinomial, zero_inflated=True)),
}


def output(likelihood: Likelihood, rows: int, seed: int = 0) -> Tensor:
    """A decoder's output, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *likelihood.output_shape, generator=generator, dtype=torch.float64)
