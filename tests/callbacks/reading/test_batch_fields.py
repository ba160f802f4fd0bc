import pytest

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
