"""The checks that all projects share; each project has a script of its own beside this one."""

from __future__ import annotations

import contextlib
import copy
import json
import logging.handlers
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightning_vae.callbacks import (
    Callback,
    CollapseDetector,
    Constant,
    DistributionReader,
    EnforcedFreeBits,
    FreeBits,
    KLAnnealing,
    Linear,
    TargetRate,
)

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "drop_in.md"
WEIGHT, EPOCHS, RAMP = 0.5, 6, 0.75
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"enable_checkpointing": False, "logger": False, "num_sanity_val_steps": 0}


@dataclass(frozen=True)
class Project:
    """Facts about a project that the checks need.

    Args:
        name: The heading of its example in docs/guides/drop_in.md.
        fit: Train a new module as the project does, with callbacks and options of the Trainer.
        spy: Let the loss of a module report the weight that it receives.
        mean_head: Return the layer whose first outputs are the means of the posterior.
        reduce: Reduce KL terms of shape ``(N, k)`` to the number in the project's loss.
        target: The weight that a new module is configured with.
        floor: ``weight`` and ``reduction`` as :class:`EnforcedFreeBits` needs them.
        own: Let a module follow a schedule of the project's own, which starts at 0.
        cured: The same, and then what the warning says, if that is not another ``attribute``.
        others: Other places of the weight, which are not the documented ones.
    """

    name: str
    fit: Callable[..., Any]
    spy: Callable[[Any, Callable[[Any], None]], None]
    mean_head: Callable[[Any], nn.Linear]
    reduce: Callable[[Tensor], Tensor]
    target: float
    floor: dict[str, Any]
    own: type[Callback]
    cured: type[Callback] | None = None
    others: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Spied:
    """A method that is watched. In a copy of its module, on which the callbacks try things, it is not watched."""

    method: Callable[..., Any]
    watch: Callable[..., None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.watch(*args, **kwargs)
        return self.method(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.method, memo)


@dataclass(eq=False)
class Recorder(Callback):
    """Record a fit, independently of the callbacks that are checked."""

    project: Project
    posterior: Any
    checkpoint: str = ""
    loss: float = 0.0
    rates: Tensor | None = None
    trained: list[float] = field(default_factory=list)
    validated: list[float] = field(default_factory=list)
    outputs: list[list[Tensor]] = field(default_factory=list)

    def on_fit_start(self, _trainer: Trainer, pl_module: LightningModule) -> None:
        self.project.spy(pl_module, lambda weight: self._used.append(float(weight)))
        self._reader = DistributionReader(self.posterior)

    def on_train_batch_start(self, _trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._used = []
        if self.rates is None:
            self._reader.listen(pl_module)

    def on_train_batch_end(
        self, _trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        [weight] = self._used
        self.trained.append(weight)
        if self.rates is None:
            [posterior] = self._reader.read(pl_module, batch)
            self._reader.detach()
            exact = Normal(posterior.mean.double(), posterior.stddev.double())
            self.rates = kl_divergence(exact, Normal(0.0, 1.0)).detach()
            self.loss = float(outputs["loss"])

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the mean head. The last pass repeats the model of the pass before it, with a rescaled head."""
        head = self.project.mean_head(pl_module)
        if trainer.current_epoch < EPOCHS - 1:
            self._state = copy.deepcopy(pl_module.state_dict())
        else:
            pl_module.load_state_dict(self._state)
            means = self._means(-1)
            scale, k = 0.05 / means.std(0, correction=0), means.shape[1]
            head.weight[:k] *= scale[:, None]
            head.bias[:k] = 100 + (head.bias[:k] - means.mean(0)) * scale
        self.outputs.append([])
        self._hook = head.register_forward_hook(lambda _head, _inputs, output: self.outputs[-1].append(output.double()))

    def on_validation_batch_start(self, *_: Any) -> None:
        self._used = []

    def on_validation_batch_end(self, *_: Any) -> None:
        [weight] = self._used
        self.validated.append(weight)

    def on_validation_end(self, *_: Any) -> None:
        self._hook.remove()

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.checkpoint and trainer.current_epoch == EPOCHS // 2 - 1:
            trainer.save_checkpoint(self.checkpoint)

    def variance(self, validation: int) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of the means in a validation pass, computed in two passes in float64."""
        means = self._means(validation)
        return means.mean(0), (means - means.mean(0)).square().mean(0)

    def _means(self, validation: int) -> Tensor:
        return torch.cat(self.outputs[validation])[:, : self.rates.shape[1]]


@dataclass(eq=False)
class Witness(Callback):
    """Compare the weight that the loss receives with the one that a callback logs, and validation's with the target."""

    project: Project
    callback: Any
    trained: list[float] = field(default_factory=list)
    validated: list[bool] = field(default_factory=list)

    def on_train_start(self, _trainer: Trainer, pl_module: LightningModule) -> None:
        self.project.spy(pl_module, lambda weight: self._used.append(float(weight)))

    def on_train_batch_start(self, *_: Any) -> None:
        self._used: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        floors = isinstance(self.callback, EnforcedFreeBits)
        meant = self._weight if floors else float(trainer.callback_metrics[f"knobs/{self.callback.name}"])
        self.trained.append(abs(self._used[-1] - meant) / self.project.target)

    def on_before_backward(self, _trainer: Trainer, pl_module: LightningModule, _loss: Tensor) -> None:
        if isinstance(self.callback, EnforcedFreeBits):
            self._weight = float(self.callback._read_weight(pl_module))

    def on_validation_batch_start(self, *_: Any) -> None:
        self._used = []

    def on_validation_batch_end(self, *_: Any) -> None:
        if isinstance(self.callback, EnforcedFreeBits):
            return
        weight = self.callback.weight if isinstance(self.callback, TargetRate) else self.project.target
        self.validated.append(abs(self._used[-1] - float(weight)) <= 1e-6 * self.project.target)


def conflicts(project: Project, attribute: Any, posterior: Any) -> list[dict[str, Any]]:
    """Train with the project's own schedule on, and return a row of the second table for each callback and place."""
    name = (attribute if isinstance(attribute, str) else attribute[0]).rpartition(".")[2]
    own, ramp = project.own, Linear(fraction=RAMP)
    cases = [(KLAnnealing(ramp, attribute=each), own, f"`{each}`") for each in project.others]
    cases += [
        (KLAnnealing(ramp, attribute=attribute, name=name), own, "as documented"),
        (TargetRate(2.0, posterior=posterior, attribute=attribute, name=name), own, "as documented"),
        (FreeBits(0.5), own, ""),
        (EnforcedFreeBits(0.5, posterior, **project.floor), own, f"`{project.floor['weight']}`"),
    ]
    if project.cured:
        cases.insert(-2, (KLAnnealing(ramp, attribute=attribute, name=name), project.cured, "as the warning says"))
    return [conflict(project, *case) for case in cases]


def conflict(project: Project, callback: Callback, own: type[Callback], place: str) -> dict[str, Any]:
    """Train with a callback beside the project's own schedule, and return what the loss received and what was said."""
    seed_everything(0, verbose=False)
    witness, heard, refused = Witness(project, callback), logging.handlers.BufferingHandler(1000), []
    told = rank_zero.log  # Lightning replaces it
    told.addHandler(heard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            project.fit([callback, own(), witness], max_epochs=EPOCHS, log_every_n_steps=1, **QUIET)
        except Exception as error:
            refused = [str(error)]
    told.removeHandler(heard)
    title = type(callback).__name__
    warned = [text for each in caught if title in (text := str(each.message))]
    believed = max(witness.trained, default=0.0) <= 1e-6 and all(witness.validated)
    return {
        # A warning is right where the weight is wrong, and only there.
        "ok": believed != bool(warned) and bool(refused) == isinstance(callback, FreeBits),
        "cells": [
            title,
            place,
            f"{max(witness.trained):.0e}" if witness.trained else "-",
            f"{sum(witness.validated)} of {len(witness.validated)}" if witness.validated else "-",
            "refuses" if refused else "warns" if warned else "nothing",
        ],
        "said": refused + warned + [text for each in heard.buffer if title in (text := each.getMessage())],
    }


def identity(project: Project, attribute: Any, posterior: Any, precision: str) -> tuple[float, float]:
    """Return the relative error of ``loss(w) - loss(0) = w KL`` in the first step, and a bound on rounding."""
    runs = []
    for weight in (WEIGHT, 0.0):
        seed_everything(0, verbose=False)
        runs.append(recorder := Recorder(project, posterior))
        annealing = KLAnnealing(Constant(weight), attribute=attribute)
        project.fit([annealing, recorder], max_epochs=1, max_steps=1, precision=precision, **QUIET)
        assert recorder.trained == [weight], recorder.trained
    with_kl, without = runs
    assert torch.equal(with_kl.rates, without.rates)  # the same random state
    rate = float(project.reduce(with_kl.rates))
    terms = float(project.reduce(torch.ones_like(with_kl.rates)))
    epsilon = torch.finfo(torch.float64 if precision == "64-true" else torch.float32).eps
    error = (with_kl.loss - without.loss) / (WEIGHT * rate) - 1
    return abs(error), 4 * epsilon * (abs(with_kl.loss) + WEIGHT * terms) / (WEIGHT * rate)


def ramp(project: Project, total: int) -> list[float]:
    """Compute the weights of a linear ramp over the first part of a run."""
    return [project.target * min(1.0, step / int(RAMP * total)) for step in range(total)]


def main(project: Project) -> None:
    """Run a project's documented example and then the checks; print the results as one line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        measured = measure(project)
    print(json.dumps(measured))


def run_example(name: str) -> dict[str, Any]:
    """Run the documented example under a heading, and return its names."""
    example = re.search(rf"^### {name}\n.*?```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL | re.M)
    names: dict[str, Any] = {}
    seed_everything(0, verbose=False)
    exec(compile(example[1], name, "exec"), names)
    return names


def measure(project: Project) -> dict[str, Any]:
    namespace = run_example(project.name)
    callbacks = namespace["trainer"].callbacks
    attribute = next(each.attribute for each in callbacks if isinstance(each, KLAnnealing))
    posterior = next(each.posterior for each in callbacks if isinstance(each, CollapseDetector))

    exact, exact_noise = identity(project, attribute, posterior, "64-true")
    single, single_noise = identity(project, attribute, posterior, "32-true")

    runs = []
    for ckpt_path in (None, "half.ckpt"):
        seed_everything(0, verbose=False)
        runs.append(recorder := Recorder(project, posterior, checkpoint="" if ckpt_path else "half.ckpt"))
        annealing = KLAnnealing(Linear(fraction=RAMP), attribute=attribute)
        detector = CollapseDetector(posterior=posterior)
        # Ours come first, so that the recorder sees their effect.
        project.fit([annealing, detector, recorder], max_epochs=EPOCHS, ckpt_path=ckpt_path, **QUIET)
    whole, resumed = runs
    weights = ramp(project, len(whole.trained))
    assert len(resumed.trained) == len(weights) // 2
    deviations = [
        abs(used - meant) / project.target
        for used, meant in zip(whole.trained + resumed.trained, weights + weights[len(weights) // 2 :], strict=True)
    ]
    validated = whole.validated + resumed.validated
    at_target = sum(abs(weight - project.target) <= 1e-6 * project.target for weight in validated)

    ours = detector.state_dict()["variances"].double()  # of the resumed fit, a row for each pass
    errors = [float((ours[row] / resumed.variance(row)[1] - 1).abs().max()) for row in (-2, -1)]
    mean, variance = resumed.variance(-1)
    ok = exact <= 1e-5 + exact_noise and single <= 1e-5 + single_noise
    ok = ok and max(deviations) <= 1e-6 and at_target == len(validated) and max(errors) <= 1e-6
    rows = conflicts(project, attribute, posterior)
    return {
        "ok": ok and all(each["ok"] for each in rows),
        "conflicts": rows,
        "cells": [
            f"{exact:.0e}",
            f"{single:.0e} ({single_noise:.0e})",
            f"{len(whole.trained)} + {len(resumed.trained)} steps, {max(deviations):.0e}",
            f"{at_target} of {len(validated)} batches",
            f"{errors[0]:.0e}",
            f"{errors[1]:.0e} ({float(mean.mean()):.1f}, {float(variance.mean()):.4f})",
        ],
    }
