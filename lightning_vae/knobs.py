"""The knobs of a module's loss: numbers that callbacks move during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from .checkpoints.checkpoint_io import MODULE_KEY
from .checkpoints.class_paths import check_checkpoint
from .checkpoints.exact_resume import trainer_of


class KnobModule(LightningModule):
    """Base class of a module whose loss has knobs.

    A knob is a 0-dim float32 buffer. Assigning a number fills it in place. Outside a fit the assignment also configures
    the module, as the constructor does. The buffer is the single source of truth: a callback moves a knob only during
    training batches, so validation, checkpoints and the finished module hold its target.

    Attributes:
        knobs: The number that each knob is configured with; ``None`` for a knob left at its default, for which a
            callback's schedule may have any end.
        rate_limit: The rate in nats that a controller holds the module at, and the price of each nat above it; saved in
            checkpoints. ``None`` if no controller has set it.
    """

    knobs: dict[str, float | None]
    rate_limit: tuple[float, float] | None
    chosen_options: tuple[str, ...] = ()
    """Options of the constructor that a callback may override. The override is saved like the knobs."""

    def _register_knobs(self, **knobs: tuple[float | None, float]) -> None:
        """Register knobs by name, each with its configured number, if any, and its default."""
        self.rate_limit = None
        self.knobs = {name: None if own is None else checked_knob(name, own) for name, (own, _) in knobs.items()}
        for name, (own, default) in knobs.items():
            knob = torch.tensor(default if own is None else own, dtype=torch.float32)
            self.register_buffer(name, knob, persistent=False)
        # Callbacks move the knobs identically in every process: there is nothing to broadcast.
        self._ddp_params_and_buffers_to_ignore = tuple(self.knobs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Fill a knob when a value is assigned to it; outside a fit, configure it too."""
        knobs = self.__dict__.get("knobs")
        if knobs is None or name not in knobs or name not in self._buffers:
            super().__setattr__(name, value)
            return
        if not self._is_fitting:
            knobs[name] = checked_knob(name, float(value))
            self.save_hyperparameters({name: knobs[name]})
        self._fill(name, value)

    @torch.no_grad()
    def _fill(self, name: str, value: float | Tensor) -> None:
        self._buffers[name].fill_(value)  # type: ignore[union-attr]

    @property
    def _is_fitting(self) -> bool:
        trainer = trainer_of(self)
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.state.stopped

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":  # a checkpoint restores the limit of the resumed run
            self.rate_limit = None
            for name, value in self.knobs.items():
                if value is not None:  # otherwise the knob stays as it is
                    self._fill(name, value)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        options = {name: getattr(self, name) for name in self.chosen_options}
        checkpoint.setdefault(MODULE_KEY, {}).update(
            knobs=dict(self.knobs),
            knob_values={name: float(getattr(self, name)) for name in self.knobs},
            rate_limit=self.rate_limit,
            chosen={name: value for name, value in options.items() if value != self.hparams[name]},
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(MODULE_KEY, {})
        self.rate_limit = saved.get("rate_limit")
        values = saved.get("knob_values", saved.get("knob_targets", {}))  # the name in version 0.1.0
        for name, value in values.items():
            self._load_knob(name, value, saved.get("knobs", {}).get(name))
        for name, value in saved.get("chosen", {}).items():
            setattr(self, name, value)

    def _load_knob(self, name: str, value: float, saved: float | None) -> None:
        """Take a knob's value from a checkpoint, unless the module is configured with another number.

        Args:
            name: The knob.
            value: Its value when the checkpoint was saved.
            saved: The number that the saved module was configured with.
        """
        own = self.knobs[name]
        if self._is_fitting:
            steered = name == "beta" and self.rate_limit is not None  # keep the weight that a controller has found
            keeps = own is not None and not steered
            if keeps and float(getattr(self, name)) != value:
                rank_zero_warn(
                    f"The checkpoint was saved with `{name}={value:g}`; the run continues with `{name}={own:g}`, which "
                    "the module is configured with."
                )
        else:
            keeps = trainer_of(self) is None and own not in (None, saved)  # an argument that overrides the checkpoint
        if not keeps:
            self._fill(name, value)

    @override
    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a module as Lightning does, after checking the classes that the checkpoint names.

        Args:
            checkpoint_path: A path, a URL or an open file.
            *args: Passed on to Lightning.
            **kwargs: Passed on to Lightning; they override constructor arguments.

        Raises:
            ValueError: If the checkpoint names a class to build that is not a network.
        """
        if kwargs.get("weights_only") is not False:
            check_checkpoint(checkpoint_path, replaced=kwargs)
        module = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        for name in module.knobs:
            if kwargs.get(name) is not None:  # it also wins over the weight that a controller has found
                setattr(module, name, kwargs[name])
        return module

    @override
    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the buffers without the knobs: weight averaging iterates over them, and must not average a knob."""
        knobs = {id(self._buffers.get(name)) for name in self.knobs}
        return (each for each in super().buffers(recurse) if id(each) not in knobs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own knobs: spawned processes share the memory of anything that Lightning does not copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self.knobs:
            self._buffers[name] = getattr(self, name).clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        knobs = {name: self._buffers[name] for name in self.knobs}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, knob in knobs.items():
            moved = self._buffers[name]
            if knob is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = knob.to(moved.device)
        return self


def checked_knob(name: str, value: float) -> float:
    """Return a knob's value.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not 0 <= value <= torch.finfo(torch.float32).max:
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
    return float(value)
