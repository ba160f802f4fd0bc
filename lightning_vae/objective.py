"""The terms of the ELBO and the loss built from them, as pure functions of tensors and distributions."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    kl,
    kl_divergence,
)

from .checks import check_number

FreeBitsPer = Literal["dimension", "whole"] | int
FreeBitsAverage = Literal["batch", "sample"]
_LARGEST = torch.finfo(torch.float32).max
JOINT_GAUSSIANS = (MultivariateNormal, LowRankMultivariateNormal)


class ELBOTerms(NamedTuple):
    """The unweighted terms of the ELBO, per observation and in nats.

    Attributes:
        distortion: ``-log p(x|z)`` of one posterior sample, shape ``(B,)``.
        rate_per_dimension: ``KL(q(z_j|x) || p(z_j))``, shape ``(B, k)``.
    """

    distortion: Tensor
    rate_per_dimension: Tensor

    @property
    def rate(self) -> Tensor:
        """``KL(q(z|x) || p(z))`` in nats, shape ``(B,)``."""
        return self.rate_per_dimension.sum(-1)

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound in nats, shape ``(B,)``."""
        return elbo(self.distortion, self.rate)


def elbo(distortion: Tensor, rate: Tensor) -> Tensor:
    """Compute the evidence lower bound ``-(distortion + rate)``: unweighted, higher is better.

    Args:
        distortion: ``-E_q log p(x|z)`` in nats, any shape.
        rate: ``KL(q(z|x) || p(z))`` in nats, same shape.

    Raises:
        ValueError: If the shapes differ.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, equation 3.
    """
    _check_same_shape(distortion=distortion, rate=rate)
    return -(distortion + rate)


def kl_per_dimension(posterior: Distribution, prior: Distribution, z: Tensor | None = None) -> Tensor:
    """Compute the rate of each latent dimension, ``KL(q(z_j|x) || p(z_j))``.

    Args:
        posterior: ``q(z|x)``, factorised: batch shape ``(B, k)`` and no event dimension.
        prior: ``p(z)``, factorised and broadcastable to it: batch shape ``(k,)`` or ``(B, k)``.
        z: A sample of the posterior, shape ``(B, k)``. It is used if this pair of distributions has no closed form: the
            rate is then the estimate ``log q(z_j|x) - log p(z_j)`` at that sample, which may be negative.

    Returns:
        Nats, shape ``(B, k)``.

    Raises:
        ValueError: If the posterior or the prior has event dimensions, the prior does not broadcast to the posterior's
            shape, the sample has another shape, or a sample is needed and none was given.
    """
    for name, each in (("posterior", posterior), ("prior", prior)):
        if each.event_shape:
            raise ValueError(
                f"`{name}` must have one batch entry per latent dimension and no event dimension, got event shape "
                f"{tuple(each.event_shape)}; unwrap `Independent` with `.base_dist`. A joint distribution has no rate "
                "per dimension."
            )
    return kl_or_estimate(posterior, prior, z)


def rate_parts(posterior: Distribution, prior: Distribution, z: Tensor | None = None) -> Tensor:
    r"""Compute the rate of each observation, in as many parts as the posterior and the prior have in common.

    .. math::
        \mathrm{KL}\bigl(q(z|x) \,\|\, p(z)\bigr) \quad \text{or} \quad \log q(z|x) - \log p(z), \; z \sim q(z|x)

    in closed form where there is one, and otherwise estimated at the sample, where it may be negative. Two Gaussians
    have a closed form, whichever of them has a full covariance. A mixture has none.

    Args:
        posterior: ``q(z|x)``: batch shape ``(B, k)``; ``(B, G)`` with event shape ``(C,)`` for groups of categories; or
            ``(B,)`` with event shape ``(k,)`` if it is joint. ``Independent`` counts as the distribution in it.
        prior: ``p(z)``, broadcastable to it: factorised, or joint with batch shape ``()`` or ``(B,)`` and event shape
            ``(k,)``.
        z: A sample of the posterior, for a pair without a closed form.

    Returns:
        Nats: shape ``(B, k)`` or ``(B, G)`` where both factorise alike, ``(B, 1)`` where one of them is joint.

    Raises:
        ValueError: If the prior or the sample does not fit the posterior, or a sample is needed and none was given.

    Example::

        >>> posterior = Normal(torch.zeros(3, 2), torch.ones(3, 2))
        >>> rate_parts(posterior, Normal(torch.zeros(2), 1.0)).shape
        torch.Size([3, 2])
        >>> rate_parts(posterior, MultivariateNormal(torch.zeros(2), torch.eye(2))).shape
        torch.Size([3, 1])
    """
    if posterior.event_shape or prior.event_shape:
        posterior, prior = _with_equal_events(posterior, prior)
    rates = kl_or_estimate(posterior, prior, z)
    return rates if rates.ndim == 2 else rates[:, None]


