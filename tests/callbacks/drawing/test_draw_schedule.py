from types import SimpleNamespace

import pytest

from lightning_vae.callbacks.drawing.draw_schedule import DrawSchedule, expected_passes, is_drawn


@pytest.mark.parametrize(
    ("total", "times", "expected"),
    [
        (120, 10, [1, 14, 27, 40, 54, 67, 80, 94, 107, 120]),
        (4, 10, [1, 2, 3, 4]),
        (10, 10, list(range(1, 11))),
        (11, 3, [1, 6, 11]),
        (9, 1, [9]),
        (None, 10, [1, 2, 4, 8, 16, 32, 64, 128]),
    ],
)
def test_which_passes_are_drawn(total, times, expected):
    assert [number for number in range(1, (total or 200) + 1) if is_drawn(number, total, times)] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),
        ({"max_epochs": -1}, None),
        ({"max_epochs": -1, "max_steps": 100}, 10),
        ({"max_steps": 30}, 3),
        ({"max_steps": 30, "accumulate_grad_batches": 2}, 6),
        ({"max_steps": 30, "lightning_module": SimpleNamespace(automatic_optimization=False)}, None),
        ({"lightning_module": SimpleNamespace(automatic_optimization=False)}, 6),
        ({"check_val_every_n_epoch": 2}, 3),
        ({"val_check_batch": 5}, 12),
        ({"val_check_batch": 15, "check_val_every_n_epoch": None}, 4),
        ({"num_training_batches": float("inf"), "val_check_batch": 15}, None),
        ({"num_training_batches": 0}, None),
        ({"val_check_batch": None}, None),
    ],
)
def test_how_many_passes_there_will_be(options, expected):
    trainer = {
        "num_training_batches": 10,
        "val_check_batch": 10,
        "max_epochs": 6,
        "max_steps": -1,
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
        "lightning_module": SimpleNamespace(automatic_optimization=True),
    }
    assert expected_passes(SimpleNamespace(**{**trainer, **options})) == expected


def test_only_the_passes_of_a_fit_count():
    options = {"num_training_batches": 10, "val_check_batch": 10, "max_epochs": 3, "max_steps": -1}
    options |= {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1}

    def trainer(fn="fit", sanity_checking=False):
        return SimpleNamespace(state=SimpleNamespace(fn=fn), sanity_checking=sanity_checking, **options)

    schedule = DrawSchedule(times=2)
    assert not schedule.start_pass(trainer("validate"))
    assert schedule.start_pass(trainer(sanity_checking=True))
    assert schedule.passes == 0
    assert schedule.passes == 0
    assert [schedule.start_pass(trainer()) for _ in range(3)] == [True, False, True]
