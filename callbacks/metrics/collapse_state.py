"""The state of a posterior during training: collapsed, healthy, or something in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..schedules import at_least, check_number
from .active_units import ACTIVE, is_active

MIN_WIDTH = 1e-3
"""Ratio of the posteriors' variance to that of q(z) below which an encoder is deterministic in all but name."""
MAX_MARGINAL_KL = 0.5
"""Nats per active dimension up to which q(z) counts as near the prior."""

# Parts of a remedy that hold with or without a floor under the rate, or while something moves the weight.
_RAISE_SLOWLY = "Let `KLAnnealing` hold beta at 0 until the latents are used and then raise it slowly (or in cycles)"
_PUT_A_FLOOR = "put a floor of a few nats under the whole rate with `FreeBits`, or 0.1 to 0.5 under each dimension"


def _remedy(name: str, anneals: bool | None, floors: bool | None) -> str:
    if name == "collapsed":
        slowly = "Keep beta at 0 for longer" if anneals else _RAISE_SLOWLY
        floor = "raise the floor under the rate" if floors else _PUT_A_FLOOR
        return (
            f"The rate is penalised too strongly, or the decoder does not need the latents. {slowly}, "
            f"{floor}, lower beta, or weaken the decoder. With a Gaussian likelihood, learn its variance: a variance "
            "fixed too large collapses the model, and no schedule cures that."
        )
    if name == "offset":
        if floors is False:
            return (
                "Dimensions that hold no information keep a shift or a width that is the same for every x. Train "
                "longer, raise beta so that this KL is given up, or use fewer latent dimensions."
            )
        instead = "" if anneals else "use `KLAnnealing` instead, "
        return (
            "Free bits guarantee KL, not information: a dimension reaches its floor by a shift or a width that is the "
            "same for every x. Lower or drop the floor of `FreeBits`, put it under the whole KL instead of each "
            f"dimension, {instead}or use fewer latent dimensions: there are then fewer to hold up."
        )
    if name == "uninformative":
        lower = "" if floors is False else "lower the floor of `FreeBits`, "
        return (
            "The rate moves all posteriors away from the prior together and does not distinguish observations. To fix "
            f"it, {lower}lower beta or learn the decoder's variance so that information pays, or give the prior that "
            "shape; `latent/marginal_kl` is the wasted part of the rate."
        )
    if name == "deterministic":
        return (
            "The latents are those of an autoencoder: samples of the prior don't decode to data. To generate, raise "
            "the weight of the KL until their scale nears the prior's, or train a second model on the latents, as "
            "latent diffusion does: normalise them with the logged shift and scale, `(z - shift) / scale`."
        )
    if name == "pruned":
        return "Nothing: the data fill fewer dimensions than there are. As many as are active would be enough."
    return "Nothing."


@dataclass(frozen=True)
class CollapseState:
    """The state of a posterior during training, the reason, and a remedy.

    It needs only the encoder's output, which is available after every validation pass. The assessment that ``test``
    prints also needs the decoder, and judges if a trained model is over-regularised or under-regularised.

    Attributes:
        name: ``"collapsed"``, ``"offset"``, ``"uninformative"`` or ``"deterministic"``, which are alarms; ``"pruned"``
            or ``"healthy"``.
        reason: The measurements, in words and numbers.
        anneals: Whether a callback moves the weight of the KL; ``None`` if not known.
        floors: Whether the rate has a floor; ``None`` if not known.
    """

    name: Literal["collapsed", "offset", "uninformative", "deterministic", "pruned", "healthy"]
    reason: str
    anneals: bool | None = None
    floors: bool | None = None

    @property
    def alarm(self) -> bool:
        """Return whether something is wrong."""
        return self.name not in ("pruned", "healthy")

    @property
    def remedy(self) -> str:
        """The remedy to try next: nothing that the run has already, or can't change."""
        return _remedy(self.name, self.anneals, self.floors)


