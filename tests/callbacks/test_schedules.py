import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lightning_vae.callbacks.schedules import (
    Constant,
    Cosine,
    Cyclical,
    Join,
    Linear,
    Schedule,
    Sigmoid,
    Staged,
    sigmoid_ramp,
)

MODULE = "lightning_vae.callbacks.schedules"


def values(schedule: Schedule, steps: int) -> list[float]:
    return [schedule(step) for step in range(steps)]


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Values


def test_constant_holds_its_value() -> None:
    assert values(Constant(0.3), 3) == [0.3] * 3
    assert Constant(0.3)(10**9) == 0.3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(start=0.0, stop=1.0, steps=4), [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        (Linear(start=1.0, stop=0.0, steps=4), [1, 0.75, 0.5, 0.25, 0, 0, 0]),
        (Linear(start=10.0, stop=20.0, steps=10), [*range(10, 20), *[20] * 5]),
        (Linear(start=0.2, stop=4.0, steps=1), [0.2, 4, 4]),
        (Cosine(start=0.0, stop=1.0, steps=4), [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1]),
        (Cosine(start=3.0, stop=1.0, steps=2), [3, 2, 1, 1]),
        (Sigmoid(start=0.0, stop=2.0, steps=2), [0, 1, 2, 2]),
        (Sigmoid(start=2.0, stop=0.0, steps=2), [2, 1, 0, 0]),
        (Staged([0.0, 0.5, 1.0], at_steps=[2, 5]), [0, 0, 0.5, 0.5, 0.5, 1, 1]),
        (Staged([1.0, 0.0], at_steps=[1]), [1, 0, 0]),
        (Staged([0.0, 0.5, 1.0], at_steps=[2, 2]), [0, 0, 1, 1]),
    ],
    ids=repr,
)
def test_values_by_step(schedule: Schedule, expected: list[float]) -> None:
    assert values(schedule, len(expected)) == pytest.approx(expected, abs=1e-15)


def test_cyclical_is_the_published_cycle() -> None:
    # Fu et al. 2019 with T = 40 steps, M = 4 cycles, R = 0.5
    cycle = [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]
    schedule = Cyclical(stop=1.0, period_steps=10, cycles=4)
    assert values(schedule, 40) == pytest.approx(cycle * 4)
    assert sum(values(schedule, 40)) / 40 == pytest.approx(0.70)
    assert values(schedule, 50)[40:] == [1] * 10


def test_cyclical_plateau_is_at_stop_not_at_one() -> None:
    schedule = Cyclical(start=3.0, stop=2.0, period_steps=4)
    assert values(schedule, 8) == [3, 2.5, 2, 2] * 2


def test_cyclical_with_ratio_one_is_the_sawtooth() -> None:
    schedule = Cyclical(stop=1.0, period_steps=8, ratio=1.0)
    assert values(schedule, 1000) == [step % 8 / 8 for step in range(1000)]


def test_cyclical_starts_every_cycle_at_start_when_cycles_do_not_divide_the_run() -> None:
    # T = 37, M = 4: rounding the period up (paper) and keeping it fractional (its code) differ by up to 1.0 at a step.
    schedule = Cyclical(stop=1.0, period_fraction=0.25, cycles=4).resolve(total_steps=37)
    assert schedule.period_steps == 9
    assert [step for step in range(37) if schedule(step) == 0] == [0, 9, 18, 27]
    assert schedule(36) == 1


@pytest.mark.parametrize("shape", ["linear", "cosine", "sigmoid"])
def test_cyclical_ramp_has_the_shape_of_the_single_ramp(shape: str) -> None:
    single = {"linear": Linear, "cosine": Cosine, "sigmoid": Sigmoid}[shape](start=0.1, stop=0.7, steps=10)
    cyclical = Cyclical(start=0.1, stop=0.7, period_steps=20, shape=shape)  # type: ignore[arg-type]
    assert values(cyclical, 60) == pytest.approx(values(single, 20) * 3)


def test_sigmoid_is_the_rescaled_textbook_curve() -> None:
    length, tau = 100, 8.0
    low, high = logistic(-length / 2 / tau), logistic(length / 2 / tau)
    expected = [(logistic((step - length / 2) / tau) - low) / (high - low) for step in range(length + 1)]
    assert values(Sigmoid(stop=1.0, steps=length, steepness=length / tau), length + 1) == pytest.approx(expected)


