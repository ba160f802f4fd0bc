"""The command line: ``fit``, ``validate``, ``test``, ``predict`` and ``sweep``, each with ``--config``."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_class
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning_utilities.core import rank_zero
from torch import nn
from typing_extensions import override

from .. import callbacks as callbacks  # importing them gives them short names in configs
from .. import datamodules as datamodules
from .. import likelihoods as likelihoods
from .. import networks as networks
from ..checkpoints import run_folder
from ..checkpoints.atomic_write import atomic_write
from ..checkpoints.checkpoint_io import AtomicCheckpointIO, SaveError, read
from ..checkpoints.class_paths import check_descriptions
from ..checkpoints.exact_resume import first_step
from ..checkpoints.flush_loggers import FlushLoggers
from ..checkpoints.last_checkpoint import LastCheckpoint
from ..evaluation.latents_writer import LatentsWriter
from ..evaluation.report import EvaluationReport
from ..vae import VAE
from . import yaml_checks
from .errors import readable

# What says by itself what is wrong with the input.
_INPUT_ERRORS = (ValueError, OSError, MisconfigurationException)

# The least that options of the Trainer may be, where it does not look or fails on it later.
_LEAST = {
    "min_epochs": 0,
    "min_steps": 0,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "limit_predict_batches": 0,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": 0,
}
# What the parts of a checkpoint are.
_CHECKPOINT = {"global_step": int, "epoch": int, "state_dict": dict, "hyper_parameters": dict}
_LARGEST = {int: 2**63 - 1, float: torch.finfo(torch.float32).max}

# Options of the model that are not for a config to give.
_FROM_DATA = ("shape", "levels")

# Warnings on the way that a user can do nothing about.
_NOT_FOR_USERS = (
    r".*LeafSpec.*is deprecated",  # Lightning's own use of a name that torch is giving up
    r".*configure_optimizers` will be overridden",  # a config's optimizer is meant to win
    r"You're using the WeightAveraging callback, but loading",  # a checkpoint's weights are the average already
)

# Errors of the place that a run is written to.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class Parser(LightningArgumentParser):
    """A parser that says what is wrong, without the page of all options, and takes nothing for something else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def validate(self, namespace: Namespace, _skip_unset: bool = True, **kwargs: Any) -> None:
        # A `null` must fit its option as any value must, but for those that the data will give.
        given = namespace.clone()
        for name in _FROM_DATA:
            if given.get(name, "") is None:
                given.pop(name)
        super().validate(given, False, **kwargs)  # the second argument's name is another in each version

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
            help="With --ckpt_path, a file, a folder or `last`: go on in that run's folder, instead of a new one.",
        )
        for name in ("shape", "levels"):
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
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        with _readable():
            super().parse_arguments(parser, args)
            config = self.config[self.config["subcommand"]].as_dict()
            for file in filter(None, config.get("config") or ()):  # None for a config that is given as text
                yaml_checks.check_empty(file.get_content(), config)
            _check_values(config)
        model = config["model"].get("init_args") or {}
        self._given = {name: model[name] for name in _FROM_DATA if model.get(name) is not None}

    @override
    def _parse_ckpt_path(self) -> None:
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        self._resumed_step = 0
        if not config.get("ckpt_path") and subcommand != "fit":
            _exit(f"`{subcommand}` needs `--ckpt_path`: without a checkpoint it would look at random weights.")
        if config.get("same_run") and not config.get("ckpt_path"):
            _exit("`--same_run` needs `--ckpt_path`: a checkpoint file in the run's folder, that folder, or `last`.")
        try:
            if config.get("ckpt_path") == "last" or os.path.isdir(config.get("ckpt_path") or ""):
                _find_checkpoint(config, resumes=subcommand == "fit")
            path = config.get("ckpt_path")
            if path and path not in ("best", "hpc", "registry"):
                self._read_ckpt_path(subcommand, path)
        except (ValueError, OSError) as error:
            _exit(f"`--ckpt_path`: {error}")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            _exit(f"`--ckpt_path`: what the checkpoint holds does not fit: {type(error).__name__}: {error}")

    def _read_ckpt_path(self, subcommand: str, path: str) -> None:
        checkpoint = _read_checkpoint(path, resumes=subcommand == "fit")
        self._resumed_step = checkpoint["global_step"]
        before = self.config[subcommand]["model"].as_dict().get("init_args", {})
        with _readable():
            super()._parse_ckpt_path()
        config = self.config[subcommand]
        _say_what_was_replaced(before, config["model"].as_dict().get("init_args", {}))
        if config.get("same_run"):
            run = run_folder.of_checkpoint(Path(path), checkpoint)
            run_folder.go_on_in(run, first_step(checkpoint), config["trainer"])

    @override
    def before_instantiate_classes(self) -> None:
        for message in _NOT_FOR_USERS:
            warnings.filterwarnings("ignore", message=message)
        rank_zero.log.addFilter(_no_advertisement)
        threading.excepthook = _not_twice
        if self.config[self.subcommand].get("same_run"):
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        elif self._resumed_step:  # a run that goes on in a new folder keeps its checkpoints there
            warnings.filterwarnings("ignore", message="The dirpath has changed from")

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return super()._instantiate_trainer(config, [*callbacks, FlushLoggers()])

    @override
    def instantiate_classes(self) -> None:
        with _readable():
            super().instantiate_classes()
            if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not where the config names another
                self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
            for name, given in self._given.items():
                if getattr(self.datamodule, name) != (tuple(given) if isinstance(given, list) else given):
                    raise ValueError(
                        f"`model.{name}` is for the data to give: leave it out. The data have "
                        f"{getattr(self.datamodule, name)}, got {given}."
                    )
            if self.subcommand == "fit":
                _try_schedule(self._get(self.config_init, "lr_scheduler"))
            if self.subcommand == "test":
                self.trainer.callbacks.append(self.config_init["test"]["evaluation"])  # type: ignore[attr-defined]

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            steps = self.trainer.global_step - self._resumed_step
            known = isinstance(error, MisconfigurationException | SaveError | FloatingPointError)
            said = _said(error)
            if isinstance(error, OSError) and error.errno in _NO_PLACE:
                known = True
                place = error.filename or getattr(self.trainer.logger, "log_dir", None) or os.getcwd()
                said = f"{error.strerror}: {place}."
            # Until the first step and what follows from it is done it is the input; later on a fault, whose traceback
            # is worth having, but for what EarlyStopping says of a metric that does not exist.
            if steps > 1 and not known and "which is not available" not in said:
                raise
            print(file=sys.stderr)  # ends the progress bar's line
            if isinstance(error, FloatingPointError):
                _exit(said, code=1)
            if known and steps > 0:
                again = "The same command with `--ckpt_path last --same_run true` goes on from the last save."
                _exit(f"{said} {again}", code=1)
            _exit(_misfit(said) if "Error(s) in loading state_dict" in said else said)

    def predict(self, **kwargs: Any) -> None:
        """Write the latents as they come, instead of gathering them in memory.

        Args:
            **kwargs: What ``Trainer.predict`` gets.
        """
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, LatentsWriter) for callback in callbacks):
            callbacks.append(LatentsWriter())
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def after_fit(self) -> None:
        """Say where everything is."""
        folder = self.trainer.log_dir  # every process must ask
        if self.config["fit"]["same_run"] and self.trainer.global_step == self._resumed_step:
            # Nothing was left to train, but the run may have been killed between its last two saves.
            for checkpoint in self.trainer.checkpoint_callbacks:
                if isinstance(checkpoint, LastCheckpoint):
                    self.trainer.save_checkpoint(checkpoint.path)
                elif isinstance(checkpoint, ModelCheckpoint) and checkpoint.last_model_path:
                    self.trainer.save_checkpoint(checkpoint.last_model_path)
        if not self.trainer.is_global_zero:
            return
        lines = {}
        if self.trainer.loggers and folder:
            lines["Run"] = folder
            run_folder.write_finished(Path(folder), self.trainer, _limits(self.config["fit"]["trainer"]))
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
        print("\n" + "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items()))


class SaveConfig(SaveConfigCallback):
    """Save the resolved config beside the run; a run that is resumed in its own folder keeps each of them."""

    filename = "config.yaml"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # every process must ask
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        target = self._folder / self.filename
        if self.config["ckpt_path"] or not self.config["same_run"]:  # what begins anew in its folder needs no other
            resumed = (self._folder / f"config-resumed-{n}.yaml" for n in itertools.count(1))
            target = next(path for path in itertools.chain([target], resumed) if not path.exists())
        with atomic_write(target) as file:
            file.write(self.parser.dump(self.config, skip_none=False).encode())


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


def _find_checkpoint(config: Namespace, resumes: bool) -> None:
    """Put a file in the place of ``last`` or of a folder, or begin anew where a run has saved none yet."""
    path, same_run = config["ckpt_path"], resumes and config["same_run"]
    runs = run_folder.of(config["trainer"]) if path == "last" else [Path(path)]
    if same_run:
        runs = runs[:1]
    for run in runs:
        finished = run_folder.read_finished(run)
        if same_run and finished and finished.get("limits") == _limits(config["trainer"]):
            _say(
                f"{run} has finished after {finished['steps']} steps: nothing is left to do. Raise the "
                "limit that ended it, such as `--trainer.max_epochs`, to go on with it, or leave `--ckpt_path` out to "
                "begin another."
            )
            raise SystemExit(0)
        if found := run_folder.newest_checkpoint(run, resumes):
            config["ckpt_path"] = str(found)
            _say(f"The newest checkpoint is {found}.")
            return
    if not (same_run and path == "last"):
        raise ValueError(f"there is no checkpoint in {', '.join(map(str, runs)) or 'any run of this config'}.")
    config["ckpt_path"] = None
    if runs:
        _say(f"{runs[0]} has saved no checkpoint yet: it begins anew.")
        run_folder.go_on_in(runs[0], 0, config["trainer"])


def _limits(trainer: Namespace) -> dict[str, Any]:
    """Return what ends a run, as JSON would give it back."""
    return {name: trainer[name] and str(trainer[name]) for name in ("max_epochs", "max_steps", "max_time")}


def _read_checkpoint(path: str, resumes: bool) -> dict[str, Any]:
    """Read a checkpoint, or say what is wrong with it."""
    try:
        checkpoint = read(path)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path!r}.") from None
    except OSError as error:
        raise ValueError(f"{error}{_beside(path, resumes)}") from None
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path!r} is no checkpoint of a Lightning Trainer.")
    if resumes and not (checkpoint.get("loops") and checkpoint.get("optimizer_states")):
        raise ValueError(f"{path!r} holds weights alone, without the state that a run could be resumed from.")
    for name, kind in _CHECKPOINT.items():
        if not isinstance(found := checkpoint.get(name), kind):
            raise ValueError(f"{path!r} is damaged: `{name}` must be a {kind.__name__}, got {found!r}.")
    if "lightning_vae" in checkpoint and not checkpoint["hyper_parameters"]:
        raise ValueError(f"{path!r} is damaged: it holds none of the model's options (`hyper_parameters`).")
    for name, weight in checkpoint["state_dict"].items():
        if isinstance(weight, torch.Tensor) and not weight.isfinite().all():
            raise ValueError(f"{path!r} holds weights that are not finite, {name} first. Take an earlier one.")
    for name, value in checkpoint["hyper_parameters"].items():
        check_descriptions(name, value)
    if resumes:
        _check_counts("loops", checkpoint["loops"])
    return checkpoint


