"""The assessment, on models built to have a symptom and on ones that must not show it."""

import math
import random
from dataclasses import fields, replace

import pytest
import torch

from lightning_vae.callbacks.metrics.collapse_state import collapse_state
from lightning_vae.datamodules import Gaussian as GaussianData
from lightning_vae.datamodules import linear_vae_optimum
from lightning_vae.datamodules.loaders.tensor_loader import TensorLoader
from lightning_vae.evaluation.assessment import FLOOR, LIMIT, TARGET, assess
from lightning_vae.evaluation.measure import evaluate
from lightning_vae.evaluation.record import Generation, Latents, Terms
from tests.doubles import optimal_linear_vae

SPECTRUM = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1)
TERMS = Terms(elbo=-8.6, rate=3.3, distortion=5.3, implied_beta=1.0, implied_beta_error=0.0, calibration=1.0)
LATENTS = Latents(
    active_units=4,
    mutual_information=3.2,
    mutual_information_upper=3.3,
    mutual_information_saturated=False,
    mutual_information_observations=2048,
    marginal_kl=0.1,
    marginal_kl_lower=0.02,
    total_correlation=0.02,
    posterior_width=0.47,
    aggregate_mean_square=0.0,
    aggregate_variance_mean=1.0,
    rate_per_dimension=(1.3, 1.0, 0.7, 0.3),
    variance_per_dimension=(0.9, 0.8, 0.7, 0.5),
)
GENERATION = Generation(shuffled_gap=22.0, sample_distance=1.0, interpolation_distance=1.0)


def assessed(beta=1.0, holds=(), **changes):
    """The assessment of a healthy model with some of its numbers changed, whichever part they are in."""
    parts = []
    for part in (TERMS, LATENTS, GENERATION):
        own = {each.name for each in fields(part)} & changes.keys()
        parts.append(replace(part, **{name: changes.pop(name) for name in own}))
    assert not changes
    return assess(beta, *parts, holds)


def observations(spectrum=SPECTRUM, size=2048, seed=0):
    data = GaussianData(spectrum, size=size, batch_size=size, seed=seed)
    data.setup("test")
    return data._splits["test"]["x"]


def active_rate(nats):
    """One active dimension of this rate, beside one that is just not active."""
    return {"rate_per_dimension": (nats, 3.0), "variance_per_dimension": (0.9, 0.01)}


def evaluated(vae, x, **options):
    return evaluate(vae, TensorLoader({"x": x}, batch_size=len(x)), importance_samples=1, **options)


def where(assessment):
    return [symptom.partition(":")[0] for symptom in assessment.symptoms]


# ---- the rules


def test_a_healthy_model_is_balanced_with_all_four_places_described():
    result = assessed()
    assert (result.verdict, result.advice) == ("balanced", "Nothing to change.")
    assert where(result) == ["posterior width", "latent space", "generation", "reconstruction"]