def _with_equal_events(posterior: Distribution, prior: Distribution) -> tuple[Distribution, Distribution]:
    """Return both as distributions over whole vectors if one of them is: their rate is then that of the vector."""
    posterior, prior = _unwrapped(posterior), _unwrapped(prior)
    if isinstance(posterior, OneHotCategorical) != isinstance(prior, OneHotCategorical):
        raise ValueError(
            f"`posterior` and `prior` must both be over categories or neither, got {type(posterior).__name__} and "
            f"{type(prior).__name__}."
        )
    own, other = len(posterior.event_shape), len(prior.event_shape)
    if own < other < own + len(posterior.batch_shape):  # the observations stay an axis of the batch
        posterior = Independent(posterior, other - own, validate_args=False)
    elif other < own and len(posterior.batch_shape) == 1:
        shape = posterior.batch_shape + posterior.event_shape
        if broadcasts_to(prior.batch_shape, shape):  # refused otherwise
            prior = prior.expand(prior.batch_shape[:-1] + posterior.event_shape)
            prior = Independent(prior, 1, validate_args=False)
    if isinstance(posterior, JOINT_GAUSSIANS) or isinstance(prior, JOINT_GAUSSIANS):
        posterior, prior = _as_whole(posterior), _as_whole(prior)
    return posterior, prior


def _unwrapped(distribution: Distribution) -> Distribution:
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def _as_whole(distribution: Distribution) -> Distribution:
    """Return independent Gaussians over a vector as one Gaussian."""
    base = _unwrapped(distribution)
    if isinstance(distribution, Independent) and isinstance(base, Normal):
        return MultivariateNormal(base.loc, scale_tril=base.scale.diag_embed(), validate_args=False)
    return distribution


def kl_or_estimate(posterior: Distribution, prior: Distribution, z: Tensor | None = None) -> Tensor:
    """Compute ``KL(q || p)`` in closed form, or without one its estimate ``log q(z|x) - log p(z)`` at a sample.

    Args:
        posterior: ``q(z|x)``, any batch and event shape.
        prior: ``p(z)``, of the same event shape and broadcastable to the posterior's batch shape.
        z: A sample of the posterior.

    Returns:
        Nats, in the batch shape of the posterior.

    Raises:
        ValueError: If the prior or the sample does not fit the posterior, or a sample is needed and none was given.
    """
    if not broadcasts_to(prior.batch_shape, posterior.batch_shape):
        raise ValueError(
            f"`prior` must broadcast to the posterior's batch shape {tuple(posterior.batch_shape)}, got "
            f"{tuple(prior.batch_shape)}."
        )
    if prior.event_shape != posterior.event_shape:
        raise ValueError(
            f"`prior` must have the posterior's event shape {tuple(posterior.event_shape)}, got "
            f"{tuple(prior.event_shape)}: as many dimensions or classes, and both in `Independent` or neither."
        )
    shape = posterior.batch_shape + posterior.event_shape
    if z is not None and z.shape != shape:
        raise ValueError(f"`z` must be one sample of the posterior, of shape {tuple(shape)}, got {tuple(z.shape)}.")
    if isinstance(posterior, JOINT_GAUSSIANS) and isinstance(prior, JOINT_GAUSSIANS):
        return _kl_of_gaussians(posterior, prior)
    if torch.compiler.is_compiling():
        _look_up(type(posterior), type(prior))
    try:
        return kl_divergence(posterior, prior)
    except NotImplementedError:
        if z is None:
            raise ValueError(
                f"KL({type(posterior).__name__} || {type(prior).__name__}) has no known closed form; "
                "pass `z`, a sample of the posterior, for an estimate."
            ) from None
        return posterior.log_prob(z) - prior.log_prob(z)


