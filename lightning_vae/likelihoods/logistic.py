"""Likelihoods of integer data: logistic distributions integrated over each level's bin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F  # noqa: N812

from ..checks import check_number, integer_from
from ..networks import Shape
from .base import Likelihood, soft_clamp


class DiscretisedLogistic(Likelihood):
    """Logistic integrated over each level's bin, which gives probabilities of integer data.

    The decoder's output is the location. One scale per channel is learned. The outermost bins include the tails.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data; ``None`` means 256 levels, on data in [0, 1].

    References:
        Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.
    """

    learns_scale = True
    unit_interval = True
    takes_mask = True

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__(shape, levels)
        channels = (shape[0],) + (1,) * (len(shape) - 1) if len(shape) > 1 else (1,)
        self.log_scale = nn.Parameter(torch.full(channels, math.log(0.1)))

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the discretised logistic distribution with this mean."""
        return self._independent(_DiscretisedLogistic(output, self.log_scale.exp(), self.levels or 256))


class DiscretisedLogisticMixture(Likelihood):
    """Mixture of discretised logistics for each number, with weights, locations and scales from the decoder.

    A pixel may have several likely levels, as at an edge. Channels are independent given z: unlike in PixelCNN++, a
    channel does not see the others' values.

    The decoder's output has ``3 * components`` times the entries along the first axis: logits of the weights, then
    locations, then log-scales. An output of 0 means components spread evenly over the range of the data.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data; ``None`` means 256 levels, on data in [0, 1].
        components: Number of components.

    Raises:
        ValueError: If the number of components is no integer of at least 1.

    References:
        Salimans et al., "PixelCNN++", ICLR 2017, section 2.1.
    """

    centres: Tensor

    learns_scale = True
    unit_interval = True
    takes_mask = True

    min_log_scale = -7.0
    """Lower bound of the log-scales, in the networks' scale: a twentieth of a bin of 8-bit data and less."""
    max_log_scale = 3.0
    """Upper bound of the log-scales: nearly all probability is in the outermost bins."""

    def __init__(self, shape: Shape, levels: int | None = None, components: int = 5) -> None:
        super().__init__(shape, levels)
        check_number("components", components, "an integer of at least 1", integer_from(1))
        self.components = components
        self._needs(3 * components)
        self.register_buffer("centres", (torch.arange(components) + 0.5) / components, persistent=False)

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the mixture with these weights, locations and scales."""
        parts = torch.stack(self._parameters_of(output, 3 * self.components), dim=-1)
        logits, loc, log_scale = parts.chunk(3, dim=-1)
        scale = soft_clamp(log_scale + math.log(0.1), self.min_log_scale, self.max_log_scale).exp()
        return self._independent(
            td.MixtureSameFamily(
                td.Categorical(logits=logits, validate_args=False),
                _DiscretisedLogistic(loc + self.centres, scale, self.levels or 256),
                validate_args=False,
            )
        )


class _DiscretisedLogistic(td.Distribution):
    """Logistic over [0, 1] in ``levels`` bins. Its values are the bins' centres."""

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Location, clamped to the range of the data."""
        inside: Tensor = self.loc.clamp(0, 1)
        return inside

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a bin, in nats, for values at the bins' centres."""
        half = 0.5 / (self.levels - 1)
        upper = (value - self.loc + half) / self.scale
        lower = (value - self.loc - half) / self.scale
        below: Tensor = F.logsigmoid(upper)
        above: Tensor = F.logsigmoid(-lower)
        # log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - e^(l - u)) avoids a difference of nearly equal numbers.
        inside = below + above + torch.log(-torch.expm1(-2 * half / self.scale))
        return torch.where(value < half, below, torch.where(value > 1 - half, above, inside))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw values at the bins' centres."""
        uniform = torch.rand(self._extended_shape(torch.Size(sample_shape)), device=self.loc.device)
        value = self.loc + self.scale * torch.logit(uniform, eps=1e-6)
        bins: Tensor = (value.clamp(0, 1) * (self.levels - 1)).round()
        return bins / (self.levels - 1)
