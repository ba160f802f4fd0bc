import copy
import math
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lightning_vae.evaluation.record import (
    Assessment,
    Evaluation,
    Generation,
    Labels,
    Latents,
    LikelihoodEstimate,
    Terms,
)

RECORD = Evaluation(
    observations=300,
    latent_dim=3,
    beta=2.0,
    terms=Terms(elbo=-30.0, rate=5.0, distortion=25.0, implied_beta=1.9, implied_beta_error=0.04, calibration=math.nan),
    likelihood=LikelihoodEstimate(
        nll=29.0, nll_error=0.5, importance_samples=100, effective_sample_size=12.0, nll_active_only=29.1
    ),
    latents=Latents(
        active_units=2,
        mutual_information=4.0,
        mutual_information_upper=4.5,
        mutual_information_saturated=False,
        mutual_information_observations=300,
        marginal_kl=1.0,
        marginal_kl_lower=0.5,
        total_correlation=0.25,
        posterior_width=0.4,
        aggregate_mean_square=0.01,
        aggregate_variance_mean=0.98,
        rate_per_dimension=(3.0, 1.9, 0.1),
        variance_per_dimension=(0.9, 0.8, 0.01),
    ),
    generation=Generation(shuffled_gap=12.0, sample_distance=1.1, interpolation_distance=0.9),
    labels=Labels(knn_accuracy=math.nan, linear_probe_accuracy=math.nan),
    assessment=Assessment("balanced", ("latent space: fine",), "Nothing to change."),
    own={"mine": 0.125},
)


def test_the_dictionary_is_flat_with_null_for_what_is_unknown():
    written = RECORD.to_dict()
    assert written.keys() == Evaluation.names() | {"mine"}
    assert written["rate_per_dimension"] == [3.0, 1.9, 0.1]
    assert (written["verdict"], written["symptoms"]) == ("balanced", ["latent space: fine"])
    assert (written["nll"], written["mine"], written["calibration"]) == (29.0, 0.125, None)


def test_the_values_of_the_parts_are_attributes():
    assert (RECORD.nll, RECORD.knn_accuracy is RECORD.labels.knn_accuracy) == (29.0, True)
    assert copy.deepcopy(RECORD).shuffled_gap == pickle.loads(pickle.dumps(RECORD)).shuffled_gap == 12.0
    with pytest.raises(AttributeError, match="has no attribute 'sharpness'"):
        _ = RECORD.sharpness


def test_a_part_that_is_added_is_named():
    @dataclass(frozen=True)
    class Quality:
        sharpness: float

    @dataclass(frozen=True)
    class More(Evaluation):
        quality: Quality = Quality(0.5)
        seed: int = 0

    assert More.names() == Evaluation.names() | {"sharpness", "seed"}
    assert {"nll", "verdict", "observations", "knn_accuracy"} < Evaluation.names()
    assert "own" not in Evaluation.names()


def test_loggers_get_the_numbers_alone():
    scalars = RECORD.scalars()
    assert all(type(value) is float for value in scalars.values())
    assert scalars["mutual_information_saturated"] == 0.0
    assert not {"calibration", "verdict", "symptoms", "rate_per_dimension"} & scalars.keys()


def test_the_rate_of_active_dimensions_is_of_those_strictly_above_the_threshold():
    assert RECORD.latents.active_rate == pytest.approx(4.9)


@pytest.mark.parametrize(
    ("variances", "rate"), [((0.0, 0.9, 0.8), 5.0), ((0.9, 0.0, 0.0), 5.0), ((0.0, 0.0, 0.0), 0.0)]
)
def test_a_joint_rate_is_that_of_the_active_dimensions(variances, rate):
    joint = replace(RECORD.latents, rate_per_dimension=(5.0,), variance_per_dimension=variances)
    assert joint.active_rate == rate


def test_the_table_leaves_out_what_is_unknown():
    lines = RECORD.table().split("\n")
    assert lines[0] == "300 observations"
    assert "  NLL                       29 +- 0.5           100 importance samples, 12.0 effective" in lines
    assert "  active units              2 of 3" in lines
    assert "  mutual information        4                   bounds 4, 4.5" in lines
    assert (
        "  implied beta              1.9 +- 0.04         nats of distortion that a nat of rate buys; the ELBO's is 1"
        in lines
    )
    assert "  mine                      0.125" in lines
    assert lines[-3:] == ["Verdict: balanced", "  latent space: fine", "  -> Nothing to change."]
    assert "claimed variance" not in RECORD.table()
    assert "labels" not in RECORD.table()


def test_the_table_gives_the_reason_for_missing_distances():
    reason = "distances of samples      none                numbers are missing in the data, or fewer than 3"
    nan = replace(RECORD.generation, sample_distance=math.nan, interpolation_distance=math.nan)
    without = replace(RECORD, generation=nan)
    assert reason in without.table()
    assert "prior samples" not in without.table()
    assert reason not in RECORD.table()
    # Of too few observations the assessment has told.
    assert reason not in replace(without, assessment=replace(RECORD.assessment, verdict=None)).table()


def test_the_table_says_what_is_only_a_bound():
    saturated = replace(RECORD, latents=replace(RECORD.latents, mutual_information_saturated=True)).table()
    assert f"mutual information        >= log M = {math.log(300):.2f}" in saturated
    assert "marginal KL               >= 1" in saturated
    assert "total correlation         ~ 0.25" in saturated
    few = replace(RECORD, likelihood=replace(RECORD.likelihood, effective_sample_size=3.0)).table()
    assert "100 importance samples, 3.0 effective: more would lower it" in few


def test_the_guide_names_every_key_of_the_json():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "evaluation.md").read_text()
    cells = [line.split("|")[2] for line in guide.splitlines() if line.count(" | ") == 2]
    assert set(re.findall(r"`(\w+)`", "".join(cells))) >= Evaluation.names()