def test_sigmoid_is_close_to_bowman() -> None:
    # Sentence-VAE: a = 0.0025, t0 = 2500 steps
    schedule = Sigmoid(stop=1.0, steps=5000, steepness=0.0025 * 5000)
    for step in (0, 1000, 2500, 4000, 5000):
        assert schedule(step) == pytest.approx(logistic(0.0025 * (step - 2500)), abs=2e-3)


@pytest.mark.parametrize("steepness", [1e-300, 1e-3, 1.0, 12.0, 1e3, 1e300])
def test_sigmoid_ramp_is_exact_and_never_overflows(steepness: float) -> None:
    assert sigmoid_ramp(0.0, steepness) == 0
    assert sigmoid_ramp(0.5, steepness) == 0.5
    assert sigmoid_ramp(1.0, steepness) == 1


# Join


def test_join_counts_each_schedule_from_its_own_start() -> None:
    schedule = Join([Constant(0.0, steps=2), Linear(stop=1.0, steps=2), Linear(start=1.0, stop=0.5, steps=2)])
    assert values(schedule, 8) == [0, 0, 0, 0.5, 1, 0.75, 0.5, 0.5]
    assert (schedule.length, schedule.final) == (6, 0.5)


def test_join_with_one_schedule_is_that_schedule() -> None:
    assert values(Join([Linear(stop=1.0, steps=3)]), 6) == values(Linear(stop=1.0, steps=3), 6)


def test_join_may_end_in_something_endless() -> None:
    schedule = Join([Linear(stop=2.0, steps=2), Constant(0.5)])
    assert values(schedule, 4) == [0, 1, 0.5, 0.5]
    assert schedule.length == 2
    forever = Join([Constant(0.0, steps=3), Cyclical(stop=1.0, period_steps=2)])
    assert values(forever, 7) == [0, 0, 0, 0, 1, 0, 1]
    assert forever.length == math.inf


def test_joins_nest() -> None:
    inner = Join([Constant(0.0, steps=2), Linear(stop=1.0, steps=2)])
    assert values(Join([inner, inner]), 9) == [0, 0, 0, 0.5] * 2 + [1]


def test_join_gives_the_cycle_of_optimus() -> None:
    # a quarter at 0, a quarter of ramp, half at 1
    cycle = [Constant(0.0, steps=4), Cyclical(stop=1.0, period_steps=12, ratio=1 / 3, cycles=1)]
    assert values(Join(cycle * 4), 64) == pytest.approx(([0] * 4 + [0, 0.25, 0.5, 0.75] + [1] * 8) * 4)


# What holds for every schedule

AWKWARD = [(0.1, 0.7), (0.7, 0.1), (0.3, 0.1 + 0.2), (1 / 3, 1e-12), (-1e9, 1e-9), (0.1, 0.1), (0.0, 4.0)]
RAMPS: list[Callable[[float, float, int], Schedule]] = [
    lambda start, stop, steps: Linear(start=start, stop=stop, steps=steps),
    lambda start, stop, steps: Cosine(start=start, stop=stop, steps=steps),
    lambda start, stop, steps: Sigmoid(start=start, stop=stop, steps=steps),
    lambda start, stop, steps: Sigmoid(start=start, stop=stop, steps=steps, steepness=500.0),
    lambda start, stop, steps: Cyclical(start=start, stop=stop, period_steps=steps, cycles=1),
    lambda start, stop, steps: Cyclical(start=start, stop=stop, period_steps=steps, cycles=1, ratio=1.0),
    lambda start, stop, steps: Cyclical(start=start, stop=stop, period_steps=steps, cycles=1, shape="cosine"),
    lambda start, stop, steps: Staged([start, stop], at_steps=[steps]),
    lambda start, stop, steps: Join([Linear(start=start, stop=start, steps=1), Constant(stop)]),
]
IDS = ["linear", "cosine", "sigmoid", "steep", "cyclical", "sawtooth", "cosine cycle", "staged", "join"]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("start", "stop"), AWKWARD)
@pytest.mark.parametrize("ramp", RAMPS, ids=IDS)
def test_every_schedule_is_exact_at_both_ends_and_monotone(
    ramp: Callable[[float, float, int], Schedule], start: float, stop: float, steps: int
) -> None:
    schedule = ramp(start, stop, steps)
    assert schedule(0) == start
    assert schedule.final == stop
    assert [schedule(int(schedule.length) + later) for later in (0, 1, 10, 10**9)] == [stop] * 4
    rising = [b - a for a, b in pairwise(values(schedule, steps + 2))]
    assert all(rise >= 0 for rise in rising) if stop >= start else all(rise <= 0 for rise in rising)