@pytest.mark.parametrize(
    ("changes", "verdict", "places"),
    [
        (active_rate(0.49), "over-regularised", ["latent space", "reconstruction"]),
        (active_rate(0.51), "balanced", None),
        ({"mutual_information_upper": 0.49}, "over-regularised", ["latent space", "reconstruction"]),
        ({"mutual_information": 0.4, "mutual_information_upper": 0.51}, "balanced", None),
        ({"shuffled_gap": 1.59}, "over-regularised", ["reconstruction"]),
        ({"shuffled_gap": 1.61}, "balanced", None),
        ({"shuffled_gap": 1.59, "beta": 0.9}, "balanced", None),
        ({"implied_beta": 1.51}, "over-regularised", ["posterior width"]),
        ({"implied_beta": 1.49}, "balanced", None),
        ({"implied_beta": 0.66}, "under-regularised", ["posterior width"]),
        ({"implied_beta": 0.67}, "balanced", None),
        ({"implied_beta": 1.9, "implied_beta_error": 0.19}, "over-regularised", ["posterior width"]),
        ({"implied_beta": 1.9, "implied_beta_error": 0.21}, "balanced", None),
        ({"implied_beta": 0.3, "implied_beta_error": 0.18}, "under-regularised", ["posterior width"]),
        ({"implied_beta": 0.3, "implied_beta_error": 0.19}, "balanced", None),
        ({"implied_beta": 0.6, "implied_beta_error": 0.19, "calibration": 2.0}, "under-regularised", None),
        ({"implied_beta": -2.0}, "balanced", None),
        ({"implied_beta": -2.0, "beta": 0.0, "shuffled_gap": 0.0}, "under-regularised", None),
        ({"calibration": 0.5}, "over-regularised", ["posterior width", "reconstruction"]),
        ({"calibration": 0.7}, "balanced", None),
        ({"calibration": 2.0}, "under-regularised", ["posterior width", "reconstruction"]),
        ({"calibration": 2.0, "implied_beta": 2.0}, "balanced", None),
        ({"marginal_kl_lower": 1.1}, "under-regularised", ["latent space"]),
        ({"marginal_kl_lower": 0.9}, "balanced", None),
        ({"marginal_kl_lower": 1.1, "rate": 5.0}, "balanced", None),
        ({"sample_distance": 1.26}, "under-regularised", ["generation"]),
        ({"sample_distance": 1.24}, "balanced", None),
        # the first that holds decides, and signs of a mismatch are listed beside it
        ({"implied_beta": 0.1, "shuffled_gap": 0.1}, "over-regularised", ["reconstruction"]),
        ({"implied_beta": 3.0, "sample_distance": 2.0}, "over-regularised", ["posterior width", "generation"]),
    ],
)  # fmt: skip
def test_each_rule_at_its_boundary(changes, verdict, places):
    result = assessed(**changes)
    assert result.verdict == verdict
    assert places is None or where(result) == places
    assert (result.advice == "Nothing to change.") == (verdict == "balanced")


def test_what_could_not_be_measured_is_no_symptom():
    nan = dict.fromkeys(
        ("mutual_information", "mutual_information_upper", "marginal_kl_lower", "implied_beta", "calibration",
         "sample_distance"), math.nan,
    )  # fmt: skip
    assert assessed(**nan).verdict == "balanced"
    assert assessed(calibration=math.nan, implied_beta=3.0).verdict == "over-regularised"


APART = "The latents are not where the prior is: raise beta or hold it at its target for longer"
USELESS = "Let more information through: lower beta or raise it more slowly from 0 with `KLAnnealing`"


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"beta": 10.0, "implied_beta": 10.0, "shuffled_gap": 40.0}, "Lower beta from 10 to about 1."),
        ({"beta": 10.0, "implied_beta": 2.0, "shuffled_gap": 40.0}, "Lower beta from 10 to about 1."),  # a floor
        ({"implied_beta": 5.0}, "Lower beta from 1 to about 0.2."),  # a sum where a mean should be
        ({"calibration": 0.1}, "Lower beta from 1 to about 0.1, or learn the likelihood's variance at beta 1."),
        ({"beta": 0.1, "implied_beta": 0.1}, "Raise beta from 0.1 to about 1."),
        ({"beta": 0.1, "implied_beta": 0.075}, "Raise beta from 0.1 to about 1."),  # not quite at its optimum
        ({"beta": 0.1, "implied_beta": 0.5}, "Raise beta from 0.1 to about 0.2."),  # a sum where a mean should be
        ({"implied_beta": 0.3}, "The posteriors are narrower than beta 1 makes them: look for a mean"),
        (
            {"implied_beta": 0.3, "holds": [FLOOR, TARGET]},
            f"The posteriors are narrower than beta 1 makes them: lower {FLOOR} and {TARGET}.",
        ),
        ({"shuffled_gap": 0.1}, "The decoder ignores latents that are paid for: weaken the decoder"),
        ({"shuffled_gap": 0.1, "holds": [TARGET]}, "The decoder ignores latents that are paid for: drop the target of"),
        ({"sample_distance": 2.0}, f"{APART};"),
        ({"beta": 5.0, "implied_beta": 5.0, "holds": [TARGET]}, f"Raise {TARGET}."),
        ({"beta": 5.0, "implied_beta": 5.0, "holds": [LIMIT]}, f"Lower {LIMIT}."),
        ({"beta": 0.1, "implied_beta": 0.1, "holds": [TARGET]}, f"Lower {TARGET}."),
        ({"beta": 0.1, "implied_beta": 0.1, "holds": [LIMIT]}, f"Raise {LIMIT}."),
        ({"mutual_information_upper": 0.1, "holds": [LIMIT]}, f"Let more information through: lower {LIMIT} or"),
        ({"sample_distance": 2.0, "holds": [TARGET]}, f"The latents are not where the prior is: lower {TARGET};"),
        ({"sample_distance": 2.0, "holds": [FLOOR]}, f"{APART}, or lower the floor of `FreeBits`;"),
        ({"mutual_information_upper": 0.1}, f"{USELESS}, put a floor under the rate"),
        ({"mutual_information_upper": 0.1, "holds": [FLOOR]}, f"{USELESS}, raise the floor of `FreeBits`"),
        ({"beta": 0.0, "implied_beta": 0.0, "shuffled_gap": 0.0}, "Train with beta at 1"),
        ({"beta": 0.0, "implied_beta": -0.1, "shuffled_gap": -1e-9}, "Train with beta at 1"),
    ],
)
def test_the_advice_names_the_beta_to_go_to(changes, advice):
    assert assessed(**changes).advice.startswith(advice)


