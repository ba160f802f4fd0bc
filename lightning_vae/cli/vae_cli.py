"""The command line: ``fit``, ``validate``, ``test`` and ``predict``, each with ``--config``."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from .. import callbacks as callbacks  # importing them gives their classes short names in configs
from .. import datamodules as datamodules
from .. import likelihoods as likelihoods
from .. import networks as networks
from ..checkpoints import run_folder
from ..checkpoints.checkpoint_io import AtomicCheckpointIO
from ..checkpoints.exact_resume import first_step
from ..checkpoints.flush_loggers import FlushLoggers
from ..checkpoints.last_checkpoint import LastCheckpoint
from ..distributed import in_group, leave_processes
from ..evaluation.latents_writer import LatentsWriter
from ..evaluation.report import EvaluationReport
from ..vae import VAE
from . import yaml_checks
from .checkpoint_checks import (
    FROM_DATA,
    KNOBS,
    find_checkpoint,
    read_checkpoint,
    run_limits,
    warn_of_other_data_set,
    warn_of_replaced_options,
)
from .errors import exit_if_expected, exit_with, readable_errors
from .save_config import SaveConfig

# Warnings that a user can do nothing about.
_NOT_FOR_USERS = (
    r".*LeafSpec.*is deprecated",  # Lightning's own use of a name that torch deprecates
    r".*configure_optimizers` will be overridden",  # a config's optimizer is meant to win
    r"You're using the WeightAveraging callback, but loading",  # a checkpoint's weights are the average already
)


_CONFIGS = Path(__file__).parents[1] / "configs"


class Parser(LightningArgumentParser):
    """A parser that rejects abbreviations and reports an error as one message instead of listing all options.

    A ``--config`` that is not a file may name one that comes with the package, such as ``digits``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().parse_args(list(self._with_found(sys.argv[1:] if args is None else args)), *rest, **options)

    def _with_found(self, arguments: Sequence[str]) -> Iterator[str]:
        """Yield the arguments, with the path of each config that comes with the package in place of its name."""
        follows = False
        for argument in arguments:
            option, joined, name = argument.partition("=")
            if follows:
                yield self._found(argument)
            else:
                yield f"{option}={self._found(name)}" if option == "--config" and joined else argument
            follows = argument in ("-c", "--config") and not follows

    def _found(self, config: str) -> str:
        """Return the path of a config that is given by its path or, if the package brings it, by its name."""
        config = os.path.expanduser(config)
        if os.path.exists(config) or not re.fullmatch(r"[\w.+/-]+", config) or config == "-":
            return config  # a file, or a config that is given as text
        if "+" in config:  # a sweep lays one over another
            return "+".join(map(self._found, config.split("+")))
        name = config.removeprefix("configs/").removesuffix(".yaml")
        shipped = {path.relative_to(_CONFIGS).with_suffix("").as_posix(): path for path in _CONFIGS.rglob("*.yaml")}
        if name not in shipped:
            self.error(f"`--config`: there is no file {config!r}. The package brings {', '.join(sorted(shipped))}.")
        return str(shipped[name])

    @override
    def validate(self, namespace: Namespace, _skip_unset: bool = True, **kwargs: Any) -> None:
        # `null` must fit its option like any other value, except for options that are set from the data.
        given = namespace.clone()
        for name in FROM_DATA:
            if given.get(name, "") is None:
                given.pop(name)
        super().validate(given, False, **kwargs)  # the second argument's name differs between versions

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an attempt of an outer parser, which will try another
            super().error(message, ex)
        program = getattr(ex, "subcommand_parser", self).prog.replace(" [options]", "")
        exit_with(message, f"\nAll options: {program} --help")


