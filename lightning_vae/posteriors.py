"""Posteriors q(z|x): the meaning of the encoder's output.

A head is a module that turns the encoder's output into a ``torch.distributions.Distribution`` over the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributions as td
from typing_extensions import override

from .checks import check_number, integer_from, is_positive
from .likelihoods.base import at_least_float32


class WideModule(nn.Module):
    """A module whose parameters and buffers are never in half precision.

    Under ``bf16-true``, rounding would undo each optimizer step of a scale or a weight.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(at_least_float32(fn), recurse)  # type: ignore[no-untyped-call]
        return self


class PosteriorHead(WideModule):
    """Base class of the posterior heads: from the encoder's output to a distribution over the latents.

    Args:
        latent_dim: Number of columns k of the latents, which is what the decoder is given.

    Attributes:
        outputs: Number of columns that the encoder must return.
        parts: Number of parts G of the rate under a prior that factorises alike.

    Raises:
        ValueError: If an option is out of range.
    """

    is_joint = False
    """True if the dimensions are not independent: the rate is then one number an observation."""
    classes: int | None = None
    """Number of classes of each group of categories; ``None`` for continuous latents."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_number("latent_dim", latent_dim, "an integer of at least 1", integer_from(1))
        self.latent_dim = self.parts = latent_dim
        self.outputs = 2 * latent_dim

    def forward(self, output: Any) -> td.Distribution:
        """Return q(z|x), with the observations along its first axis.

        Args:
            output: The encoder's output: a tensor of shape ``(B, outputs)``, or tensors of as many columns together.
        """
        raise NotImplementedError(f"`posterior`: {type(self).__name__} has no `forward`. Use a class that has one.")

    def _columns(self, output: Any) -> Tensor:
        """Return the encoder's output as one tensor of shape ``(B, outputs)``, in at least float32."""
        parts = [output] if isinstance(output, Tensor) else output
        tensors = isinstance(parts, Sequence) and bool(parts) and all(isinstance(part, Tensor) for part in parts)
        if tensors and all(part.ndim == 2 and len(part) == len(parts[0]) for part in parts):
            columns = widen(parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1))
            if columns.shape[1] == self.outputs:
                return columns
        got = " and ".join(str(tuple(part.shape)) for part in parts) if tensors else type(output).__name__
        raise ValueError(
            f"`encoder` must give {self.outputs} columns for each observation, which `posterior` "
            f"{type(self).__name__} of {self.latent_dim} latent dimensions needs, got {got}."
        )


class DiagonalGaussian(PosteriorHead):
    r"""Independent Gaussians: the encoder's output is their means and log-variances.

    The latents have shape ``(B, k)``, and the rate has k parts.

    Args:
        latent_dim: Number of latent dimensions k.
        bound: Bound b of the log-variance v, which becomes :math:`b \tanh(v / b)`: smooth, and nearly v where that is
            small. ``None`` for no bound. NVAE bounds the logarithm of the scale by 5, which is 10 here.

    Raises:
        ValueError: If an option is out of range.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, appendix B; Vahdat and Kautz, "NVAE", NeurIPS
        2020, whose code has this bound.
    """

    def __init__(self, latent_dim: int, bound: float | None = None) -> None:
        super().__init__(latent_dim)
        if bound is not None:
            check_number("bound", bound, "a positive number, or None for no bound", is_positive)
        self.bound = bound

    @override
    def forward(self, output: Any) -> td.Normal:
        mean, log_variance = self._columns(output).chunk(2, dim=1)
        if self.bound is not None:
            log_variance = self.bound * (log_variance / self.bound).tanh()
        return td.Normal(mean, (0.5 * log_variance).exp(), validate_args=False)


