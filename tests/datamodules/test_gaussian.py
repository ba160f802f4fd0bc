import pytest
import torch

from lightning_vae.datamodules import Gaussian
from tests.datamodules.doubles import ready, splits, whole

SPECTRUM = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1)  # the default


def test_every_gaussian_split_has_the_exact_moments():
    datamodule = ready(Gaussian(size=500))
    assert datamodule.shape == (6,)
    assert datamodule.levels is None
    covariances = []
    for split in splits(datamodule):
        x = split["x"].double()
        assert split["x"].dtype == torch.float32
        torch.testing.assert_close(x.mean(dim=0), torch.zeros(6).double(), atol=1e-7, rtol=0)
        covariances.append(x.T @ x / len(x))
        expected = torch.tensor(SPECTRUM).double().flip(0)
        torch.testing.assert_close(torch.linalg.eigvalsh(covariances[-1]), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(covariances[-1], covariances[0], atol=1e-6, rtol=0)
    assert covariances[0].fill_diagonal_(0).abs().max() > 0.1  # rotated
    train, val, test = (split["x"] for split in splits(datamodule))
    assert not torch.equal(val, test)
    assert not any(torch.equal(train[0], row) for row in val)
    assert torch.equal(whole(ready(Gaussian(size=500)).val_dataloader())["x"], val)
    assert not torch.equal(whole(ready(Gaussian(size=500, seed=1)).val_dataloader())["x"], val)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eigenvalues": ()}, r"`eigenvalues` must be one or more positive numbers, got \[\]"),
        ({"eigenvalues": (1.0, 0.0)}, "`eigenvalues` must be one or more positive numbers"),
        ({"size": 6}, r"`size` must be greater than the number of eigenvalues \(6\), got 6"),
    ],
)
def test_gaussian_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Gaussian(**options)
