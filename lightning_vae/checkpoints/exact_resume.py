"""Resume a run bit for bit from a checkpoint, restoring what Lightning's checkpoint lacks."""

from __future__ import annotations

import zlib
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import SequentialSampler
from typing_extensions import override

from .checkpoint_io import MODULE_KEY

_HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Companion(Callback):
    """Base class of the callbacks that a module adds. They leave a Trainer that continues with another module."""

    def __init__(self) -> None:
        # Lightning enters a profiler's context for each hook, even an empty one, but skips what can't be called.
        for hook in _HOOKS_OF_A_STEP:
            if getattr(type(self), hook) is getattr(Callback, hook):
                setattr(self, hook, None)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if hasattr(pl_module, "training_means"):
            self._start(trainer, stage)
        else:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            trainer.callbacks = [each for each in callbacks if each is not self]  # type: ignore[attr-defined]

    def _start(self, trainer: Trainer, stage: str) -> None:
        """Start a run of the module."""


class ExactResume(Companion):
    """Make a resumed run equal to an uninterrupted one. A :class:`lightning_vae.VAE` adds this callback itself.

    Each training batch draws its own random numbers, whatever was drawn before. A checkpoint also holds the training
    means so far, and the unfinished part of the batch in which it was saved; the resumed run does that part first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seed = 0
        self._unfinished: dict[str, Any] | None = None

    @override
    def _start(self, trainer: Trainer, stage: str) -> None:
        if stage == "fit":
            self._seed = trainer.strategy.broadcast(int(torch.randint(2**31, ())))
            self._unfinished = None

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(MODULE_KEY, {})
        self._seed, self._unfinished = saved.get("seed", self._seed), saved.get("unfinished")
        if trainer.state.fn == TrainerFn.FITTING and "train_sums" in saved:
            pl_module.training_means.load(saved["train_sums"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._unfinished is not None:
            _finish_batch(trainer, self._unfinished)
            _warn_of_losses(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _seed_batch(pl_module.device, self._seed, step_of(trainer), batch_idx, trainer.global_rank)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._unfinished is not None:  # this epoch ends like any other
            _set_restarting(trainer.fit_loop, False)  # otherwise schedulers that monitor a metric are not updated
            trainer.fit_loop.epoch_loop.on_iteration_done()
            self._unfinished = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault(MODULE_KEY, {}).update(
            seed=self._seed,
            train_sums=pl_module.training_means.state(),
            unfinished=_unfinished_batch(trainer, checkpoint),
        )


# The model and its knobs use these three. They are here because this file may read private names of Lightning's loops.


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer that a module is attached to; ``None`` in a custom training loop."""
    return module._trainer


