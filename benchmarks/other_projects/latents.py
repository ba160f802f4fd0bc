"""The checks of projects with other priors and latents; each has a script of its own beside this one."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from checks import QUIET, run_example
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_vae.callbacks import Callback, CollapseDetector, KLAnnealing, Linear, TargetRate

EPOCHS, ROUNDS, TIMED_EPOCHS = 3, 5, 4


@dataclass(frozen=True)
class Model:
    """Facts about a project that the checks need.

    Args:
        name: The heading of its example in docs/guides/drop_in.md.
        fit: Train a new module as the example does, given the example's names, with callbacks and options of the
            Trainer.
        spy: Let a module report its own KL of each batch, ``(N,)``.
        weight: ``attribute`` of :class:`KLAnnealing`.
        extra: Further checks, given the example's names: lines that tell the results, and whether they are right.
    """

    name: str
    fit: Callable[..., Any]
    spy: Callable[[Any, Callable[[Tensor], None]], None]
    weight: Any
    extra: Callable[[dict[str, Any]], tuple[list[str], bool]] = lambda _names: ([], True)


@dataclass(eq=False)
class Witness(Callback):
    """Compare the rate that a callback measures with the module's own KL of the same observations.

    A detector is compared at the end of each pass, a :class:`TargetRate` in each training step.
    """

    model: Model
    callback: CollapseDetector | TargetRate
    stage: Literal["validation", "training", "step"]
    errors: list[float] = field(default_factory=list)
    last: float = math.nan
    _own: list[Tensor] = field(default_factory=list)

    def on_fit_start(self, _trainer: Trainer, pl_module: LightningModule) -> None:
        self.model.spy(pl_module, lambda kl: self._own.append(kl.detach().double().flatten()))

    def on_train_epoch_start(self, *_: Any) -> None:
        self._own.clear()

    def on_train_batch_start(self, *_: Any) -> None:
        if self.stage == "step":
            self._own.clear()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.stage == "step":
            self._compare(trainer.callback_metrics["latent/controlled_rate_weight"])

    def on_validation_epoch_start(self, *_: Any) -> None:
        self._own.clear()

    def on_validation_epoch_end(self, *_: Any) -> None:
        if self.stage == "validation":
            self._compare(self.callback.report.rate)

    def on_train_epoch_end(self, *_: Any) -> None:
        if self.stage == "training":
            self._compare(self.callback.report.rate)

    def _compare(self, rate: Any) -> None:
        self.last = float(torch.cat(self._own).mean())
        self.errors.append(abs(float(rate) / self.last - 1))


class Last(Callback):
    """Keep the parameters of the end."""

    def on_train_end(self, _trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = [parameter.detach().clone() for parameter in pl_module.parameters()]


@dataclass(eq=False)
class Stopwatch(Callback):
    """Take the time from the start of a batch to the start of the next, with all callbacks."""

    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    _begun: float | None = None

    def on_train_epoch_start(self, *_: Any) -> None:
        self._begun = None

    def on_validation_epoch_start(self, *_: Any) -> None:
        self._begun = None

    def on_train_batch_start(self, *_: Any) -> None:
        self._lap(self.training)

    def on_validation_batch_start(self, *_: Any) -> None:
        self._lap(self.validation)

    def _lap(self, laps: list[float]) -> None:
        now = time.perf_counter()
        if self._begun is not None:
            laps.append(now - self._begun)
        self._begun = now


def agreement(model: Model, names: dict[str, Any], stage: Literal["validation", "training", "step"]) -> Witness:
    """Compare the measured rate with the module's own KL in a fit in float64."""
    seed_everything(0, verbose=False)
    places = names["places"]
    if stage == "step":
        places = {option: place for option, place in places.items() if option != "pool"}
        callback = TargetRate(1.0, attribute=model.weight, name="weight", smoothing=0.0, **places)
    else:
        callback = CollapseDetector(**places)
    witness = Witness(model, callback, stage)
    options = QUIET if stage == "validation" else {**QUIET, "limit_val_batches": 0}
    model.fit(names, [callback, witness], max_epochs=EPOCHS, precision="64-true", log_every_n_steps=1, **options)
    assert witness.errors
    return witness


def leaves_no_trace(model: Model, names: dict[str, Any], trains: bool) -> bool:
    """Return whether a fit with the detector ends with the same parameters and random state, to the bit."""
    ends = []
    for has_detector in (True, False):
        seed_everything(0, verbose=False)
        last = Last()
        callbacks = [CollapseDetector(**names["places"])] if has_detector else []
        options = {"limit_val_batches": 0} if trains else {}
        model.fit(names, [*callbacks, last], max_epochs=EPOCHS, **QUIET, **options)
        ends.append([*last.parameters, torch.get_rng_state()])
    return all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def cost(model: Model, names: dict[str, Any]) -> list[str]:
    """Return the milliseconds of a step without the callbacks and the ratio with them, in training and validation."""
    laps: dict[bool, Stopwatch] = {True: Stopwatch(), False: Stopwatch()}
    for _ in range(ROUNDS):
        for has_callbacks, stopwatch in laps.items():
            seed_everything(0, verbose=False)
            schedule = KLAnnealing(Linear(fraction=0.5), attribute=model.weight, name="weight")
            callbacks = [schedule, CollapseDetector(**names["places"])] if has_callbacks else []
            model.fit(names, [*callbacks, stopwatch], max_epochs=TIMED_EPOCHS, **QUIET)
    cells = []
    for stage in ("training", "validation"):
        with_, without = (statistics.median(getattr(laps[each], stage)) for each in (True, False))
        cells.append(f"{1000 * without:.1f} ms, {with_ / without:.2f}")
    return cells


def main(model: Model) -> None:
    """Run a project's documented example and then the checks; print the results as one line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        names = run_example(model.name)
        validation, *others = (agreement(model, names, stage) for stage in ("validation", "training", "step"))
        clean = all(leaves_no_trace(model, names, trains) for trains in (False, True))
        told, ok = model.extra(names)
        times = cost(model, names)
    errors = [float(torch.tensor(each.errors).max()) for each in (validation, *others)]  # NaN wins
    cells = [f"{validation.last:.2f}", *(f"{error:.0e}" for error in errors), "none" if clean else "LEFT", *times]
    ok = ok and clean and all(error <= 1e-5 for error in errors)
    print(json.dumps({"cells": cells, "ok": ok, "told": told}))
