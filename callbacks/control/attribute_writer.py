"""Base of the callbacks that write a number of the module in each training step."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..base import Callback, averages_of, callbacks_of, knobs_of
from ..reading.distribution_reader import DistributionReader
from ..reading.latent_reader import LatentReader
from .attribute_path import AttributePath
from .conflicts import remedy, suspects
from .tied_attributes import NumberPlace, TiedAttributes, number_place

try:
    from lightning.fabric.utilities.exceptions import MisconfigurationException as MisconfigurationException
except ImportError:  # a copied folder, in a project that has only pytorch_lightning
    from lightning_fabric.utilities.exceptions import MisconfigurationException  # type: ignore[assignment]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_FIRST_CHECKS = 10  # first steps at which the number is read back even if they do not log
_MOVING_LOSS = re.compile(r"train(ing)?[/_]loss(_step|_epoch)?")


class AttributeWriter(Callback):
    """Write a number of a LightningModule: its value in training batches, its target in between.

    The base class of :class:`AttributeScheduler`, and the one to derive a controller from. A subclass has

    - :meth:`_prepare`, called when a run begins, which sets the first :attr:`_target`;
    - :meth:`_value`, which returns the number of each step;
    - :attr:`_moves`, whether the number moves during the run.

    A controller changes :attr:`_target` in ``on_train_batch_end``, before it calls ``super()``. The state that a
    resumed run needs is returned by ``state_dict`` and passed to :meth:`_prepare`.

    From the start to the end of a training batch the module holds the step's value, and at all other times the target.
    So validation, checkpoints (weights-only ones too) and the finished module see the intended number, and a validation
    loss selects models under any schedule.

    At the end of a batch the number is read back. If something else also sets it, that is reported once.

    Args:
        attribute: Where the module keeps the number: a dotted path through submodules, objects, dict keys and list
            indices, or several such paths that get the same value. A method at its end is replaced by the value.
            ``None`` if the number is the callback's own, in :attr:`_current`; it then needs a ``name``.
        setter: Writes the number instead, ``(pl_module, value) -> None``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If there is neither a path nor a name.

    Example::

        >>> class HalvedEachStep(AttributeWriter):
        ...     _moves = True
        ...
        ...     def _prepare(self, trainer, pl_module, current, restored):
        ...         self._target = restored.get("target", current)
        ...
        ...     def _value(self, step):
        ...         return self._target
        ...
        ...     def on_train_batch_end(self, *args):
        ...         self._target /= 2
        ...         super().on_train_batch_end(*args)
        ...
        ...     def state_dict(self):
        ...         return {"target": self._target}
        >>> HalvedEachStep("beta").name
        'beta'
    """

    def __init__(
        self,
        attribute: str | Sequence[str] | None,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        paths = _paths(attribute)
        if not paths and not name:
            raise ValueError(f"`name` must be given where `attribute` is None, got {name!r}: no path has a last part.")
        self.attribute = attribute
        self.setter = setter
        self.name = name or _last_part(paths[-1])
        self._paths = paths if setter is None else []
        self._reader: DistributionReader | LatentReader = (
            DistributionReader()
        )  # for a subclass that reads the posterior of each training batch
        self._place: NumberPlace | None = None  # during a fit
        self._current: float | Tensor = math.nan  # the number of this step
        self._target: float | Tensor | None = None
        self._holds_step = False  # whether the module has this step's number, and not the target
        self._has_settled = False  # for a subclass whose number no longer changes
        self._restored: dict[str, Any] = {}
        self._configured: float | None = None  # in a tensor, before a checkpoint is loaded into it
        self._are_several = False  # whether the places were configured with several quantities
        self._checks_left: float = 0
        self._conflicts = 0

    # ---- for a subclass

    @abstractmethod
    def _value(self, step: int) -> float | Tensor:
        """Return the number for the step that is about to begin."""

    @property
    @abstractmethod
    def _moves(self) -> bool:
        """Return whether the number, and with it the training loss, moves during the run."""

    @abstractmethod
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        """Prepare for a run, and set the target.

        Args:
            trainer: The Trainer.
            pl_module: The module to be fitted.
            current: The module's number, if it can be read: the configured one, not that of a checkpoint.
            restored: The state of the resumed run; empty for a new run.
        """

    def _probe(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Probe the effect of the number, before the very first batch."""

    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:  # noqa: ARG002
        """Log the number used in the step, at the end of a batch that logs."""
        if self.name not in knobs_of(pl_module):  # a module with knobs logs them itself
            self.log_now(pl_module, {f"knobs/{self.name}": self._current}, prog_bar=True)

    def _find(self, pl_module: LightningModule) -> NumberPlace:
        return number_place(pl_module, self._paths, self.setter)

    # ---- hooks

    @cached_property  # Lightning reads it at every hook of every step
    @override
    def state_key(self) -> str:
        where = {} if self.attribute is None else {"attribute": self.attribute}
        return self.keyed_by(**where, name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = {}  # drop the state of a checkpoint that was only evaluated
        self._configured, self._are_several = None, False
        if stage == "fit":
            with suppress(Exception):  # some modules build themselves later
                place = self._find(pl_module)
                self._configured = place.read() if place.is_tensor() else None
                self._are_several = isinstance(place, TiedAttributes) and place.are_several_quantities()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_twins(trainer)
        self._refuse_unread(pl_module)
        self.at_end(trainer, self._release)
        self.around_saves(trainer, partial(self._at_target, trainer))
        try:
            self._begin(trainer, pl_module)
        except ValueError:
            # Some modules build themselves in hooks that run after this one.
            if not _builds_itself_later(pl_module):
                raise

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take_up_loaders(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._place is None:
            self._begin(trainer, pl_module)
        if not self._has_settled:
            self._current = self._value(self.step(trainer))
        self._write_step()
        self._reader.listen(pl_module, batch)
        if batch_idx == 0 and self.step(trainer) == 0:
            self._probe(trainer, pl_module, batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._reader.capture(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        logs_now = self.logs_now(trainer)
        if logs_now or self._checks_left:  # reading an element of a tensor back may wait for the device
            self._check_conflict(trainer, pl_module, wait=logs_now)  # logging waits anyway
        if logs_now:
            self._log(trainer, pl_module, batch)
        self._reader.forget()
        if self._current is not self._target:
            self._write_target()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._holds_step:  # the module's `on_train_batch_start` returned -1: the batch never ended
            self._write_target()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_everywhere(trainer)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._write_target()  # weight averaging has swapped the buffers

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        place = self._place.overwritten() if self._place is not None and batch_idx == 0 else None
        if place is not None and self._target is not None and self._conflicts < 2:
            self._conflicts = 2
            rank_zero_warn(
                f"{type(self).__name__}({self.name}): validation should see `{place.path}` at its target, "
                f"{float(self._target):g}, but sees {place.read()}: {self._cause(trainer, pl_module, place)}"
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(Exception):  # it must not hide the error that ended the run; `_release` reports it
            self._write_everywhere(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._reader.unhook()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    # ---- helpers

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        place = self._find(pl_module)
        goes_on = self.step(trainer) > 0  # the same Trainer's next fit counts on
        resumes = getattr(trainer, "ckpt_path", None) is not None
        restores = resumes and not self._are_several  # a checkpoint may hold some of the places
        if isinstance(place, TiedAttributes) and not (goes_on or restores):
            place.refuse_several_quantities()
        current = self._configured if resumes and self._configured is not None else place.read()
        self._prepare(trainer, pl_module, current, self._restored or (self.state_dict() if goes_on else {}))
        self._refuse_moving_monitor(trainer)
        if resumes and not self._restored and self._moves:
            rank_zero_warn(
                f"{type(self).__name__}({self.name}): the checkpoint holds no state of this callback, so it was saved "
                "without it, or is damaged. The schedule starts at the run's current step, over the run's current "
                "length; measurements start from scratch."
            )
        self._place = place
        self._conflicts, self._has_settled = 0, False
        self._checks_left = math.inf if getattr(trainer, "fast_dev_run", False) else _FIRST_CHECKS
        self._write_target()

    def _release(self) -> None:
        """Leave the number at its target, however the run ended."""
        self._reader.detach()
        try:
            self._write_target()
        finally:
            self._place = None

    def _write_step(self) -> None:
        self._place.write(self._current)  # type: ignore[union-attr]
        self._holds_step = True

    def _write_target(self) -> None:
        if self._place is not None and self._target is not None:
            self._place.write(self._target)
            self._holds_step = False

    def _write_everywhere(self, trainer: Trainer) -> None:
        """Write the target to the module, and to its averaged copies, which average the number like a weight."""
        self._write_target()
        if self._place is not None and self._target is not None and self._paths:
            for each in averages_of(trainer):
                number_place(each, self._paths).write(self._target)

    @contextmanager
    def _at_target(self, trainer: Trainer) -> Iterator[None]:
        """Hold the target while a checkpoint is saved, which may happen within a training batch."""
        held_step = self._holds_step
        self._write_everywhere(trainer)
        try:
            yield
        finally:
            if held_step and not self._holds_step:
                self._write_step()

    def _check_conflict(self, trainer: Trainer, pl_module: LightningModule, wait: bool) -> None:
        """Warn once if something else also sets the number; a module may set it a single time, to build itself."""
        assert self._place is not None
        self._checks_left = max(0, self._checks_left - (not self.accumulates(trainer)))
        place = self._place.overwritten(wait) if self._conflicts < 2 else None
        if place is None:
            return
        self._conflicts += 1
        if self._conflicts < 2:
            self._checks_left += 1
            return
        rank_zero_warn(
            f"{type(self).__name__}({self.name}): `{place.path}` was set to {float(self._current):g} for step "
            f"{self.step(trainer)}, and after it is {place.read()}: {self._cause(trainer, pl_module, place)}"
        )

    def _cause(self, trainer: Trainer, pl_module: LightningModule, place: AttributePath) -> str:
        found = suspects(trainer, place.path.rpartition(".")[2])
        perhaps = f", perhaps {' or '.join(found)}" if found else ""
        advice = remedy(pl_module, self._paths) or "Remove one of them."
        return f"something else sets it too{perhaps}, so one of the two has no effect. {advice}"

    def _refuse_twins(self, trainer: Trainer) -> None:
        for each in callbacks_of(trainer):
            if not isinstance(each, AttributeWriter) or each is self:
                continue
            if set(each._paths) & set(self._paths) or (self.setter is not None and each.setter is self.setter):
                raise MisconfigurationException(
                    f"Two callbacks move `{self.attribute}`. Remove one, or join their schedules with `Join`."
                )
            if each.name == self.name:
                raise MisconfigurationException(
                    f"Two callbacks log `knobs/{self.name}`. Distinguish them with `name=`."
                )

    def _refuse_unread(self, pl_module: Any) -> None:
        unread = [path for path in self._paths if path in getattr(pl_module, "unread_knobs", ())]
        if unread:
            raise MisconfigurationException(
                f"{type(self).__name__}: the loss of {type(pl_module).__name__} does not read `{unread[0]}` as it is "
                "configured: `capacity_weight` or `importance_samples` gives it another loss. Remove the callback, or "
                "leave that option out."
            )

    def _refuse_moving_monitor(self, trainer: Trainer) -> None:
        for owner, monitor in monitors(trainer) if self._moves else ():
            if _MOVING_LOSS.fullmatch(monitor):
                raise MisconfigurationException(
                    f"{owner} monitors {monitor!r}, which moves with `{self.name}`: it would follow that number and "
                    "not the model. Monitor 'val/loss' (the loss at the target) or 'train/elbo' with mode 'max'."
                )


def monitors(trainer: Trainer) -> list[tuple[str, str]]:
    """Return the monitored values, each with the name of its monitor."""
    found = [(type(each).__name__, getattr(each, "monitor", None)) for each in callbacks_of(trainer)]
    found += [("The learning rate scheduler", config.monitor) for config in trainer.lr_scheduler_configs]
    return [(owner, monitor) for owner, monitor in found if isinstance(monitor, str)]


def _paths(attribute: str | Sequence[str] | None) -> list[str]:
    if attribute is None:
        return []
    paths = [attribute] if isinstance(attribute, str) else list(attribute)
    if not paths or not all(isinstance(path, str) and all(path.split(".")) for path in paths):
        raise ValueError(f"`attribute` must be a dotted path such as 'model.beta', or several, got {attribute!r}.")
    return paths


def _last_part(path: str) -> str:
    """Return a path's last part, with the part before it if the last is a number."""
    *before, last = path.split(".")
    return ".".join([*before[-1:], last]) if last.lstrip("-").isdigit() else last


def _builds_itself_later(pl_module: LightningModule) -> bool:
    hooks = ("on_fit_start", "on_train_start", "on_train_epoch_start")
    return any(hook in vars(of) for of in type(pl_module).__mro__ for hook in hooks if not _is_lightnings(of))


def _is_lightnings(of: type) -> bool:
    return of.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")
