"""Assess a trained VAE: over-regularised, balanced or under-regularised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .record import LEAST_COMPARED, Assessment, Generation, Latents, Terms, Verdict

_SIDES: dict[int, Verdict] = {1: "over-regularised", 0: "balanced", -1: "under-regularised"}

MIN_INFORMATION = 0.5
"""Nats of rate on active dimensions, and of mutual information, below which the latents are not used."""
BETA_BAND = 1.5
"""Factor by which the implied beta may differ from the ELBO's."""
MIN_USE = 0.5
"""Share of ``beta * mutual information`` that shuffling the latents must at least cost."""
MAX_MARGINAL_KL = 0.25
"""Share of the rate that the marginal KL may account for."""
MIN_MARGINAL_KL = 1.0
"""Nats of marginal KL that are not a symptom at any rate."""
MAX_DISTANCE = 1.25
"""Distance of prior samples from the data, relative to that of reconstructions."""


FLOOR = "the floor of `FreeBits`"
TARGET = "the target of the rate"
LIMIT = "the limit of the error"


def assess(
    beta: float, terms: Terms, latents: Latents, generation: Generation, holds: Sequence[str] = ()
) -> Assessment:
    r"""Judge if the latents carry too little information, too much, or about as much as the ELBO asks for.

    The first rule that holds decides. Each uses the bound of an estimate that can't raise a false alarm:

    1. *collapsed*, over: the active dimensions' rate or the mutual information is below 0.5 nats;
    2. *unread*, over: shuffling the latents costs less distortion than ``0.5 * beta * mutual information``. At an
       optimum it costs at least ``beta * mutual information``: otherwise drawing from q(z) regardless of x would have
       a smaller loss;
    3. *width*, over above 1.5, under below 1/1.5, by more than twice its standard error: the implied beta over the
       calibration. A likelihood whose variance isn't the squared error weights the distortion wrongly, and the
       calibration corrects that: a variance ten times too large is equivalent to beta 10. A negative implied beta, if
       beta isn't 0, only means that training is far from an optimum;
    4. *mismatched*, under: the marginal KL exceeds 1 nat and a quarter of the rate, or decoded prior samples lie more
       than 1.25 times as far from the data as reconstructions.

    Otherwise the model is balanced. Symptoms of the opposite side are listed, but don't count. NaN is not a symptom.

    Args:
        beta: Weight of the rate that the model was trained with, or that a constraint amounts to.
        terms: The terms of the ELBO.
        latents: The latent space.
        generation: Decodings of prior samples and shuffled latents.
        holds: The constraints that hold the rate: ``FLOOR``, ``TARGET`` and ``LIMIT``. The advice names no others, and
            where the last two find beta it does not say to change it.
    """
    measured = _Measured(beta, terms, latents, generation, tuple(holds))
    found = _collapsed(measured) or _unread(measured) or _width(measured)
    mismatched = _mismatched(measured)
    if found is None and mismatched:
        found = -1, [], _bring_together(measured)
    if found is None:
        return Assessment("balanced", _all_well(measured), "Nothing to change.")
    side, symptoms, advice = found
    return Assessment(_SIDES[side], (*symptoms, *mismatched), advice)


def unassessed(observations: int) -> Assessment:
    """Return the reason why so few observations get no verdict."""
    reason = (
        f"too few observations with distinct indices to compare them with one another, {observations}: mutual "
        "information, marginal KL, total correlation, label probes and distances of samples are not measured"
    )
    return Assessment(None, (reason,), f"Evaluate at least {LEAST_COMPARED} observations.")


def without_variance() -> Assessment:
    """Return the reason why data that are all equal get no verdict."""
    reason = "the data have no variance: all observations are equal, so there is nothing to encode"
    return Assessment(None, (reason,), "Check how the data are read and scaled.")


