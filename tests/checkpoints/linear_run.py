"""A short run of the command line, and its folder."""

from pathlib import Path

import pytest

from lightning_vae.checkpoints.checkpoint_io import read
from lightning_vae.main import main

ROOT = Path(__file__).parents[2]
LINEAR = ["--config", str(ROOT / "configs" / "linear.yaml"), "--data.size=96", "--data.batch_size=16",
          "--trainer.log_every_n_steps=4", "--trainer.max_epochs=3", "--trainer.callbacks=null",
          "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss",
          "--trainer.callbacks.filename=best", "--trainer.callbacks+=LastCheckpoint",
          "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]  # fmt: skip
LOOP = ["fit", *LINEAR, "--ckpt_path=last", "--same_run=true"]
RUN = Path("logs/linear/version_0")
CHECKPOINTS = RUN / "checkpoints"


def exits(arguments, code, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert (exit_.value.code or 0) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err if code else said.out


def step_of(path):
    return read(path)["global_step"]


def damaged(whole: bytes):
    middle = len(whole) // 2
    yield from (whole[:length] for length in (0, 1, 100, middle, len(whole) - 1))
    yield whole[:middle] + bytes(64) + whole[middle + 64 :]  # what a power cut may leave: torch.load would not see it
