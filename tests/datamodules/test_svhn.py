import numpy as np
import torchvision
from scipy.io import savemat  # type: ignore[import-untyped]

from lightning_vae.datamodules import SVHN
from tests.datamodules.doubles import ready, splits


def test_svhn(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.arange(1, 11)[:, None]})
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *_: True)
    train, val, test = splits(ready(SVHN(tmp_path)))
    assert [len(split["x"]) for split in (train, val, test)] == [9, 1, 10]
    np.testing.assert_array_equal(test["x"], images.transpose(3, 2, 0, 1))
    assert test["label"].tolist() == [*range(1, 10), 0]
