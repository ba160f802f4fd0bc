"""The plan of a sweep: configurations, points, and the commands that make them."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..checkpoints import run_folder
from ..checkpoints.last_checkpoint import LastCheckpoint
from ..checkpoints.monitors import check_monitors, check_validation
from ..cli.vae_cli import Unrun
from ..evaluation.measure import check_rereadable, evaluate
from ..evaluation.report import all_loaders
from ..likelihoods import Gaussian

BETA = "model.beta"


@dataclass(frozen=True)
class Configuration:
    """Everything that defines a training run except the seed.

    Attributes:
        name: Name of the config, from its files.
        options: The options that the sweep varies, by their dotted names.
        arguments: Arguments of ``fit``, without seed and logger.
        seed: The config's own seed.
        digest: Hash of the resolved config, without seed and logger.
    """

    name: str
    options: Mapping[str, Any]
    arguments: tuple[str, ...]
    seed: int
    digest: str

    @property
    def varied(self) -> dict[str, str]:
        """The varied options as text, by the last part of their names if that is unambiguous."""
        last = {name: name.rpartition(".")[2] for name in self.options}
        alone = [name for name, count in Counter(last.values()).items() if count == 1]
        return {last[name] if last[name] in alone else name: _text(value) for name, value in self.options.items()}

    @property
    def label(self) -> str:
        """A label that distinguishes this configuration from the others."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.varied.items())])


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        configuration: The configuration to train; ``None`` for an existing checkpoint.
        seed: Seed of the run.
        folder: Its run folder.
        trained: The existing checkpoint.
        evaluated_by: Arguments of ``test``, such as ``--evaluation.importance_samples=5000``.
    """

    configuration: Configuration | None
    seed: int
    folder: Path
    trained: Path | None = None
    evaluated_by: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """A label for this point in a line of text."""
        if self.configuration is None:
            return str(self.trained)
        return f"{self.configuration.label} seed={self.seed}"

    @property
    def run(self) -> Path:
        """The folder in which ``fit`` has saved its config."""
        return self.folder if self.trained is None else self.trained.parent.parent

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to evaluate, as soon as there is one."""
        if self.trained is not None:
            return self.trained
        found = run_folder.read_finished(self.folder)
        return self.folder / found["checkpoint"] if found and found["checkpoint"] else None

    def fit(self) -> list[str]:
        """Return the arguments of ``fit`` that train it, or continue a training that was cut off."""
        assert self.configuration is not None
        last = self.folder / "checkpoints" / "last.ckpt"
        return [
            "fit",
            *self.configuration.arguments,
            f"--seed_everything={self.seed}",
            *_into(self.folder),
            *([f"--ckpt_path={last}", "--same_run=true"] if last.is_file() else []),
        ]

    def test(self) -> list[str]:
        """Return the arguments of ``test`` that evaluate it, without ``--ckpt_path`` until it is trained."""
        return [
            "test",
            f"--config={self.run / 'config.yaml'}",
            *([f"--ckpt_path={self.checkpoint}"] if self.checkpoint else []),
            "--same_run=false",  # a point that was trained by hand may have it in its config
            *self.evaluated_by,
            *_into(self.evaluation.parent),
        ]

    def commands(self, evaluate: bool = True) -> dict[str, list[str]]:
        """Return the arguments of ``fit`` and of ``test``, empty for a command that is not needed.

        Args:
            evaluate: Whether to evaluate the point.
        """
        return {"fit": self.fit() if self.checkpoint is None else [], "test": self.test() if evaluate else []}

    @property
    def evaluation(self) -> Path:
        """Path of the finished evaluation; an evaluation with other options has another path."""
        options = (argument.removeprefix("--evaluation.") for argument in self.evaluated_by)
        return self.folder / _folder(" ".join(["test", *options])) / "evaluation.json"

    def found(self) -> dict[str, Any]:
        """Read the results of ``test``."""
        found: dict[str, Any] = json.loads(self.evaluation.read_text())
        return found