def step_of(trainer: Trainer) -> int:
    """Return the number of batches that stepped, the loggers' x-axis."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def is_fitting(trainer: Trainer) -> bool:
    """Return whether a fit goes on; one that an exception ends goes on until its clean-up is done."""
    state = trainer.state
    if state.status == TrainerStatus.INTERRUPTED:  # after the clean-up one of the two is `None`, by what ended the run
        return state.fn == TrainerFn.FITTING and None not in (state.stage, trainer.fit_loop._data_fetcher)
    return state.fn == TrainerFn.FITTING and not state.stopped


def is_stopping(trainer: Trainer) -> bool:
    """Return whether the run ends with this batch: it was told to stop and may, or has reached ``max_steps``."""
    stops: bool = trainer.should_stop and trainer.fit_loop._can_stop_early
    return stops or trainer.global_step >= trainer.max_steps != -1


def first_step(checkpoint: dict[str, Any]) -> int:
    """Return the step from which a run resumed from a checkpoint writes its curves.

    Args:
        checkpoint: A checkpoint of a VAE, or of another module, for which Lightning's own count is returned.
    """
    found = checkpoint.get(MODULE_KEY, {}).get("unfinished")
    own: int = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    return own if found is None else found["step"]


def _seed_batch(device: torch.device, seed: int, step: int, batch_idx: int, rank: int) -> None:
    """Seed the random numbers of one training batch.

    Args:
        device: Device of the batch. The CPU is always seeded too.
        seed: Seed of the run.
        step: Number of batches that stepped before.
        batch_idx: The batch's number in its epoch. It differs between batches whose gradients are accumulated.
        rank: Rank of the process.
    """
    seed = zlib.crc32(b"(%d, %d, %d, %d)" % (seed, step, batch_idx, rank))
    # `torch.manual_seed` takes thirty times as long, because it queries every kind of device.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _unfinished_batch(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Describe the unfinished part of the batch in whose ``on_train_batch_end`` a checkpoint is being saved.

    Lightning considers such a batch finished when it resumes, and drops what should follow: the values that it logs,
    the validation that is due, and, after an epoch's last batch, the hooks at the epoch's end. This function completes
    the checkpoint's own count of batches, so that Lightning resumes between the batch and what follows it.

    Args:
        trainer: The Trainer that saves.
        checkpoint: The checkpoint. Changed in place.

    Returns:
        ``"step"``, at which the resumed run starts to write its curves; ``"logged"``, values by key that the loggers do
        not have yet; ``"follows"``, what Lightning would skip: a ``"validation"``, the ``"epoch_end"``, or the learning
        rate schedulers at its end that wait for ``"plateaus"``; ``"metrics"``, which those may monitor.
    """
    fit_loop = trainer.fit_loop
    loop, batches = fit_loop.epoch_loop, fit_loop.epoch_loop.batch_progress
    step, total = step_of(trainer), cast(_ProcessedTracker, batches.total)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not (trainer.training and total.completed + 1 == total.processed == total.ready):
        epochs, step = cast(_ProcessedTracker, fit_loop.epoch_progress.total), step + int(trainer.validating)
        plateaus = epochs.completed + 1 == epochs.processed and batches.is_last_batch
        return {"step": step, "logged": {}, "follows": "plateaus" if plateaus else None, "metrics": metrics}

    logs = trainer._logger_connector.should_update_logs and not fit_loop._should_accumulate()
    logged = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()} if logs else {}
    ends = "epoch_end" if loop._num_ready_batches_reached() else None
    follows = "validation" if _is_validation_due(trainer) else ends
    if follows:
        saved = checkpoint["loops"]["fit_loop"]
        for progress in ("total", "current"):
            saved["epoch_loop.batch_progress"][progress]["completed"] += 1
        # For a completed batch Lightning counts the step after a validation, and does not count it without one.
        saved["epoch_loop.state_dict"]["_batches_that_stepped"] += int(follows == "epoch_end")
    if logged:
        logged["epoch"] = float(trainer.current_epoch)
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(each, LearningRateMonitor) and _has_written(each, trainer, logs):
            logged |= {name: rates[-1] for name, rates in each.lrs.items()}
    return {"step": step, "logged": logged, "follows": follows, "metrics": metrics}


def _has_written(monitor: LearningRateMonitor, trainer: Trainer, logs: bool) -> bool:
    """Return whether a monitor, which writes to the loggers itself, has written at this batch."""
    intervals = {config.interval for config in trainer.lr_scheduler_configs} or {"step", "epoch"}
    if monitor.logging_interval is not None:
        intervals = {monitor.logging_interval}
    return (logs and "step" in intervals) or (trainer.fit_loop.epoch_loop.batch_idx == 0 and "epoch" in intervals)


