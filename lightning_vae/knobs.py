"""The knobs of a module's loss: numbers that callbacks move during training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, callbacks
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from .checkpoints.checkpoint_io import MODULE_KEY
from .checkpoints.class_paths import check_checkpoint
from .checkpoints.exact_resume import is_fitting, trainer_of
from .objective import check_single, checked_number

_WEIGHT_AVERAGING = getattr(callbacks, "WeightAveraging", ())  # new in Lightning 2.6


class KnobModule(LightningModule):
    """Base class of a module whose loss has knobs.

    A knob is a 0-dim float32 buffer. Assigning a number fills it in place. Outside a fit the assignment also configures
    the module, as the constructor does. The buffer is the single source of truth: a callback moves a knob only during
    training batches, so validation, checkpoints and the finished module hold its target.

    Attributes:
        knobs: The number that each knob is configured with; ``None`` for a knob left at its default, for which a
            callback's schedule may have any end.
        constructed_knobs: The same as the constructor set it, before any later assignment.
        rate_limit: The rate in nats that a controller holds the module at, and the price of each nat above it; saved in
            checkpoints. ``None`` if no controller has set it.
        error_limit: The error that a controller holds the module at, ``"squared_error"`` or ``"distortion"``, with its
            limit and the price in nats of each unit above it; saved in checkpoints. ``None`` if none has set it.
        steered_knobs: The knobs that this controller moves; saved with the limit.
        unread_knobs: The knobs that the loss does not read as the module is configured; setting one is an error.
    """

    knobs: dict[str, float | None]
    constructed_knobs: dict[str, float | None]
    steered_knobs: tuple[str, ...]
    rate_limit: tuple[float, float] | None
    error_limit: tuple[str, float, float] | None
    unread_knobs: tuple[str, ...] = ()
    _averages = False
    chosen_options: tuple[str, ...] = ()
    """Options of the constructor that a callback may override. The override is saved like the knobs."""

    def _register_knobs(self, **knobs: tuple[float | None, float]) -> None:
        """Register knobs by name, each with its configured number, if any, and its default."""
        self.rate_limit, self.error_limit, self.steered_knobs = None, None, ()
        self.knobs = {name: None if own is None else checked_number(name, own) for name, (own, _) in knobs.items()}
        self.constructed_knobs = dict(self.knobs)
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
        if name in self.unread_knobs:
            raise ValueError(
                f"`{name}` is set to {value}, but the loss of {type(self).__name__} does not read it as it is "
                "configured: `capacity_weight` or `importance_samples` gives it another loss. Leave out that option "
                "or the assignment."
            )
        is_fitting = self._is_fitting
        if is_fitting and isinstance(value, Tensor) and value.device.type != "cpu":  # reading it would synchronise
            check_single(name, value)
        else:
            value = checked_number(name, value)
        if not is_fitting:
            self._configure(name, value)
        self._fill(name, value)

    def _configure(self, name: str, value: float) -> None:
        self.knobs[name] = value
        self._update_hparams({name: value})

    def _update_hparams(self, values: dict[str, Any]) -> None:
        """Update the hyperparameters as ``save_hyperparameters`` does, without enabling their logging."""
        self.hparams.update(values)
        self._hparams_initial = copy.deepcopy(self.hparams)

    @torch.no_grad()
    def _fill(self, name: str, value: float | Tensor) -> None:
        self._buffers[name].fill_(value)  # type: ignore[union-attr]

    @property
    def _is_fitting(self) -> bool:
        trainer = trainer_of(self)
        return trainer is not None and is_fitting(trainer)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":  # a controller sets its limit when fitting starts
            self.rate_limit, self.error_limit, self.steered_knobs = None, None, ()
            for name, value in self.knobs.items():
                if value is not None:  # otherwise the knob stays as it is
                    self._fill(name, value)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        options = {name: getattr(self, name) for name in self.chosen_options}
        checkpoint.setdefault(MODULE_KEY, {}).update(
            knobs=dict(self.knobs),
            constructed_knobs=dict(self.constructed_knobs),
            knob_values={name: float(getattr(self, name)) for name in self.knobs},
            rate_limit=self.rate_limit,
            error_limit=self.error_limit,
            steered_knobs=list(self.steered_knobs),
            chosen={name: value for name, value in options.items() if value != self.hparams[name]},
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(MODULE_KEY, {})
        if "knob_targets" in saved:  # version 0.1.0, in which a controller always moved beta
            found = ["beta"] if saved.get("rate_limit") else []
            saved = {**saved, "knob_values": saved["knob_targets"], "knobs": self.knobs, "steered_knobs": found}
        steered = tuple(saved.get("steered_knobs", ()))
        if not self._is_fitting:  # in a fit, the limit is that of a controller of this run
            self.rate_limit, self.error_limit = saved.get("rate_limit"), saved.get("error_limit")
            self.steered_knobs = steered
        for name, value in saved.get("knob_values", {}).items():
            if name not in self.knobs:  # of a loss that the module is no longer configured with
                continue
            constructed = saved.get("constructed_knobs", {}).get(name)
            self._load_knob(name, value, saved["knobs"][name], constructed, name in steered)
        for name, value in saved.get("chosen", {}).items():
            setattr(self, name, value)

    def _load_knob(
        self, name: str, value: float, configured: float | None, constructed: float | None, is_steered: bool
    ) -> None:
        """Take a knob's value from a checkpoint, unless the module is configured with another number.

        Args:
            name: The knob.
            value: Its value when the checkpoint was saved.
            configured: The number that the saved module was configured with.
            constructed: The number that its constructor set.
            is_steered: Whether a controller has found the value.
        """
        own, value = self.knobs[name], checked_number(name, value)
        if self._is_fitting:
            keeps = own is not None and not is_steered  # keep the weight that a controller has found
            if keeps and float(getattr(self, name)) != value:
                rank_zero_warn(
                    f"The checkpoint was saved with `{name}={value:g}`; the run continues with `{name}={own:g}`, which "
                    "the module is configured with."
                )
            if not keeps and own not in (None, configured):
                rank_zero_warn(
                    f"The run continues with `{name}={value:g}`, which a controller had found when the checkpoint was "
                    f"saved. `{name}={own:g}`, which the module is configured with, is not used."
                )
        elif trainer_of(self) is None:
            keeps = own not in (None, configured, constructed)  # an argument that overrides the checkpoint
            if not keeps and configured is not None:
                self._configure(name, configured)
        else:
            keeps = False
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
        """Yield the buffers, but no knobs under weight averaging, which iterates over them: a knob is no weight."""
        hidden = {id(self._buffers.get(name)) for name in self.knobs} if recurse and self._is_averaged else set()
        return (each for each in super().buffers(recurse) if id(each) not in hidden)

    @property
    def _is_averaged(self) -> bool:
        trainer = trainer_of(self)
        if trainer is None:
            return self._averages
        return any(isinstance(each, _WEIGHT_AVERAGING) for each in trainer.callbacks)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # Weight averaging pairs the buffers of the module with those of a copy, which has no Trainer.
        return {**super().__getstate__(), "_averages": self._is_averaged}

    def _replicate_for_data_parallel(self) -> Self:
        """Make a replica that declares no knobs, so that torch can assign its copies of the buffers."""
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__["knobs"] = {}
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy its own knobs: spawned processes share the memory of anything that Lightning does not copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _make_trainable(self)
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


@torch.inference_mode(False)
def _make_trainable(module: nn.Module) -> None:
    """Replace tensors that can't be trained: those of a copy made in inference mode, as during a validation."""
    replaced: dict[int, Tensor] = {}  # modules may share a tensor
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in replaced:
                    own = tensor.clone()
                    is_parameter = tensors is each._parameters
                    replaced[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if is_parameter else own
                tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]
