"""What a run leaves when its disk is full or its files are damaged, and how it goes on."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from tensorboard.summary.writer.record_writer import RecordWriter

from lightning_vae.checkpoints.atomic_write import _HOST, atomic_write
from lightning_vae.checkpoints.checkpoint_io import AtomicCheckpointIO, SaveError, read
from lightning_vae.checkpoints.flush_loggers import FlushLoggers
from lightning_vae.checkpoints.last_checkpoint import LastCheckpoint
from lightning_vae.checkpoints.run_folder import newest_checkpoint
from lightning_vae.cli.vae_cli import Unrun
from lightning_vae.main import main
from tests.cli.test_vae_cli import scalars
from tests.doubles import RecordingVAE, loader, quiet_trainer

ROOT = Path(__file__).parents[2]
LINEAR = ["--config", str(ROOT / "configs" / "linear.yaml"), "--data.size=96", "--data.batch_size=16",
          "--trainer.log_every_n_steps=4", "--trainer.max_epochs=3", "--trainer.callbacks=null",
          "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss",
          "--trainer.callbacks.filename=best", "--trainer.callbacks+=LastCheckpoint",
          "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip
LOOP = ["fit", *LINEAR, "--ckpt_path=last", "--same_run=true"]
RUN = Path("logs/linear/version_0")
CHECKPOINTS = RUN / "checkpoints"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@contextmanager
def disk_full(at: int = 1000):
    """No file can grow beyond `at` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def exits(arguments, code, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert (exit_.value.code or 0) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err if code else said.out


def step_of(path):
    return read(path)["global_step"]


# ---- one file


def test_a_file_appears_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append((name, args)), real(*args)))
    with atomic_write(tmp_path / "new" / "file") as file:
        file.write(b"whole")
        assert not (tmp_path / "new" / "file").exists()
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]  # of the file, and then of its folder
    part, target = calls[1][1]
    assert part.parent == target.parent
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with suppress(KeyboardInterrupt), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parts = {name: tmp_path / f".x.ckpt.{name}.part" for name in (
        f"{_HOST}-{dead.pid}", f"{_HOST}-{os.getppid()}", f"{_HOST}-1", "elsewhere-7", "elsewhere-8"
    )}  # fmt: skip
    for path in (*parts.values(), tmp_path / ".not_ours.part"):
        path.touch()
    os.utime(parts["elsewhere-8"], (0, 0))
    with atomic_write(tmp_path / "y.ckpt"):
        pass
    gone = {name for name, path in parts.items() if not path.exists()}
    assert gone == {f"{_HOST}-{dead.pid}", "elsewhere-8"}
    assert (tmp_path / ".not_ours.part").exists()


@pytest.mark.parametrize("size", [10, 100_000])  # torch's writer has the whole file in its buffer, or not
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, size):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    with disk_full(), pytest.raises(SaveError, match=r"a\.ckpt can't be saved: File too large; the one .* untouched"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2, "weights": torch.zeros(size)}, path)
    assert (step_of(path), len(list(tmp_path.iterdir()))) == (1, 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/a\.ckpt can't be saved: .*; no partial file is left"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "a.ckpt")


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"x": lambda: None}, tmp_path / "a.ckpt")


def damaged(whole: bytes):
    middle = len(whole) // 2
    yield from (whole[:length] for length in (0, 1, 100, middle, len(whole) - 1))
    yield whole[:middle] + bytes(64) + whole[middle + 64 :]  # what a power cut may leave: torch.load would not see it


def test_damage_is_seen_and_named(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1, "weights": torch.randn(10_000)}, path)
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"a\.ckpt' can't be read"):
            AtomicCheckpointIO().load_checkpoint(path)


def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path):
    path = tmp_path / "a.ckpt"
    weights = torch.randn(1000)
    AtomicCheckpointIO().save_checkpoint({"global_step": 1, "weights": weights}, path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), len(whole) // 300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = AtomicCheckpointIO().load_checkpoint(path)
        except OSError:
            refused += 1
        else:  # a file has dates, and room between its parts
            assert found["global_step"] == 1
            assert torch.equal(found["weights"], weights)
    assert refused > 200


def test_code_in_a_checkpoint_is_refused_unless_it_is_trusted(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"path": Path("x")}, tmp_path / "a.ckpt")
    with pytest.raises(OSError, match="not a checkpoint that holds only data"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False) == {"path": Path("x")}


# ---- in a Trainer


@pytest.mark.parametrize("options", [{"save_last": True}, {"save_last": "link"}, {"save_top_k": 1},
                                     {"save_top_k": 2, "monitor": "val/loss"}])  # fmt: skip
def test_a_checkpoint_is_whole_at_every_moment(tmp_path, options):
    kept = []

    class Watched(AtomicCheckpointIO):
        def look(self):
            newest = newest_checkpoint(tmp_path, resumes=True)
            kept.append(step_of(newest) if newest else 0)

        def save_checkpoint(self, *arguments, **options):
            self.look()
            super().save_checkpoint(*arguments, **options)
            self.look()

        def remove_checkpoint(self, path):
            super().remove_checkpoint(path)
            self.look()

    callback = ModelCheckpoint(tmp_path, **options)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], plugins=[Watched()], enable_checkpointing=True,
                            max_epochs=4, logger=False, num_sanity_val_steps=0)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers")
        trainer.fit(RecordingVAE(), loader(), loader())
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (0, 24)


