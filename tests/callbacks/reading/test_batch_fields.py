from collections import UserDict, UserList

import pytest
import torch

from lightning_vae.callbacks.reading.batch_fields import LABELS, OBSERVATIONS, batch_part


@pytest.mark.parametrize(
    ("batch", "where", "expected"),
    [
        (7, None, (7, None)),
        ((7, 8), None, (7, 8)),
        ([7], None, (7, None)),
        ({"image": 7, "target": 8}, None, (7, 8)),
        ({"other": 7}, None, (None, None)),
        ({"other": 7}, "other", (7, 7)),
        ((5, 6, 7), 2, (7, 7)),
        ((5, 6, 7), sum, (18, 18)),
    ],
)
def test_parts_of_a_batch(batch, where, expected):
    parts = batch_part(batch, where, OBSERVATIONS, 0), batch_part(batch, where, LABELS, 1)
    assert parts == expected


def test_a_part_that_is_not_there():
    with pytest.raises(ValueError, match="A batch has no 'y'; it is or has 'x', 'z'"):
        batch_part({"x": 1, "z": 2}, "y", LABELS, 1)


def test_any_sequence_and_mapping():
    x, y = torch.zeros(2, 3), torch.ones(2)
    assert batch_part(UserList([x, y]), None, LABELS, 1) is y
    assert batch_part(UserDict({"image": x, "label": y}), None, LABELS, 1) is y
    assert batch_part(UserDict({"image": x, "label": y}), None, OBSERVATIONS, 0) is x
    assert batch_part(UserList([x, y]), None, OBSERVATIONS, 0) is x
