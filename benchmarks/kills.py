"""Kill a run many times, mostly in the middle of a save, and measure the losses.

    python benchmarks/kills.py
    python benchmarks/kills.py --every 4
    python benchmarks/kills.py --in-steps

A small run of `fit ... --ckpt_path last --same_run true` is killed with SIGKILL and restarted, the given number of
times, and then left to finish. The table compares it with a run that was never killed. Temporary files are on another
filesystem, where a rename would be a copy.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vae.checkpoints import checkpoint_io, run_folder
from lightning_vae.checkpoints.checkpoint_io import AtomicCheckpointIO
from lightning_vae.checkpoints.flush_loggers import FlushLoggers
from lightning_vae.main import main as command_line
from lightning_vae.vae import VAE

EPOCH = 6  # steps
CONFIG = """
data: {class_path: Gaussian, init_args: {eigenvalues: [3, 2, 1], size: 96, batch_size: 16}}
model:
  class_path: VAE
  init_args:
    latent_dim: 2
    encoder: {class_path: LinearEncoder}
    decoder: {class_path: LinearDecoder}
    likelihood: {class_path: Gaussian, init_args: {variance: 0.5}}
trainer:
  accelerator: cpu
  log_every_n_steps: 4
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: ., name: runs, default_hp_metric: false}}
  callbacks:
    - {class_path: KLAnnealing, init_args: {schedule: {class_path: Linear, init_args: {fraction: 0.3}}}}
    - {class_path: FreeBits, init_args: {threshold: 0.05}}
    - {class_path: CollapseDetector, init_args: {warmup: 20, patience: 5}}
    - {class_path: ModelCheckpoint, init_args: {monitor: val/loss, filename: best}}
    - {class_path: LastCheckpoint}
"""
EVERY = "    - {{class_path: ModelCheckpoint, init_args: {{every_n_train_steps: {}, filename: step}}}}\n"


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(number: int, function: Callable[..., Any], kill: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it works `number - 1` times and then kills the process."""
    calls = iter(range(1, number + 1))
    return lambda *arguments, **options: (kill if next(calls) == number else function)(*arguments, **options)


def _half(checkpoint: Any, file: Any) -> None:
    torch_save(checkpoint, whole := io.BytesIO())
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    _kill()


torch_save, save, replace = torch.save, AtomicCheckpointIO.save_checkpoint, os.replace


def _in_save(place: str, number: int) -> None:
    """Make this process die during the save with this number."""
    if place == "half written":
        torch.save = _at(number, torch_save, _half)
    elif place == "before the save":  # and so between `best` and `last`, too
        AtomicCheckpointIO.save_checkpoint = _at(number, save, lambda *_, **__: _kill())  # type: ignore[method-assign]
    else:
        last = {"not yet flushed": "fsync", "before the rename": "replace", "after the rename": "open"}[place]

        def save_and_die(self: AtomicCheckpointIO, *arguments: Any, **options: Any) -> None:
            if last != "open":
                setattr(os, last, lambda *_: _kill())
            else:
                os.replace = lambda *names: (replace(*names), _kill())  # type: ignore[assignment]
            save(self, *arguments, **options)

        AtomicCheckpointIO.save_checkpoint = _at(number, save, save_and_die)  # type: ignore[method-assign]


def _elsewhere(place: str, number: int) -> None:
    """Make this process die outside a save."""
    hooks = {"at the first step": "on_train_start", "in a step": "training_step", "in validation": "validation_step"}
    number = 1 if place == "at the first step" else number
    setattr(VAE, hooks[place], _at(number, getattr(VAE, hooks[place]), lambda *_, **__: _kill()))


IN_SAVE = ("before the save", "half written", "not yet flushed", "before the rename", "after the rename")
ELSEWHERE = ("at the first step", "in a step", "in validation", "at any time")