def _check_counts(name: str, state: dict[str, Any]) -> None:
    """Refuse counts of steps, batches and epochs that are none; Lightning would count on from them."""
    for key, item in state.items():
        if key in ("total", "current", "epoch_loop.state_dict"):
            counts = item.values() if isinstance(item, dict) else ()
            if not counts or not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError(f"the checkpoint is damaged: `{name}.{key}` must hold counts, got {item!r}.")
        elif isinstance(item, dict):
            _check_counts(f"{name}.{key}", item)


def _misfit(error: str) -> str:
    """Say that a checkpoint is of another model, with the first of what torch lists."""
    first = next(line.strip() for line in error.splitlines()[1:])
    return (
        "`--ckpt_path`: the checkpoint is of another model than the config's networks and data make. Give the config "
        f"that it was trained with, the config.yaml in its run's folder. The first misfit: {first}"
    )


def _say_what_was_replaced(given: dict[str, Any], used: dict[str, Any]) -> None:
    """Say which of the model's options the checkpoint has replaced; Lightning does it without a word."""
    changed = [
        f"{name} {given[name]!r} -> {used[name]!r}"
        for name in given
        if name not in ("shape", "levels") and name in used and given[name] != used[name]  # those the data give
    ]
    if changed:
        rank_zero.rank_zero_warn(
            "`--ckpt_path`: the model is the checkpoint's, so these options of the config are not used: "
            + ", ".join(changed)
        )