class VAECLI(LightningCLI):
    """A LightningCLI that passes the shape of the data to the model and reports each error as one readable message.

    Creating an instance runs the subcommand.

    Args:
        args: Arguments in place of the process's own.
    """

    def __init__(self, args: ArgsType = None) -> None:
        yaml_checks.install()
        super().__init__(
            VAE,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},  # Lightning's own way leaves half a file after a kill
            seed_everything_default=0,
            parser_kwargs={"epilog": "`sweep --help`: train and compare many. `auroc --help`: find anomalies."},
            parser_class=Parser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--same_run",
            type=bool,
            default=False,
            help="With --ckpt_path, a file, a folder or `last`: continue in that run's folder, instead of a new one.",
        )
        for name in FROM_DATA:
            parser.link_arguments(
                "data", f"model.init_args.{name}", compute_fn=_Attribute(name), apply_on="instantiate"
            )
        parser.set_defaults({"model": {"class_path": "lightning_vae.VAE"}})

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.add_class_arguments(EvaluationReport, "evaluation")
            parser.set_defaults({"verbose": False})  # the evaluation prints a table of its own
        if subcommand == "predict":
            parser.add_class_arguments(LatentsWriter, "latents")
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with readable_errors():
            super().parse_arguments(parser, args)
            config = self.config[self.config["subcommand"]].as_dict()
            for file in filter(None, config.get("config") or ()):  # None for a config that is given as text
                yaml_checks.check_empty(file.get_content(), config)
            yaml_checks.check_values(config, self.config["subcommand"])
            expand_home(self.config)
        model = config["model"].get("init_args") or {}
        self._given = {name: model[name] for name in FROM_DATA if model.get(name) is not None}

    @override
    def _parse_ckpt_path(self) -> None:
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        self._resumed_step = 0
        if not config.get("ckpt_path") and subcommand != "fit":
            exit_with(f"`{subcommand}` needs `--ckpt_path`: without a checkpoint it would use random weights.")
        if config.get("same_run") and not config.get("ckpt_path"):
            exit_with(
                "`--same_run` needs `--ckpt_path`: a checkpoint file in the run's folder, that folder, or `last`."
            )
        try:
            find_checkpoint(config, resumes=subcommand == "fit")
            path = config.get("ckpt_path")
            if path and path not in ("best", "hpc", "registry"):
                self._use_checkpoint(subcommand, path)
        except (ValueError, OSError) as error:
            exit_with(f"`--ckpt_path`: {error}")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            exit_with(f"`--ckpt_path`: the content of the checkpoint does not fit: {type(error).__name__}: {error}")

    def _use_checkpoint(self, subcommand: str, path: str) -> None:
        """Take the model's options from a checkpoint, and continue in its run if asked to."""
        checkpoint = read_checkpoint(path, resumes=subcommand == "fit")
        self._resumed_step = checkpoint["global_step"]
        before = self.config[subcommand]["model"].as_dict().get("init_args", {})
        with readable_errors():
            super()._parse_ckpt_path()
        config = self.config[subcommand]
        if subcommand == "fit":  # where a knob that is given wins over the checkpoint's; the module says so
            for name in KNOBS:
                if before.get(name) is not None:
                    config["model"]["init_args"][name] = before[name]
        warn_of_other_data_set(checkpoint, config["data"]["class_path"])
        warn_of_replaced_options(before, config["model"].as_dict().get("init_args", {}))
        if config.get("same_run"):
            run = run_folder.of_checkpoint(Path(path), checkpoint)
            run_folder.go_on_in(run, first_step(checkpoint), config["trainer"])

    @override
    def before_instantiate_classes(self) -> None:
        for message in _NOT_FOR_USERS:
            warnings.filterwarnings("ignore", message=message)
        rank_zero.log.addFilter(_no_advertisement)
        threading.excepthook = _report_fault_once
        if self.config[self.subcommand].get("same_run"):
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        elif self._resumed_step:  # a run resumed in a new folder keeps its checkpoints there
            warnings.filterwarnings("ignore", message="The dirpath has changed from")

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return super()._instantiate_trainer(config, [*callbacks, FlushLoggers()])

    @override
    def instantiate_classes(self) -> None:
        with readable_errors():
            super().instantiate_classes()
            if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not if the config names another
                self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            for name, given in self._given.items():
                if getattr(self.datamodule, name, None) != (tuple(given) if isinstance(given, list) else given):
                    raise ValueError(
                        f"`model.{name}` is set from the data: leave it out. The data have "
                        f"{getattr(self.datamodule, name, None)}, got {given}."
                    )
            options = self.config_init[self.subcommand]
            if self.subcommand == "fit":
                yaml_checks.check_schedule(options.get("lr_scheduler"))
            if self.subcommand == "test":
                self.trainer.callbacks.append(options["evaluation"])  # type: ignore[attr-defined]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            exit_if_expected(error, self.trainer, self.trainer.global_step - self._resumed_step)
            raise

    def predict(self, **kwargs: Any) -> None:
        """Write the latents batch by batch instead of collecting them in memory.

        Args:
            **kwargs: Arguments of ``Trainer.predict``.
        """
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, LatentsWriter) for callback in callbacks):
            callbacks.append(self.config_init["predict"]["latents"])
        elif any(option is not None for option in self.config["predict"]["latents"].as_dict().values()):
            exit_with("`--latents`: the callbacks have a LatentsWriter already. Give its options there.")
        path = self.config["predict"]["latents"]["path"]
        if path and os.path.exists(path):
            rank_zero_info(f"`--latents.path`: {path} is there already, and is overwritten.")
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def after_fit(self) -> None:
        """Record that the run has finished, and print where everything is."""
        folder = self.trainer.log_dir  # broadcasts: every process must call it
        if self.config["fit"]["same_run"] and self.trainer.global_step == self._resumed_step:
            self._save_last()
        if not self.trainer.is_global_zero:
            return
        if self.trainer.loggers and folder:
            run_folder.write_finished(Path(folder), self.trainer, run_limits(self.config["fit"]["trainer"]))
        print("\n" + "\n".join(f"{name + ':':<12}{text}" for name, text in self._summary(folder).items()))

    def _save_last(self) -> None:
        """Save the last checkpoint of a run that had nothing left to train, which a kill may have prevented."""
        for checkpoint in self.trainer.checkpoint_callbacks:
            if isinstance(checkpoint, LastCheckpoint):
                self.trainer.save_checkpoint(checkpoint.path)
            elif isinstance(checkpoint, ModelCheckpoint) and checkpoint.last_model_path:
                self.trainer.save_checkpoint(checkpoint.last_model_path)

    def _summary(self, folder: str | None) -> dict[str, str]:
        """Return the lines to print at the end of a fit, by name."""
        lines = {}
        if self.trainer.loggers and folder:
            lines["Run"] = folder
        metrics = self.trainer.callback_metrics
        if "val/elbo" in metrics:
            terms = (f"{name} {float(metrics[f'val/{name.lower()}']):.4g}" for name in ("ELBO", "rate", "distortion"))
            lines["At the end"] = ", ".join(terms) + " nats"
            if "latent/active_units" in metrics:
                units = int(metrics["latent/active_units"])
                lines["At the end"] += f", {units} of {self.model.latent_dim} units active"
        if best := run_folder.best_keeper(self.trainer):
            score = best.best_model_score
            monitored = f"  ({best.monitor} {score:.4g})" if score is not None else ""
            lines["Checkpoint"] = os.path.relpath(best.best_model_path) + monitored
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lines["Look at it"] = f"tensorboard --logdir {logger.save_dir}"
        return lines