def _kl_of_gaussians(posterior: Distribution, prior: Distribution) -> Tensor:
    """Compute the KL divergence of Gaussians with full covariances; torch's own formula can't be compiled."""
    own, other = posterior.scale_tril, prior.scale_tril  # type: ignore[attr-defined]
    shift = (posterior.mean - prior.mean)[..., None]
    squares = torch.linalg.solve_triangular(other, torch.cat([own, shift], dim=-1), upper=False).square().sum((-2, -1))
    log_ratio = other.diagonal(dim1=-2, dim2=-1).log().sum(-1) - own.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    rate: Tensor = 0.5 * (squares - shift.shape[-2]) + log_ratio
    return rate


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _look_up(posterior: type[Distribution], prior: type[Distribution]) -> None:
    """Fill `kl_divergence`'s table of formulas: a compiled graph can use an entry, but can't search for one."""
    kl._KL_MEMOIZE[posterior, prior] = kl._dispatch_kl(posterior, prior)


def free_bits(
    kl_per_dimension: Tensor,
    threshold: Tensor | float,
    per: FreeBitsPer = "dimension",
    average: FreeBitsAverage = "batch",
) -> Tensor:
    r"""Floor the rate: each dimension costs at least ``threshold`` nats, so shrinking it further gains nothing.

    .. math::
        \sum_{j=1}^{G} \max\bigl(\lambda,\; \tfrac1B \sum_n \mathrm{KL}_{nj}\bigr)

    is Kingma's form and the default. The floor acts on the raw rate, so weight the result:
    ``loss = reconstruction + beta * free_bits(kl_per_dimension, 0.5)``. The floor guarantees a rate, not information: a
    posterior offset that is the same for every observation satisfies it too.

    Args:
        kl_per_dimension: Raw rates in nats, shape ``(B, k)``.
        threshold: The floor in nats, per dimension, per group or in total, depending on ``per``: one number, or a
            tensor of one or ``G``. 0 switches it off. The values of a tensor are not checked.
        per: ``"dimension"``; ``"whole"``, one floor under the total rate; or an int, the number of consecutive
            dimensions that share one floor.
        average: ``"batch"`` floors the mean over the batch (Kingma et al. 2016); ``"sample"`` floors each observation's
            rate, which never gives a smaller result (Jensen).

    Returns:
        The floored rate, averaged over the batch, in nats; a scalar.

    Raises:
        ValueError: On rates or a floor of another shape, a floor that is negative or not finite, an unknown ``per`` or
            ``average``, or a group size that does not divide ``k``.

    References:
        Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016,
        appendix C.8.

    Example::

        >>> kl = torch.tensor([[0.1, 2.0], [0.3, 4.0]])
        >>> free_bits(kl, 0.5)
        tensor(3.5000)
    """
    if average not in ("batch", "sample"):
        raise ValueError(f"`average` must be 'batch' or 'sample', got {average!r}.")
    rates = group_rates(kl_per_dimension, per)
    if average == "batch":
        rates = rates.mean(0)
    if isinstance(threshold, Tensor):
        if not broadcasts_to(threshold.shape, rates.shape[-1:]):
            raise ValueError(
                f"`threshold` must be one number, or a tensor of {rates.shape[-1]}, got shape {tuple(threshold.shape)}."
            )
        threshold = threshold.to(rates)
    else:  # fill the number in on the device: copying it there would synchronise
        threshold = rates.new_full((), checked_number("threshold", threshold))
    # At 0 the floor is off, and not max(0, rate): a Monte Carlo estimate of the rate may be negative.
    floor = torch.where(threshold > 0, threshold, -torch.inf)
    floored = rates.clamp(min=floor).sum(-1)
    return floored.mean() if average == "sample" else floored


def group_rates(kl_per_dimension: Tensor, per: FreeBitsPer = "dimension") -> Tensor:
    """Sum the rates of the dimensions that share one floor.

    Args:
        kl_per_dimension: Rates in nats, shape ``(B, k)``.
        per: As in :func:`free_bits`.

    Returns:
        Nats, shape ``(B, G)``.

    Raises:
        ValueError: On rates of another shape, an unknown ``per``, or a group size that does not divide ``k``.
    """
    if kl_per_dimension.ndim != 2 or not kl_per_dimension.is_floating_point():
        raise ValueError(
            "`kl_per_dimension` must hold a rate for each observation and latent dimension, floating-point numbers of "
            f"shape (B, k), got {kl_per_dimension.dtype} of shape {tuple(kl_per_dimension.shape)}. Do not sum or "
            "average before; `flatten(1)` spatial latents, and give a mean over the batch as one row, `mean[None]`."
        )
    if per == "dimension":
        return kl_per_dimension
    if per == "whole":
        return kl_per_dimension.sum(-1, keepdim=True)
    allowed = "'dimension', 'whole' or a group size of at least 1"
    check_number("per", per, allowed, lambda size: isinstance(size, int) and size >= 1)
    if kl_per_dimension.shape[-1] % per:
        raise ValueError(
            f"`per` as a group size must divide the number of latent dimensions, "
            f"got {per} for {kl_per_dimension.shape[-1]} dimensions."
        )
    grouped: Tensor = kl_per_dimension.unflatten(-1, (-1, per)).sum(-1)
    return grouped