def test_the_command_line_saves_whole_files_unless_told_otherwise():
    assert type(Unrun(["fit", *LINEAR]).trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    named = ["fit", *LINEAR, "--trainer.plugins+=AsyncCheckpointIO"]
    assert type(Unrun(named).trainer.strategy.checkpoint_io) is AsyncCheckpointIO


class LogsEpochs(RecordingVAE):
    def on_train_epoch_end(self):
        super().on_train_epoch_end()
        self.log("epoch/end", 1.0)


class SavesEarly(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint("early.ckpt")


@pytest.mark.parametrize("early", [[], [SavesEarly()]])
def test_the_curves_are_on_the_disk_before_a_checkpoint_is(tmp_path, early, monkeypatch):
    seen = []
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.01), write(*args)))  # lags behind

    class Looks(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            seen.append(
                [[step for step, _ in scalars(tmp_path / "a").get(tag, [])] for tag in ("train/loss", "epoch/end")]
            )
            super().save_checkpoint(checkpoint, path, storage_options)

    trainer = Trainer(accelerator="cpu", logger=TensorBoardLogger(tmp_path, "", "a"), max_epochs=2, log_every_n_steps=2,
                      callbacks=[*early, FlushLoggers(), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)],
                      plugins=[Looks()], enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers")
        trainer.fit(LogsEpochs(), loader())
    assert seen[-1] == [[1, 3, 5, 7, 9, 11], [5] if early else [5, 11]]
    assert [step for step, _ in scalars(tmp_path / "a")["epoch/end"]] == [5, 11]


# ---- from the command line


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


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_epochs": 5}, [12, 24, 30]), ({"max_epochs": 4}, [12, 24]), ({"max_steps": 20}, [12, 20]),
     ({"max_epochs": 5, "limit_val_batches": 0}, [12, 24, 30]), ({"max_epochs": 2, "val_check_interval": 3}, [9, 12]),
     ({"max_epochs": 3, "val_check_interval": 4}, [10, 12, 16, 18]),
     ({"max_epochs": 5, "check_val_every_n_epoch": 3}, [12, 24, 30])],
)  # fmt: skip
def test_the_newest_is_kept_in_every_so_many_epochs_and_at_the_end(tmp_path, monkeypatch, options, steps):
    saved = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda trainer, *_: saved.append(trainer.global_step))
    trainer = quiet_trainer(tmp_path, callbacks=[LastCheckpoint(every_n_epochs=2)], enable_checkpointing=True,
                            num_sanity_val_steps=0, **options)  # fmt: skip
    trainer.fit(RecordingVAE(), loader(), loader())
    assert saved == steps


def test_a_number_of_epochs_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`every_n_epochs` must be at least 1, got 0"):
        LastCheckpoint(every_n_epochs=0)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_keeps_the_newest(config):
    callbacks = yaml.safe_load(config.read_text())["trainer"]["callbacks"]
    assert "LastCheckpoint" in [callback["class_path"] for callback in callbacks]


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


def test_what_cannot_be_found_is_said(capsys):
    for arguments, message in (
        ([], "there is no checkpoint in any run of this config"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"], "only runs of TensorBoardLogger"),
        (["--trainer.callbacks.dirpath=elsewhere"], "a checkpoint callback has another `dirpath`"),
    ):
        assert message in exits(["fit", *LINEAR, "--ckpt_path=last", *arguments], 2, capsys)


def test_events_that_a_kill_cut_short_are_read_up_to_there(tmp_path):
    main(LOOP)
    events = next(RUN.glob("events*"))
    whole = events.read_bytes()
    for cut in range(len(whole) // 2, len(whole) // 2 + 40):
        events.write_bytes(whole[:cut])
        assert scalars(RUN)["train/elbo"][0][0] == 3
    main([*LOOP, "--trainer.max_epochs=4"])
    assert scalars(RUN)["val/loss"][-1][0] == 23


def test_the_file_that_says_a_run_is_done_says_within_which_limits():
    main(LOOP)
    assert json.loads((RUN / "fit.json").read_text())["limits"] == {
        "max_epochs": "3", "max_steps": "-1", "max_time": None
    }  # fmt: skip


def test_a_fit_after_one_that_failed_at_an_epochs_end_logs_as_any_other(tmp_path: Path) -> None:
    """What takes the place of Lightning's logging at an epoch's end goes with the run."""

    class Fails(Callback):
        def on_save_checkpoint(self, *_: object) -> None:
            raise OSError("no space")

    saves = ModelCheckpoint(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    trainer = quiet_trainer(
        tmp_path, callbacks=[FlushLoggers(), saves, Fails()], max_epochs=2, enable_checkpointing=True
    )
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            trainer.fit(RecordingVAE(), loader())
    assert "log_metrics" not in vars(trainer._logger_connector)


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_knows_no_flushing_is_no_fault_and_a_failing_disk_is(
    code: int, raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, "no")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with pytest.raises(OSError, match="no") if raises else nullcontext(), atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
