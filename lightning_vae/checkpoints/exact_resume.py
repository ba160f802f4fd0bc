"""What a Lightning checkpoint lacks for the run that goes on from it to be the uninterrupted one."""

from __future__ import annotations

import zlib
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import SequentialSampler


def seed_batch(device: torch.device, seed: int, step: int, batch_idx: int, rank: int) -> None:
    """Start the random numbers of one training batch, so that they depend on nothing that came before.

    Args:
        device: Where the batch is; the CPU's numbers start anew in any case.
        seed: Of the run.
        step: Number of batches that stepped before this one.
        batch_idx: Its number in the epoch, which tells batches apart that accumulate gradients.
        rank: The process.
    """
    seed = zlib.crc32(b"(%d, %d, %d, %d)" % (seed, step, batch_idx, rank))
    # `torch.manual_seed` would take thirty times as long: it asks every kind of device.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def unfinished_batch(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Describe what remains to be done of the batch in whose ``on_train_batch_end`` a checkpoint is being saved.

    Lightning takes such a batch for finished when it resumes. What was to follow it is lost then: the values that it
    logs, the validation that is due, and, after an epoch's last batch, the hooks at the epoch's end. The checkpoint's
    own count of batches is completed here, so that Lightning finds itself between the batch and what follows it.

    Args:
        trainer: What saves.
        checkpoint: What it saves, which is changed.

    Returns:
        ``"step"``, from which on the resumed run writes its curves; ``"logged"``, values by key that the loggers had
        not been given; ``"follows"``, what Lightning would leave out: a ``"validation"``, the ``"epoch_end"``, or, of
        that, the learning rate schedulers that wait for ``"plateaus"``; ``"metrics"``, what these may monitor.
    """
    fit_loop = trainer.fit_loop
    loop, batches = fit_loop.epoch_loop, fit_loop.epoch_loop.batch_progress
    step, total = loop._batches_that_stepped, cast(_ProcessedTracker, batches.total)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if not (trainer.training and total.completed + 1 == total.processed == total.ready):
        epochs, step = cast(_ProcessedTracker, fit_loop.epoch_progress.total), step + int(trainer.validating)
        plateaus = epochs.completed + 1 == epochs.processed and batches.is_last_batch
        return {"step": step, "logged": {}, "follows": "plateaus" if plateaus else None, "metrics": metrics}

    logs = trainer._logger_connector.should_update_logs and not fit_loop._should_accumulate()
    logged = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()} if logs else {}
    ends = "epoch_end" if loop._num_ready_batches_reached() else None
    follows = "validation" if _validation_is_due(trainer) else ends
    if follows:
        saved = checkpoint["loops"]["fit_loop"]
        for progress in ("total", "current"):
            saved["epoch_loop.batch_progress"][progress]["completed"] += 1
        # A validation is followed by the count that Lightning, once the batch is completed, leaves out without one.
        saved["epoch_loop.state_dict"]["_batches_that_stepped"] += int(follows == "epoch_end")
    if logged:
        logged["epoch"] = float(trainer.current_epoch)
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(each, LearningRateMonitor) and _has_written(each, trainer, logs):
            logged |= {name: rates[-1] for name, rates in each.lrs.items()}
    return {"step": step, "logged": logged, "follows": follows, "metrics": metrics}


def _has_written(monitor: LearningRateMonitor, trainer: Trainer, logs: bool) -> bool:
    """Whether a monitor, which writes to the loggers by itself, has written at this batch."""
    intervals = {config.interval for config in trainer.lr_scheduler_configs} or {"step", "epoch"}
    if monitor.logging_interval is not None:
        intervals = {monitor.logging_interval}
    return (logs and "step" in intervals) or (trainer.fit_loop.epoch_loop.batch_idx == 0 and "epoch" in intervals)


def first_step(checkpoint: dict[str, Any]) -> int:
    """Return the step from which on a run that goes on from a checkpoint writes its curves.

    Args:
        checkpoint: Of a VAE, or of another module, whose own count is then taken.
    """
    found = checkpoint.get("lightning_vae", {}).get("unfinished")
    own: int = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    return own if found is None else found["step"]


def finish_batch(trainer: Trainer, unfinished: dict[str, Any]) -> None:
    """Do what remained to be done; from ``on_train_start``, before Lightning looks where it is.

    Args:
        trainer: What resumes.
        unfinished: What :func:`unfinished_batch` found.
    """
    fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    validation = loop.val_loop
    loaders = fit_loop._combined_loader
    if loaders is not None and (places := fit_loop._combined_loader_states_to_load):
        # Who asks for `trainer.estimated_stepping_batches` early, as learning rate schedules do, has the loaders made
        # before Lightning has read where they were, and it would forget that.
        loaders._load_state_dicts(places)
        fit_loop._combined_loader_states_to_load = []
        iter(fit_loop._data_fetcher)  # type: ignore[arg-type]
    epochs = cast(_ProcessedTracker, fit_loop.epoch_progress.total)
    if 0 < epochs.ready == epochs.processed:  # saved when an epoch ended, or afterwards
        _take_up_the_epoch(fit_loop)
    between = loop.restarted_on_last and not validation.restarted_mid_evaluation and unfinished["follows"] is None
    if between and not fit_loop._should_accumulate():
        # Where a validation is due, Lightning passes over the one that has been and counts the step; else it does not.
        is_due = _validation_is_due(trainer)
        loop._batches_that_stepped = unfinished["step"] - int(is_due)
        validation._has_run = not is_due and loop._num_ready_batches_reached()  # the epoch's end follows
    trainer._logger_connector._callback_metrics.update(
        {name: torch.tensor(value) for name, value in unfinished["metrics"].items()}
    )
    if unfinished["logged"]:
        trainer._logger_connector.log_metrics(unfinished["logged"], step=unfinished["step"])
    if unfinished["follows"] == "validation" or validation.restarted_mid_evaluation:
        # As if stopped amid the pass; and a pass that was is begun anew, since its sums are not in the checkpoint.
        validation._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
        validation.batch_progress.current.reset()
    elif unfinished["follows"] == "epoch_end":
        validation._has_run = True
    elif unfinished["follows"] == "plateaus":
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)


def end_first_epoch(trainer: Trainer) -> None:
    """Let the epoch that a resumed run began in end as any other does; from ``on_train_epoch_end``.

    Args:
        trainer: What has resumed.
    """
    _set_restarting(trainer.fit_loop, False)  # else schedulers that monitor a metric are not updated
    trainer.fit_loop.epoch_loop.on_iteration_done()


def _take_up_the_epoch(fit_loop: _FitLoop) -> None:
    """Leave an epoch that has ended behind, and go on with one that the end of the run has cut short."""
    loop, epochs = fit_loop.epoch_loop, fit_loop.epoch_progress
    cut_short = not loop.batch_progress.is_last_batch
    for progress in (cast(_ProcessedTracker, epochs.total), cast(_ProcessedTracker, epochs.current)):
        progress.processed = progress.completed = progress.ready - int(cut_short)
    # Where `max_steps` is given, Lightning would go through the end of the epoch again, and count a step there.
    _set_restarting(fit_loop, cut_short)
    fit_loop.update_restart_stage()


def _validation_is_due(trainer: Trainer) -> bool:
    """Tell whether a validation follows the batch, apart from the one that Lightning adds when a run is to stop."""
    fit_loop, stops = trainer.fit_loop, trainer.should_stop
    assert fit_loop._data_fetcher is not None
    trainer.should_stop = False
    is_due = fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
    trainer.should_stop = stops
    return is_due


def _set_restarting(loop: _FitLoop, restarting: bool) -> None:
    """Say whether a loop resumes; its own setter says that it does wherever `max_steps` is given."""
    _Loop.restarting.fset(loop, restarting)  # type: ignore[attr-defined]


def say_what_is_lost(trainer: Trainer) -> None:
    """Warn of gradients that were not saved, and of a training loader that does not know its place.

    Args:
        trainer: What resumes.
    """
    if trainer.fit_loop._should_accumulate():
        rank_zero_warn(
            f"The checkpoint was saved amid {trainer.accumulate_grad_batches} batches whose gradients are accumulated "
            "(`accumulate_grad_batches`). It does not hold those so far, so the first step takes the others' alone."
        )
    loaders = trainer.fit_loop._combined_loader
    amid = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.num_training_batches
    for loader in loaders.flattened if loaders is not None else ():
        ordered = isinstance(getattr(loader, "sampler", None), SequentialSampler)
        if not hasattr(loader, "load_state_dict") and (amid or not ordered):
            rank_zero_warn(
                f"The training data come from a {type(loader).__name__}, which keeps neither its place nor its order: "
                "parameters, optimizer, schedules and noise go on as they were; the data go on in another order, and "
                "amid an epoch with those of its start. With a loader that has `state_dict` and `load_state_dict`, as "
                "those of lightning_vae.datamodules do, resuming is exact."
            )