def attempt(options: list[str], reached: mmap, arrange: Callable[[], None] = lambda: None, seconds: float = 0) -> int:
    """Run the command line in a fork, which avoids repeating the imports.

    Args:
        options: Options of `fit`.
        reached: Shared memory in which the process notes its last step.
        arrange: Called in the process; arranges its death.
        seconds: Time until it is killed from outside; 0 for never.

    Returns:
        Its exit code.
    """
    if process := os.fork():
        if seconds:
            time.sleep(seconds)
            os.kill(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)

        def note(_self: Any, trainer: Any, *_: Any) -> None:
            reached[:8] = trainer.global_step.to_bytes(8, "little")

        FlushLoggers.on_train_batch_end = note  # type: ignore[method-assign]
        sys.argv = ["train.py"]
        arrange()
        command_line(["fit", "--config", "config.yaml", *options])
        os._exit(0)
    except SystemExit as exit_:
        os._exit(int(exit_.code or 0))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all curves, as TensorBoard shows them."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def same(one: Any, other: Any) -> bool:
    """Compare nested containers of tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def kill_again_and_again(saves: int, others: int, epochs: int, every: int, in_steps: bool) -> dict[str, Any]:
    """Kill a run in this folder, let it finish, and compare it with a run that was never killed.

    Args:
        saves: Number of kills within a save.
        others: Number of other kills.
        epochs: Length of the run.
        every: Steps between further saves within the epochs; 0 for saves after validation only.
        in_steps: Give the length to the Trainer in steps, for which it resumes along another path.

    Returns:
        Counts and comparisons, by name.
    """
    Path("config.yaml").write_text(CONFIG + (EVERY.format(every) if every else ""))
    reached = mmap(-1, 8)
    length = [f"--trainer.max_epochs={epochs}"]
    if in_steps:
        length = ["--trainer.max_epochs=-1", f"--trainer.max_steps={epochs * EPOCH}"]
    if attempt([*length, "--trainer.logger.version=alone"], reached):
        raise RuntimeError(Path("log.txt").read_text())
    alone, killed = Path("runs/alone"), Path("runs/killed")
    command = [*length, "--trainer.logger.version=killed", "--ckpt_path=last", "--same_run=true"]
    draw = random.Random(0)
    places = [IN_SAVE[n % len(IN_SAVE)] for n in range(saves)] + [ELSEWHERE[n % len(ELSEWHERE)] for n in range(others)]
    draw.shuffle(places)
    kills: Counter[str] = Counter()
    lost, damaged = [], 0
    for place in places:
        number = draw.randint(1, 4 if place in IN_SAVE else 2 * EPOCH)
        if place == "at any time":
            code = attempt(command, reached, seconds=draw.uniform(0.1, 1.0))
        else:
            arrange = _in_save if place in IN_SAVE else _elsewhere
            code = attempt(command, reached, partial(arrange, place, number))
        kills[place if code == -signal.SIGKILL else f"not killed: exit code {code}"] += 1
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            newest = run_folder.newest_checkpoint(killed, resumes=True)
        damaged += len(found)
        step = checkpoint_io.read(newest)["global_step"] if newest else 0
        lost.append(int.from_bytes(reached[:8], "little") - step)
        reached[:8] = step.to_bytes(8, "little")
        time.sleep(1 - time.time() % 1)  # TensorBoard orders the files by the second in their name
    ended = attempt(command, reached)
    expected, got = curves(alone), curves(killed)
    wanted, shown = (
        Counter((tag, step) for tag, points in each.items() for step, _ in points) for each in (expected, got)
    )
    one, other = (checkpoint_io.read(run / "checkpoints" / "last.ckpt") for run in (alone, killed))
    return {
        **kills,
        "kills in all": sum(kills.values()),
        "of them in a save": sum(kills[place] for place in IN_SAVE),
        "exit code of the last attempt": ended,
        "steps from a save to the next": every or EPOCH,
        "steps lost by a kill, at most": max(lost),
        "damaged checkpoints": damaged,
        "files left over": len(list((killed / "checkpoints").glob(".*"))),
        "points of the curves": wanted.total(),
        "points missing": (wanted - shown).total(),
        "points too many": (shown - wanted).total(),
        "same curves": expected == got,
        "same parameters": same(one["state_dict"], other["state_dict"]),
        "same optimizer": same(one["optimizer_states"], other["optimizer_states"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=35, help="kills within a save")
    parser.add_argument("--others", type=int, default=20, help="kills at other places")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--every", type=int, default=0, help="steps between further saves within the epochs")
    parser.add_argument("--in-steps", action="store_true", help="limit the run by steps and not by epochs")
    parser.add_argument("--temporary", default="/dev/shm", help="folder on another filesystem, for TMPDIR")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tempfile.tempdir = os.environ["TMPDIR"] = options.temporary
        another = os.stat(options.temporary).st_dev != os.stat(folder).st_dev
        seen = kill_again_and_again(options.saves, options.others, options.epochs, options.every, options.in_steps)
    print(f"torch {torch.__version__}, TMPDIR on {'another' if another else 'the same'} filesystem")
    for name, value in seen.items():
        print(f"{name:32}{value!s:>8}")


if __name__ == "__main__":
    main()