class BatchNormMeans(DiagonalGaussian):
    r"""Independent Gaussians whose means are normalised over the batch, so that no dimension can collapse.

    .. math::
        \mu_j = \gamma \, \frac{h_j - \text{mean}(h_j)}{\sqrt{\text{var}(h_j) + \epsilon}} + b_j, \qquad
        \text{mean}(\mathrm{KL}_j) \ge \tfrac12 (\gamma^2 + b_j^2)

    with :math:`\gamma` fixed and :math:`b` learned. The bound holds over a training batch as long as the variance of
    the encoder's output is large beside :math:`\epsilon`. Evaluation uses the running mean and variance. Each process
    normalises its own share of the batch, unless the Trainer has ``sync_batchnorm=True``.

    Every dimension is active by construction, so a count of active units says nothing here.

    Args:
        latent_dim: Number of latent dimensions k.
        gamma: Standard deviation of the means over a batch. The paper has 0.5 to 0.7 for text.
        bound: As in :class:`DiagonalGaussian`.

    Raises:
        ValueError: If an option is out of range.

    References:
        Zhu et al., "A Batch Normalized Inference Network Keeps the KL Vanishing Away", ACL 2020, equation 8.
    """

    def __init__(self, latent_dim: int, gamma: float = 0.5, bound: float | None = None) -> None:
        super().__init__(latent_dim, bound)
        check_number("gamma", gamma, "a positive number", is_positive)
        self.gamma = gamma
        self.normalise = nn.BatchNorm1d(latent_dim, affine=False)
        self.shift = nn.Parameter(torch.zeros(latent_dim))

    @override
    def forward(self, output: Any) -> td.Normal:
        posterior = super().forward(output)
        mean = self.gamma * self.normalise(posterior.loc) + self.shift
        return td.Normal(mean, posterior.scale, validate_args=False)


class FullCovariance(PosteriorHead):
    r"""One Gaussian with a full covariance :math:`L L^\top`.

    The encoder's output is the k means, the logarithms of the k squared diagonal elements of :math:`L`, and the
    :math:`k (k - 1) / 2` elements below the diagonal, row by row. Where these are 0 it is :class:`DiagonalGaussian`.
    The latents have shape ``(B, k)``, and the rate has one part.

    Args:
        latent_dim: Number of latent dimensions k.

    Raises:
        ValueError: If it is not an integer of at least 1.

    References:
        Kingma and Welling, "An Introduction to Variational Autoencoders", 2019, section 2.5.1.
    """

    is_joint = True
    _below: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.parts = 1
        below = torch.tril_indices(latent_dim, latent_dim, -1)
        self.outputs = 2 * latent_dim + below.shape[1]
        self.register_buffer("_below", below, persistent=False)

    @override
    def forward(self, output: Any) -> td.MultivariateNormal:
        sizes = [self.latent_dim, self.latent_dim, self.outputs - 2 * self.latent_dim]
        mean, log_variance, below = self._columns(output).split(sizes, dim=1)
        factor = (0.5 * log_variance).exp().diag_embed()
        rows, columns = self._below
        factor[:, rows, columns] = below
        return td.MultivariateNormal(mean, scale_tril=factor, validate_args=False)


class CategoricalGroups(PosteriorHead):
    r"""Groups of categories: each of G groups of latents is a one-hot vector over C classes.

    The encoder's output is the logits. The probabilities are mixed with a share :math:`\epsilon` of the uniform
    distribution, :math:`p = (1 - \epsilon) \, \text{softmax} + \epsilon / C`, so no class gets probability 0 and the
    rate stays finite. Samples have the gradient of the probabilities (straight-through), which is unbiased if the
    decoder is linear in each group. Samples and means have shape ``(B, G, C)``, and the decoder is given them as
    ``(B, G * C)``. The rate has G parts.

    Args:
        latent_dim: Number of columns of the latents, ``G * C``.
        classes: Number of classes C of each group, which divides it.
        unimix: Share :math:`\epsilon` of the uniform distribution, at least 0 and below 1.

    Attributes:
        groups: Number of groups G.

    Raises:
        ValueError: If an option is out of range.

    References:
        Hafner et al., "Mastering Atari with Discrete World Models" (DreamerV2), ICLR 2021, algorithm 1, for the
        gradient (Bengio et al. 2013); "Mastering Diverse Domains through World Models" (DreamerV3), 2023, for the
        uniform share.
    """

    classes: int

    def __init__(self, latent_dim: int, classes: int, unimix: float = 0.01) -> None:
        super().__init__(latent_dim)
        self.groups = self.parts = groups_of(latent_dim, classes)
        check_number("unimix", unimix, "at least 0 and below 1", lambda value: 0 <= value < 1)
        self.classes, self.unimix = classes, unimix
        self.outputs = latent_dim

    @override
    def forward(self, output: Any) -> td.OneHotCategorical:
        logits = self._columns(output).unflatten(1, (self.groups, self.classes))
        if self.unimix:
            logits = ((1 - self.unimix) * logits.softmax(-1) + self.unimix / self.classes).log()
        return OneHotGroups(logits)


