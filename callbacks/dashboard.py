"""TensorBoard pages that show at a glance how a run went."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from .base import Callback, callbacks_of, knobs_of, validates
from .control.attribute_writer import AttributeWriter
from .drawing.best_effort import BestEffort
from .drawing.media_logger import MediaLogger
from .reading.distributions import is_sequence

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_CHARTS: Mapping[str, Sequence[str]] = {
    "beta": ["knobs/beta"],
    "rate": ["latent/rate", "train/rate", "val/rate"],
    "distortion": ["train/distortion", "val/distortion"],
    "ELBO": ["train/elbo", "val/elbo"],
    "active_units": ["latent/active_units"],
    "mutual_information": ["latent/mutual_information"],
}
# Markdown, as TensorBoard shows it.
_HOW_TO_READ = """\
| | over-regularised | balanced | under-regularised |
|---|---|---|---|
| `Overview/rate` | near 0, or falls to it as beta rises | levels off | high |
| `Overview/mutual_information` | near 0 | most of the rate | at its cap, log(observations), far below the rate |
| `Overview/active_units` | 0, or many that carry next to nothing | as many as the data need | all |
| `images/reconstructions` | blurred, alike | the inputs | sharp |
| `images/samples` | as blurred, alike | like the inputs | unlike the inputs |
| `latent/against_prior` | bars in a spike, blue on black | wide bars, blue on black | blue away from black |
| what to change | lower or anneal `beta`; free bits | nothing | raise `beta`; fewer latent dimensions |
"""
_MAX_OPTION_LENGTH = 80  # characters


class Dashboard(Callback):
    """Arrange a VAE's curves in TensorBoard, and describe the model, its objective and the data beside them.

    - Scalars: a first group ``Overview`` of beta, rate, distortion, ELBO, active units and mutual information, with a
      point for each validation pass.
    - Custom scalars: a chart for each of the six, with training and validation together.
    - Text: ``How_to_read``, which explains the curves and pictures; ``objective``, the loss with its numbers, the sizes
      of the networks, and the schedules of the knobs; and ``data``.
    - HParams, to compare runs: the module's numbers, the callbacks that move its knobs (``method``) and all other
      options (``setup``), against the overview. This page needs a ``TensorBoardLogger(default_hp_metric=False)``,
      because a logger that has already filled the page can't add to it.

    Other loggers get only the numbers. Anything that can't be shown gives one warning, and training continues without
    it. In a run without validation the overview is empty, and that is said.

    Args:
        charts: The curves of a chart by its title, if they have other names: ``{"rate": ["kl", "val_kl"]}``. They
            replace the default curves of that title; an empty list removes the chart. The overview shows the last
            curve of a chart that the run logs.
        objective: Markdown about the objective, instead of the description.
        data: Markdown about the data, instead of the description.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Dashboard(charts={"rate": ["train_kl", "val_kl"]})])
    """

    def __init__(
        self,
        charts: Mapping[str, Sequence[str]] | None = None,
        objective: str | None = None,
        data: str | None = None,
    ) -> None:
        self.charts = {title: list(tags) for title, tags in {**_CHARTS, **(charts or {})}.items() if tags}
        self.objective = objective
        self.data = data
        self._attempt = BestEffort("Dashboard")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attempt = BestEffort("Dashboard")
        if not validates(trainer):
            rank_zero_info("Dashboard: this run has no validation, where `Overview` is drawn; it stays empty.")
        logger = None
        with self._attempt("the loggers"):
            logger = MediaLogger(trainer)
        if logger:
            step = self.step(trainer)
            with self._attempt("the custom scalars"):
                logger.layout(_layout(self.charts))
            with self._attempt("How_to_read"):
                logger.text("How_to_read", _HOW_TO_READ, step)
            with self._attempt("objective"):
                logger.text("objective", self.objective or describe_objective(trainer, pl_module), step)
            with self._attempt("data"):
                logger.text("data", self.data or describe_data(trainer), step)
            with self._attempt("HParams"):
                measured = [title for title, tags in self.charts.items() if not tags[-1].startswith("knobs/")]
                values = hyperparameters_of(trainer, pl_module)
                logger.hyperparameters(values, [f"Overview/{title}" for title in measured])
        elif logger is not None and trainer.is_global_zero:
            rank_zero_info("Dashboard: no logger of this run takes pictures; it stays empty.")

    @override
    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            with self._attempt("Overview"):
                logger = MediaLogger(trainer)
                for title, value in _overview(self.charts, trainer.callback_metrics).items():
                    logger.scalar(f"Overview/{title}", value, self.step(trainer))


def describe_objective(trainer: Trainer, pl_module: LightningModule) -> str:
    """Describe in Markdown the loss, the module with the sizes of its parts, and the schedules of its knobs.

    The formula is shown only for a module with ``knobs``. For other modules the description lists only the parts.
    """
    knobs = _knob_values(pl_module)
    rows = [("module", f"`{type(pl_module).__name__}`, {_size(pl_module)}")]
    rows += [(name, f"{value:g}") for name, value in knobs.items()]
    likelihood, latent_dim = getattr(pl_module, "likelihood", None), getattr(pl_module, "latent_dim", None)
    if isinstance(likelihood, nn.Module):
        rows.append(("likelihood", f"`{type(likelihood).__name__}`"))
    if latent_dim is not None:
        rows.append(("latent dimensions", str(latent_dim)))
    parts = [(name, part) for name, part in pl_module.named_children() if any(True for _ in part.parameters())]
    rows += [(name, f"`{type(part).__name__}`, {_size(part)}") for name, part in parts]
    rows += [("optimizer", f"`{type(each).__name__}`, learning rate {_rates(each)}") for each in trainer.optimizers]
    rows += [
        (type(each).__name__, f"moves `{each.attribute or each.name}` by `{_schedule(each)}`")
        for each in _writers(trainer)
    ]
    formula = "**loss = distortion + beta · floored rate**, in nats per observation.\n\n" if "beta" in knobs else ""
    terms = (
        "*Distortion* is -log p(x|z), *rate* is KL(q(z|x) || p(z)), ELBO = -(distortion + rate).\n\n" if knobs else ""
    )
    return formula + terms + _table(rows)


def describe_data(trainer: Trainer) -> str:
    """Describe in Markdown the data module, and the numbers of batches and observations."""
    data: Any = getattr(trainer, "datamodule", None)
    rows = [("data", f"`{type(data).__name__}`")] if data is not None else []
    rows += [(name, f"`{value}`") for name, value in options_of(data).items()]
    for name in ("shape", "levels"):
        if getattr(data, name, None) is not None:
            rows.append((name, f"`{_short_text(getattr(data, name))}`"))
    batches, count = trainer.num_training_batches, _observations(trainer.train_dataloader)
    rows.append(("training", f"{batches} batches in an epoch{count}"))
    loaders = trainer.val_dataloaders
    for number, batches in enumerate(trainer.num_val_batches):
        loader = loaders[number] if is_sequence(loaders) else loaders
        rows.append(("validation", f"{batches} batches{_observations(loader)}"))
    return _table(rows)


def hyperparameters_of(trainer: Trainer, pl_module: LightningModule) -> dict[str, bool | int | float | str]:
    """Return the hyperparameters to compare runs by: each number, and the texts ``method`` and ``setup``.

    The texts hold everything else: a column for each option would push the measurements out of sight.
    """
    data: Any = getattr(trainer, "datamodule", None)
    # An option whose value comes from the data module, such as the shape, is listed there.
    own = {name: value for name, value in options_of(pl_module).items() if str(getattr(data, name, None)) != str(value)}
    beta = {name: value for name, value in _knob_values(pl_module).items() if name == "beta"}
    numbers = {name: value for name, value in own.items() if not isinstance(value, str | bool)}
    rest = {name: value for name, value in own.items() if isinstance(value, str | bool)}
    setup = _call(pl_module, rest) + (f" on {_call(data, options_of(data))}" if data is not None else "")
    method = ", ".join(f"{type(each).__name__}({_schedule(each)})" for each in _writers(trainer))
    return {**beta, **numbers, "method": method or "none", "setup": setup}


def options_of(owner: Any) -> dict[str, bool | int | float | str]:
    """Return the options of an object: its hyperparameters, or else the attributes named like constructor arguments.

    Nested options have names with slashes. For a part given as ``class_path`` and ``init_args`` the value is the name
    of its class, with its arguments below it.
    """
    given = dict(getattr(owner, "hparams", None) or {})
    if not given and owner is not None:
        names = inspect.signature(type(owner).__init__).parameters
        given = {name: getattr(owner, name) for name in names if name != "self" and hasattr(owner, name)}
    return dict(_flattened(given))


def _layout(charts: Mapping[str, Sequence[str]]) -> dict[str, dict[str, list[Any]]]:
    """Return the argument of ``add_custom_scalars``, whose tags are regular expressions matched from the start."""
    return {
        "Overview": {title: ["Multiline", [f"{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()}
    }


def _overview(charts: Mapping[str, Sequence[str]], metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the value of each chart's last curve that has one."""
    present = {title: [tag for tag in tags if tag in metrics] for title, tags in charts.items()}
    return {title: float(metrics[tags[-1]]) for title, tags in present.items() if tags}


