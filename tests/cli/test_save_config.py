"""The config that a run leaves."""

from types import SimpleNamespace

import pytest

from lightning_vae.cli.save_config import SaveConfig


def saved(folder, **config):
    """Save a config as the Trainer would, and name the files that are there."""
    parser = SimpleNamespace(dump=lambda config, **_: repr(config))
    callback = SaveConfig(parser, {"ckpt_path": None, "same_run": False, **config}, save_to_log_dir=False)
    trainer = SimpleNamespace(log_dir=str(folder), is_global_zero=True, strategy=None)
    callback._folder = folder
    callback.save_config(trainer, None, "fit")
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("same_run", [False, True])
def test_what_is_resumed_keeps_the_configs_of_before(tmp_path, same_run):
    assert saved(tmp_path) == ["config.yaml"]
    first = (tmp_path / "config.yaml").read_text()
    resumed = {"ckpt_path": "last.ckpt", "same_run": same_run}
    assert saved(tmp_path, **resumed) == ["config-resumed-1.yaml", "config.yaml"]
    assert saved(tmp_path, **resumed) == ["config-resumed-1.yaml", "config-resumed-2.yaml", "config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == first


def test_a_run_that_starts_over_in_its_folder_has_one_config(tmp_path):
    (tmp_path / "config.yaml").write_text("cut o")
    assert saved(tmp_path, same_run=True) == ["config.yaml"]
    assert "same_run" in (tmp_path / "config.yaml").read_text()