@dataclass(frozen=True)
class _Measured:
    """The measurements behind an assessment."""

    beta: float
    terms: Terms
    latents: Latents
    generation: Generation
    holds: tuple[str, ...]

    @property
    def held_by(self) -> str:
        """The constraints that hold the rate up, as text; empty if there are none."""
        return " and ".join(each for each in self.holds if each != LIMIT)

    def moved_constraint(self, raises_rate: bool) -> str:
        """Say how to move the constraint that finds beta, to raise or to lower the rate; empty if there is none."""
        if TARGET in self.holds:
            return f"{'raise' if raises_rate else 'lower'} {TARGET}"
        return f"{'lower' if raises_rate else 'raise'} {LIMIT}" if LIMIT in self.holds else ""

    @property
    def fair_beta(self) -> float:
        """The beta of the ELBO under a likelihood whose variance is the mean squared error."""
        return 1.0 if math.isnan(self.terms.calibration) else self.terms.calibration

    @property
    def relative_beta(self) -> float:
        """The implied beta, relative to the ELBO's."""
        return self.terms.implied_beta / self.fair_beta

    @property
    def margin(self) -> float:
        """The margin of error of the relative beta: twice its standard error."""
        return 2 * self.terms.implied_beta_error / self.fair_beta

    @property
    def active(self) -> str:
        """The active units, in words."""
        return f"{self.latents.active_units} of {len(self.latents.variance_per_dimension)} dimensions are active"

    @property
    def share(self) -> str:
        """The part of the rate that the active units have, in words."""
        rate, latents = self.terms.rate, self.latents
        if len(latents.rate_per_dimension) == len(latents.variance_per_dimension):
            return f"{latents.active_rate:.3g} of the rate's {rate:.3g} nats"
        return f"a rate of {rate:.3g} nats"


_Found = tuple[int, list[str], str]  # side, symptoms, advice


def _let_through(measured: _Measured) -> str:
    floor = f"raise {FLOOR}" if FLOOR in measured.holds else "put a floor under the rate with `FreeBits`"
    change = (
        measured.moved_constraint(True) or f"lower beta or raise it more slowly from 0 with `KLAnnealing`, {floor},"
    )
    return (
        f"Let more information through: {change} or weaken the decoder. With a Gaussian likelihood, learn its variance "
        "at beta 1: a variance fixed too large collapses the model, and no schedule cures that."
    )


def _make_it_read(measured: _Measured) -> str:
    drop = f"drop {measured.held_by}, " if measured.held_by else ""
    return (
        f"The decoder ignores latents that are paid for: {drop}weaken the decoder, or train with beta at 0 first until "
        "it reads them."
    )


def _bring_together(measured: _Measured) -> str:
    lower = f", or lower {FLOOR}" if FLOOR in measured.holds else ""
    change = measured.moved_constraint(False) or f"raise beta or hold it at its target for longer{lower}"
    return (
        f"The latents are not where the prior is: {change}; with an "
        "implied beta near 1, use a richer prior rather than more weight."
    )


def _collapsed(measured: _Measured) -> _Found | None:
    rate, information = measured.terms.rate, measured.latents.mutual_information_upper
    if measured.latents.active_rate < MIN_INFORMATION:
        symptom = f"latent space: {measured.active}, with {measured.share}; below {MIN_INFORMATION:g} they are not used"
    elif information < MIN_INFORMATION:
        symptom = (
            f"latent space: of a rate of {rate:.3g} nats at most {information:.3g} are information about the data; "
            f"below {MIN_INFORMATION:g} the latents are not used"
        )
    else:
        return None
    return 1, [symptom, _gap(measured)], _let_through(measured)


def _unread(measured: _Measured) -> _Found | None:
    information = measured.latents.mutual_information
    expected = measured.beta * information
    if not (expected > 0 and measured.generation.shuffled_gap < MIN_USE * expected):
        return None
    symptom = (
        f"{_gap(measured)}, where {information:.3g} nats of information at beta {measured.beta:g} should be worth "
        f"{expected:.3g} at least"
    )
    return 1, [symptom], _make_it_read(measured)


