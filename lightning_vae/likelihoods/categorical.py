"""The likelihood of classes and of levels without an order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributions as td

from ..networks import Shape
from .base import Likelihood, check_integers


class Categorical(Likelihood):
    """Categorical distribution over the integer levels of each number.

    The decoder's output has ``levels`` times the entries along the first axis: the logits of the levels. It can take
    any form over the levels, and knows nothing of their order. The mean is that of the levels as numbers.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels (classes) of the raw data.

    Raises:
        ValueError: If there are no levels.
    """

    unit_interval = True
    takes_mask = True

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__(shape, levels)
        if levels is None:
            raise ValueError("`levels` must be the number of classes for the Categorical likelihood, got None.")
        self.classes = levels
        self._needs(levels)

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the categorical distribution with these logits."""
        logits = torch.stack(self._parameters_of(output, self.classes), dim=-1)
        return self._independent(Classes(logits, 1 / (self.classes - 1)))

    def check_values(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Refuse numbers that are no classes."""
        check_integers("`likelihood` Categorical", x if mask is None else x[mask], self.classes - 1)


class Classes(td.Distribution):
    """Classes 0 to n - 1, as the numbers ``class * spacing``.

    Args:
        logits: Shape ``(..., n)``.
        spacing: Distance between neighbouring classes.
    """

    def __init__(self, logits: Tensor, spacing: float = 1.0) -> None:
        self.logits, self.spacing = logits.log_softmax(-1), spacing
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of the classes as numbers."""
        numbers = torch.arange(self.logits.shape[-1], device=self.logits.device)
        return (self.logits.exp() * numbers).sum(-1) * self.spacing

    @property
    def mode(self) -> Tensor:
        """The most probable class."""
        return self.logits.argmax(-1).to(self.logits.dtype) * self.spacing

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of the nearest class, in nats; minus infinity beyond the classes."""
        index = (value / self.spacing).round().long()
        inside = (index >= 0) & (index < self.logits.shape[-1])  # any other would end the process on a GPU
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)
        logits = self.logits.expand(*shape, -1)
        log_prob: Tensor = logits.gather(-1, index.where(inside, 0).expand(shape)[..., None])[..., 0]
        return log_prob.where(inside, -math.inf)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw classes."""
        drawn: Tensor = td.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
        return drawn.to(self.logits.dtype) * self.spacing
