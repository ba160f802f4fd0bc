"""KL divergences that train the prior and the posterior at different rates, as world models need."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd.function import FunctionCtx
from torch.distributions import Distribution, OneHotCategorical

from .objective import checked_number, kl_or_estimate


def kl_balance(posterior: Distribution, prior: Distribution, alpha: float = 0.8, z: Tensor | None = None) -> Tensor:
    r"""Compute the KL divergence, whose gradients train the prior faster than the posterior.

    .. math::
        \alpha \, \mathrm{KL}\bigl(\mathrm{sg}(q) \,\|\, p\bigr) + (1 - \alpha) \,
        \mathrm{KL}\bigl(q \,\|\, \mathrm{sg}(p)\bigr)

    with ``sg`` for a stopped gradient. The value is the plain KL. The gradient is ``alpha`` times the plain one in the
    prior's parameters and ``1 - alpha`` times in the posterior's, to the last bit. So it is for a *learned* prior: with
    a fixed one, balancing is only a smaller weight of the rate, a beta of ``1 - alpha``, that the value does not show.

    This is the balancing of world models. NVAE uses the same words for something else: it weights the *groups* of a
    hierarchy during the warm-up (Vahdat and Kautz, "NVAE", NeurIPS 2020, appendix A).

    Args:
        posterior: ``q(z|x)``, such as ``Normal`` of batch shape ``(B, k)``, ``OneHotCategorical`` of batch shape
            ``(B, groups)``, or an ``Independent`` of them.
        prior: ``p(z)``, of the same event shape and broadcastable to the posterior's batch shape.
        alpha: The prior's share of the gradient, from 0 to 1.
        z: A sample of the posterior, for a pair of distributions without a closed form. Its gradient is the
            posterior's too.

    Returns:
        Nats, in the batch shape of the posterior: for each dimension or group, and for each observation if these are
        wrapped in ``Independent``.

    Raises:
        ValueError: If ``alpha`` is out of range, the prior or the sample does not fit the posterior, a sample is needed
            and none was given, or a distribution has parameters that are not tensors.

    References:
        Hafner et al., "Mastering Atari with Discrete World Models" (DreamerV2), ICLR 2021, equation 2 with algorithm 2.

    Example::

        >>> from torch.distributions import Normal
        >>> mean, prior_mean = torch.tensor([2.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
        >>> kl = kl_balance(Normal(mean, 1.0), Normal(prior_mean, 1.0), alpha=0.75)
        >>> kl.backward()
        >>> kl.item(), prior_mean.grad.item(), mean.grad.item()
        (2.0, -1.5, 0.5)
    """
    alpha = checked_number("alpha", alpha)
    if alpha > 1:
        raise ValueError(f"`alpha` must be from 0 to 1, the prior's share of the gradient, got {alpha}.")
    return _kl_with_scaled_gradients(posterior, prior, 1 - alpha, alpha, z)


def world_model_kl(
    posterior: Distribution,
    prior: Distribution,
    dynamics: float = 1.0,
    representation: float = 0.1,
    free_nats: float = 1.0,
    z: Tensor | None = None,
) -> Tensor:
    r"""Compute the KL loss of a world model: a weight for each side, and a floor under the whole KL of an observation.

    .. math::
        \beta_\mathrm{dyn} \max\bigl(f, \mathrm{KL}(\mathrm{sg}(q) \,\|\, p)\bigr) +
        \beta_\mathrm{rep} \max\bigl(f, \mathrm{KL}(q \,\|\, \mathrm{sg}(p))\bigr)

    with ``sg`` for a stopped gradient. The *dynamics* loss trains the prior, the *representation* loss the posterior.
    Above the floor their gradients are the plain KL's times their weight, to the last bit, and below it 0. The mean
    is ``free_bits(kl_balance(...), f, per="whole", average="sample")`` at ``alpha = dynamics / (dynamics +
    representation)``, times the sum of the weights.

    Args:
        posterior: ``q(z|x)`` over the whole latent of an observation, batch shape ``(B, ...)``, such as
            ``Independent(OneHotCategorical(...), 1)``.
        prior: ``p(z)``, of the same event shape and broadcastable to the posterior's batch shape.
        dynamics: Weight of the dynamics loss.
        representation: Weight of the representation loss.
        free_nats: The floor, in nats. 0 switches it off.
        z: As in :func:`kl_balance`.

    Returns:
        Weighted nats, in the batch shape of the posterior: one number for each observation.

    Raises:
        ValueError: As :func:`kl_balance`; if a weight or the floor is negative or not finite; if the posterior is one
            of a dimension or a group, which must be wrapped in ``Independent``.

    References:
        Hafner et al., "Mastering Diverse Domains through World Models" (DreamerV3), arXiv:2301.04104, first version,
        2023, equations 4 and 5, with the weights 0.5 and 0.1; later versions and Nature 2025 have the defaults.
    """
    dynamics, representation = checked_number("dynamics", dynamics), checked_number("representation", representation)
    free_nats = checked_number("free_nats", free_nats)
    if not posterior.event_shape or isinstance(posterior, OneHotCategorical):
        raise ValueError(
            "The floor is under the whole KL of an observation, but `posterior` has a number for each dimension or "
            f"group, {type(posterior).__name__} of batch shape {tuple(posterior.batch_shape)}. Wrap both: "
            "`Independent(posterior, 1)`, `Independent(prior, 1)`."
        )
    kl = _kl_with_scaled_gradients(posterior, prior, representation, dynamics, z)
    floored = kl.clamp(min=free_nats) if free_nats else kl  # an estimate may be negative
    return floored + (dynamics + representation - 1) * floored.detach()


def _kl_with_scaled_gradients(
    posterior: Distribution, prior: Distribution, to_posterior: float, to_prior: float, z: Tensor | None
) -> Tensor:
    # One KL of scaled parameters has the gradients of two KLs with stopped ones, for half the work and unrounded.
    z = z if z is None else scale_gradient("z", z, to_posterior)
    scaled = scale_gradient("posterior", posterior, to_posterior), scale_gradient("prior", prior, to_prior)
    return kl_or_estimate(*scaled, z)


def scale_gradient(name: str, value: Any, factor: float) -> Any:
    """Return a tensor, or a distribution with all its tensors, as it is but with scaled gradients."""
    if isinstance(value, Tensor):
        return _ScaledGradient.apply(value, factor) if factor else value.detach()
    if isinstance(value, Distribution):
        scaled = copy(value)
        vars(scaled).update({key: scale_gradient(name, each, factor) for key, each in vars(value).items()})
        return scaled
    if value is None or isinstance(value, bool | int | float | Size):
        return value
    raise ValueError(
        f"The parameters of `{name}` must be tensors, so that their gradients can be scaled; it holds a "
        f"{type(value).__name__}. Write it as a distribution of tensors, or stop the gradients by hand."
    )


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return values.view_as(values)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None  # type: ignore[attr-defined]