def test_a_capacity_amounts_to_the_beta_at_its_rate():
    vae = optimal_linear_vae(observations(), 3, 0.4, 4.0)
    vae.knobs["beta"], vae.capacity_weight = None, 10.0
    vae._fill("beta", 1.0)
    result = evaluated(vae, observations())
    assert result.beta == result.implied_beta == pytest.approx(4.0, rel=0.05)
    assert result.assessment.advice.startswith("Raise the target of the rate, or learn")


def test_what_was_not_measured_is_not_spoken_of():
    unknown = assessed(implied_beta=math.nan, marginal_kl_lower=math.nan, sample_distance=math.nan)
    assert "nan" not in " ".join(unknown.symptoms)


# ---- models that have a symptom, and their likes that must not


@pytest.mark.parametrize(
    ("beta", "verdict"), [(0.3, "under-regularised"), (0.9, "balanced"), (4.0, "over-regularised")]
)
def test_beta_on_the_linear_vae(beta, verdict):
    assert evaluated(optimal_linear_vae(observations(), 3, 0.4, beta), observations()).assessment.verdict == verdict


def test_pruned_dimensions_are_no_symptom():
    x = observations((5.0, 3.0, 0.4, 0.4, 0.4, 0.4))
    result = evaluated(optimal_linear_vae(x, 6, 0.4), x)
    assert (result.latents.active_units, result.assessment.verdict) == (2, "balanced")


@pytest.mark.parametrize(("variance", "verdict"), [(0.1, "balanced"), (2.0, "over-regularised")])
def test_a_variance_fixed_too_large_is_as_good_as_beta(variance, verdict):
    x = observations((50.0, 30.0, 0.1, 0.1, 0.1, 0.1))
    result = evaluated(optimal_linear_vae(x, 2, variance), x)
    assert (result.beta, result.latents.active_units) == (1.0, 2)
    assert result.terms.implied_beta == pytest.approx(1, abs=0.02)
    assert result.assessment.verdict == verdict
    assert where(result.assessment) == ["posterior width", "reconstruction"] or verdict == "balanced"


def test_an_offset_is_a_collapse_in_disguise():
    x = observations()
    vae = optimal_linear_vae(x, 4, variance=6.0)  # above the spectrum: nothing is worth encoding
    assert evaluated(vae, x).assessment.verdict == "over-regularised"
    with torch.no_grad():
        vae.encoder.mean.bias.fill_(3.0)
    result = evaluated(vae, x)
    assert (result.terms.rate, result.latents.active_units) == (pytest.approx(18), 0)
    assert result.assessment.verdict == "over-regularised"
    assert where(result.assessment)[0] == "latent space"
    assert "0 of 4 dimensions are active" in result.assessment.symptoms[0]


def test_a_decoder_that_does_not_read_its_latents():
    x = observations()
    vae = optimal_linear_vae(x, 4, 0.4)
    assert evaluated(vae, x).assessment.verdict == "balanced"
    with torch.no_grad():
        vae.decoder.map.weight.zero_()
    result = evaluated(vae, x)
    assert result.terms.rate == pytest.approx(3.28, abs=0.01)
    assert result.generation.shuffled_gap == pytest.approx(0, abs=1e-9)
    assert (result.assessment.verdict, where(result.assessment)) == ("over-regularised", ["reconstruction"])


