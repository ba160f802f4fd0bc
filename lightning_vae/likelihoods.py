"""Likelihoods p(x|z): what the decoder's output means.

Each is a module that turns the decoder's output into a normalised ``torch.distributions.Distribution`` over the data in
the network's scale (images in [0, 1]), constants included, so that its ``log_prob`` is in nats and methods compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F  # noqa: N812

from .networks import Shape
from .noise import uniform_by_index
from .precision import at_least_float32


class Likelihood(nn.Module):
    """Base of the likelihoods: from the decoder's output to a distribution over one observation.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
    """

    learns_scale = False
    """Whether its scale adapts to the reconstruction error while training."""
    unit_interval = False
    """Whether data in the network's scale must lie in [0, 1]."""
    starts = False
    """Whether it takes something from the first training batch, and has not seen it yet."""

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.levels = levels

    def observe(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return what is observed, given data in the network's scale.

        Args:
            x: Data in the network's scale, shape ``(B, *shape)``.
            index: Which observations these are, to draw their noise by; ``None`` to draw fresh noise (training).
        """
        del index
        return x

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:
        """Return p(x|z), with batch shape ``(B,)`` and event shape ``shape``.

        Args:
            output: The decoder's output, shape ``(B, *shape)``.
            x: While training, the data it will be evaluated on, for a scale that is computed from the error.
        """
        raise NotImplementedError(f"`likelihood`: {type(self).__name__} has no `forward` of its own: give a subclass.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Under `bf16-true` a learned scale would round each optimizer step away.
        super()._apply(at_least_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _independent(self, distribution: td.Distribution) -> td.Distribution:
        return td.Independent(distribution, len(self.shape), validate_args=False)


class Bernoulli(Likelihood):
    """Bernoulli over dynamically binarised data; the decoder's output is the logit.

    Grey data in [0, 1] are the probability of a pixel being on. In training each use draws it afresh (Burda et al.
    2015, section 5); at evaluation the draw is fixed by seed and index. Cross-entropy on the grey levels themselves
    would be no likelihood.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for data in [0, 1].
        seed: Seed of the binarisation at evaluation.
        start_at_mean: Whether to add to the decoder's output the logits of each pixel's mean over the first training
            batch. A decoder that starts there need not learn them first, while the pressure on the rate already
            closes latents (Burda et al.'s code sets its output bias so).
    """

    offset: Tensor

    unit_interval = True

    def __init__(self, shape: Shape, levels: int | None = None, seed: int = 0, start_at_mean: bool = False) -> None:
        super().__init__(shape, levels)
        self.seed = seed
        self.start_at_mean = start_at_mean
        self.starts = start_at_mean
        if start_at_mean:
            self.register_buffer("offset", torch.zeros(self.shape))
            self.register_load_state_dict_post_hook(_has_started)  # type: ignore[no-untyped-call]

    def observe(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return ``x`` binarised: afresh, or by the observations' own noise where ``index`` is given."""
        noise = torch.rand_like(x) if index is None else uniform_by_index(index, math.prod(self.shape), self.seed)
        return noise.view_as(x).lt_(x).to(x.dtype)  # in place, as 0 or 1: no pass to turn bools into numbers

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:
        """Return the Bernoulli distribution with these logits."""
        if self.starts and x is not None:
            self.starts = False
            self.offset.copy_(_mean_logits(x))
        logits = output + self.offset if self.start_at_mean else output
        bernoulli = td.Bernoulli(logits=logits, validate_args=False)
        return _IndependentBernoulli(bernoulli, len(self.shape), validate_args=False)


class _IndependentBernoulli(td.Independent):  # type: ignore[type-arg]
    """Bernoullis of an observation, which negate their sum and not each of them: two passes less for the gradient."""

    def log_prob(self, value: Tensor) -> Tensor:
        logits, value = broadcast_all(self.base_dist.logits, value)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
        batch = cross_entropy.shape[: cross_entropy.ndim - self.reinterpreted_batch_ndims]
        return -cross_entropy.reshape(*batch, -1).sum(-1)


class ContinuousBernoulli(Likelihood):
    """Continuous Bernoulli over data in [0, 1]; the decoder's output is the logit.

    References:
        Loaiza-Ganem and Cunningham, "The continuous Bernoulli: fixing a pervasive error in variational autoencoders",
        NeurIPS 2019.
    """

    unit_interval = True

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the continuous Bernoulli distribution with these logits."""
        return self._independent(td.ContinuousBernoulli(logits=output, validate_args=False))


class Gaussian(Likelihood):
    """Gaussian whose variance all pixels share; the decoder's output is the mean.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
        variance: A positive number fixes it (1 on data in [0, 1] collapses the latents: the scale of the variance
            decides what is worth encoding). ``"learned"`` makes its logarithm a parameter, which starts at a tenth of
            the first training batch's mean squared error: an optimizer's steps are too small to cross scales.
            ``"optimal"`` takes, while training, the mean squared error over the global batch, and at evaluation a
            running mean of it (sigma-VAE).

    Raises:
        ValueError: If the variance is neither.

    References:
        Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021; Lucas
        et al., "Don't Blame the ELBO!", NeurIPS 2019, for what a variance that is too large does.
    """

    log_variance: Tensor
    start_weight: Tensor

    start_share = 0.1
    """Of the first batch's mean squared error, where a learned variance starts: about what training leaves of it."""
    momentum = 0.99
    """Of the running mean of the optimal variance."""
    min_log_variance = -12.0
    """Data that are reconstructed exactly would have an unbounded density; sigma-VAE's log-sigma of -6."""

    def __init__(
        self, shape: Shape, levels: int | None = None, variance: float | Literal["learned", "optimal"] = "learned"
    ) -> None:
        super().__init__(shape, levels)
        number = isinstance(variance, int | float) and not isinstance(variance, bool)
        if not (variance in ("learned", "optimal") or (number and 0 < float(variance) < math.inf)):
            raise ValueError(f"`variance` must be a positive number, 'learned' or 'optimal', got {variance!r}.")
        self.variance = variance
        self.learns_scale = not number
        self.starts = variance == "learned"
        if variance == "learned":
            self.log_variance = nn.Parameter(torch.tensor(0.0))
            self.register_load_state_dict_post_hook(_has_started)  # type: ignore[no-untyped-call]
        elif variance == "optimal":
            self.register_buffer("log_variance", torch.tensor(0.0))
            # What is left of the start value's weight: dividing by the rest makes the first batches count in full.
            self.register_buffer("start_weight", torch.tensor(1.0))
        else:
            self.register_buffer("log_variance", torch.tensor(math.log(float(variance))), persistent=False)

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:
        """Return the Gaussian with this mean."""
        if self.starts and x is not None:
            self.starts = False
            with torch.no_grad():
                self.log_variance.copy_(self._optimal(output, x) + math.log(self.start_share))
        if self.variance == "optimal" and x is not None:
            log_variance = self._update(output, x)
        else:
            log_variance = self.log_variance.clamp(min=self.min_log_variance)
        scale = (0.5 * log_variance).exp()
        return self._independent(td.Normal(output, scale.expand_as(output), validate_args=False))

    @torch.no_grad()
    def _optimal(self, output: Tensor, x: Tensor) -> Tensor:
        """Compute the global batch's optimal log-variance.

        Without a gradient: at its optimum the loss is flat in the variance, so the gradient of the rest is the same.
        """
        error = (output - x).square().sum()
        sums = _over_processes(torch.stack([error, error.new_full((), x.numel())]))
        return (sums[0] / sums[1]).log().clamp(min=self.min_log_variance)

    @torch.no_grad()
    def _update(self, output: Tensor, x: Tensor) -> Tensor:
        """Compute the optimal log-variance and take it into the running mean."""
        optimal = self._optimal(output, x)
        self.start_weight.mul_(self.momentum)
        share = (1 - self.momentum) / (1 - self.start_weight)
        running = (1 - share) * self.log_variance.exp() + share * optimal.exp()
        self.log_variance.copy_(running.log())
        return optimal


def _has_started(module: nn.Module, _keys: object) -> None:
    """Keep what was loaded: a learned variance or an offset that started from another first batch."""
    module.starts = False  # type: ignore[assignment]


def _over_processes(sums: Tensor) -> Tensor:
    """Add up over the processes that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums


def _mean_logits(x: Tensor) -> Tensor:
    """Compute the logits of the global batch's mean, with half a count on either side, as few pixels are never on."""
    on = _over_processes(torch.cat([x.sum(dim=0).flatten(), x.new_tensor([float(len(x))])]))
    return torch.logit((on[:-1] + 0.5) / (on[-1] + 1)).view(x.shape[1:])


class DiscretisedLogistic(Likelihood):
    """Logistic integrated over each level's bin, so that integer data get probabilities.

    The decoder's output is the location. The scale is learned, one per channel. The outermost bins take the tails.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data; ``None`` takes 256 on data in [0, 1].

    References:
        Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.
    """

    learns_scale = True
    unit_interval = True

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__(shape, levels)
        channels = (shape[0],) + (1,) * (len(shape) - 1) if len(shape) > 1 else (1,)
        self.log_scale = nn.Parameter(torch.full(channels, math.log(0.1)))

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the discretised logistic distribution with this mean."""
        return self._independent(_DiscretisedLogistic(output, self.log_scale.exp(), self.levels or 256))


class _DiscretisedLogistic(td.Distribution):
    """Logistic over [0, 1] in ``levels`` bins, whose centres are the values it gives probability to."""

    def __init__(self, loc: Tensor, scale: Tensor, levels: int) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Location, held inside the range of the data."""
        inside: Tensor = self.loc.clamp(0, 1)
        return inside

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a bin, in nats, for values at the bins' centres."""
        half = 0.5 / (self.levels - 1)
        upper = (value - self.loc + half) / self.scale
        lower = (value - self.loc - half) / self.scale
        below: Tensor = F.logsigmoid(upper)
        above: Tensor = F.logsigmoid(-lower)
        # log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - e^(l - u)): no difference of nearly equal numbers.
        inside = below + above + torch.log(-torch.expm1(-2 * half / self.scale))
        return torch.where(value < half, below, torch.where(value > 1 - half, above, inside))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw values at the bins' centres."""
        uniform = torch.rand(self._extended_shape(torch.Size(sample_shape)), device=self.loc.device)
        value = self.loc + self.scale * torch.logit(uniform, eps=1e-6)
        bins: Tensor = (value.clamp(0, 1) * (self.levels - 1)).round()
        return bins / (self.levels - 1)


def default_likelihood(shape: Shape, levels: int | None = None) -> Likelihood:
    """Choose by the data: grey images Bernoulli, colour images discretised logistic, vectors Gaussian.

    The Gaussian's variance is learned. A variance fixed at 1 is never a default: on data in [0, 1] it collapses.
    """
    if len(shape) != 3:
        return Gaussian(shape, levels)
    return Bernoulli(shape, levels) if shape[0] == 1 else DiscretisedLogistic(shape, levels)
