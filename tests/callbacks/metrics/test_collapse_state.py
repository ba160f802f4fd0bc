import math
from typing import Any

import pytest
import torch

from lightning_vae.callbacks.metrics.collapse_state import CollapseState, collapse_state

HEALTHY: dict[str, Any] = {
    "rate_per_dimension": torch.tensor([2.0, 2.0, 1.0]),
    "variance_of_means": torch.tensor([0.9, 0.8, 0.6]),
    "mutual_information": 4.9,
    "observations": 2048,
}


def state(**changes):
    return collapse_state(**{**HEALTHY, **changes}).name


def test_healthy():
    assert state() == "healthy"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"variance_of_means": torch.tensor([0.9, 0.8, 0.0]), "rate_per_dimension": torch.tensor([2.0, 2, 0])},
            "pruned",
        ),
        ({"variance_of_means": torch.zeros(3)}, "collapsed"),
        (
            {"variance_of_means": torch.zeros(3), "rate_per_dimension": torch.zeros(3), "mutual_information": 0.0},
            "collapsed",
        ),
        ({"rate_per_dimension": torch.full((3,), 0.1), "mutual_information": 0.29}, "collapsed"),
        (
            {"variance_of_means": torch.tensor([0.9, 0.0, 0.0]), "rate_per_dimension": torch.tensor([2.0, 1, 1])},
            "offset",
        ),
        ({"mutual_information": 2.0}, "uninformative"),
    ],
)
def test_states(changes, expected):
    assert state(**changes) == expected


@pytest.mark.parametrize(("variance", "expected"), [(0.01, "pruned"), (0.0101, "healthy")])
def test_a_dimension_is_active_strictly_above_the_threshold(variance, expected):
    variances = torch.tensor([0.9, 0.8, variance], dtype=torch.float64)
    assert state(variance_of_means=variances, rate_per_dimension=torch.tensor([2.0, 2.0, 0.1])) == expected


@pytest.mark.parametrize(("rate", "expected"), [(0.499, "collapsed"), (0.5, "healthy")])
def test_collapsed_below_the_minimal_rate(rate, expected):
    rates = torch.tensor([rate, 0.0, 0.0], dtype=torch.float64)
    assert state(rate_per_dimension=rates, mutual_information=rate) == expected


def test_the_minimal_rate_is_that_of_the_active_dimensions():
    variances = torch.tensor([0.9, 0.0, 0.0])
    assert state(variance_of_means=variances, rate_per_dimension=torch.tensor([0.4, 3.0, 3.0])) == "collapsed"


@pytest.mark.parametrize(("inactive", "expected"), [(0.1, "pruned"), (0.1001, "offset")])
def test_offset_above_a_tenth_of_the_rate(inactive, expected):
    rates = 4 * torch.tensor([1 - inactive, inactive], dtype=torch.float64)
    assert state(variance_of_means=torch.tensor([0.9, 0.0]), rate_per_dimension=rates) == expected


@pytest.mark.parametrize(
    ("rate", "information", "expected"),
    [
        (0.69 * math.log(2048), 0.49, "uninformative"),
        (0.69 * math.log(2048), 0.51, "healthy"),
        (0.71 * math.log(2048), 0.49, "healthy"),  # too near the cap to say
    ],
)
def test_uninformative_below_half_the_rate_and_far_from_the_cap(rate, information, expected):
    rates = torch.tensor([rate / 3] * 3, dtype=torch.float64)
    assert state(rate_per_dimension=rates, mutual_information=information * rate) == expected


@pytest.mark.parametrize(
    ("variances", "expected"), [([0.0, 0.0], "collapsed"), ([0.9, 0.0], "pruned"), ([0.9, 0.9], "healthy")]
)
def test_without_a_rate_only_the_active_units_count(variances, expected):
    changes = {"rate_per_dimension": None, "mutual_information": None, "variance_of_means": torch.tensor(variances)}
    assert state(**changes) == expected


def test_only_three_states_are_alarms_and_each_has_its_own_remedy():
    states = [
        collapse_state(**{**HEALTHY, **changes})
        for changes in (
            {"variance_of_means": torch.zeros(3)},
            {"variance_of_means": torch.tensor([0.9, 0.0, 0.0])},
            {"mutual_information": 1.0},
            {"variance_of_means": torch.tensor([0.9, 0.9, 0.0]), "rate_per_dimension": torch.tensor([2.0, 2.0, 0.0])},
            {},
        )
    ]
    assert [each.name for each in states] == ["collapsed", "offset", "uninformative", "pruned", "healthy"]
    assert [each.alarm for each in states] == [True, True, True, False, False]
    assert len({each.remedy for each in states}) == 5


def test_the_reason_has_the_numbers():
    reason = collapse_state(**{**HEALTHY, "mutual_information": 1.0}).reason
    for number in ("3 of 3", "0.01", "0.9", "5 nats", "2048", "1 nats"):
        assert number in reason


@pytest.mark.parametrize("information", [3.8, 0.1])
def test_latents_that_are_used_at_a_small_scale_are_said_to_be(information: float) -> None:
    found = collapse_state(torch.full((3,), 6.0), torch.full((3,), 2e-4), information, observations=48)
    assert found.name == "collapsed"
    assert ("at a scale below the threshold" in found.reason) == (information > 1)


def test_a_remedy_is_neither_what_the_run_has_nor_a_floor_that_it_lacks():
    def remedy(name: str, anneals: bool, floors: bool) -> str:
        return CollapseState(name, "", anneals, floors).remedy  # type: ignore[arg-type]

    for floors in (False, True):
        for name in ("collapsed", "offset", "uninformative"):
            assert "KLAnnealing" not in remedy(name, True, floors)
        assert "Let `KLAnnealing` hold" in remedy("collapsed", False, floors)
    for anneals in (False, True):
        for name in ("offset", "uninformative"):
            assert "floor" not in remedy(name, anneals, floors=False)
            assert "floor of `FreeBits`" in remedy(name, anneals, floors=True)
        assert "put a floor" in remedy("collapsed", anneals, floors=False)
        assert "raise the floor" in remedy("collapsed", anneals, floors=True)
