"""The likelihood of a model that is given none."""

from __future__ import annotations

from collections.abc import Sequence

from ..networks import Shape
from .base import Likelihood
from .bernoulli import Bernoulli
from .columns import Columns
from .gaussian import Gaussian
from .logistic import DiscretisedLogistic


def default_likelihood(shape: Shape, levels: int | None = None, kinds: Sequence[str | int] | None = None) -> Likelihood:
    """Choose the likelihood by the data.

    Columns for a table, Bernoulli for grey images, discretised logistic for colour images, else Gaussian.

    The Gaussian's variance is learned. A variance fixed at 1 is never a default: on data in [0, 1] the model collapses.
    """
    if kinds is not None:
        return Columns(shape, levels, kinds)
    if len(shape) != 3:
        return Gaussian(shape, levels)
    return Bernoulli(shape, levels) if shape[0] == 1 else DiscretisedLogistic(shape, levels)