def test_no_schedule_goes_on_before_its_start() -> None:
    for schedule in (Constant(1.0), Linear(stop=1.0, steps=2), Staged([0.0, 1.0], at_steps=[1])):
        with pytest.raises(ValueError, match=r"`step` must be >= 0, got -1"):
            schedule(-1)


def test_cycles_for_ever_have_no_end() -> None:
    schedule = Cyclical(stop=2.0, period_steps=10)
    assert (schedule.length, schedule.final) == (math.inf, 2.0)
    assert schedule(10**9) == 0
    assert schedule(10**9 + 5) == 2


def test_a_bare_constant_has_no_length() -> None:
    assert (Constant(0.5).length, Constant(0.5).final) == (0, 0.5)


# Lengths and ends that depend on the run


@pytest.mark.parametrize(
    ("schedule", "length"),
    [
        (Linear(steps=7), 7),
        (Linear(epochs=2), 90),
        (Linear(epochs=2.5), 112),  # 112.5, rounded down
        (Sigmoid(fraction=0.25), 225),
        (Cosine(fraction=1.0), 900),
        (Linear(fraction=1e-9), 1),
        (Constant(0.0), 0),
        (Constant(0.0, epochs=1), 45),
        (Cyclical(period_epochs=2, cycles=3), 270),
        (Cyclical(period_fraction=0.25, cycles=4), 900),
        (Staged([0.0, 0.5, None], at_epochs=[1, 2]), 90),
        (Staged([0.0, 0.5, None], at_fractions=[0.1, 0.5]), 450),
        (Join([Constant(0.0, fraction=0.1), Linear(epochs=2), Linear(start=1.0, steps=10)]), 190),
    ],
    ids=repr,
)
def test_lengths_in_every_unit(schedule: Schedule, length: int) -> None:
    resolved = schedule.resolve(target=4.0, steps_per_epoch=45, total_steps=900)
    assert type(resolved) is type(schedule)
    assert resolved.length == length
    assert resolved.resolve() == resolved


def test_a_fraction_means_the_decimal_number_that_was_written() -> None:
    assert 0.29 * 100 < 29
    assert Linear(stop=1.0, fraction=0.29).resolve(total_steps=100).steps == 29


@pytest.mark.parametrize("total_steps", [7, 37, 99, 100, 101])
def test_fractions_that_sum_to_one_fit_into_the_run(total_steps: int) -> None:
    halves = Join([Linear(fraction=0.5), Linear(start=1.0, fraction=0.5)])
    quarters = Cyclical(period_fraction=0.25, cycles=4)
    for schedule in (halves, quarters):
        assert total_steps - 4 < schedule.resolve(1.0, total_steps=total_steps).length <= total_steps


def test_stages_of_a_very_short_run_may_fall_together() -> None:
    schedule = Staged([0.0, 0.5, 1.0], at_fractions=[0.01, 0.02]).resolve(total_steps=1)
    assert values(schedule, 3) == [0, 1, 1]


@pytest.mark.parametrize(
    "schedule",
    [
        Linear(start=0.5, steps=3),
        Cosine(start=9.0, steps=3),
        Sigmoid(steps=3),
        Cyclical(period_steps=3, cycles=2),
        Staged([0.0, None], at_steps=[3]),
        Join([Linear(steps=3), Linear(start=5.0, steps=3)]),
    ],
    ids=repr,
)
def test_an_open_end_is_the_configured_value(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"must be a number to compute with, got None"):
        schedule(100)
    with pytest.raises(ValueError, match=r"got None and no configured value\. Give it a `stop`"):
        schedule.resolve()
    resolved = schedule.resolve(target=4.0)
    assert (resolved.final, resolved(100)) == (4.0, 4.0)


def test_inside_a_join_every_open_end_is_the_configured_value() -> None:
    schedule = Join([Linear(steps=2), Linear(start=4.0, stop=1.0, steps=3)]).resolve(target=4.0)
    assert values(schedule, 6) == [0, 2, 4, 3, 2, 1]


