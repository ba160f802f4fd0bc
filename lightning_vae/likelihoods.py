"""Likelihoods p(x|z): the meaning of the decoder's output.

Each is a module that turns the decoder's output into a normalised ``torch.distributions.Distribution`` over the data in
the networks' scale (images in [0, 1]). Constants are included: ``log_prob`` is in nats and comparable across methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeGuard

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from .checks import check_number, integer_from, is_positive
from .distributed import sum_over_processes
from .networks import Shape
from .noise import uniform_by_index
from .objective import broadcasts_to


class Likelihood(nn.Module):
    """Base class of the likelihoods: from the decoder's output to a distribution over one observation.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
    """

    learns_scale = False
    """True if the scale adapts to the reconstruction error during training."""
    unit_interval = False
    """True if data in the networks' scale must lie in [0, 1]."""
    starts = False
    """True if a parameter waits for the first training batch, which sets its initial value: until then it is zero."""

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.levels = levels

    def observe(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return the observed values of data in the networks' scale: the data, unless a subclass randomises them.

        Args:
            x: Data in the networks' scale, shape ``(B, *shape)``.
            index: Index of each observation, which fixes its noise; ``None`` for fresh noise, as in training.
        """
        del index
        return x

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:
        """Return p(x|z), with batch shape ``(B,)`` and event shape ``shape``.

        Args:
            output: The decoder's output, shape ``(B, *shape)``.
            x: During training, the data that it will be evaluated on, for a scale computed from the error.
        """
        raise NotImplementedError(f"`likelihood`: {type(self).__name__} has no `forward`. Use a class that has one.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Under `bf16-true`, rounding would undo each optimizer step of a learned scale.
        super()._apply(at_least_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def _independent(self, distribution: td.Distribution) -> td.Distribution:
        return _IndependentNumbers(distribution, len(self.shape), validate_args=False)

    def _start_with_data(self, name: str) -> None:
        """Let the first training batch set a parameter or buffer that is zero until then."""
        self.starts, self._started = True, name
        self.register_load_state_dict_post_hook(_note_start)  # type: ignore[no-untyped-call]

    def _is_first(self, x: Tensor | None) -> TypeGuard[Tensor]:
        """Return whether these are the first training batch, which sets the initial value."""
        if x is None or not self.starts:
            return False
        _note_start(self)  # the value may have been set without loading a checkpoint
        is_first, self.starts = self.starts, False
        return is_first


class _IndependentNumbers(td.Independent):  # type: ignore[type-arg]
    """Independent numbers of one observation, whose density refuses observations of another shape."""

    def log_prob(self, value: Tensor) -> Tensor:
        event = self.event_shape
        last = value.shape[-len(event) :]
        if last.numel() != event.numel() or not broadcasts_to(last, event):  # only axes of size 1 may be missing
            raise ValueError(
                f"`value` must end with the shape {tuple(event)} of one observation, got shape {tuple(value.shape)}."
            )
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.base_dist.log_prob(value)
        return log_prob.flatten(-self.reinterpreted_batch_ndims).sum(-1)  # torch's sum refuses an empty batch


class Bernoulli(Likelihood):
    """Bernoulli over dynamically binarised data; the decoder's output is the logit.

    A grey level in [0, 1] is the probability that the pixel is on. Training draws the pixel again at each use (Burda et
    al. 2015, section 5); at evaluation the seed and the index fix the draw. Cross-entropy on the grey levels themselves
    is not a likelihood.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for data in [0, 1].
        seed: Seed of the binarisation at evaluation.
        start_at_mean: Add the logits of each pixel's mean over the first training batch to the decoder's output. The
            decoder then does not have to learn them first, while the pressure on the rate already shuts latents down.
            (Burda et al.'s code initialises its output bias this way.)
    """

    offset: Tensor

    unit_interval = True

    def __init__(self, shape: Shape, levels: int | None = None, seed: int = 0, start_at_mean: bool = False) -> None:
        super().__init__(shape, levels)
        check_number("seed", seed, "an integer", integer_from())
        self.seed = seed
        self.start_at_mean = start_at_mean
        if start_at_mean:
            self.register_buffer("offset", torch.zeros(self.shape))
            self._start_with_data("offset")

    def observe(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Return ``x`` binarised, with each observation's own noise if ``index`` is given."""
        noise = torch.rand_like(x) if index is None else uniform_by_index(index, math.prod(self.shape), self.seed)
        return noise.view_as(x).lt_(x).to(x.dtype)  # in place, as 0 or 1: saves a conversion from bool

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:
        """Return the Bernoulli distribution with these logits."""
        if self._is_first(x):
            self.offset.copy_(_mean_logits(x))
        logits = output + self.offset if self.start_at_mean else output
        bernoulli = td.Bernoulli(logits=logits, validate_args=False)
        return _IndependentBernoulli(bernoulli, len(self.shape), validate_args=False)


class _IndependentBernoulli(_IndependentNumbers):
    """Independent Bernoullis that negate the sum and not each term, which saves two passes in the gradient."""

    @override
    def _log_prob(self, value: Tensor) -> Tensor:
        logits, value = broadcast_all(self.base_dist.logits, value)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, value, reduction="none")
        return -cross_entropy.flatten(-self.reinterpreted_batch_ndims).sum(-1)


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
    """Gaussian with one variance for all pixels; the decoder's output is the mean.

    Args:
        shape: Shape of one observation.
        levels: Number of integer levels of the raw data, ``None`` for real-valued data.
        variance: A positive number fixes it (1 on data in [0, 1] collapses the latents: the scale of the variance
            decides what is worth encoding). ``"learned"`` makes its logarithm a parameter, which starts at a tenth of
            the first training batch's mean squared error, because an optimizer's steps are too small to cross scales.
            ``"optimal"`` is the mean squared error over the global batch during training, and its running mean at
            evaluation (sigma-VAE).

    Raises:
        ValueError: If the variance is none of these.

    References:
        Rybkin, Daniilidis and Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021; Lucas
        et al., "Don't Blame the ELBO!", NeurIPS 2019, on variances that are too large.
    """

    log_variance: Tensor
    start_weight: Tensor

    start_share = 0.1
    """Initial learned variance, as a share of the first batch's mean squared error: about what training leaves."""
    momentum = 0.99
    """Momentum of the running mean of the optimal variance."""
    min_log_variance = -12.0
    """Lower bound, as in sigma-VAE: the density of data that are reconstructed exactly is unbounded otherwise."""

    def __init__(
        self, shape: Shape, levels: int | None = None, variance: float | Literal["learned", "optimal"] = "learned"
    ) -> None:
        super().__init__(shape, levels)
        self.learns_scale = variance in ("learned", "optimal")
        if not self.learns_scale:
            allowed = "a positive number, 'learned' or 'optimal'"
            check_number(
                "variance", variance, allowed, lambda each: isinstance(each, int | float) and is_positive(each)
            )
        self.variance = variance
        if variance == "learned":
            self.log_variance = nn.Parameter(torch.tensor(0.0))
            self._start_with_data("log_variance")
        elif variance == "optimal":
            self.register_buffer("log_variance", torch.tensor(0.0))
            # Weight of the initial value in the running mean, which is divided by one minus it to correct the bias.
            self.register_buffer("start_weight", torch.tensor(1.0))
        else:
            self.register_buffer("log_variance", torch.tensor(math.log(float(variance))), persistent=False)

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:
        """Return the Gaussian with this mean."""
        if self._is_first(x):
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

        It needs no gradient: at the optimum, the loss has zero slope in the variance.
        """
        error = (output - x).square().sum()
        sums = sum_over_processes(torch.stack([error, error.new_full((), x.numel())]))
        return (sums[0] / sums[1]).log().clamp(min=self.min_log_variance)

    @torch.no_grad()
    def _update(self, output: Tensor, x: Tensor) -> Tensor:
        """Compute the optimal log-variance and update the running mean."""
        optimal = self._optimal(output, x)
        self.start_weight.mul_(self.momentum)
        share = (1 - self.momentum) / (1 - self.start_weight)
        running = (1 - share) * self.log_variance.exp() + share * optimal.exp()
        self.log_variance.copy_(running.log())
        return optimal


def _note_start(module: Any, _keys: object = None) -> None:
    """Note if the value is still the one before the first batch: a checkpoint may lack another."""
    module.starts = not getattr(module, module._started).any()


def _mean_logits(x: Tensor) -> Tensor:
    """Compute the logits of the global batch's mean, with half a count added on both sides for constant pixels."""
    on = sum_over_processes(torch.cat([x.sum(dim=0).flatten(), x.new_tensor([float(len(x))])]))
    return torch.logit((on[:-1] + 0.5) / (on[-1] + 1)).view(x.shape[1:])


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

    def __init__(self, shape: Shape, levels: int | None = None) -> None:
        super().__init__(shape, levels)
        channels = (shape[0],) + (1,) * (len(shape) - 1) if len(shape) > 1 else (1,)
        self.log_scale = nn.Parameter(torch.full(channels, math.log(0.1)))

    def forward(self, output: Tensor, x: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the discretised logistic distribution with this mean."""
        return self._independent(_DiscretisedLogistic(output, self.log_scale.exp(), self.levels or 256))


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


def default_likelihood(shape: Shape, levels: int | None = None) -> Likelihood:
    """Choose the likelihood by the data: Bernoulli for grey images, discretised logistic for colour, else Gaussian.

    The Gaussian's variance is learned. A variance fixed at 1 is never a default: on data in [0, 1] the model collapses.
    """
    if len(shape) != 3:
        return Gaussian(shape, levels)
    return Bernoulli(shape, levels) if shape[0] == 1 else DiscretisedLogistic(shape, levels)


def warn_of_feedback(beta: float, likelihood: Likelihood) -> None:
    """Warn about a beta other than 1 with a likelihood whose scale adapts."""
    if beta != 1 and likelihood.learns_scale:
        rank_zero_warn(
            f"`beta` is {beta:g} with a likelihood whose scale adapts: the two form a feedback loop. A larger beta "
            "worsens the reconstruction, which widens the scale, which weakens the reconstruction term again, until "
            "everything has collapsed. Fix the variance (train once at beta 1 and use its variance), or keep beta at 1."
        )


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of ``nn.Module._apply``: move tensors as ``fn`` does, but never to half precision."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        if applied.dtype in (torch.bfloat16, torch.float16) and applied.dtype != tensor.dtype:
            return tensor.to(applied.device)
        return applied

    return apply
