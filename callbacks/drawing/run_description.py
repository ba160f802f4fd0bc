"""What a run trains on what, in words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..base import callbacks_of
from ..control.attribute_writer import AttributeWriter

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

# A row for each thing to look at; Markdown, as TensorBoard shows it.
HOW_TO_READ = """\
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
_LONGEST = 80  # characters of an option's value


def describe_objective(trainer: Trainer, pl_module: LightningModule) -> str:
    """Describe in Markdown what is minimised, by which module, and what moves its knobs.

    A module that offers ``knobs`` and a ``likelihood`` is described by its formula, any other by its name.
    """
    knobs = _knob_values(pl_module)
    rows = [("module", f"`{type(pl_module).__name__}`, {_size(pl_module)}")]
    rows += [(name, f"{value:g}") for name, value in knobs.items()]
    likelihood, latents = getattr(pl_module, "likelihood", None), getattr(pl_module, "latent_dim", None)
    if isinstance(likelihood, nn.Module):
        rows.append(("likelihood", f"`{type(likelihood).__name__}`"))
    if latents is not None:
        rows.append(("latent dimensions", str(latents)))
    rows += [
        (name, f"`{type(part).__name__}`, {_size(part)}") for name, part in pl_module.named_children() if _weighs(part)
    ]
    rows += [("optimizer", f"`{type(each).__name__}`, learning rate {_rate(each)}") for each in trainer.optimizers]
    rows += [
        (type(each).__name__, f"steers `{each.attribute or each.name}` by `{_schedule(each)}`")
        for each in _knobs(trainer)
    ]
    formula = "**loss = distortion + beta · floored rate**, in nats per observation.\n\n" if "beta" in knobs else ""
    terms = (
        "*Distortion* is -log p(x|z), *rate* is KL(q(z|x) || p(z)), ELBO = -(distortion + rate).\n\n" if knobs else ""
    )
    return formula + terms + _table(rows)


def describe_data(trainer: Trainer) -> str:
    """Describe in Markdown the data module or the loaders, and how many batches there are."""
    data: Any = getattr(trainer, "datamodule", None)
    rows = [("data", f"`{type(data).__name__}`")] if data is not None else []
    rows += [(name, f"`{value}`") for name, value in options(data).items()]
    for name in ("shape", "levels"):
        if getattr(data, name, None) is not None:
            rows.append((name, f"`{getattr(data, name)}`"))
    rows.append(("training", f"{trainer.num_training_batches} batches in an epoch{_rows(trainer.train_dataloader)}"))
    loaders = trainer.val_dataloaders
    for number, batches in enumerate(trainer.num_val_batches):
        loader = loaders[number] if isinstance(loaders, list | tuple) else loaders
        rows.append(("validation", f"{batches} batches{_rows(loader)}"))
    return _table(rows)


def comparable(trainer: Trainer, pl_module: LightningModule) -> dict[str, bool | int | float | str]:
    """Return what runs are compared by: numbers one by one, everything else in the texts ``method`` and ``setup``.

    A page that has a column for each of a module's options has none in sight for what was measured.
    """
    data: Any = getattr(trainer, "datamodule", None)
    # What the data module has too is its, linked: the shape, say.
    own = {name: value for name, value in options(pl_module).items() if str(getattr(data, name, None)) != str(value)}
    beta = {name: value for name, value in _knob_values(pl_module).items() if name == "beta"}
    numbers = {name: value for name, value in own.items() if not isinstance(value, str | bool)}
    rest = {name: value for name, value in own.items() if isinstance(value, str | bool)}
    setup = _call(pl_module, rest) + (f" on {_call(data, options(data))}" if data is not None else "")
    method = ", ".join(f"{type(each).__name__}({_schedule(each)})" for each in _knobs(trainer))
    return {**beta, **numbers, "method": method or "none", "setup": setup}


def options(owner: Any) -> dict[str, bool | int | float | str]:
    """Return the plain values that an object was made with: its hyperparameters, or the attributes of their names.

    Nested ones have names with slashes; a LightningCLI's ``class_path`` is the value of the part itself.
    """
    given = dict(getattr(owner, "hparams", None) or {})
    if not given and owner is not None:
        names = inspect.signature(type(owner).__init__).parameters
        given = {name: getattr(owner, name) for name in names if name != "self" and hasattr(owner, name)}
    return dict(_plain(given))


def _plain(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, bool | int | float | str]]:
    for key, value in values.items():
        name = f"{prefix}/{key}".strip("/")
        if isinstance(value, Mapping):
            yield from _plain(value, prefix if key == "init_args" else name)
        elif key == "class_path":
            yield prefix or key, str(value).rpartition(".")[2]
        elif value is not None and not str(key).startswith("_"):
            yield name, value if isinstance(value, bool | int | float | str) else _in_a_line(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {text.replace('|', '/')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    if any(map(is_lazy, parameters)):
        return "parameters not yet made"
    return f"{sum(parameter.numel() for parameter in parameters):,} parameters"


def _rate(optimizer: Any) -> str:
    rates = [group.get("lr") for group in optimizer.param_groups]
    return ", ".join("none given" if rate is None else f"{float(rate):g}" for rate in rates)


def _knob_values(pl_module: LightningModule) -> dict[str, float]:
    """Return the numbers that a module's own knobs hold, rounded to what float32 tells apart."""
    return {name: float(f"{float(getattr(pl_module, name)):.7g}") for name in getattr(pl_module, "knobs", {})}


def _knobs(trainer: Trainer) -> list[Any]:
    return [each for each in callbacks_of(trainer) if isinstance(each, AttributeWriter)]


def _schedule(knob: Any) -> str:
    """Return a schedule without the arguments that nobody gave."""
    return re.sub(r", \w+=None|\w+=None, ", "", repr(knob.schedule))


def _call(owner: Any, arguments: Mapping[str, Any]) -> str:
    return f"{type(owner).__name__}({', '.join(f'{name}={value}' for name, value in arguments.items())})"


def _in_a_line(value: Any) -> str:
    """Return a value as a short text: networks and tables have long ones."""
    text = type(value).__name__ if isinstance(value, nn.Module) else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _rows(loader: Any) -> str:
    """Say how many observations a loader has, if it says."""
    count = getattr(loader, "size", None)
    if not isinstance(count, int):
        try:
            count = len(loader.dataset)
        except (AttributeError, TypeError):
            return ""
    return f", {count:,} observations"
