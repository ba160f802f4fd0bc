"""Gaussian vectors, on which the optimum of a linear VAE is known in closed form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..checks import check_number, integer_from
from .base import DataModule, Tensors
from .linear_vae_optimum import check_eigenvalues
from .loaders.seeding import seeded_generator


class Gaussian(DataModule):
    """Gaussian vectors whose mean and covariance are exact in every split.

    The covariance has the given eigenvalues, and directions drawn from the seed. Training, validation and test are
    different draws of `size` vectors each. Each split is whitened with its own sample mean and covariance (divided by
    N) and then given that covariance, so all three have the same first two moments to float32's precision. The loss of
    a linear VAE depends on these moments alone, so `linear_vae_optimum` is exact on every split.

    Args:
        eigenvalues: Eigenvalues of the covariance, one for each dimension of the data.
        size: Number of vectors in each split.
        batch_size: Observations in a batch of one process.
        seed: Seed of the directions, the draws and the training order.

    Raises:
        ValueError: If an option is out of range.
    """

    levels = None

    def __init__(
        self,
        eigenvalues: Sequence[float] = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1),
        size: int = 8192,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        check_eigenvalues(eigenvalues)
        allowed = f"greater than the number of eigenvalues ({len(eigenvalues)})"
        remedy = "Fewer vectors can't have that covariance: raise `size`."
        check_number("size", size, allowed, integer_from(len(eigenvalues) + 1), remedy)
        self.eigenvalues = tuple(eigenvalues)
        self.size = size
        self.shape = (len(eigenvalues),)

    @override
    def _read_train(self) -> dict[str, Tensors]:
        return {"train": self._draw("train"), "val": self._draw("val")}

    @override
    def _read_test(self) -> dict[str, Tensors]:
        return {"test": self._draw("test")}

    @override
    def _fingerprint(self) -> dict[str, Any]:
        # The options say all, also of splits that are not drawn.
        return {"eigenvalues": list(self.eigenvalues), "size": self.size, "seed": self.seed}

    def _draw(self, split: str) -> dict[str, Tensor]:
        scales = torch.tensor(self.eigenvalues, dtype=torch.float64).sqrt()
        directions, _ = torch.linalg.qr(_normal(len(scales), len(scales), self.seed, "directions"))
        noise = _normal(self.size, len(scales), self.seed, split)
        return {"x": (_whitened(noise) * scales @ directions.T).float()}


def _normal(rows: int, columns: int, seed: int, purpose: str) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=seeded_generator(seed, purpose))


def _whitened(noise: Tensor) -> Tensor:
    centred = noise - noise.mean(dim=0)
    factor = torch.linalg.cholesky(centred.T @ centred / len(centred))
    whitened: Tensor = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
    return whitened