def weighted_loss(distortion: Tensor, floored_rate: Tensor, beta: Tensor | float) -> Tensor:
    """Compute the training loss, ``distortion + beta * floored_rate``, in nats per observation.

    Args:
        distortion: Mean over the batch of ``-log p(x|z)``, a scalar.
        floored_rate: Mean floored rate, from :func:`free_bits`; without free bits, the mean rate. A scalar.
        beta: Weight of the rate; 1 gives the negative ELBO. A tensor holds one number, which is not checked.

    Raises:
        ValueError: If the shapes differ, or the weight is negative or not finite.

    References:
        Higgins et al., "beta-VAE", ICLR 2017, equation 4; Alemi et al., "Fixing a Broken ELBO", ICML 2018, for the
        rate and distortion.
    """
    _check_same_shape(distortion=distortion, floored_rate=floored_rate)
    if not isinstance(beta, Tensor):
        beta = checked_number("beta", beta)
    else:
        check_single("beta", beta)
    return distortion + beta * floored_rate


def limited_rate_loss(distortion: Tensor, rate: Tensor, limit: float, price: float) -> Tensor:
    r"""Compute the loss that selects models under a rate limit: the distortion, plus a price on rate above the limit.

    .. math::
        D + \text{price} \cdot \max(0, R - \text{limit})

    The smallest distortion at a given rate is a convex function of the rate, with slope minus the ``beta`` that leads
    to that rate. If the price is at least the ``beta`` at the limit, the model with the smallest loss is therefore the
    one with the smallest distortion within the limit: exceeding the limit never pays.

    Args:
        distortion: Mean of ``-log p(x|z)`` in nats per observation, a scalar.
        rate: Mean rate in nats per observation, a scalar.
        limit: Nats.
        price: Nats of loss per nat of rate.

    Raises:
        ValueError: If the shapes differ, or the limit or the price is negative or not finite.

    References:
        Alemi et al., "Fixing a Broken ELBO", ICML 2018, for the slope.
    """
    _check_same_shape(distortion=distortion, rate=rate)
    limit, price = checked_number("limit", limit), checked_number("price", price)
    return distortion + price * (rate - limit).clamp(min=0.0)


def constrained_rate_loss(rate: Tensor, error: Tensor, limit: float, price: float) -> Tensor:
    r"""Compute the loss that selects models under a constraint on an error: the rate, plus a price on violations.

    .. math::
        R + \text{price} \cdot \max(0, E - \text{limit})

    The smallest rate at a given error is a convex function of the error. If the price is at least minus its slope at
    the limit, which is the multiplier of the constraint, the model with the smallest loss is therefore the one with the
    smallest rate within the limit: a violation never pays. For the distortion the multiplier is ``1 / beta``.

    Args:
        rate: Mean rate in nats per observation, a scalar.
        error: Mean error of an observation, a scalar.
        limit: In units of the error.
        price: Nats of loss per unit of the error.

    Raises:
        ValueError: If the shapes differ, the limit is not finite, or the price is negative or not finite.

    References:
        Rezende and Viola, "Taming VAEs", 2018, equation 3, for the multiplier.
    """
    _check_same_shape(rate=rate, error=error)
    check_number("limit", limit, "a finite number", math.isfinite)
    return rate + checked_number("price", price) * (error - limit).clamp(min=0.0)


