"""Steps and data that the tests of the terms share."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributions as td

from lightning_vae import Observations
from lightning_vae.terms import Step


def step_of(posterior: td.Distribution, z: Tensor, **options: Any) -> Step:
    """A step of which only the latents matter."""
    x = torch.zeros(len(z), 1)
    given = {
        "observations": Observations(x, x, x, torch.arange(len(z))),
        "prior": td.Normal(torch.zeros(z.shape[-1]).to(z), torch.ones(z.shape[-1]).to(z)),
        "likelihood": td.Independent(td.Normal(x, 1.0), 1),
    }
    return Step(posterior=posterior, z=z, **{**given, **options})


def exact_data(rows: int, covariance: Any, seed: int = 0) -> Tensor:
    """Data with exactly this covariance, with the divisor N, and the mean 0."""
    data = np.random.default_rng(seed).standard_normal((rows, len(covariance)))
    data -= data.mean(0)
    data = data @ np.linalg.inv(np.linalg.cholesky(data.T @ data / rows)).T
    return torch.as_tensor(data @ np.linalg.cholesky(np.asarray(covariance)).T)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
