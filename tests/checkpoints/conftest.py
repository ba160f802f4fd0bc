import sys

import pytest


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Run in a folder of its own, as if from the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