def _knob_values(pl_module: LightningModule) -> dict[str, float]:
    """Return the values of a module's own knobs, rounded to the precision of float32."""
    return {name: float(f"{float(getattr(pl_module, name)):.7g}") for name in knobs_of(pl_module)}


def _writers(trainer: Trainer) -> list[Any]:
    """Return the callbacks that move a number of the module."""
    return [each for each in callbacks_of(trainer) if isinstance(each, AttributeWriter)]


def _schedule(writer: Any) -> str:
    """Return a schedule as text, without the arguments that are not given."""
    return re.sub(r", \w+=None|\w+=None, ", "", _plain(repr(writer.schedule)))


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, bool | int | float | str]]:
    for key, value in values.items():
        name = f"{prefix}/{key}".strip("/")
        if isinstance(value, Mapping):
            yield from _flattened(value, prefix if key == "init_args" else name)
        elif key == "class_path":
            yield prefix or key, str(value).rpartition(".")[2]
        elif value is not None and not str(key).startswith("_"):
            yield name, value if isinstance(value, bool | int | float | str) else _short_text(value)


def _short_text(value: Any) -> str:
    text = type(value).__name__ if isinstance(value, nn.Module) else " ".join(_plain(str(value)).split())
    return text if len(text) <= _MAX_OPTION_LENGTH else f"{text[:_MAX_OPTION_LENGTH]}..."


def _plain(text: str) -> str:
    """Remove the addresses of objects, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {text.replace('|', '/')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _call(owner: Any, arguments: Mapping[str, Any]) -> str:
    return f"{type(owner).__name__}({', '.join(f'{name}={value}' for name, value in arguments.items())})"


def _size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    if any(map(is_lazy, parameters)):
        return "parameters not yet made"
    return f"{sum(parameter.numel() for parameter in parameters):,} parameters"


def _rates(optimizer: Any) -> str:
    rates = [group.get("lr") for group in optimizer.param_groups]
    return ", ".join("none given" if rate is None else f"{float(rate):g}" for rate in rates)


def _observations(loader: Any) -> str:
    """Return the number of a loader's observations as text, empty if it is unknown."""
    count = getattr(loader, "size", None)
    if not isinstance(count, int):
        try:
            count = len(loader.dataset)
        except (AttributeError, TypeError):
            return ""
    return f", {count:,} observations"
