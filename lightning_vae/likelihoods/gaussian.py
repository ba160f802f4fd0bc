"""The Gaussian likelihood."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..checks import check_number, is_positive
from ..networks import Shape
from .base import Likelihood, global_mean, soft_clamp

_STARTED = ("learned", "per_dimension", "per_pixel")


class Gaussian(Likelihood):
    """Gaussian with one variance for all pixels or one for each; the decoder's output is the mean.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
        variance: A positive number fixes it (1 on data in [0, 1] collapses the latents: the scale of the variance
            decides what is worth encoding). ``"learned"`` makes its logarithm a parameter, which starts at a tenth of
            the first training batch's mean squared error, because an optimizer's steps are too small to cross scales.
            ``"optimal"`` is the mean squared error over the global batch during training, and its running mean at
            evaluation (sigma-VAE). ``"per_dimension"`` learns a variance for each dimension (pixel) of the data, the
            same for all observations: with linear networks this is factor analysis. ``"per_pixel"`` lets the decoder
            predict it: its output has twice the entries along the first axis, first the means and then the
            log-variances, which are added to one learned log-variance and bounded smoothly.

    Raises:
        ValueError: If the variance is none of these.

    References:
        Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021; Lucas
        et al., "Don't Blame the ELBO!", NeurIPS 2019, on variances that are too large.
    """

    log_variance: Tensor
    start_weight: Tensor

    takes_mask = True

    start_share = 0.1
    """Initial learned variance, as a share of the first batch's mean squared error: about what training leaves."""
    momentum = 0.99
    """Momentum of the running mean of the optimal variance."""
    min_log_variance = -12.0
    """Lower bound, as in sigma-VAE: the density of data that are reconstructed exactly is unbounded otherwise."""
    max_log_variance = 30.0
    """Upper bound of a predicted log-variance, far above any data's."""

    def __init__(
        self,
        shape: Shape,
        levels: int | None = None,
        variance: float | Literal["learned", "optimal", "per_dimension", "per_pixel"] = "learned",
    ) -> None:
        super().__init__(shape, levels)
        self.learns_scale = variance == "optimal" or variance in _STARTED
        self.learns_each_scale = variance in ("per_dimension", "per_pixel")
        if not self.learns_scale:
            allowed = "a positive number, 'learned', 'optimal', 'per_dimension' or 'per_pixel'"
            check_number(
                "variance", variance, allowed, lambda each: isinstance(each, int | float) and is_positive(each)
            )
        self.variance = variance
        if variance in _STARTED:
            self.log_variance = nn.Parameter(torch.zeros(self.shape if variance == "per_dimension" else ()))
            self._start_with_data("log_variance")
        elif variance == "optimal":
            self.register_buffer("log_variance", torch.tensor(0.0))
            # Weight of the initial value in the running mean, which is divided by one minus it to correct the bias.
            self.register_buffer("start_weight", torch.tensor(1.0))
        else:
            self.register_buffer("log_variance", torch.tensor(math.log(float(variance))), persistent=False)
        if variance == "per_pixel":
            self._needs(2)

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:
        """Return the Gaussian with this mean, and with this variance where the decoder predicts it."""
        deviation: Tensor | None = None
        if self.variance == "per_pixel":
            output, deviation = self._parameters_of(output, 2)
        if self._is_first(x):
            with torch.no_grad():
                self.log_variance.copy_(self._optimal(output, x, mask) + math.log(self.start_share))
        if deviation is not None:
            log_variance = soft_clamp(self.log_variance + deviation, self.min_log_variance, self.max_log_variance)
        elif self.variance == "optimal" and x is not None:
            log_variance = self._update(output, x, mask)
        else:
            log_variance = self.log_variance.clamp(min=self.min_log_variance)
        scale = (0.5 * log_variance).exp()
        return self._independent(td.Normal(output, scale.expand_as(output), validate_args=False))

    @torch.no_grad()
    def _optimal(self, output: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the global batch's optimal log-variance.

        It needs no gradient: at the optimum, the loss has zero slope in the variance.
        """
        mse = global_mean((output - x).square(), mask, per_dimension=self.variance == "per_dimension")
        return mse.log().clamp(min=self.min_log_variance)

    @torch.no_grad()
    def _update(self, output: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the optimal log-variance and update the running mean."""
        optimal = self._optimal(output, x, mask)
        self.start_weight.mul_(self.momentum)
        share = (1 - self.momentum) / (1 - self.start_weight)
        running = (1 - share) * self.log_variance.exp() + share * optimal.exp()
        self.log_variance.copy_(running.log())
        return optimal
