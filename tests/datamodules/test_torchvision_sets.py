import pytest

from lightning_vae.datamodules import CIFAR10, KMNIST, MNIST, SVHN, FashionMNIST, Omniglot


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize(
    ("cls", "layout"),
    [
        (MNIST, "train-images-idx3-ubyte"),
        (FashionMNIST, "FashionMNIST/raw"),
        (KMNIST, "KMNIST/raw"),
        (CIFAR10, "cifar-10-batches-py"),
        (SVHN, "test_32x32.mat"),
        (Omniglot, "images_evaluation"),
    ],
)
def test_a_failed_or_unwanted_download_says_what_to_put_where(tmp_path, cls, layout):
    with pytest.raises(FileNotFoundError, match="its download failed") as failed:
        cls(tmp_path / "data").prepare_data()
    assert layout in str(failed.value)
    assert str(tmp_path) in str(failed.value)
    assert "Name or service not known" in str(failed.value)
    with pytest.raises(FileNotFoundError, match="`download` is off") as unwanted:
        cls(tmp_path / "other", download=False).prepare_data()
    assert layout in str(unwanted.value)
    assert not (tmp_path / "other").exists()