def constrained_error(
    kind: str,
    distortion: Tensor,
    likelihood: Distribution,
    x: Tensor,
    mask: Tensor | None = None,
    unit: Tensor | float = 1.0,
) -> Tensor:
    """Return the error of each observation that a constraint limits, without its graph, shape ``(B,)``.

    Args:
        kind: ``"distortion"``, or ``"squared_error"`` for that of the mean of p(x|z), summed over the event.
        distortion: ``-log p(x|z)`` in nats, shape ``(B,)``.
        likelihood: ``p(x|z)`` at the sample of the posterior.
        x: The observations, shape ``(B, *shape)``.
        mask: True where a number of ``x`` is there; ``None`` if all are.
        unit: The unit of the squared error: a number, or one for each number of an observation, of shape ``shape``.

    Raises:
        ValueError: If the mean of p(x|z) has another shape than the data.
    """
    if kind == "distortion":
        return distortion.detach()
    with torch.no_grad():
        mean = likelihood.mean
        if mean.shape != x.shape:
            raise ValueError(
                f"The squared error needs a mean of p(x|z) in the shape of the data, {tuple(x.shape)}, got "
                f"{tuple(mean.shape)}. Constrain the distortion."
            )
        errors = ((mean - x) / unit).square()
        return (errors if mask is None else errors * mask).flatten(1).sum(1)


def capacity_loss(distortion: Tensor, rate: Tensor, capacity: Tensor | float, weight: Tensor | float) -> Tensor:
    r"""Compute a loss that holds the rate at a capacity: the distortion, plus a price on each nat above or below it.

    .. math::
        D + \gamma \, |R - C|

    Its minimum has the rate C if the weight is at least the ``beta`` that leads to this rate, the slope of the smallest
    distortion at a given rate; with a smaller weight it is that of ``beta`` = weight, and the rate is above C. With a
    weight that is much too large the rate's gradient leaves the optimizer little for the distortion.

    Args:
        distortion: Mean of ``-log p(x|z)`` in nats per observation, a scalar.
        rate: Mean rate in nats per observation, a scalar.
        capacity: Nats. A tensor holds one number, which is not checked.
        weight: Nats of loss per nat of rate. A tensor holds one number, which is not checked.

    Raises:
        ValueError: If the shapes differ, or the capacity or the weight is negative or not finite.

    References:
        Burgess et al., "Understanding disentangling in beta-VAE", 2018, equation 8.
    """
    _check_same_shape(distortion=distortion, rate=rate)
    for name, value in (("capacity", capacity), ("weight", weight)):
        if isinstance(value, Tensor):
            check_single(name, value)
        else:
            checked_number(name, value)
    return distortion + weight * (rate - capacity).abs()


def checked_capacity_weight(weight: float | None, capacity: float | None, **replaced: Any) -> float | None:
    """Return the weight of :func:`capacity_loss` that a model is configured with, ``None`` for another loss.

    Args:
        weight: The weight.
        capacity: The capacity; ``None`` if it is not given.
        **replaced: The options of the loss that it replaces; ``None`` if they are not given.

    Raises:
        ValueError: If a number is out of range, or they do not go together.
    """
    if capacity is not None:
        checked_number("capacity", capacity)
    if weight is None:
        if capacity is not None:
            raise ValueError(
                f"`capacity` must come with `capacity_weight`, the price of each nat away from it, got {capacity:g}."
            )
        return None
    check_number("capacity_weight", weight, "a finite number above 0, or None", lambda each: 0 < each <= _LARGEST)
    for name, value in replaced.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out (null in a config, if it is a weight or a floor) with a `capacity_weight`, "
                f"whose term takes the place of the weighted rate and its floor in the loss, got {value!r}."
            )
    return float(weight)


def checked_number(name: str, value: Any) -> float:
    """Return a weight, a floor or a limit of the loss as a float.

    Args:
        name: Its name, for the error.
        value: The number.

    Raises:
        ValueError: If it is no number, negative or not finite.
    """
    check_number(name, value, "a finite number of at least 0", lambda number: 0 <= float(number) <= _LARGEST)
    return float(value)


def check_single(name: str, value: Tensor) -> None:
    """Check that a tensor holds one number, which is not read.

    Raises:
        ValueError: If it has an axis.
    """
    if value.ndim:
        raise ValueError(f"`{name}` must be one number, got a tensor of shape {tuple(value.shape)}.")


def _check_same_shape(**operands: Tensor) -> None:
    (first, one), (second, other) = operands.items()
    if one.shape != other.shape:
        raise ValueError(
            f"`{first}` and `{second}` must have the same shape, got {tuple(one.shape)} and {tuple(other.shape)}."
        )


def broadcasts_to(shape: Size, target: Size) -> bool:
    """Return whether a shape broadcasts to the target and no further."""
    sizes = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in sizes)
