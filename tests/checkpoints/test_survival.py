"""What a run leaves when its disk is full or its files are damaged, and how it goes on."""

import errno

import pytest
import torch

from lightning_vae.checkpoints.run_folder import newest_checkpoint
from lightning_vae.main import main
from tests.checkpoints.linear_run import CHECKPOINTS, LINEAR, LOOP, RUN, damaged, exits, step_of
from tests.cli.test_vae_cli import scalars

pytestmark = pytest.mark.usefixtures("own_folder")


def test_one_command_begins_goes_on_and_knows_when_it_is_done(capsys):
    main(LOOP)
    assert step_of(CHECKPOINTS / "last.ckpt") == 18
    before = {path: path.stat().st_mtime_ns for path in RUN.rglob("*")}
    assert "has finished after 18 steps: nothing is left to do" in exits(LOOP, 0, capsys)
    assert {path: path.stat().st_mtime_ns for path in RUN.rglob("*")} == before
    main([*LOOP, "--trainer.max_epochs=4"])
    assert f"The newest checkpoint is {CHECKPOINTS / 'last.ckpt'}" in capsys.readouterr().out
    assert step_of(CHECKPOINTS / "last.ckpt") == 24
    assert [step for step, _ in scalars(RUN)["val/loss"]] == [5, 11, 17, 23]
    main(["fit", *LINEAR, "--ckpt_path=last", "--trainer.max_epochs=5"])  # a run of its own, from there
    assert step_of("logs/linear/version_1/checkpoints/last.ckpt") == 30


def test_what_is_no_better_is_saved_too(capsys):
    main(["fit", *LINEAR, "--optimizer.lr=0"])
    assert step_of(CHECKPOINTS / "best.ckpt") == 6
    assert step_of(CHECKPOINTS / "last.ckpt") == 18
    assert str(CHECKPOINTS / "best.ckpt") in capsys.readouterr().out


def test_a_run_that_goes_on_from_its_first_best_keeps_the_newest_under_the_same_name(capsys):
    unchanging = ["fit", *LINEAR, "--optimizer.lr=0"]
    main(unchanging)
    main([*unchanging, f"--ckpt_path={CHECKPOINTS / 'best.ckpt'}", "--same_run=true", "--trainer.max_epochs=4"])
    assert {path.name: step_of(path) for path in CHECKPOINTS.iterdir()} == {"best.ckpt": 6, "last.ckpt": 24}


@pytest.mark.parametrize("place", ["best.ckpt", "last.ckpt"])
def test_a_full_disk_ends_the_run_and_loses_nothing_that_was_saved(place, capsys, monkeypatch):
    calls = []

    def full_later(checkpoint, file, save=torch.save):
        calls.append(file)
        save(checkpoint, file)
        if len(calls) > 4 and f".{place}." in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:  # a limit on files would catch TensorBoard's thread, too
        patched.setattr(torch, "save", full_later)
        error = exits(LOOP, 1, capsys)
    assert f"{CHECKPOINTS / place} can't be saved: No space left on device" in error
    assert "`--ckpt_path last --same_run true` continues" in error
    assert not (RUN / "fit.json").exists()
    assert step_of(CHECKPOINTS / place) == 12
    assert not list(CHECKPOINTS.glob(".*"))
    main(LOOP)
    assert step_of(CHECKPOINTS / "last.ckpt") == 18
    assert [step for step, _ in scalars(RUN)["val/loss"]] == [5, 11, 17]


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "file" in exits(["fit", *LINEAR, f"--trainer.logger.save_dir={tmp_path / 'file' / 'logs'}"], 2, capsys)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(capsys):
    each = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename={step}",
            "--trainer.callbacks.save_top_k=-1"]  # fmt: skip
    main(["fit", *LINEAR, *each])
    last = CHECKPOINTS / "last.ckpt"
    (CHECKPOINTS / "best.ckpt").unlink()
    (CHECKPOINTS / "step=18.ckpt").unlink()
    for content in damaged(last.read_bytes()):
        last.write_bytes(content)
        with pytest.warns(UserWarning, match=r"last\.ckpt' can't be read\. .* It is skipped"):
            assert newest_checkpoint(RUN, resumes=True) == CHECKPOINTS / "step=12.ckpt"
        error = exits(["fit", *LINEAR, f"--ckpt_path={last}"], 2, capsys)
        assert f"'{last}' can't be read" in error
        assert f"The newest valid one in the same folder is {CHECKPOINTS / 'step=12.ckpt'}" in error
    with pytest.warns(UserWarning, match=r"last\.ckpt"):
        main([*LOOP, *each, "--trainer.max_epochs=4"])
    for path in CHECKPOINTS.iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"):
        error = exits([*LOOP, "--trainer.max_epochs=5"], 2, capsys)
    assert f"No checkpoint in {RUN} can be read" in error


def test_events_that_a_kill_cut_short_are_read_up_to_there(tmp_path):
    main(LOOP)
    events = next(RUN.glob("events*"))
    whole = events.read_bytes()
    for cut in range(len(whole) // 2, len(whole) // 2 + 40):
        events.write_bytes(whole[:cut])
        assert scalars(RUN)["train/elbo"][0][0] == 3
    main([*LOOP, "--trainer.max_epochs=4"])
    assert scalars(RUN)["val/loss"][-1][0] == 23
