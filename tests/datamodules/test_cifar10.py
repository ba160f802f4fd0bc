import pickle

import numpy as np
import torchvision

from lightning_vae.datamodules import CIFAR10
from tests.datamodules.doubles import ready, splits


def test_cifar10(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    data = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        data[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data[name], "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    train, val, test = splits(ready(CIFAR10(tmp_path)))
    assert [len(split["x"]) for split in (train, val, test)] == [18, 2, 4]
    np.testing.assert_array_equal(test["x"], data["test_batch"].reshape(4, 3, 32, 32))
    assert test["label"].tolist() == [3, 1, 4, 1]
