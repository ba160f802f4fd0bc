import pytest
import torch

from lightning_vae.datamodules import Digits
from tests.datamodules.doubles import ready, splits


def test_digits_hold_out_the_last_297_and_split_the_rest():
    from sklearn.datasets import load_digits

    train, val, test = splits(ready(Digits()))
    assert [len(split["x"]) for split in (train, val, test)] == [1350, 150, 297]
    images, labels = load_digits(return_X_y=True)
    torch.testing.assert_close(test["x"].flatten(1).double(), torch.from_numpy(images[1500:]))
    assert test["label"].tolist() == labels[1500:].tolist()
    # The other two are exactly the first 1500.
    together = torch.cat([train["x"], val["x"]]).flatten(1).double()
    assert sorted(together.tolist()) == sorted(images[:1500].tolist())
    assert train["x"].shape[1:] == Digits().shape
    assert train["x"].dtype == torch.uint8
    assert train["x"].max() == Digits().levels - 1
    assert train["label"].dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"val_fraction": 0}, "`val_fraction` must be between 0 and 1, both excluded, got 0"),
        ({"val_fraction": 1.0}, "`val_fraction` must be between 0 and 1, both excluded, got 1.0"),
    ],
)
def test_digits_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Digits(**options)