def configure(files: str, options: Mapping[str, Any], rest: Sequence[str]) -> tuple[Configuration, Unrun]:
    """Resolve a config and its options, and build its parts once; a parser error ends the process here.

    Args:
        files: Config files, joined by ``+``.
        options: Options that the sweep varies.
        rest: Further arguments of ``fit``.

    Raises:
        ValueError: If the config starts from a checkpoint.
    """
    paths = files.split("+")
    arguments = (
        *(f"--config={path}" for path in paths),
        *rest,
        *(f"--{name}={_text(value)}" for name, value in options.items()),
    )
    built = _build(["fit", *arguments])
    config = built.config["fit"].as_dict()
    identity = copy.deepcopy(config)
    seed = identity.pop("seed_everything")
    identity["trainer"].pop("logger")
    if config["ckpt_path"]:
        raise ValueError(
            f"`--ckpt_path`: every point would train the model of {config['ckpt_path']}, whatever its options. To "
            "compare with a finished run, use `--checkpoints`."
        )
    for name in ("config", "ckpt_path", "same_run"):
        identity.pop(name, None)
    return Configuration(
        name="+".join(Path(path).stem for path in paths),
        options=dict(options),
        arguments=arguments,
        seed=int(seed),
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8],
    ), built


def check_run(built: Unrun) -> None:
    """Refuse a run that would leave nothing to evaluate, or evaluate nothing.

    Args:
        built: The parts that :func:`configure` has built.

    Raises:
        ValueError: If it trains or evaluates no batch, or keeps no checkpoint.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If a callback monitors a value that the run
            does not log.
    """
    trainer = built.trainer
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ValueError(
            "`trainer.fast_dev_run` saves no checkpoint, so there would be nothing to evaluate. For a quick sweep set "
            "`--trainer.max_steps`."
        )
    for name in ("max_epochs", "max_steps", "limit_train_batches", "limit_test_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(
                f"`trainer.{name}` is 0, so there would be nothing to {'test' if 'test' in name else 'train'}."
            )
    check_monitors(trainer, built.model)
    if not trainer.limit_val_batches:
        check_validation(trainer, built.model, 0)
    if not any(_keeps(each, trainer.max_epochs) for each in trainer.checkpoint_callbacks):
        raise ValueError(
            "`trainer.callbacks` must hold a ModelCheckpoint that saves within the run: without a checkpoint nothing "
            "is evaluated."
        )


def _keeps(callback: Any, epochs: int | None) -> bool:
    """Return whether a callback saves a checkpoint in a run of this many epochs, ``None`` or -1 for no limit."""
    if isinstance(callback, LastCheckpoint):
        return True
    is_in_time = epochs in (None, -1) or (callback.every_n_epochs or 1) <= epochs
    return isinstance(callback, ModelCheckpoint) and callback.save_top_k != 0 and is_in_time


def rehearse(built: Unrun) -> None:
    """Evaluate an untrained model on its first test batch, to find before any training why ``test`` would fail.

    Args:
        built: The parts that :func:`configure` has built.

    Raises:
        ValueError: If there are no test data, or the limit of test batches leaves none.
        Exception: Whatever the data or the evaluation raise.
    """
    data, limit = built.datamodule, built.trainer.limit_test_batches
    loader = test_loader(data)
    check_rereadable(loader)
    length = sized_len(loader)
    if isinstance(limit, float) and limit < 1 and (length is None or int(length * limit) < 1 <= length):
        batches = "batches, whose number is not known" if length is None else f"{length} batches"
        raise ValueError(
            f"`trainer.limit_test_batches` must leave at least one of the test's {batches}, got {limit}. Give a whole "
            "number."
        )
    with _silence():
        if set_scales := getattr(data, "set_scales", None):  # as `fit` does, for data in units of their own
            set_scales(built.model)
        evaluate(built.model, list(itertools.islice(transferred(loader, data), 1)), importance_samples=1)