def _finish_batch(trainer: Trainer, unfinished: dict[str, Any]) -> None:
    """Finish the batch. Call it in ``on_train_start``, before Lightning finds its place.

    Args:
        trainer: The Trainer that resumes.
        unfinished: The result of :func:`_unfinished_batch`.
    """
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    validation = loop.val_loop
    loaders = fit_loop._combined_loader
    if loaders is not None and (places := fit_loop._combined_loader_states_to_load):
        # Reading `trainer.estimated_stepping_batches` early, as learning rate schedules do, makes the loaders before
        # Lightning has read their places from the checkpoint. It would then forget those.
        loaders._load_state_dicts(places)
        fit_loop._combined_loader_states_to_load = []
        iter(fit_loop._data_fetcher)  # type: ignore[arg-type]
    epochs = cast(_ProcessedTracker, fit_loop.epoch_progress.total)
    if 0 < epochs.ready == epochs.processed:  # saved when an epoch ended, or afterwards
        _continue_epoch(fit_loop)
    between = loop.restarted_on_last and not validation.restarted_mid_evaluation and unfinished["follows"] is None
    if between and not fit_loop._should_accumulate():
        # If a validation is due, Lightning skips the one already done and counts the step; otherwise it does not.
        is_due = _is_validation_due(trainer)
        loop._batches_that_stepped = unfinished["step"] - int(is_due)
        validation._has_run = not is_due and loop._num_ready_batches_reached()  # the epoch's end follows
    trainer._logger_connector._callback_metrics.update(
        {name: torch.tensor(value) for name, value in unfinished["metrics"].items()}
    )
    if unfinished["logged"]:
        trainer._logger_connector.log_metrics(unfinished["logged"], step=unfinished["step"])
    if unfinished["follows"] == "validation" or validation.restarted_mid_evaluation:
        # As if the run had stopped during the pass. Such a pass starts over: the checkpoint does not hold its sums.
        validation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        validation.batch_progress.current.reset()
    elif unfinished["follows"] == "epoch_end":
        validation._has_run = True
    elif unfinished["follows"] == "plateaus":
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def _continue_epoch(fit_loop: _FitLoop) -> None:
    """Start the next epoch after a finished one, or continue one that the end of the run cut short."""
    loop, epochs = fit_loop.epoch_loop, fit_loop.epoch_progress
    cut_short = not loop.batch_progress.is_last_batch
    for progress in (cast(_ProcessedTracker, epochs.total), cast(_ProcessedTracker, epochs.current)):
        progress.processed = progress.completed = progress.ready - int(cut_short)
    # With `max_steps` Lightning would repeat the epoch's end, and count a step there.
    _set_restarting(fit_loop, cut_short)
    fit_loop.update_restart_stage()


def _is_validation_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch, apart from the one that Lightning adds when a run stops."""
    fit_loop, stops = trainer.fit_loop, trainer.should_stop
    assert fit_loop._data_fetcher is not None
    trainer.should_stop = False
    is_due = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
    trainer.should_stop = stops
    return is_due


def _set_restarting(loop: _FitLoop, restarting: bool) -> None:
    """Set whether a loop resumes, bypassing its own setter, which assumes so whenever `max_steps` is given."""
    _Loop.restarting.fset(loop, restarting)  # type: ignore[attr-defined]


def _warn_of_losses(trainer: Trainer) -> None:
    """Warn about gradients that were not saved and training loaders that do not keep their place."""
    if trainer.fit_loop._should_accumulate():
        rank_zero_warn(
            f"The checkpoint was saved within {trainer.accumulate_grad_batches} batches whose gradients are "
            "accumulated (`accumulate_grad_batches`). It does not hold the gradients so far, so the first step uses "
            "only the rest."
        )
    loaders = trainer.fit_loop._combined_loader
    amid = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.num_training_batches
    for loader in loaders.flattened if loaders is not None else ():
        ordered = isinstance(getattr(loader, "sampler", None), SequentialSampler)
        if not hasattr(loader, "load_state_dict") and (amid or not ordered):
            rank_zero_warn(
                f"The training data come from a {type(loader).__name__}, which keeps neither its place nor its order. "
                "Parameters, optimizer, schedules and noise continue as they were, but the data come in another order, "
                "and from the start of the epoch. Resuming is exact with a loader that has `state_dict` and "
                "`load_state_dict`, such as those of lightning_vae.datamodules."
            )
