"""Whether a VAE is over-regularised, balanced or under-regularised, told from what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["over-regularised", "balanced", "under-regularised"]
_SIDES: dict[int, Verdict] = {1: "over-regularised", 0: "balanced", -1: "under-regularised"}

MIN_INFORMATION = 0.5
"""Nats of rate on active dimensions, and of mutual information, below which the latents are not used."""
PRICE_BAND = 1.5
"""Factor by which the price of a nat may miss 1, which is what the ELBO pays."""
MIN_USE = 0.5
"""Share of ``beta * mutual information`` that shuffling the latents must cost at least."""
MAX_MARGINAL_KL = 0.25
"""Share of the rate that the marginal KL may take."""
MIN_MARGINAL_KL = 1.0
"""Nats of marginal KL that are no symptom at any rate."""
MAX_DISTANCE = 1.25
"""Distance of prior samples from the data, in that of reconstructions."""


@dataclass(frozen=True)
class Measured:
    """What a diagnosis rests on. NaN stands for what could not be measured, and is no symptom.

    Attributes:
        beta: Weight of the rate that the model was trained with.
        rate: Nats per observation.
        active_rate: Rate of the active dimensions, in nats.
        active_units: Number of them.
        latent_dim: Number of latent dimensions.
        mutual_information: A lower bound in nats.
        mutual_information_upper: An upper bound.
        marginal_kl: A lower bound of it in nats, the rate less an upper bound of the mutual information.
        posterior_width: Mean standard deviation of the active dimensions' posteriors, in those of the prior.
        rate_price: Nats of distortion that a nat of rate buys, by narrowing the posterior.
        price_error: Its standard error.
        calibration: Mean squared error over the variance that the likelihood claims.
        shuffled_gap: Nats of distortion that the latents of another observation cost.
        sample_distance: Distance of decoded prior samples from the data, in that of reconstructions.
    """

    beta: float
    rate: float
    active_rate: float
    active_units: int
    latent_dim: int
    mutual_information: float
    mutual_information_upper: float
    marginal_kl: float
    posterior_width: float
    rate_price: float
    price_error: float
    calibration: float
    shuffled_gap: float
    sample_distance: float

    @property
    def price(self) -> float:
        """Price of a nat under a likelihood whose variance is the mean squared error."""
        return self.rate_price / self.fair_beta

    @property
    def fair_beta(self) -> float:
        """Weight of the rate that the ELBO has, under a likelihood whose variance is the mean squared error."""
        return 1.0 if math.isnan(self.calibration) else self.calibration

    @property
    def price_margin(self) -> float:
        """What the price may be off by: twice its standard error."""
        return 2 * self.price_error / self.fair_beta


@dataclass(frozen=True)
class Diagnosis:
    """What state a model is in, the symptoms it rests on, and what to change.

    Attributes:
        verdict: ``"over-regularised"``, ``"balanced"`` or ``"under-regularised"``.
        symptoms: In words and numbers, each beginning with where it shows: posterior width, latent space, generation
            or reconstruction. Never empty.
        advice: What to change.
    """

    verdict: Verdict
    symptoms: tuple[str, ...]
    advice: str


def diagnose(measured: Measured) -> Diagnosis:
    r"""Tell whether too little information passes through the latents, about as much as the ELBO asks for, or too much.

    The first that holds decides; each bound of an estimate stands on the side where it can't raise a false alarm:

    1. *collapsed*, over: the active dimensions' rate or the mutual information is below 0.5 nats;
    2. *unread*, over: shuffling the latents costs less distortion than ``0.5 * beta * mutual information``. At an
       optimum it costs at least ``beta * mutual information``: else drawing from q(z) whatever x is would have a
       smaller loss;
    3. *price*, over above 1.5, under below 1/1.5, by more than twice its standard error: the nats of distortion that a
       nat of rate buys. An optimum of ``distortion + beta * rate`` has beta, the ELBO has 1. A likelihood whose
       variance isn't the squared error misprices distortion, and that is taken out: a variance ten times too large
       is as good as beta 10. A negative price, where beta isn't 0, says that training is far from an optimum, and
       nothing of its sign;
    4. *mismatched*, under: the marginal KL exceeds 1 nat and a quarter of the rate, or decoded prior samples lie more
       than 1.25 times as far from the data as reconstructions.

    Otherwise the model is balanced. Symptoms of the other side are listed, and don't count.

    Args:
        measured: What was measured.
    """
    found = _collapsed(measured) or _unread(measured) or _priced(measured)
    mismatched = _mismatched(measured)
    if found is None and mismatched:
        found = -1, [], _MISMATCHED
    if found is None:
        return Diagnosis("balanced", _all_well(measured), "Nothing to change.")
    side, symptoms, advice = found
    return Diagnosis(_SIDES[side], (*symptoms, *mismatched), advice)


_Found = tuple[int, list[str], str]  # side, symptoms, advice

_COLLAPSED = (
    "Let more information through: lower beta or raise it slowly from 0 with `KLAnnealing`, put a floor under the rate "
    "with `FreeBits`, or weaken the decoder. With a Gaussian likelihood, learn its variance at beta 1: fixed too large "
    "it collapses the model, and no schedule cures that."
)
_UNREAD = (
    "The decoder does without latents that are paid for: drop the floor of `FreeBits` or the target of the rate, "
    "weaken the decoder, or train with beta at 0 first until it reads them."
)
_MISMATCHED = (
    "The prior is not where the latents are: raise beta, hold it at its target for longer, or lower the floor of "
    "`FreeBits`; with the price of a nat near 1, a richer prior rather than more weight."
)


def _collapsed(measured: Measured) -> _Found | None:
    rate, information = measured.rate, measured.mutual_information_upper
    if measured.active_rate < MIN_INFORMATION:
        symptom = (
            f"latent space: {measured.active_units} of {measured.latent_dim} dimensions are active, with "
            f"{measured.active_rate:.3g} of the rate's {rate:.3g} nats; below {MIN_INFORMATION:g} they are not used"
        )
    elif information < MIN_INFORMATION:
        symptom = (
            f"latent space: of a rate of {rate:.3g} nats at most {information:.3g} are information about the data; "
            f"below {MIN_INFORMATION:g} the latents are not used"
        )
    else:
        return None
    return 1, [symptom, _gap(measured)], _COLLAPSED


def _unread(measured: Measured) -> _Found | None:
    expected = measured.beta * measured.mutual_information
    if not (expected > 0 and measured.shuffled_gap < MIN_USE * expected):
        return None
    symptom = (
        f"{_gap(measured)}, where {measured.mutual_information:.3g} nats of information at beta {measured.beta:g} "
        f"should be worth {expected:.3g} at least"
    )
    return 1, [symptom], _UNREAD


def _priced(measured: Measured) -> _Found | None:
    price, calibration = measured.price, measured.calibration
    over = price - measured.price_margin > PRICE_BAND
    under = price + measured.price_margin < 1 / PRICE_BAND and (price > 0 or measured.beta == 0)
    if not (over or under):
        return None
    symptoms = [
        f"posterior width: {measured.posterior_width:.2g} of the prior's on active dimensions is too "
        f"{'wide' if over else 'narrow'}: narrowed further, a nat of rate would buy {price:.3g} nats of "
        f"distortion{_corrected(measured)}, and the ELBO is best where it buys 1"
    ]
    remedy = _lower_beta(measured) if over else _raise_beta(measured)
    if calibration > PRICE_BAND or calibration < 1 / PRICE_BAND:
        symptoms.append(
            f"reconstruction: the squared error is {calibration:.3g} times the variance that the likelihood claims"
        )
        remedy += ", or learn the likelihood's variance at beta 1"
    return (1 if over else -1), symptoms, remedy + "."


def _lower_beta(measured: Measured) -> str:
    # What is bought at a lower price than beta is forced, by a floor: then the whole way down to a price of 1.
    beta = min(measured.beta / measured.price, measured.fair_beta) if measured.rate_price < measured.beta else (
        measured.beta / measured.price
    )  # fmt: skip
    return f"Lower beta from {measured.beta:g} to about {beta:.2g}"


def _raise_beta(measured: Measured) -> str:
    if measured.beta == 0:
        return "Train with beta at 1: at 0 the rate costs nothing"
    if measured.rate_price < measured.beta / PRICE_BAND:
        return (
            f"The posteriors are narrower than beta {measured.beta:g} makes them: lower the floor of `FreeBits` or the "
            "target of the rate; without these, look for a mean in the loss where a sum should be, which weighs the "
            "rate less, or for over-fitting, against which a smaller decoder or more data help"
        )
    # Where the price is about beta, as an optimum has it, the fair beta's price is fair; else something hides a weight.
    usual = measured.rate_price < PRICE_BAND * measured.beta
    beta = measured.fair_beta if usual else measured.beta / measured.price
    return f"Raise beta from {measured.beta:g} to about {beta:.2g}"


def _mismatched(measured: Measured) -> list[str]:
    symptoms = []
    if measured.marginal_kl > max(MIN_MARGINAL_KL, MAX_MARGINAL_KL * measured.rate):
        symptoms.append(f"{_apart(measured)}, of a rate of {measured.rate:.3g}")
    if measured.sample_distance > MAX_DISTANCE:
        symptoms.append(_samples(measured))
    return symptoms


def _all_well(measured: Measured) -> tuple[str, ...]:
    width = f"posterior width: {measured.posterior_width:.2g} of the prior's on active dimensions"
    if measured.price > 0:
        width += f", where a nat of rate buys {measured.price:.3g} nats of distortion{_corrected(measured)}"
    active = f"{measured.active_units} of {measured.latent_dim} dimensions are active"
    space = f"latent space: {active}" if math.isnan(measured.marginal_kl) else f"{_apart(measured)}; {active}"
    generation = [] if math.isnan(measured.sample_distance) else [_samples(measured)]
    return (width, space, *generation, _gap(measured))


def _corrected(measured: Measured) -> str:
    return "" if math.isnan(measured.calibration) else " (the price over error / claimed variance)"


def _gap(measured: Measured) -> str:
    return f"reconstruction: from another observation's latents it costs {measured.shuffled_gap:.3g} nats more"


def _apart(measured: Measured) -> str:
    return (
        f"latent space: the latents as a whole are at least {max(measured.marginal_kl, 0):.2g} nats away from the prior"
    )


def _samples(measured: Measured) -> str:
    return (
        f"generation: decoded prior samples lie {measured.sample_distance:.3g} times as far from the data as "
        "reconstructions"
    )