def test_an_explicit_end_wins_over_the_configured_value() -> None:
    assert Linear(stop=2.0, steps=3).resolve(target=4.0).final == 2


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Linear(stop=1.0, epochs=2), "`epochs` .* got epochs=2: the number of steps in an epoch"),
        (Constant(1.0, fraction=0.5), "`fraction` .* got fraction=0.5: the number of steps in the run"),
        (Cyclical(stop=1.0, period_epochs=2, cycles=1), "`period_epochs` .* the number of steps in an epoch"),
        (Staged([0.0, 1.0], at_fractions=[0.5]), "`at_fractions` .* the number of steps in the run"),
        (Join([Linear(stop=1.0, fraction=0.5)]), "`fraction` .* the number of steps in the run"),
    ],
)
def test_a_length_that_cannot_be_resolved_asks_for_steps(schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message + " is not known. Give the length in steps."):
        schedule.resolve(target=1.0)
    with pytest.raises(ValueError, match=r"`(\w+_)?steps` must be a number to compute with, got None"):
        _ = schedule.length


# Mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(stop=1.0), "exactly one of `steps`, `epochs`, `fraction`, got none of them"),
        (lambda: Linear(steps=3, epochs=1), "exactly one of .*, got steps=3, epochs=1"),
        (lambda: Constant(1.0, steps=3, fraction=0.5), "exactly one of .*, got steps=3, fraction=0.5"),
        (lambda: Cyclical(), "exactly one of `period_steps`, `period_epochs`, `period_fraction`, got none"),
        (lambda: Staged([0.0, 1.0]), "exactly one of `at_steps`, `at_epochs`, `at_fractions`, got none"),
        (lambda: Linear(steps=0), "`steps` must be an integer >= 1, got 0"),
        (lambda: Linear(steps=2.5), "`steps` must be an integer >= 1, got 2.5"),  # type: ignore[arg-type]
        (lambda: Cosine(epochs=0), "`epochs` must be a finite number > 0, got 0"),
        (lambda: Cosine(epochs=math.inf), "`epochs` must be a finite number > 0, got inf"),
        (lambda: Sigmoid(fraction=0.0), r"`fraction` must be a fraction of the run, in \(0, 1\], got 0.0"),
        (lambda: Sigmoid(fraction=10), r"`fraction` must be .* in \(0, 1\], got 10"),
        (lambda: Sigmoid(fraction=math.nan), r"`fraction` must be .* in \(0, 1\], got nan"),
        (lambda: Cyclical(period_steps=-1), "`period_steps` must be an integer >= 1, got -1"),
        (lambda: Constant(1.0, epochs=-1), "`epochs` must be a finite number > 0, got -1"),
        (lambda: Constant(math.nan), "`value` must be finite, got nan"),
        (lambda: Linear(start=math.inf, steps=3), "`start` must be finite, got inf"),
        (lambda: Linear(stop=math.nan, steps=3), "`stop` must be finite, got nan"),
        (lambda: Cyclical(stop=math.inf, period_steps=3), "`stop` must be finite, got inf"),
        (lambda: Sigmoid(steps=3, steepness=0.0), "`steepness` must be a finite number > 0, got 0.0"),
        (lambda: Sigmoid(steps=3, steepness=math.inf), "`steepness` must be a finite number > 0, got inf"),
        (lambda: Cyclical(period_steps=3, cycles=0), "`cycles` must be an integer >= 1, or None .* got 0"),
        (lambda: Cyclical(period_steps=3, ratio=0.0), r"`ratio` must be in \(0, 1\], got 0.0"),
        (lambda: Cyclical(period_steps=3, ratio=1.5), r"`ratio` must be in \(0, 1\], got 1.5"),
        (
            lambda: Cyclical(period_steps=3, shape="square"),  # type: ignore[arg-type]
            "`shape` must be one of linear, cosine, sigmoid, got 'square'",
        ),
        (lambda: Staged([0.0, 1.0], at_steps=[1, 2]), "`at_steps` must have one boundary fewer .* got 2 for 2"),
        (lambda: Staged([0.0, 1.0], at_steps=[0]), "`at_steps` must be an integer >= 1, got 0"),
        (lambda: Staged([0.0, 0.5, 1.0], at_epochs=[2, 1]), r"`at_epochs` must not decrease, got \[2, 1\]"),
        (lambda: Staged([None, 1.0], at_steps=[1]), r"Only the last of `values` may be None, got \[None, 1.0\]"),
        (lambda: Staged([0.0, math.nan], at_steps=[1]), "`values` must be finite, got nan"),
        (lambda: Join([]), "`schedules` must hold at least one schedule"),
        (lambda: Join([float]), "`schedules` must hold `Schedule` objects, got <class 'float'>"),  # type: ignore[list-item]
        (lambda: Join([Constant(0.0), Linear(steps=3)]), "`schedules` must all end except the last, got Constant"),
        (lambda: Join([Cyclical(period_steps=3), Linear(steps=3)]), "must all end except the last, got Cyclical"),
    ],
)
def test_mistakes_are_errors_at_construction(build: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# Objects

EVERY: list[Schedule] = [
    Constant(0.5),
    Linear(epochs=1),
    Cosine(stop=2.0, steps=10),
    Sigmoid(steps=10, steepness=8.0),
    Cyclical(period_fraction=0.25, cycles=4, shape="cosine"),
    Staged([0.0, None], at_steps=[10]),
    Join([Constant(0.0, steps=10), Linear(fraction=0.5)]),
]


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_schedules_are_values(schedule: Schedule) -> None:
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule), eval(repr(schedule))):
        assert twin == schedule
        assert hash(twin) == hash(schedule)


