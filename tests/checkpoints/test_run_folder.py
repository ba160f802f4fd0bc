"""The folder that a run goes on in."""

import json
import shutil

import pytest

from lightning_vae.main import main
from tests.checkpoints.linear_run import CHECKPOINTS, LINEAR, LOOP, RUN, exits, step_of
from tests.cli.test_vae_cli import scalars

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_run_that_ends_between_two_saves_makes_up_for_the_second(capsys):
    main(["fit", *LINEAR])
    main(["fit", *LINEAR, "--trainer.max_epochs=2"])
    shutil.copy("logs/linear/version_1/checkpoints/last.ckpt", CHECKPOINTS / "last.ckpt")
    shutil.rmtree("logs/linear/version_1")
    (RUN / "fit.json").unlink()
    capsys.readouterr()
    main(LOOP)
    assert f"The newest checkpoint is {CHECKPOINTS / 'best.ckpt'}" in capsys.readouterr().out
    assert step_of(CHECKPOINTS / "last.ckpt") == 18
    assert sorted(path.name for path in CHECKPOINTS.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_without_a_checkpoint_starts_over_in_its_folder(capsys):
    RUN.mkdir(parents=True)
    (RUN / "config.yaml").write_text("cut o")
    (RUN / "events.out.tfevents.1.killed.1.0").write_bytes(b"\x18\0")
    main(LOOP)
    assert "it starts over" in capsys.readouterr().out
    assert [path.name for path in RUN.parent.iterdir()] == [RUN.name]
    assert [step for step, _ in scalars(RUN)["train/elbo"]] == [3, 7, 11, 15]
    assert [path.name for path in RUN.glob("*.yaml") if path.name != "hparams.yaml"] == ["config.yaml"]
    assert "model:" in (RUN / "config.yaml").read_text()


def test_the_folder_of_an_evaluation_is_no_run(capsys):
    main(["fit", *LINEAR])
    main(["validate", *LINEAR, f"--ckpt_path={RUN}"])
    assert (RUN.with_name("version_1") / "config.yaml").is_file()
    assert str(RUN) in exits(LOOP, 0, capsys)
    main(["validate", *LINEAR, "--ckpt_path=last"])
    assert f"The newest checkpoint is {CHECKPOINTS / 'last.ckpt'}" in capsys.readouterr().out


def test_what_cannot_be_found_is_said(capsys):
    for arguments, message in (
        ([], "there is no checkpoint in any run of this config"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"], "only runs of TensorBoardLogger"),
        (["--trainer.callbacks.dirpath=elsewhere"], "a checkpoint callback has another `dirpath`"),
    ):
        assert message in exits(["fit", *LINEAR, "--ckpt_path=last", *arguments], 2, capsys)


def test_the_file_that_says_a_run_is_done_says_within_which_limits():
    main(LOOP)
    assert json.loads((RUN / "fit.json").read_text())["limits"] == {
        "max_epochs": "3", "max_steps": "-1", "max_time": None
    }  # fmt: skip