class OneHotGroups(td.OneHotCategoricalStraightThrough):
    """One-hot categories with the straight-through gradient, made without checks, which would wait for the device.

    Args:
        logits: Logits, shape ``(..., G, C)``, which may be shifted by a constant.
    """

    def __init__(self, logits: Tensor) -> None:
        self._categorical = td.Categorical(logits=logits, validate_args=False)
        td.Distribution.__init__(self, logits.shape[:-1], logits.shape[-1:], validate_args=False)

    @override
    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHotGroups:
        return OneHotGroups(self.logits.expand(*batch_shape, -1))


def groups_of(latent_dim: int, classes: int) -> int:
    """Return the number of groups that latents of so many classes have.

    Raises:
        ValueError: If there are fewer than two classes, or they don't divide the latents.
    """
    check_number("classes", classes, "an integer of at least 2", integer_from(2))
    if latent_dim % classes:
        raise ValueError(
            f"`classes` must divide `latent_dim`, the number of groups times that of their classes, got {classes} for "
            f"{latent_dim}."
        )
    return latent_dim // classes


def posterior_of(output: Any, size: int, latent_dim: int) -> td.Distribution:
    """Turn an encoder's output into a posterior, in at least float32.

    Args:
        output: A factorised distribution; or the mean and log-variance of a Gaussian, each of shape ``(B, k)``, as a
            pair or as one tensor of ``2k`` columns.
        size: Number of observations B.
        latent_dim: Number of latent dimensions k.

    Returns:
        A distribution of batch shape ``(B, k)``.

    Raises:
        ValueError: If the output has another shape.
    """
    shape = (size, latent_dim)
    if isinstance(output, td.Distribution):
        if output.batch_shape == shape and not output.event_shape:
            return _widened(output)
        got = f"{tuple(output.batch_shape)} and event shape {tuple(output.event_shape)}"
    else:
        parts = output.chunk(2, dim=-1) if isinstance(output, Tensor) and output.ndim else output
        tensors = isinstance(parts, Sequence) and all(isinstance(part, Tensor) for part in parts)
        if tensors and len(parts) == 2 and parts[0].shape == parts[1].shape == shape:
            mean, log_variance = parts
            return td.Normal(widen(mean), (0.5 * widen(log_variance)).exp(), validate_args=False)
        got = " and ".join(str(tuple(part.shape)) for part in parts) if tensors else type(output).__name__
    raise ValueError(
        f"`encoder` must give a mean and a log-variance of shape {shape} each, or a distribution of that batch shape "
        f"and no event shape, got {got}."
    )


def widen(tensor: Tensor) -> Tensor:
    """Cast half precision to float32, in which rates and likelihoods are computed."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _widened(distribution: td.Distribution) -> td.Distribution:
    """Return the distribution with parameters in half precision cast to float32."""
    parameters: dict[str, Any] = {
        name: value for name, value in vars(distribution).items() if name in distribution.arg_constraints
    }
    if all(widen(value) is value for value in parameters.values()):
        return distribution
    make: Any = type(distribution)
    widened: td.Distribution = make(**{name: widen(value) for name, value in parameters.items()}, validate_args=False)
    return widened
