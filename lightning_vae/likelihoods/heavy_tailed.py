"""Likelihoods of real-valued data whose tails are heavier than a Gaussian's: outliers count less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..checks import check_number, is_positive
from ..networks import Shape
from .base import Likelihood, global_mean


class _LocationScale(Likelihood):
    """Base of the likelihoods with one scale for all pixels; the decoder's output is the location."""

    log_scale: Tensor

    takes_mask = True

    start_share = math.sqrt(0.1)
    """Initial learned scale, as a share of the first batch's mean absolute error, as for the Gaussian's variance."""
    min_log_scale = -6.0
    """Lower bound: the density of data that are reconstructed exactly is unbounded otherwise."""

    def __init__(self, shape: Shape, levels: int | None = None, scale: float | Literal["learned"] = "learned") -> None:
        super().__init__(shape, levels)
        self.scale, self.learns_scale = scale, scale == "learned"
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.tensor(0.0))
            self._start_with_data("log_scale")
        else:
            check_number(
                "scale",
                scale,
                "a positive number or 'learned'",
                lambda each: isinstance(each, int | float) and is_positive(each),
            )
            self.register_buffer("log_scale", torch.tensor(math.log(float(scale))), persistent=False)

    def _scale_of(self, output: Tensor, x: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the scale of each pixel, after its start at the first training batch's error."""
        if self._is_first(x):
            with torch.no_grad():
                error = self.start_share * global_mean((output - x).abs(), mask)
                self.log_scale.copy_(error.log().clamp(min=self.min_log_scale))
        return self.log_scale.clamp(min=self.min_log_scale).exp().expand_as(output)


class Laplace(_LocationScale):
    r"""Laplace distribution; the decoder's output is the location, which is mean and median.

    .. math::
        \log p(x|z) = -\log(2b) - |x - \mu| / b

    Training fits the median of the data, so the loss is an absolute error.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
        scale: b, one for all pixels. A positive number fixes it. ``"learned"`` makes its logarithm a parameter, which
            starts at a third of the first training batch's mean absolute error.

    Raises:
        ValueError: If the scale is neither.
    """

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:
        """Return the Laplace distribution with this location."""
        return self._independent(td.Laplace(output, self._scale_of(output, x, mask), validate_args=False))


class StudentT(_LocationScale):
    """Student's t distribution; the decoder's output is the location, which is mean and median.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
        degrees_of_freedom: The fewer, the heavier the tails. A number above 1 fixes them, so that there is a mean.
            ``"learned"`` makes them a parameter, one for all pixels, between 1 and 1100, which starts at 5.
        scale: As for :class:`Laplace`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Takahashi et al., "Student-t Variational Autoencoder for Robust Density Estimation", IJCAI 2018.
    """

    log_excess: Tensor
    """Logarithm of the degrees of freedom above 1."""

    max_log_excess = 7.0
    """Upper bound: a Gaussian for all purposes, and the density's constants still precise in float32."""

    def __init__(
        self,
        shape: Shape,
        levels: int | None = None,
        degrees_of_freedom: float | Literal["learned"] = "learned",
        scale: float | Literal["learned"] = "learned",
    ) -> None:
        super().__init__(shape, levels, scale)
        self.degrees_of_freedom = degrees_of_freedom
        if degrees_of_freedom == "learned":
            self.log_excess = nn.Parameter(torch.tensor(math.log(4.0)))
        else:
            check_number(
                "degrees_of_freedom",
                degrees_of_freedom,
                "a number above 1 or 'learned'",
                lambda each: isinstance(each, int | float) and is_positive(each - 1),
            )
            self.register_buffer("log_excess", torch.tensor(math.log(degrees_of_freedom - 1)), persistent=False)

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:
        """Return Student's t distribution with this location."""
        degrees = 1 + self.log_excess.clamp(max=self.max_log_excess).exp()
        return self._independent(_StudentT(degrees, output, self._scale_of(output, x, mask)))


class _StudentT(td.Distribution):
    """Student's t with more than one degree of freedom; torch's own makes the host wait for the device."""

    def __init__(self, df: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df: Tensor
        self.loc: Tensor
        self.scale: Tensor
        self.df, self.loc, self.scale = torch.broadcast_tensors(df, loc, scale)
        super().__init__(self.loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        finite: Tensor = self.scale.square() * self.df / (self.df - 2)
        return finite.where(self.df > 2, math.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        half = (self.df + 1) / 2
        constant = half.lgamma() - (self.df / 2).lgamma() - 0.5 * (math.pi * self.df).log() - self.scale.log()
        distance: Tensor = ((value - self.loc) / self.scale).square() / self.df
        return constant - half * distance.log1p()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        squares: Tensor = td.Chi2(self.df, validate_args=False).sample(torch.Size(sample_shape)) / self.df
        return self.loc + self.scale * torch.randn_like(squares) / squares.sqrt()