def _width(measured: _Measured) -> _Found | None:
    relative, calibration = measured.relative_beta, measured.terms.calibration
    over = relative - measured.margin > BETA_BAND
    under = relative + measured.margin < 1 / BETA_BAND and (relative > 0 or measured.beta == 0)
    if not (over or under):
        return None
    symptoms = [
        f"posterior width: {measured.latents.posterior_width:.2g} of the prior's on active dimensions is too "
        f"{'wide' if over else 'narrow'}: it is optimal at a beta of {relative:.3g}{_corrected(measured)}, and the "
        "ELBO's is 1"
    ]
    remedy = _lower_beta(measured) if over else _raise_beta(measured)
    if calibration > BETA_BAND or calibration < 1 / BETA_BAND:
        symptoms.append(
            f"reconstruction: the squared error is {calibration:.3g} times the variance that the likelihood claims"
        )
        remedy += ", or learn the likelihood's variance at beta 1"
    return (1 if over else -1), symptoms, remedy + "."


def _lower_beta(measured: _Measured) -> str:
    if change := measured.moved_constraint(True):
        return change.capitalize()
    beta = measured.beta / measured.relative_beta
    # An implied beta below beta means that a floor holds the rate up: then lower beta all the way.
    if measured.terms.implied_beta < measured.beta:
        beta = min(beta, measured.fair_beta)
    return f"Lower beta from {measured.beta:g} to about {beta:.2g}"


def _raise_beta(measured: _Measured) -> str:
    if measured.beta == 0:
        return "Train with beta at 1: at 0 the rate costs nothing"
    if measured.terms.implied_beta < measured.beta / BETA_BAND:
        narrow = f"The posteriors are narrower than beta {measured.beta:g} makes them"
        if measured.held_by:
            return f"{narrow}: lower {measured.held_by}"
        return (
            f"{narrow}: look for a mean in the loss that should be a sum, which gives the rate less weight, or for "
            "over-fitting, against which a smaller decoder or more data help"
        )
    if change := measured.moved_constraint(False):
        return change.capitalize()
    # At an optimum the implied beta is about beta, and the ELBO's is the goal. Otherwise something hides a weight.
    is_optimal = measured.terms.implied_beta < BETA_BAND * measured.beta
    beta = measured.fair_beta if is_optimal else measured.beta / measured.relative_beta
    return f"Raise beta from {measured.beta:g} to about {beta:.2g}"


def _mismatched(measured: _Measured) -> list[str]:
    symptoms = []
    rate = measured.terms.rate
    if measured.latents.marginal_kl_lower > max(MIN_MARGINAL_KL, MAX_MARGINAL_KL * rate):
        symptoms.append(f"{_apart(measured)}, of a rate of {rate:.3g}")
    if measured.generation.sample_distance > MAX_DISTANCE:
        symptoms.append(_samples(measured))
    return symptoms


def _all_well(measured: _Measured) -> tuple[str, ...]:
    widths = [] if math.isnan(measured.latents.posterior_width) else [_width_of(measured)]
    is_unknown = math.isnan(measured.latents.marginal_kl_lower)
    space = f"latent space: {measured.active}" if is_unknown else f"{_apart(measured)}; {measured.active}"
    generation = [] if math.isnan(measured.generation.sample_distance) else [_samples(measured)]
    return (*widths, space, *generation, _gap(measured))


def _width_of(measured: _Measured) -> str:
    width = f"posterior width: {measured.latents.posterior_width:.2g} of the prior's on active dimensions"
    if measured.relative_beta > 0:
        width += f", optimal at a beta of {measured.relative_beta:.3g}{_corrected(measured)}"
    return width


def _corrected(measured: _Measured) -> str:
    return "" if math.isnan(measured.terms.calibration) else " (implied beta over error / claimed variance)"


def _gap(measured: _Measured) -> str:
    gap = measured.generation.shuffled_gap
    return f"reconstruction: from another observation's latents it costs {gap:.3g} nats more"


def _apart(measured: _Measured) -> str:
    distance = max(measured.latents.marginal_kl_lower, 0)
    return f"latent space: the latents as a whole are at least {distance:.2g} nats away from the prior"


def _samples(measured: _Measured) -> str:
    return (
        f"generation: decoded prior samples lie {measured.generation.sample_distance:.3g} times as far from the data "
        "as reconstructions"
    )