def test_later_changes_of_the_arguments_change_nothing() -> None:
    stages: list[float | None] = [0.0, 1.0]
    schedule = Staged(stages, at_steps=[1])
    stages[1] = 5.0
    assert schedule(1) == 1


class Knob:
    def __init__(self, schedule: Schedule | Callable[[int], float]) -> None:
        self.schedule = schedule


class PlainKnob:
    def __init__(self, schedule: Callable[[int], float]) -> None:
        self.schedule = schedule


def linear(class_path: str) -> dict[str, object]:
    return {"class_path": class_path, "init_args": {"start": 0.1, "steps": 3}}


def auto_cli(*arguments: Any, **options: Any) -> Any:
    return pytest.importorskip("jsonargparse", reason="the base install has no command line").auto_cli(
        *arguments, **options
    )


def joined(prefix: str) -> dict[str, object]:
    hold = {"class_path": f"{prefix}Constant", "init_args": {"value": 0, "epochs": 1}}
    return {"class_path": f"{prefix}Join", "init_args": {"schedules": [hold, linear(f"{prefix}Linear")]}}


@pytest.mark.parametrize(
    ("knob", "config", "expected"),
    [
        (PlainKnob, linear(f"{MODULE}.Linear"), Linear(start=0.1, steps=3)),
        (PlainKnob, joined(f"{MODULE}."), Join([Constant(0.0, epochs=1), Linear(start=0.1, steps=3)])),
        (Knob, linear(f"{MODULE}.Linear"), Linear(start=0.1, steps=3)),
        (Knob, linear("Linear"), Linear(start=0.1, steps=3)),
        (Knob, joined(""), Join([Constant(0.0, epochs=1), Linear(start=0.1, steps=3)])),
        (
            Knob,
            {"class_path": "Staged", "init_args": {"values": [0.0, 0.5, None], "at_epochs": [1, 2.5]}},
            Staged([0.0, 0.5, None], at_epochs=[1, 2.5]),
        ),
        (
            Knob,
            {"class_path": "Cyclical", "init_args": {"period_fraction": 0.25, "cycles": 4, "shape": "cosine"}},
            Cyclical(period_fraction=0.25, cycles=4, shape="cosine"),
        ),
    ],
)
def test_schedules_come_from_yaml(
    knob: type, config: dict[str, object], expected: Schedule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"schedule": config}))
    assert auto_cli(knob, args=[f"--config={file}"]).schedule == expected
    with pytest.raises(SystemExit, match="0"):
        auto_cli(knob, args=[f"--config={file}", "--print_config"])
    file.write_text(capsys.readouterr().out)
    assert auto_cli(knob, args=[f"--config={file}"]).schedule == expected


def test_schedules_come_from_flags() -> None:
    flags = ["--schedule=Sigmoid", "--schedule.epochs=2", "--schedule.steepness=8"]
    assert auto_cli(Knob, args=flags, as_positional=False).schedule == Sigmoid(epochs=2, steepness=8.0)


def test_a_callable_of_ones_own_goes_where_a_schedule_goes() -> None:
    assert auto_cli(Knob, args=["math.sqrt"]).schedule is math.sqrt


PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "schedules.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_examples_of_the_page_run(example: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(example)
    schedule = auto_cli(Knob, args=[f"--config={file}"]).schedule.resolve(1.0, steps_per_epoch=10, total_steps=1000)
    assert 0 < schedule.length <= 5000
    assert schedule.final == 1
