"""Checks and small corrections when a run starts and when it saves.

At the start: sensible monitors, options unchanged since the save, beta with the likelihood, gradient clipping with
fused optimizers, an optimizer's ``eps`` in half precision, and batches that a batch normalisation can train on. At a
save: finite numbers. At the end: that there was a batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from ..likelihoods import warn_of_feedback
from .checkpoint_io import MODULE_KEY
from .exact_resume import Companion, ExactResume
from .monitors import check_monitors, check_validation, validation_loaders


class Guards(Companion):
    """Check a run when it starts. A :class:`lightning_vae.VAE` adds this callback itself.

    It refuses monitors that would keep the wrong model or wait in vain, an optimizer that can't work in float16, a last
    batch of one observation under batch normalisation, and a run without a batch. For a resumed run it reports which
    options of the model and the optimizer, and which length of the run or of an epoch, differ from the saved ones. It
    warns of a beta that feeds back with the likelihood, and allows gradient clipping with fused optimizers under mixed
    precision.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If it refuses one of these.
        ValueError: If a run is resumed with another kind of optimizer.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[str, Any] = {}
        self._batches: float | None = None  # of an epoch of the run that is resumed
        self._has_saved = False
        self._configured: list[list[dict[str, float]]] = []

    @override
    def _start(self, trainer: Trainer, stage: str) -> None:
        self._loaded, self._batches, self._has_saved = {}, None, False

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._has_saved:  # otherwise a tuner restores what it saved at the start of this run
            self._loaded = {name: checkpoint.get(name, {}) for name in ("hyper_parameters", MODULE_KEY)}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._configured = _configured(trainer.optimizers)  # before a checkpoint or the training changes them
        if self._loaded:
            self._say_what_changed(trainer, pl_module)
            self._loaded = {}
        if trainer.gradient_clip_val:
            for optimizer in trainer.optimizers:
                # Lightning refuses to clip under mixed precision if an optimizer may unscale gradients by itself,
                # which fused ones do unless told not to.
                optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        check_monitors(trainer, pl_module)
        check_half_precision(trainer.optimizers)
        configured = pl_module.knobs["beta"]
        if configured is None or configured != pl_module.constructed_knobs["beta"]:  # otherwise the constructor warned
            warn_of_feedback(float(pl_module.beta), pl_module.likelihood)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        before, now = self._batches, trainer.num_training_batches
        if before not in (None, math.inf, now):
            rank_zero_info(f"An epoch has {now} batches; when the run was saved it had {before}.")
        check_last_batch(trainer, pl_module)
        check_validation(trainer, pl_module, validation_loaders(trainer))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            raise without_batches("fit")

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        had_any = trainer.predict_loop.batch_progress.current.ready > 0
        if not trainer.strategy.reduce_boolean_decision(had_any, all=False):
            raise without_batches("predict")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_batches(trainer, TrainerFn(stage).value)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._has_saved = True
        checkpoint.setdefault(MODULE_KEY, {}).update(
            length=_length(trainer),
            batches=trainer.num_training_batches,
            optimizers=self._configured,
            optimizer_names=_names(trainer.optimizers),
        )

    def _say_what_changed(self, trainer: Trainer, pl_module: Any) -> None:
        own = self._loaded[MODULE_KEY]
        saved, names = own.get("optimizer_names"), _names(trainer.optimizers)
        if saved not in (None, names):
            raise ValueError(
                f"The checkpoint was saved with the optimizer {', '.join(saved)}, so a run with {', '.join(names)} "
                "can't be resumed from it. Configure the same optimizer, or start a new fit from its weights with "
                "`VAE.load_from_checkpoint`."
            )
        # The module itself reports changed knobs when it loads them.
        options = {name: value for name, value in pl_module.hparams.items() if name not in pl_module.knobs}
        if changed := _differences(self._loaded["hyper_parameters"], options):
            rank_zero_warn(f"The run continues with other options of the model than it was saved with: {changed}.")
        for optimizer, before, now in zip(
            trainer.optimizers, own.get("optimizers", ()), self._configured, strict=False
        ):
            changes = [_differences(*groups) for groups in zip(before, now, strict=False)]
            if any(changes):
                rank_zero_warn(
                    f"{type(optimizer).__name__} keeps the options in the checkpoint, although they have been changed "
                    f"since: {next(filter(None, changes))}."
                )
        held = next((name for name in ("rate_limit", "error_limit") if own.get(name)), None)
        if held and getattr(pl_module, held) is None:
            rank_zero_warn(
                f"The checkpoint was saved under a callback that holds the {held.partition('_')[0]}, and none of this "
                "run does: `val/loss` is the loss at the module's knobs from here on, and not that of before."
            )
        if changed := _differences(own.get("length", {}), _length(trainer)):
            rank_zero_info(f"The run is not as long as when it was saved: {changed}.")
        self._batches = own.get("batches")


def missing_companions(trainer: Trainer) -> list[Callback]:
    """Return the callbacks that every run of a VAE needs and a Trainer does not have yet."""
    present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [kind() for kind in (ExactResume, Guards) if not any(isinstance(each, kind) for each in present)]


def warn_of_missing_companions(trainer: Trainer) -> None:
    """Warn if a subclass of the module has dropped the callbacks that every run of a VAE needs."""
    if names := ", ".join(type(each).__name__ for each in missing_companions(trainer)):
        rank_zero_warn(
            f"The run lacks {names}: `configure_callbacks` of the model does not return what `super()` does. Without "
            "ExactResume a resumed run draws different noise; without Guards neither monitors nor changed options are "
            "checked. "
            "Return `[*super().configure_callbacks(), ...]`."
        )