def test_latents_that_lie_beside_the_prior():
    x = observations()
    vae = optimal_linear_vae(x, 4, 0.4)
    with torch.no_grad():  # the same model of the data, with its latents moved by 3
        vae.encoder.mean.bias[0] = 3.0
        vae.decoder.map.bias.copy_(-3.0 * vae.decoder.map.weight[:, 0])
    result = evaluated(vae, x)
    assert result.terms.implied_beta == pytest.approx(1, abs=0.02)
    assert result.latents.marginal_kl == pytest.approx(4.5, abs=0.1)
    assert result.assessment.verdict == "under-regularised"
    assert where(result.assessment) == ["latent space", "generation"]


def test_holes_between_the_latents():
    # Two clusters, which a linear decoder puts at -10 and 10: the prior's samples fall between and beyond them.
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    x[:, 0] += 10.0 * (torch.arange(2000) % 2 * 2 - 1)
    vae = optimal_linear_vae(x, 1, variance=0.25)
    result = evaluated(vae, x)
    assert (result.latents.aggregate_mean_square, result.latents.aggregate_variance_mean) == (
        pytest.approx(0, abs=0.01),
        pytest.approx(1),
    )
    assert result.assessment.verdict == "under-regularised"
    assert where(result.assessment)[-2:] == ["latent space", "generation"]


def test_whatever_the_detector_calls_collapsed_is_over_regularised():
    generator = random.Random(5)
    for _ in range(200):
        rates = [generator.choice([0.0, 0.1, 0.3, 1.0]) for _ in range(4)]
        variances = [0.5 * rate if generator.random() < 0.7 else 0.0 for rate in rates]
        state = collapse_state(torch.tensor(rates), torch.tensor(variances), None, 2048).name
        verdict = assessed(
            rate=sum(rates), rate_per_dimension=tuple(rates), variance_per_dimension=tuple(variances)
        ).verdict
        assert (state == "collapsed") == (verdict == "over-regularised")


# ---- the linear VAE's closed form


def truth(spectrum, latent_dim, variance, beta):
    """The verdict by the closed form, and how far the nearest boundary is, as a factor."""
    optimum = linear_vae_optimum(spectrum, latent_dim, variance, beta)
    activity = zip(optimum.rate_per_dimension, optimum.posterior_mean_variance, strict=True)
    active_rate = sum(rate for rate, variance_of_mean in activity if variance_of_mean > 0.01)
    price = beta * variance * len(spectrum) / optimum.squared_error
    collapsed = active_rate < 0.5
    verdict = "over-regularised" if collapsed or price > 1.5 else "under-regularised" if price < 1 / 1.5 else "balanced"
    boundaries = [active_rate / 0.5] if collapsed else [active_rate / 0.5, price / 1.5, price * 1.5]
    return verdict, min(math.inf if ratio == 0 else max(ratio, 1 / ratio) for ratio in boundaries)


@pytest.mark.exhaustive
def test_verdicts_on_random_spectra_are_those_of_the_closed_form():
    generator = random.Random(20261122)  # chosen once, before the first run
    counts, wrong = {}, []
    for number in range(50):
        dimension = generator.randint(3, 12)
        spectrum = tuple(math.exp(generator.uniform(math.log(0.02), math.log(20))) for _ in range(dimension))
        latent_dim = generator.randint(1, dimension)
        variance = math.exp(generator.uniform(math.log(0.03), math.log(1)))
        x = observations(spectrum, size=512, seed=number)
        for beta in (0.1, 0.5, 1.0, 2.0, 8.0):
            verdict, factor = truth(spectrum, latent_dim, variance, beta)
            if factor < 1.1:
                continue
            vae = optimal_linear_vae(x, latent_dim, variance, beta)
            result = evaluated(vae, x, samples=256)
            counts[verdict] = counts.get(verdict, 0) + 1
            if result.assessment.verdict != verdict:
                wrong.append((spectrum, latent_dim, variance, beta, verdict, result.assessment))
    assert min(counts.values()) >= 25, counts
    assert sum(counts.values()) >= 180, counts
    assert not wrong
