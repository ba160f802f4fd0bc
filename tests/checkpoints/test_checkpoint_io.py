"""Checkpoints that are whole, and damage that is seen."""

import resource
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_vae.checkpoints.checkpoint_io import AtomicCheckpointIO, SaveError
from lightning_vae.checkpoints.run_folder import newest_checkpoint
from lightning_vae.cli.vae_cli import Unrun
from tests.checkpoints.linear_run import LINEAR, damaged, step_of
from tests.doubles import RecordingVAE, loader, quiet_trainer

pytestmark = pytest.mark.usefixtures("own_folder")


@contextmanager
def disk_full(at: int = 1000):
    """No file can grow beyond `at` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 100_000])  # torch's writer has the whole file in its buffer, or not
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, size):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    message = r"a\.ckpt can't be saved: File too large; the previous one is untouched"
    with disk_full(), pytest.raises(SaveError, match=message):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2, "weights": torch.zeros(size)}, path)
    assert (step_of(path), len(list(tmp_path.iterdir()))) == (1, 1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/a\.ckpt can't be saved: .*; no partial file is left"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "a.ckpt")


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"x": lambda: None}, tmp_path / "a.ckpt")


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
