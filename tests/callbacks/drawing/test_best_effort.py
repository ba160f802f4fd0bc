import pickle
import warnings

import pytest

from lightning_vae.callbacks.drawing.best_effort import BestEffort


def test_each_failure_is_said_once():
    attempt = BestEffort("Pictures")

    def fail_often():
        for number in range(3):
            for what in ("the samples", "the curves"):
                with attempt(what):
                    raise ValueError(f"number {number}")

    with pytest.warns(UserWarning, match="can't be shown") as said:
        fail_often()
    assert [str(warning.message) for warning in said] == [
        f"Pictures: {what} can't be shown (ValueError: number 0). Training continues without it."
        for what in ("the samples", "the curves")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pickle.loads(pickle.dumps(attempt))("the samples"):
            raise ValueError


def test_what_works_is_not_touched():
    with BestEffort("Pictures")("the samples"):
        done = True
    assert done


def test_the_user_can_still_stop_the_run():
    with pytest.raises(KeyboardInterrupt), BestEffort("Pictures")("the samples"):
        raise KeyboardInterrupt