def test_loader(data: LightningDataModule) -> Iterable[Any]:
    """Return the loader that ``test`` evaluates, the first of several.

    Args:
        data: The data module. Hooks of its own may ask for a Trainer, so it gets one on the CPU.

    Raises:
        ValueError: If there is no loader.
    """
    with _silence():
        data.trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        data.prepare_data()
        data.setup("test")
        loaders = all_loaders(data.test_dataloader())
    if not loaders:
        raise ValueError(f"`test_dataloader` of {type(data).__name__} must return a loader, got none.")
    return loaders[0]


def transferred(loader: Iterable[Any], data: LightningDataModule) -> Iterator[Any]:
    """Yield a loader's batches after the data module's hooks."""
    for batch in loader:
        yield data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def data_of(config: Path) -> tuple[str, LightningDataModule]:
    """Build the data module of a run from its saved config, with a text that is the same for equal data.

    Args:
        config: A run's ``config.yaml``.
    """
    built = _rebuilt(config)
    return json.dumps(built.config["fit"]["data"].as_dict(), sort_keys=True, default=str), built.datamodule


def grid(varied: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the options' values; the last option changes fastest.

    Example::

        >>> list(grid({"a": [1, 2], "b": [3]}))
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    for values in itertools.product(*varied.values()):
        yield dict(zip(varied, values, strict=True))


def points(configuration: Configuration, seeds: Sequence[int] | None, base: Path) -> list[Point]:
    """Plan the runs of a configuration.

    Args:
        configuration: The configuration to train.
        seeds: Seeds; ``None`` uses the config's own.
        base: The sweep's folder.
    """
    return [
        Point(configuration, seed, base / _folder(f"{configuration.label} seed={seed} {configuration.digest}"))
        for seed in (seeds or [configuration.seed])
    ]


def existing(checkpoint: str, base: Path) -> Point:
    """Make a point from an existing checkpoint.

    Args:
        checkpoint: Its path, in the run folder of a ``fit``.
        base: The sweep's folder.

    Raises:
        ValueError: If there is no such checkpoint, or no config in its run folder.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise ValueError(f"`--checkpoints`: there is no file {checkpoint!r}.")
    point = Point(None, 0, Path(), trained=path)
    if not (point.run / "config.yaml").is_file():
        raise ValueError(f"`--checkpoints`: {checkpoint} is not in a run's folder: no config.yaml in {point.run}.")
    status = path.stat()  # a file with the same name and other content is another point
    digest = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:8]
    seed = int(_rebuilt(point.run / "config.yaml").config["fit"]["seed_everything"])
    return Point(None, seed, base / _folder(f"{point.run.name} {path.stem} {digest}"), trained=path)


def with_variance(rest: Sequence[str], variance: float) -> list[str]:
    """Add to the arguments of ``fit`` an option that fixes the Gaussian likelihood's variance."""
    kind = f"{Gaussian.__module__}.{Gaussian.__qualname__}"
    return [*rest, f"--model.likelihood={kind}", f"--model.likelihood.variance={variance!r}"]


def _into(folder: Path) -> list[str]:
    """Return the arguments that make a folder the run folder itself."""
    logger = "--trainer.logger"
    return [
        f"{logger}=TensorBoardLogger",
        f"{logger}.save_dir={folder.parent.parent}",
        f"{logger}.name={folder.parent.name}",
        f"{logger}.version={folder.name}",
        f"{logger}.default_hp_metric=false",
        "--trainer.enable_progress_bar=false",
    ]


def _build(arguments: Sequence[str]) -> Unrun:
    """Parse a command and build its model and data, without running it."""
    with _silence():
        return Unrun(list(arguments))


def _rebuilt(config: Path) -> Unrun:
    """Rebuild a run's model and data; the checkpoint that it resumed from may be gone."""
    return _build(["fit", f"--config={config}", "--ckpt_path=null", "--same_run=false"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _folder(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text)[-120:].strip("-")


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the output of building a model; the run that trains it prints it."""
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