def collapse_state(
    rate_per_dimension: Tensor | None,
    variance_of_means: Tensor,
    mutual_information: float | None,
    observations: int,
    min_rate: float = 0.5,
    threshold: float = ACTIVE,
    information_rate: float | None = None,
    width: Tensor | None = None,
    marginal_kl_per_unit: float | None = None,
    min_width: float = MIN_WIDTH,
    max_marginal_kl: float = MAX_MARGINAL_KL,
) -> CollapseState:
    """Distinguish a collapsed posterior from one that only has dimensions to spare.

    The first rule that holds decides:

    - *collapsed*: no dimension is active, or the active ones' rate is below ``min_rate``;
    - *offset*: the inactive dimensions carry more than 10 % of the rate, which is KL spent without information;
    - *uninformative*: the rate R is below 0.7 log M and the mutual information below R / 2. For a higher rate the
      estimate's cap, log M, makes the comparison meaningless;
    - *deterministic*: the posteriors have nearly no width beside q(z), and q(z) is far from the prior;
    - *pruned*: some dimensions are active, but not all;
    - *healthy*: all dimensions are active.

    A dimension is active if the variance of its posterior mean over the data exceeds ``threshold`` (Burda et al.,
    "Importance Weighted Autoencoders", 2015).

    Args:
        rate_per_dimension: Mean KL divergence of posterior and prior of each dimension, in nats, of shape ``(k,)``;
            of shape ``(1,)`` if it is known as a whole, which leaves out *offset*; ``None`` if it is not known, which
            leaves out every rule that depends on it.
        variance_of_means: Variance over the data of each dimension's posterior mean, of shape ``(k,)``.
        mutual_information: Mutual information of data and latents in nats; ``None`` if it was not estimated.
        observations: Number of observations M that this estimate comes from.
        min_rate: Minimum rate in nats of the active dimensions.
        threshold: Variance that an active dimension exceeds.
        information_rate: The rate of the dimensions that the mutual information comes from, if these are not all.
        width: Ratio of the posteriors' variance to that of q(z) in each dimension, of shape ``(k,)``, if known.
        marginal_kl_per_unit: KL(q(z) || p(z)) in nats per active dimension, if known.
        min_width: Median width of the active dimensions below which the posteriors count as deterministic...
        max_marginal_kl: ...if the marginal KL per active dimension is above this.

    Returns:
        The state, with the reason and a remedy.

    Raises:
        ValueError: If the variances are not finite or have another shape, the rates do not match them, or a number is
            negative.

    Example::

        >>> import torch
        >>> collapse_state(torch.tensor([2.0, 0.0]), torch.tensor([0.9, 0.0]), 1.9, observations=2048).name
        'pruned'
    """
    numbers = {
        "observations": observations, "min_rate": min_rate, "min_width": min_width, "max_marginal_kl": max_marginal_kl
    }  # fmt: skip
    for name, value in numbers.items():
        check_number(name, value, "a finite number of at least 0", at_least(0))
    if variance_of_means.ndim != 1 or not variance_of_means.numel() or not variance_of_means.isfinite().all():
        raise ValueError(f"`variance_of_means` must be k finite numbers, of shape (k,), got {variance_of_means}.")
    if rate_per_dimension is not None and rate_per_dimension.shape not in (variance_of_means.shape, (1,)):
        raise ValueError(
            "`rate_per_dimension` must have a rate for each variance, shape "
            f"{tuple(variance_of_means.shape)}, or be one for all, got {tuple(rate_per_dimension.shape)}."
        )
    if width is not None and width.shape != variance_of_means.shape:
        raise ValueError(
            f"`width` must have a ratio for each variance, shape {tuple(variance_of_means.shape)}, got "
            f"{tuple(width.shape)}."
        )
    active = is_active(variance_of_means, threshold)
    number, total = int(active.sum()), active.numel()
    units = (
        f"{number} of {total} latent dimensions are active (variance of the posterior mean above {threshold:g}; "
        f"the largest is {float(variance_of_means.max()):.3g})"
    )
    spread: Literal["pruned", "healthy"] = "healthy" if number == total else "pruned"
    if rate_per_dimension is None:
        return CollapseState(spread if number else "collapsed", units + ".")

    rate, is_joint = float(rate_per_dimension.sum()), len(rate_per_dimension) < total
    inactive_rate = 0.0 if is_joint else float(rate_per_dimension[~active].sum())
    of_inactive = "" if is_joint else f"of the rate of {rate:.3g} nats inactive ones carry {inactive_rate:.3g}"
    rates = f"{units}, and {of_inactive or f'the rate is {rate:.3g} nats'}"
    if number == 0 or rate - inactive_rate < min_rate:
        small = ""
        enough = min(0.5 * rate, 0.9 * math.log(max(observations, 1)))
        if mutual_information is not None and mutual_information > max(min_rate, enough):
            small = (
                f" Yet the mutual information is {mutual_information:.3g} nats: the latents distinguish observations, "
                "at a scale below the threshold. If that is intended, lower `threshold`."
            )
        return CollapseState("collapsed", f"{rates}; active ones need {min_rate:g}.{small}")
    if inactive_rate > 0.1 * rate:
        return CollapseState("offset", f"{rates}, more than 10 %.")
    deterministic = ""
    if width is not None and marginal_kl_per_unit is not None and marginal_kl_per_unit > max_marginal_kl:
        median = float(width[active].median())
        if median < min_width:
            deterministic = (
                f" The posteriors have {median:.2g} of the variance of q(z), in the median of the active dimensions, "
                f"and q(z) is {marginal_kl_per_unit:.3g} nats per active dimension away from the prior (limits "
                f"{min_width:g} and {max_marginal_kl:g})."
            )
    if mutual_information is None:
        return CollapseState("deterministic" if deterministic else spread, f"{rates}.{deterministic}")

    information = f"{rates}. The mutual information of {observations} observations is {mutual_information:.3g} nats"
    compared = rate if information_rate is None else information_rate
    if compared < 0.7 * math.log(max(observations, 1)) and mutual_information < 0.5 * compared:
        return CollapseState("uninformative", f"{information}, less than half the rate.")
    if deterministic:
        return CollapseState("deterministic", f"{information}.{deterministic}")
    return CollapseState(spread, f"{information}.")