def check_finite(module: nn.Module, trainer: Trainer) -> None:
    """Check a module's parameters before they are saved.

    Args:
        module: The module. Of sharded parameters, this process checks its own part.
        trainer: The Trainer that saves; all processes call this together.

    Raises:
        FloatingPointError: If a parameter of any process is not finite.
    """
    found = _parameter_not_finite(module)
    if trainer.strategy.reduce_boolean_decision(found is not None, all=False):
        raise FloatingPointError(
            f"The parameter `{found or 'of another process'}` holds values that are not finite numbers, so nothing is "
            "saved; earlier checkpoints are untouched."
        )


def check_half_precision(optimizers: Sequence[Optimizer]) -> None:
    """Refuse an optimizer that divides by numbers that float16 can't hold.

    The averages of squared gradients underflow to 0, and an ``eps`` that small does not replace them.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If ``eps`` is below the normal numbers of
            float16 where parameters are float16.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            is_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
            if is_half and 0 <= group.get("eps", 1) < torch.finfo(torch.float16).smallest_normal:
                raise MisconfigurationException(
                    f"The parameters are float16 (`precision='16-true'`), in which the `eps` of "
                    f"{type(optimizer).__name__}, {group['eps']:g}, is lost: the parameters would become NaN. Use "
                    "'16-mixed' or 'bf16-true', or set `eps` of the optimizer to 1e-4."
                )


def check_last_batch(trainer: Trainer, module: Any) -> None:
    """Refuse a last batch of one observation if a network's batch normalisation can't train on it.

    Args:
        trainer: The Trainer that is about to train.
        module: The :class:`lightning_vae.VAE`. Copies of its networks are called with zeros.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If it can't.
    """
    has_norm = any(isinstance(each, _BatchNorm) for each in module.modules())
    if not has_norm or _last_size(trainer.train_dataloader, trainer.num_training_batches) != 1:
        return
    dtype = next(module.encoder.parameters()).dtype
    condition = [] if module.condition is None else [torch.zeros(1, module.condition.dim, dtype=dtype)]
    inputs = ((module.encoder, module.shape), (module.decoder, (module.latent_dim,)))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for network, shape in inputs:
                given = [torch.zeros(1, *shape, dtype=dtype), *condition]
                copy.deepcopy(network)(*(each.to(module.device) for each in given))
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        raise MisconfigurationException(
            "The last training batch holds one observation, which a batch normalisation can't train on. Set "
            "`drop_last=True` in the DataLoader, or another `batch_size`."
        ) from error


def check_batches(trainer: Trainer, stage: str) -> None:
    """Refuse a run that has had no batch although none was asked for.

    Args:
        trainer: The Trainer at the end of its run.
        stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

    Raises:
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If the loaders are empty.
    """
    part = {"fit": "train", "validate": "val"}.get(stage, stage)
    batches = trainer.num_training_batches if stage == "fit" else sum(getattr(trainer, f"num_{part}_batches"))
    if batches == 0 and getattr(trainer, f"limit_{part}_batches") != 0:
        raise without_batches(stage)


def without_batches(stage: str) -> MisconfigurationException:
    """Return the error of a stage, such as ``"fit"``, whose loader gives no batches, or none with observations."""
    return MisconfigurationException(
        f"`{stage}` got no batch from a loader. With `drop_last=True` there is none if the data are "
        "fewer than `batch_size`: give more data, lower `batch_size`, or leave out `drop_last`. An iterator can be "
        "read only once: give a list or a DataLoader."
    )


def _last_size(loader: Any, batches: float) -> int | None:
    """Return the number of observations in a loader's last batch; ``None`` if it is unknown.

    Args:
        loader: The training loader.
        batches: Number of batches in an epoch.
    """
    if not isinstance(loader, DataLoader):
        return getattr(loader, "last_size", None)
    try:
        rows, is_whole = len(loader.sampler), batches >= len(loader)  # type: ignore[arg-type]
    except TypeError:  # a stream
        return None
    size = loader.batch_size
    return size if size is None or loader.drop_last or not is_whole else rows % size or size


def _length(trainer: Trainer) -> dict[str, int | None]:
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _names(optimizers: Sequence[Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _configured(optimizers: Sequence[Optimizer]) -> list[list[dict[str, float]]]:
    """Return the options that a config sets, for each optimizer and parameter group."""
    names = ("lr", "weight_decay")
    return [
        [{name: float(group[name]) for name in names if name in group} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    # Compare as text, because tensors and arrays compare element by element.
    texts = {name: (repr(before[name]), repr(now[name])) for name in before if name in now and not name.startswith("_")}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in texts.items() if old != new)


@torch.no_grad()
def _parameter_not_finite(module: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite."""
    named = {name: _own_part(parameter) for name, parameter in module.named_parameters()}
    if not named:
        return None
    device = next(iter(named.values())).device  # one synchronisation for all parameters
    if torch.stack([part.sum().to(device) for part in named.values()]).isfinite().all():
        return None
    # A sum may overflow although each value is finite.
    return next((name for name, part in named.items() if not part.isfinite().all()), None)


def _own_part(parameter: Tensor) -> Tensor:
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part
