from urllib.error import URLError

import pytest


@pytest.fixture
def _offline(monkeypatch):
    def fail(*_, **__):
        raise URLError("Name or service not known")

    import torchvision

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar, torchvision.datasets.omniglot):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", fail)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
