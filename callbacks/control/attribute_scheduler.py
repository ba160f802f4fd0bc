"""What the callbacks that move a knob along a schedule have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..base import Callback, callbacks_of
from ..reading.distribution_reader import DistributionReader
from ..schedules import Schedule
from .tied_attributes import TiedAttributes
from .witness import Witness, remedy

try:
    from lightning.fabric.utilities.exceptions import MisconfigurationException as MisconfigurationException
except ImportError:  # a copied folder, in a project that has pytorch_lightning alone
    from lightning_fabric.utilities.exceptions import MisconfigurationException  # type: ignore[assignment]

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_FIRST_LOOKS = 10  # batches after which the number is read back, whether they log or not
_MOST_CONFLICTS = 3  # batches in which the number was moved, before that is said without knowing by whom
_MOVING = re.compile(r"train(ing)?[/_]loss(_step|_epoch)?")


class AttributeScheduler(Callback):
    """Move a number of a LightningModule along a schedule of the training step.

    The value is a function of the step alone, so a resumed run goes on where it was. What is saved is what the step
    can't tell: the module's value before the schedule touched it, and how long the run was when lengths in epochs or
    fractions were turned into steps.

    The number moves in training batches alone: validation and checkpoints see its target, so that a validation loss
    selects models under any schedule, and a checkpoint that is loaded holds the value that was meant.

    After a step the number is read back. If something else has moved it, that is said once, with the function that did.

    Args:
        schedule: Value per step: one of this package's schedules, or any callable.
        attribute: Where the module keeps the number: a dotted path through submodules, objects, dict keys and list
            indices, or several such paths that get the same value. A method at its end is replaced by the value.
        setter: Writes the number instead, ``(pl_module, value) -> None``; the schedule then needs an explicit end.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If there is no path.
    """

    def __init__(
        self,
        schedule: Schedule | Callable[[int], float],
        attribute: str | Sequence[str],
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        paths = [attribute] if isinstance(attribute, str) else list(attribute)
        if not paths or not all(isinstance(path, str) and all(path.split(".")) for path in paths):
            raise ValueError(f"`attribute` must be a dotted path such as 'model.beta', or several, got {attribute!r}.")
        if not callable(schedule):
            raise ValueError(
                f"`schedule` must be a schedule or another callable of the step, got {type(schedule).__name__}."
            )
        self.schedule = schedule
        self.attribute = attribute
        self.setter = setter
        self.name = name or _last_part(paths[-1])
        self._paths = paths if setter is None else []
        self._reader = DistributionReader()  # for a subclass that reads the posterior of each training batch
        self._resolved: Callable[[int], float] = schedule
        self._settled = math.inf  # the step from which on the schedule holds its last value,
        self._last = math.nan  # which is this
        self._restored: dict[str, Any] = {}
        self._base: float | None = None
        self._run: dict[str, int | None] = {}
        self._target: float | None = None
        self._knob: TiedAttributes | None = None
        self._witness: Witness | None = None
        self._conflicts = 0
        self._looks: float = 0
        self._current: float | Tensor = math.nan  # the number of this step
        self._attends = True  # whether there is more to this batch: a look, a posterior to read, values to log

    @cached_property  # Lightning asks for it at every hook of every step
    @override
    def state_key(self) -> str:
        return self._generate_state_key(attribute=self.attribute, name=self.name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = {}  # a checkpoint that was only evaluated is not resumed

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_twins(trainer)
        self.at_end(trainer, self._let_go)
        try:
            self._begin(trainer, pl_module)
        except ValueError:
            # Some modules build themselves in hooks that come after this one.
            if not _builds_itself_later(pl_module):
                raise

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Asking how long the run is has had the loaders made before Lightning read where they were in the run that is
        # resumed, and it would forget that.
        loaders, places = trainer.fit_loop._combined_loader, trainer.fit_loop._combined_loader_states_to_load
        if loaders is not None and places:
            loaders._load_state_dicts(places)
            trainer.fit_loop._combined_loader_states_to_load = []
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._knob is None:
            self._begin(trainer, pl_module)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._current = self._last if step >= self._settled else self._value(step)
        self._knob.write(self._current)  # type: ignore[union-attr]
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._attends = bool(self._looks or self._reader.paths) or not every or (step + 1) % every == 0
        if self._attends:
            if self._witness is not None:
                self._witness.watch()
            self._reader.listen(pl_module)
            if batch_idx == 0 and step == 0:
                self._try_out(trainer, pl_module, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._attends:
            logs_now = self.logs_now(trainer)
            # Where a tensor has other elements that move too, looking waits for the device.
            if logs_now or self._looks:
                self._look_for_conflict(trainer, pl_module)
            if logs_now:
                self._log(trainer, pl_module, batch)
            self._reader.forget()
        self._attends = True  # a batch that is None has an end alone

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_target()

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        place = self._knob.overwritten() if self._knob is not None and batch_idx == 0 else None
        if place is not None and self._target is not None and self._conflicts < _MOST_CONFLICTS:
            self._conflicts = _MOST_CONFLICTS
            rank_zero_warn(
                f"{type(self).__name__}({self.name}): validation should see `{place.path}` at its target, "
                f"{self._target:g}, and sees {place.read()}: something else sets it too. {_take_out(pl_module)}"
            )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write_target()  # the checkpoint refers to the module's tensors and objects; numbers it has copied
        for path in self._paths:
            root, _, rest = path.partition(".")
            if root == "hparams" and "hyper_parameters" in checkpoint:
                name = rest.partition(".")[0]
                checkpoint["hyper_parameters"][name] = pl_module.hparams[name]
        self._reader.unhook()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"base": self._base, "schedule": repr(self.schedule), **self._run}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        knob = self._find(pl_module)
        goes_on = self.step(trainer) > 0  # the same Trainer's next fit counts on
        restored = self._restored or (self.state_dict() if goes_on else {})
        self._base = self._configured(pl_module, knob.read(), restored)
        self._resolve(trainer, restored)
        self._agree_on_target(pl_module)
        self._refuse_moving_monitor(trainer)
        if getattr(trainer, "ckpt_path", None) and not self._restored and not self._is_constant:
            rank_zero_warn(
                f"{type(self).__name__}({self.name}): the checkpoint holds nothing of this callback, so it was saved "
                "without it, or is damaged. The schedule is taken up at the step that the run is at, over the run's "
                "length as it is now; what is measured begins anew."
            )
        self._knob = knob
        self._current = math.nan if self._base is None else self._base
        self._conflicts, self._looks = 0, math.inf if getattr(trainer, "fast_dev_run", False) else _FIRST_LOOKS

    def _value(self, step: int) -> float | Tensor:
        """Return the number of the step that begins, as long as the schedule has not come to its end."""
        value = self._resolved(step)
        if not math.isfinite(value):
            raise ValueError(
                f"{type(self).__name__}({self.name}): the schedule must give finite numbers, got {value} at step "
                f"{step}."
            )
        return value

    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:  # noqa: ARG002
        """Log the number that the step was taken with; from ``on_train_batch_end`` on logging steps."""
        if self.name not in getattr(pl_module, "knob_targets", ()):  # else it logs them itself
            self.log_now(pl_module, {f"knobs/{self.name}": self._current}, prog_bar=True)

    def _try_out(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Look at what the number does, before the very first batch, whose index is 0."""

    def _find(self, pl_module: LightningModule) -> TiedAttributes:
        return TiedAttributes(pl_module, self._paths, self.setter)

    def _let_go(self) -> None:
        """Leave the number at its target, however the run ended."""
        self._reader.detach()
        witness, self._witness = self._witness, None
        if witness is not None:
            witness.rest()
        try:
            self._write_target()
        finally:
            self._knob = None

    def _write_target(self) -> None:
        """Set the number to where it is meant to end, until the next training batch, if any."""
        if self._knob is not None and self._target is not None:
            self._knob.write(self._target)

    def _look_for_conflict(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once that something else moves the number; who it is takes another batch to see."""
        assert self._knob is not None
        self._looks = max(0, self._looks - (not self.accumulates(trainer)))
        witness, self._witness = self._witness, None
        if witness is not None:
            witness.rest()
        place = self._knob.overwritten() if self._conflicts < _MOST_CONFLICTS else None
        if place is None:
            return
        self._conflicts += 1
        if self._conflicts < _MOST_CONFLICTS and (witness is None or witness.seen is None):
            self._witness = Witness(place.holds)
            self._looks += 1
            return
        self._conflicts = _MOST_CONFLICTS
        step, who = self.step(trainer), (witness and witness.seen) or "something else"
        rank_zero_warn(
            f"{type(self).__name__}({self.name}): `{place.path}` was set to {self._current:g} for step {step}, "
            f"and after it is {place.read()}: {who} sets it too, so that one of the two has no effect. "
            f"{_take_out(pl_module)}"
        )

    def _configured(self, pl_module: LightningModule, current: float | None, restored: dict[str, Any]) -> float | None:
        """Return the value that the module is configured with; where it doesn't tell, the one a run began with."""
        targets = getattr(pl_module, "knob_targets", {})
        for path in self._paths:
            if path in getattr(pl_module, "configured_knobs", ()):
                value: float = targets[path]
                if restored.get("base") not in (None, value):
                    rank_zero_warn(
                        f"{type(self).__name__}({self.name}): the checkpoint was saved by a run to "
                        f"{restored['base']:g}; the module is configured with {value:g}, and the run goes on to that."
                    )
                return value
        if restored.get("base") is not None:
            return float(restored["base"])
        return next((targets[path] for path in self._paths if path in targets), current)

    def _resolve(self, trainer: Trainer, restored: dict[str, Any]) -> None:
        """Turn the schedule's lengths into steps, once: a resumed run keeps the ones it began with."""
        self._resolved, self._settled, self._last = self.schedule, math.inf, math.nan
        now = _run_length(trainer)
        self._run = {name: length if restored.get(name) is None else restored[name] for name, length in now.items()}
        if not isinstance(self.schedule, Schedule):
            return
        self._resolved = resolved = self.schedule.resolve(self._base, **self._run)
        self._settled, self._last = resolved.length, resolved.final
        title = f"{type(self).__name__}({self.name})"
        if "schedule" in restored and restored["schedule"] != repr(self.schedule):
            rank_zero_warn(
                f"{title}: the checkpoint was saved under {restored['schedule']}; the run goes on under "
                f"{self.schedule!r}, evaluated at the step it resumes from."
            )
        elif _differs(self.schedule, self._base, self._run, now):
            rank_zero_warn(
                f"{title}: the run was {self._run['total_steps']} steps long when it began and is {now['total_steps']} "
                "now. The schedule keeps the steps it began with; give its length in steps to choose another."
            )
        if resolved.length > 0 and {resolved(0), resolved(int(min(resolved.length, 1e9)) // 2)} == {resolved.final}:
            rank_zero_warn(
                f"{title}: the schedule starts and ends at {resolved.final:g}, so nothing moves. Configure the module "
                "with the value to end at, or give the schedule a `stop`."
            )
        total = now["total_steps"]
        if total is not None and math.isfinite(resolved.length) and resolved.length > total:
            rank_zero_warn(
                f"{title}: the schedule takes {resolved.length:.0f} steps but the run stops after {total}, at "
                f"{resolved(total - 1):g} instead of {resolved.final:g}. Shorten the schedule, or give its length as a "
                "fraction of the run."
            )

    def _agree_on_target(self, pl_module: LightningModule) -> None:
        """Make the schedule's end the module's target, unless the module was configured with another."""
        self._target = final = self._resolved.final if isinstance(self._resolved, Schedule) else self._base
        targets = getattr(pl_module, "knob_targets", {})
        for path in self._paths:
            if path not in targets or final is None:
                continue
            if path in getattr(pl_module, "configured_knobs", ()) and final != targets[path]:
                self._target = None
                raise MisconfigurationException(
                    f"{type(self).__name__}: the schedule ends at {final:g}, but the module is configured with "
                    f"`{path}={targets[path]:g}`. Say it in one place: leave `{path}` out of the module, or "
                    "the schedule's end (`stop`) out of the callback, which then ends at the module's."
                )
            targets[path] = final

    def _refuse_twins(self, trainer: Trainer) -> None:
        for each in callbacks_of(trainer):
            if not isinstance(each, AttributeScheduler) or each is self:
                continue
            if set(each._paths) & set(self._paths) or (self.setter is not None and each.setter is self.setter):
                raise MisconfigurationException(
                    f"Two callbacks move `{self.attribute}`. Remove one, or join their schedules with `Join`."
                )
            if each.name == self.name:
                raise MisconfigurationException(f"Two callbacks log `knobs/{self.name}`. Tell them apart with `name=`.")

    @property
    def _is_constant(self) -> bool:
        return isinstance(self._resolved, Schedule) and self._resolved.length == 0

    def _refuse_moving_monitor(self, trainer: Trainer) -> None:
        if self._is_constant:
            return
        for owner, monitor in _monitors(trainer):
            if _MOVING.fullmatch(monitor):
                raise MisconfigurationException(
                    f"{owner} monitors {monitor!r}, which moves with `{self.name}`: it would follow that and "
                    "not the model. Monitor 'val/loss' (the loss at the target) or 'train/elbo' with mode 'max'."
                )


def _take_out(pl_module: LightningModule) -> str:
    return remedy(pl_module) or "Take one out."


def _last_part(path: str) -> str:
    """Return a path's last part, and the one before where that is a number."""
    *before, last = path.split(".")
    return ".".join([*before[-1:], last]) if last.lstrip("-").isdigit() else last


def _builds_itself_later(pl_module: LightningModule) -> bool:
    hooks = ("on_fit_start", "on_train_start", "on_train_epoch_start")
    return any(hook in vars(of) for of in type(pl_module).__mro__ for hook in hooks if not _is_lightnings(of))


def _is_lightnings(of: type) -> bool:
    return of.__module__.partition(".")[0] in ("lightning", "pytorch_lightning")


def _monitors(trainer: Trainer) -> list[tuple[str, str]]:
    """Return who watches which of the logged values."""
    monitors = [(type(each).__name__, getattr(each, "monitor", None)) for each in callbacks_of(trainer)]
    monitors += [("The learning rate scheduler", config.monitor) for config in trainer.lr_scheduler_configs]
    return [(owner, monitor) for owner, monitor in monitors if isinstance(monitor, str)]


def _run_length(trainer: Trainer) -> dict[str, int | None]:
    """Return the steps in an epoch and in the run, ``None`` where the run has no end or none is known."""
    if any(getattr(each, "going_to_accumulate_grad_batches", bool)() for each in callbacks_of(trainer)):
        return {"steps_per_epoch": None, "total_steps": None}  # accumulation that changes between epochs
    trainer.fit_loop.setup_data()
    total = trainer.estimated_stepping_batches
    if trainer.max_steps != -1 and len(trainer.optimizers) > 1:
        total = math.inf  # `max_steps` counts every optimizer's steps; how many a batch takes is not known
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    return {
        "steps_per_epoch": math.ceil(batches) if math.isfinite(batches) else None,
        "total_steps": int(total) if math.isfinite(total) and total >= 0 else None,
    }


def _differs(schedule: Schedule, base: float | None, saved: dict[str, int | None], now: dict[str, int | None]) -> bool:
    """Whether the run's length as it is now would give another schedule than the one it began with."""
    try:
        return schedule.resolve(base, **saved) != schedule.resolve(base, **now)
    except ValueError:
        return True
