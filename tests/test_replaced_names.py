"""Names of earlier versions, and what replaces each."""

import sys
from operator import attrgetter

import pytest
import yaml

import lightning_vae
from lightning_vae.cli.errors import readable
from lightning_vae.cli.vae_cli import Unrun
from lightning_vae.replaced_names import advice
from tests.cli.test_vae_cli import DIGITS

CHECKPOINT = "use Lightning's ModelCheckpoint with `monitor: val/loss` and `filename: best`."
LOGGER = "use Lightning's TensorBoardLogger."
PROFILER = "use the Trainer's own default, by leaving `profiler` out."
BEST = {"class_path": "BestCheckpoint", "init_args": {"every_n_epochs": 10}}
KNOB = {"class_path": "lightning_vae.callbacks.ScheduledKnob", "init_args": {"attribute": "beta"}}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"callbacks": [BEST]}, f"`BestCheckpoint` is gone: {CHECKPOINT}"),
        ({"callbacks": [{**BEST, "class_path": "lightning_vae.BestCheckpoint"}]}, f"is gone: {CHECKPOINT}"),
        ({"callbacks": {"class_path": "lightning_vae.best_checkpoint.BestCheckpoint"}}, f"is gone: {CHECKPOINT}"),
        ({"callbacks+": [{"class_path": "Dashboard"}, BEST]}, f"is gone: {CHECKPOINT}"),
        ({"callbacks+": "BestCheckpoint"}, f"is gone: {CHECKPOINT}"),
        ({"callbacks": [KNOB]}, "`ScheduledKnob` is gone: use AttributeScheduler."),
        (
            {"callbacks": [{"class_path": "lightning_vae.last_checkpoint.LastCheckpoint"}]},
            "`lightning_vae.last_checkpoint.LastCheckpoint` has moved: use lightning_vae.LastCheckpoint.",
        ),
        ({"callbacks": [{"class_path": "lightning_vae.FlushedCurves"}]}, "`FlushedCurves` is gone: use FlushLoggers."),
        ({"logger": "QuickTensorBoardLogger"}, f"`QuickTensorBoardLogger` is gone: {LOGGER}"),
        (
            {"logger": {"class_path": "lightning_vae.QuickTensorBoardLogger", "init_args": {"save_dir": "logs"}}},
            f"`QuickTensorBoardLogger` is gone: {LOGGER}",
        ),
        ({"profiler": "NullProfiler"}, f"`NullProfiler` is gone: {PROFILER}"),
        ({"profiler": {"class_path": "lightning_vae.NullProfiler"}}, f"`NullProfiler` is gone: {PROFILER}"),
    ],
)
def test_a_removed_name_in_a_config_names_its_replacement(trainer, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    with pytest.raises(SystemExit) as exit_:
        Unrun(["fit", *DIGITS, f"--config={tmp_path / 'old.yaml'}"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said) < 500


@pytest.mark.parametrize(
    ("path", "now"),
    [
        ("lightning_vae.last_checkpoint.LastCheckpoint", "lightning_vae.LastCheckpoint"),
        ("lightning_vae.KLAnnealing", "lightning_vae.callbacks.KLAnnealing"),
        ("lightning_vae.callbacks.annealing.KLAnnealing", "lightning_vae.callbacks.KLAnnealing"),
        ("lightning_vae.datamodules.gaussians.Gaussian", "lightning_vae.datamodules.Gaussian"),
        ("lightning_vae.gaussians.Gaussian", "lightning_vae.Gaussian"),
    ],
)
def test_a_class_that_has_moved_is_found(path, now):
    said = readable(
        f"""Parser key "trainer.callbacks":
  Errors:
    - Problem with given class_path '{path}':
        module 'lightning_vae' has no attribute '{path.split(".")[1]}'
  Given value: [{{'class_path': '{path}'}}]"""
    )
    assert said == f"trainer.callbacks: `{path}` has moved: use {now}."


def test_a_class_in_its_place_has_not_moved():
    said = readable("""Parser key "trainer.callbacks":
  Errors:
    - Problem with given class_path 'lightning_vae.callbacks.kl_annealing.KLAnnealing':
        Expected a <class 'int'>""")
    assert said == "trainer.callbacks: Expected a <class 'int'>"


@pytest.mark.parametrize("name", ["BestCheckpoint", "QuickTensorBoardLogger", "NullProfiler", "FlushedCurves"])
def test_a_removed_name_that_is_imported_names_its_replacement(name):
    with pytest.raises(ImportError, match=f"`{name}` is gone: use "):
        getattr(lightning_vae, name)


@pytest.mark.parametrize(
    ("gone", "now"),
    [
        ("callbacks.Attribute", "callbacks.AttributePath"),
        ("callbacks.Diagnosis", "callbacks.CollapseState"),
        ("FlushedCurves", "FlushLoggers"),
        ("callbacks.PosteriorReader", "callbacks.DistributionReader"),
        ("callbacks.ScheduledKnob", "callbacks.AttributeScheduler"),
        ("callbacks.diagnose", "callbacks.collapse_state"),
    ],
)
def test_what_replaces_a_name_is_there(gone, now):
    name = gone.rpartition(".")[2]
    assert advice(f"lightning_vae.{gone}") == f"`{name}` is gone: use {now.rpartition('.')[2]}."
    assert attrgetter(now)(lightning_vae)


@pytest.mark.parametrize("path", ["KLAnnealing", "Diagnosis", "Attribute", "project.BestCheckpoint", "callbacks.Knob"])
def test_other_names_have_no_replacement(path):
    assert advice(path) is None


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"callbacks": [{"class_path": "project.BestCheckpoint"}]}, "No module named 'not_installed'"),
        ({"callbacks": [{"class_path": "nowhere.Attribute"}]}, "No module named 'nowhere'"),
        ({"callbacks": "Attribute"}, "Expected a dot import path string: Attribute"),
        ({"profiler": "project.NullProfiler"}, "it can only be one of"),
    ],
)
def test_a_foreign_class_of_a_removed_name_keeps_its_own_error(trainer, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "project.py").write_text("import not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    with pytest.raises(SystemExit):
        Unrun(["fit", *DIGITS, f"--config={tmp_path / 'own.yaml'}"])
    said = capsys.readouterr().err
    assert says in said
    assert "is gone" not in said
