"""The controller alone, without a model."""

import math

import pytest
import torch

from lightning_vae.callbacks.control.pi_controller import (
    ControllerState,
    PIController,
    exponential_average,
    integrate,
    relative_error,
)
from lightning_vae.datamodules import linear_vae_optimum
from tests.callbacks.test_target_rate import beta_at
from tests.test_yardstick import SPECTRUM, VARIANCE


def controller(**options: float) -> PIController:
    defaults = {"proportional": 1.0, "integral": 0.03, "smoothing": 0.95, "tolerance": 0.05}
    return PIController(**{"lower": math.log(0.01), "upper": math.log(100.0), **defaults, **options})


def test_the_average_starts_at_the_first_value_and_passes_over_what_is_not_finite() -> None:
    average = torch.tensor(math.nan)
    seen = []
    for value in (math.nan, 4.0, 8.0, math.inf, math.nan, 8.0):
        average = exponential_average(average, torch.tensor(value), smoothing=0.75)
        seen.append(float(average))
    assert math.isnan(seen[0])
    assert seen[1:] == [4.0, 5.0, 5.0, 5.0, 5.75]


@pytest.mark.parametrize(
    ("rate", "target", "expected"),
    [(5.0, 4.0, 0.25), (3.0, 4.0, -0.25), (0.2, 0.1, 0.1), (1e38, 4.0, 1.0), (-9.0, 4.0, -1.0), (math.nan, 4.0, 0.0)],
)
def test_the_error_is_relative_and_bounded(rate: float, target: float, expected: float) -> None:
    assert float(relative_error(torch.tensor(rate), target, max(target, 1.0))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("integral", "error", "expected"),
    [
        (0.0, 0.5, 0.05),  # room enough
        (0.48, 0.5, 0.5),  # the output, 0.5 + integral, ends at its bound of 1
        (0.7, 0.5, 0.7),  # it is beyond: the integral neither grows nor is pulled back
        (0.7, -0.5, 0.65),  # and goes back at once
        (-0.48, -0.5, -0.5),
        (-0.7, -0.5, -0.7),
        (-0.7, 0.5, -0.65),
    ],
)
def test_the_integral_stops_where_the_output_has_no_room(integral: float, error: float, expected: float) -> None:
    result = integrate(torch.tensor(integral), torch.tensor(error), -1.0, 1.0, proportional=1.0, gain=0.1)
    assert float(result) == pytest.approx(expected)


@pytest.mark.parametrize(("unreachable", "bound", "sign"), [(100.0, 0.01, -1), (0.0, 2.0, 1)])
def test_five_thousand_steps_at_a_bound_leave_nothing_behind(unreachable: float, bound: float, sign: int) -> None:
    """On a plant that takes 50 steps to go to the yardstick's optimum."""
    control = controller(upper=math.log(2.0))
    state, rate, target = ControllerState.start(0.0, "cpu"), 0.0, unreachable
    met, wanted = [], 3.0
    for step in range(5500):
        target = unreachable if step < 5000 else wanted
        state = control(state, torch.tensor(rate), target, max(target, 1.0))
        beta = float(state.output.exp())
        assert beta * 1.000001 >= 0.01
        assert beta <= 2.000001
        rate += (linear_vae_optimum(SPECTRUM, 4, VARIANCE, beta=beta).rate - rate) / 50
        if step == 4999:
            assert beta == pytest.approx(bound)
            assert float(state.steps_at_bound) * sign > 4000
        if step >= 5000:
            met.append(abs(rate - wanted) < 0.01 * wanted)
    assert all(met[-20:])
    assert beta == pytest.approx(beta_at(wanted), rel=0.03)
    assert state.steps_at_bound == 0