def _beside(path: str, resumes: bool) -> str:
    """Name what can be used in the place of a damaged checkpoint."""
    with warnings.catch_warnings(), suppress(OSError):
        warnings.simplefilter("ignore")  # it is one of those that are passed over
        if whole := run_folder.newest_checkpoint(Path(path).parent, resumes):
            return f" The newest whole one beside it is {whole}."
    return ""


def _check_values(config: dict[str, Any]) -> None:
    """Refuse what no option of anybody's takes, and what the Trainer takes without a word."""
    if not isinstance(config["trainer"], dict):
        raise ValueError(f"`trainer` must be a mapping of options, got {config['trainer']}.")
    for name, value in _leaves(config):
        if isinstance(value, int | float) and not abs(value) <= _LARGEST[float if isinstance(value, float) else int]:
            raise ValueError(f"`{name}` must be a finite number that fits its type, got {value}.")
    for name, least in _LEAST.items():
        value = config["trainer"].get(name)
        if value is not None and value < least:
            raise ValueError(f"`trainer.{name}` must be at least {least}, got {value}.")
    interval = config["trainer"].get("val_check_interval")
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"`trainer.val_check_interval` must be above 0, got {interval}.")
    seed = config["seed_everything"]
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed_everything` must be from 0 to {2**32 - 1}, got {seed}.")


def _try_schedule(lr_scheduler: Any) -> None:
    """Take a step of a learning rate schedule: some fail on a length of 0 when the first epoch ends, and not before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            instantiate_class(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), lr_scheduler).step()
        except ArithmeticError as error:
            name = lr_scheduler["class_path"].rpartition(".")[2]
            raise ValueError(f"`lr_scheduler` {name}: its first step fails ({error}). Is a length in it 0?") from error
        except Exception:
            return  # what else is wrong shows when the run begins, and some need what only the run has


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested config with their dotted names, as they are given on the command line."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, name if key == "init_args" else f"{name}.{key}".lstrip("."))


@contextmanager
def _readable() -> Iterator[None]:
    """End with one message on whatever is wrong before a run has begun."""
    try:
        yield
    except Exception as error:
        _exit(_said(error))


def _said(error: Exception) -> str:
    """Say an error in a line; one that does not name an option says where it comes from, one's own code if it can."""
    if isinstance(error, UnicodeDecodeError):
        return f"`--config`: a file is no text in UTF-8 ({error})."
    if "more than one stateful callback" in str(error):
        return f"`trainer.callbacks`: {error}"  # two files that each bring the same one
    text = str(error).partition("\nException raised from")[0]  # torch adds a page on its own functions
    if isinstance(error, _INPUT_ERRORS) or "`" in text:
        return text
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.filename.endswith("checkpoint_connector.py") for frame in frames):
        return f"`--ckpt_path`: what the checkpoint holds does not fit: {type(error).__name__}: {text}"
    place = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
    return f"{type(error).__name__}: {text} (in {place.filename}, line {place.lineno})"


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _not_twice(fault: threading.ExceptHookArgs) -> None:
    if not isinstance(fault.exc_value, OSError):  # which TensorBoard's thread passes on to the run
        threading.__excepthook__(fault)


def _say(text: str) -> None:
    rank_zero.rank_zero_only(print)(text)


def _exit(error: object, hint: str = "", code: int = 2) -> NoReturn:
    names = [name for module in (callbacks, datamodules, likelihoods, networks) for name in vars(module)]
    print(f"error: {readable(str(error), names)}{hint}", file=sys.stderr)
    raise SystemExit(code)


def command_line(kind: type[VAECLI], args: ArgsType = None) -> VAECLI:
    """Make the command line, which runs it.

    Args:
        kind: Its class.
        args: Arguments in place of the process's own.
    """
    yaml_checks.guard()
    return kind(
        VAE,
        LightningDataModule,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False},  # not as Lightning would: a kill would leave half a file
        seed_everything_default=0,
        parser_kwargs={"epilog": "`sweep --help`: train and compare many of them."},
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
    )