def expand_home(value: Any) -> Any:
    """Expand a `~` at the start of each text in a config, such as `~/data`, because a shell does not do so there.

    Args:
        value: A config, which is changed in place, or a part of one.

    Returns:
        The value with its texts expanded.
    """
    if isinstance(value, str | Path):
        return type(value)(os.path.expanduser(value))
    if isinstance(value, Namespace | dict | list):
        for key, item in list(enumerate(value) if isinstance(value, list) else value.items()):
            value[key] = expand_home(item)
    return value


def run(args: ArgsType = None) -> VAECLI:
    """Run a subcommand, and leave any process group that it made when this process ends.

    Args:
        args: Arguments in place of the process's own.
    """
    group_is_callers = in_group()
    cli = VAECLI(args)
    # Not now, because another run may follow; nor after a failure, when gloo's threads may wait for other processes.
    if not group_is_callers:
        atexit.register(leave_processes)
    return cli


class Unrun(VAECLI):
    """The command line up to the point of running: it only makes the model, data and Trainer."""

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _Attribute:
    """A reader of one attribute of the data module that the model needs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, data: LightningDataModule) -> Any:
        if self.name == "kinds":  # of a table's columns; other data have none
            return getattr(data, self.name, None)
        if not hasattr(data, self.name):
            raise ValueError(
                f"`data`: {type(data).__name__} has no attribute `{self.name}`. A data module must offer `shape`, the "
                "shape of one observation, and `levels`, the number of its integer levels or None."
            )
        return getattr(data, self.name)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _report_fault_once(fault: threading.ExceptHookArgs) -> None:
    if not isinstance(fault.exc_value, OSError):  # TensorBoard's thread passes these on to the run, which reports them
        threading.__excepthook__(fault)
