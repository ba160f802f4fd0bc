"""What a run trains on what, in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def describe_objective(trainer: Trainer, pl_module: LightningModule) -> str:
    """Describe in Markdown what is minimised, by which module, and what moves its knobs.

    A module that says its ``knob_targets`` and ``likelihood`` is described by its formula, any other by its name.
    """
    knobs: Mapping[str, float] = getattr(pl_module, "knob_targets", {})
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
    rows += [(type(each).__name__, _knob(each)) for each in trainer.callbacks if hasattr(each, "schedule")]  # type: ignore[attr-defined]
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
            yield name, value if isinstance(value, bool | int | float | str) else str(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {name} | {text.replace('|', '/')} |" for name, text in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _weighs(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _size(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters"


def _rate(optimizer: Any) -> str:
    return ", ".join(f"{float(group['lr']):g}" for group in optimizer.param_groups)


def _knob(callback: Any) -> str:
    return f"moves `{callback.attribute}`: `{callback.schedule!r}`"


def _rows(loader: Any) -> str:
    """Say how many observations a loader has, if it says."""
    try:
        count = loader.size if hasattr(loader, "size") else len(loader.dataset)
    except (AttributeError, TypeError):
        return ""
    return f", {count:,} observations"
