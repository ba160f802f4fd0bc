"""The command line: ``fit``, ``validate``, ``test`` and ``predict``, each with ``--config``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning_utilities.core import rank_zero
from typing_extensions import override

from . import callbacks as callbacks  # importing them gives them short names in configs
from . import datamodules as datamodules
from . import likelihoods as likelihoods
from . import networks as networks
from .messages import readable
from .vae import VAE

# What is wrong with the input, as opposed to with the program.
_INPUT_ERRORS = (ValueError, TypeError, OSError, MisconfigurationException)

# Warnings on the way that a user can do nothing about.
_NOT_FOR_USERS = (
    r".*LeafSpec.*is deprecated",  # Lightning's own use of a name that torch is giving up
    r".*configure_optimizers` will be overridden",  # a config's optimizer is meant to win
    r"The dirpath has changed from .*",  # a resumed run keeps its checkpoints in its own folder
)


class Parser(LightningArgumentParser):
    """A parser that says what is wrong, without the page of all options."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an attempt of an outer parser, which goes on with another
            super().error(message, ex)
        _exit(message, f"\nAll options: {getattr(ex, 'subcommand_parser', self).prog.replace(' [options]', '')} --help")


class VAECLI(LightningCLI):
    """A LightningCLI whose data tell the model their shape, and whose errors are one readable message."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--same_run",
            type=bool,
            default=False,
            help="With --ckpt_path: go on in the run folder that the checkpoint lies in, instead of a new one.",
        )
        for name in ("shape", "levels"):
            parser.link_arguments(
                "data", f"model.init_args.{name}", compute_fn=_Attribute(name), apply_on="instantiate"
            )
        parser.set_defaults({"model": {"class_path": "lightning_vae.VAE"}})

    @override
    def _parse_ckpt_path(self) -> None:
        path = self.config[self.config["subcommand"]].get("ckpt_path")
        if path and path not in ("best", "last", "hpc", "registry"):
            try:
                torch.load(path, map_location="meta", mmap=True, weights_only=True)
            except FileNotFoundError:
                _exit(f"`--ckpt_path`: there is no file {path!r}.")
            except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
                _exit(f"`--ckpt_path`: {path!r} can't be read, it is damaged or no checkpoint ({error}).")
        super()._parse_ckpt_path()

    @override
    def before_instantiate_classes(self) -> None:
        for message in _NOT_FOR_USERS:
            warnings.filterwarnings("ignore", message=message)
        rank_zero.log.addFilter(_no_advertisement)
        config = self.config[self.subcommand]
        path = config.get("ckpt_path")
        if config.get("same_run"):
            if not path or not Path(path).is_file():
                _exit("`--same_run` needs `--ckpt_path`, a checkpoint file in the run's folder.")
            config["trainer"]["logger"] = _logger_of_run(Path(path))
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except _INPUT_ERRORS as error:
            _exit(error)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except _INPUT_ERRORS as error:
            # Until the first step is done it is the input; later on a fault, whose traceback is worth having.
            if self.trainer.global_step > 0 and subcommand == "fit":
                raise
            _exit(error)

    def after_fit(self) -> None:
        """Say where everything is."""
        if not self.trainer.is_global_zero:
            return
        lines = {}
        if self.trainer.log_dir:
            lines["Run"] = self.trainer.log_dir
        for checkpoint in self.trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
                score = checkpoint.best_model_score
                monitored = f"  ({checkpoint.monitor} {score:.4g})" if score is not None else ""
                lines["Checkpoint"] = os.path.relpath(checkpoint.best_model_path) + monitored
        if self.trainer.loggers:
            lines["Look at it"] = f"tensorboard --logdir {self.trainer.loggers[0].save_dir}"
        print("\n" + "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items()))


class SaveConfig(SaveConfigCallback):
    """Save the resolved config beside the run; a run that is resumed in its own folder keeps each of them."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.already_saved and trainer.log_dir:
            stem = self.config_filename.removesuffix(".yaml")
            names = (self.config_filename, *(f"{stem}-resumed-{n}.yaml" for n in range(1, 1000)))
            self.config_filename = next(name for name in names if not (Path(trainer.log_dir) / name).exists())
        super().setup(trainer, pl_module, stage)


class _Attribute:
    """Read what the model must know from the data module, with an error that says what is missing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, data: LightningDataModule) -> Any:
        if not hasattr(data, self.name):
            raise ValueError(
                f"`data`: {type(data).__name__} has no attribute `{self.name}`. A data module must offer `shape`, the "
                "shape of one observation, and `levels`, the number of its integer levels or None."
            )
        return getattr(data, self.name)


def _logger_of_run(checkpoint: Path) -> dict[str, Any]:
    """Describe the TensorBoard logger that goes on where a checkpoint's run stopped, without doubling its curve."""
    run = checkpoint.resolve().parent.parent
    loops = torch.load(checkpoint, map_location="cpu", weights_only=True)["loops"]
    step = loops["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {
            "save_dir": os.path.relpath(run.parent.parent),
            "name": run.parent.name,
            "version": run.name,
        },
        "dict_kwargs": {"purge_step": step},
    }


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _exit(error: object, hint: str = "") -> NoReturn:
    names = [name for module in (callbacks, datamodules, likelihoods, networks) for name in vars(module)]
    print(f"error: {readable(str(error), names)}{hint}", file=sys.stderr)
    raise SystemExit(2)


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments in place of the process's own, for use from Python.
    """
    VAECLI(
        VAE,
        LightningDataModule,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
    )
