"""Enforce a floor under the rate of a module whose loss has none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributions import Normal, OneHotCategorical
from typing_extensions import override

from .base import callbacks_of, mean_over_processes, several_processes
from .control.attribute_path import is_number, look_up
from .control.attribute_scheduler import AttributeScheduler
from .control.attribute_writer import MisconfigurationException
from .free_bits import checked_floor, count_at_floor
from .probing.declared_kl import DeclaredKL
from .probing.loss_probe import LossProbe
from .reading.distribution_reader import is_compiled
from .reading.distributions import Second, is_sequence, widened
from .reading.kl_rates import kl_per_dimension, rates_under_floors
from .reading.latent_reader import Latent, LatentReader, has_gradient
from .reading.prior_reader import Place
from .schedules import Schedule, check_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_LINE = "loss = reconstruction + w * free_bits(kl_per_dimension, self.free_bits)"
_HIDDEN = "(Within activation checkpointing, `use_reentrant=True` hides it.)"
_REDUCTIONS: dict[str, Callable[[Tensor], float]] = {
    "sum": lambda _: 1.0,
    "mean": lambda rates: 1 / rates.shape[1],
    "batch_sum": lambda rates: float(rates.shape[0]),
}


class EnforcedFreeBits(AttributeScheduler):
    r"""Enforce a floor under the rate, in nats, on a module that can't be changed.

    Prefer :class:`FreeBits` for a module that you can change: it sets the floor that the module's loss reads. This
    callback needs a loss of the form

    .. math:: \text{reconstruction} + w \, c \, \sum_j \tfrac1B \sum_n \mathrm{KL}_{nj}

    Right before the backward pass it adds the shortfall of each rate, :math:`\max(\lambda, \mathrm{KL}) = \mathrm{KL} +
    \max(0, \lambda - \mathrm{KL})`, with the same :math:`w c`. All gradients are then those of
    ``loss = reconstruction + w * c * free_bits(kl_per_dimension, threshold)``, up to rounding, under any optimizer,
    accumulation and clipping. The loss that the module logs still lacks the floor. The floor applies to the mean of the
    global batch, over all processes; each accumulated batch has its own floor.

    The KL in the loss has to be that of the output that ``posterior`` names against the prior, a diagonal ``Normal``,
    neither of them clamped, detached or changed in between. A learned prior, p(z) or p(z|c), gets the gradient of the
    floor too. The KL has to enter linearly, with the weight and the reduction given here. At the first batch this is
    tried on copies of the module if possible (see :class:`KLAnnealing`): without noise in the latents, the loss has to
    rise as declared if the posterior becomes narrower, or else by that KL for a weight of 1. Otherwise the declaration
    is taken on trust, and the reason is
    given; so is the absence of a clamp that acts beyond usual scales. The weight is read when the loss is complete.

    Logged on logging steps: ``knobs/free_bits`` and ``latent/at_floor``, as by :class:`FreeBits`.

    Args:
        threshold: The floor in nats: a number, or a schedule of the training step with an explicit ``stop``.
        posterior: The path of the submodule that outputs the posterior, or a pair of paths for its two parameters, as
            in :class:`~.reading.distribution_reader.DistributionReader`.
        weight: Where the module keeps the weight of the KL term, a dotted path as in :class:`KLAnnealing`, or a method
            without arguments that returns it; or a number, if the loss uses a literal.
        reduction: Reduction of the KL that the weight multiplies. ``"sum"``: summed over the latent dimensions, mean
            over the batch; ``"mean"``: mean over both; ``"batch_sum"``: summed over both; or a number, the factor
            between it and ``"sum"``.
        second: Meaning of the second parameter if the posterior is a pair of tensors, or a function that turns it into
            the scale.
        chunk: Axis along which the posterior is split, if it is one tensor.
        per: Scope of each floor: ``"dimension"``, ``"whole"`` (the total rate), or a number of consecutive dimensions.
        average: ``"batch"`` floors the batch's mean rate (Kingma et al.), ``"sample"`` each observation's.
        name: Logged as ``knobs/<name>``.
        prior: Where the prior is: ``None`` for the module's own attribute ``prior``, or N(0, I) if it has none; a path
            or a pair of paths; a fixed ``Normal``; or a callable ``(pl_module, batch) -> p(z)``, which is called before
            each backward pass, with gradients, and must not draw random numbers. Best is the path of what the loss
            itself uses.

    Raises:
        ValueError: If an option is out of range, or, when fitting starts, if a path leads nowhere.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: If the gradients could not be exact. When
            fitting starts: under manual optimization, a precision other than 32-true, 64-true and bf16-mixed (within
            its rounding), a strategy other than a single device or DDP, ``torch.compile``, and for a module
            with ``free_bits`` of its own. In the first step: if the posterior is not a diagonal ``Normal``, has no
            gradient, or is not the only one of the step, if the prior is not one, or if the loss does not rise with the
            KL as declared, or has an estimate of it from a sample.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> floor = EnforcedFreeBits(0.5, posterior=("fc_mu", "fc_var"), weight="kld_weight")
        >>> trainer = Trainer(callbacks=[floor], logger=False, enable_checkpointing=False)
    """

    _reader: LatentReader

    def __init__(
        self,
        threshold: float | Schedule | Callable[[int], float],
        posterior: str | tuple[str, str],
        weight: str | float,
        reduction: Literal["sum", "mean", "batch_sum"] | float = "sum",
        second: Second = "log_variance",
        chunk: int | None = None,
        per: Literal["dimension", "whole"] | int = "dimension",
        average: Literal["batch", "sample"] = "batch",
        name: str | None = None,
        prior: Place = None,
    ) -> None:
        schedule = checked_floor(threshold, per, average)
        if posterior is None or callable(posterior) or isinstance(posterior, Mapping):
            raise ValueError(
                "`posterior` must be a submodule's path or a pair of them, whose outputs the loss is known to use, "
                f"got {posterior!r}. If there is none: `{_LINE}` and `FreeBits`."
            )
        if isinstance(prior, Mapping):
            raise ValueError(
                f"`prior` must be that of the one `posterior={posterior!r}`, got {prior!r}. For several groups of "
                "latents use one EnforcedFreeBits each, distinguished by `name=`."
            )
        if not isinstance(weight, str):
            check_number("weight", weight, "a path, or the number in the loss", math.isfinite)
        if reduction not in _REDUCTIONS:
            allowed = "'sum', 'mean', 'batch_sum' or a number of times 'sum'"
            check_number("reduction", reduction, allowed, lambda factor: 0 < factor < math.inf)
        super().__init__(schedule, attribute=None, name=name or "free_bits")
        self.posterior = posterior
        self.prior = prior
        self.weight = weight
        self.reduction = reduction
        self.per = per
        self.average = average
        self._reader = LatentReader(
            posterior,
            partial(_without_noise, prior) if callable(prior) else prior,
            second=second,
            chunk=chunk,
            who=f"{type(self).__name__}({self.name})",
            keeps_graph=True,
        )
        self._batch: Any = None  # of the step
        self._rates: Tensor | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refuse_what_is_not_exact(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    @override
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        self._read_weight(pl_module)
        self._reader.listen(pl_module)  # both raise if a path leads nowhere
        self._reader.forget()
        super()._prepare(trainer, pl_module, current, restored)

    @override
    def _probe(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        declared = DeclaredKL(self._reader, self.weight, self._read_weight, self.factor)
        try:
            contradiction = declared.contradiction(LossProbe(trainer, pl_module, batch, batch_idx=0, autocast=False))
        except LossProbe.NotPossible as reason:
            rank_zero_info(f"EnforcedFreeBits takes `weight` and `reduction` on trust: they can't be tried ({reason}).")
            return
        if contradiction:
            raise _refusal(
                f"{contradiction} Declared are `posterior={self.posterior!r}`, `weight={self.weight!r}` and "
                f"`reduction={self.reduction!r}`."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        rates = self._read_rates(pl_module)
        if rates is None:
            return
        threshold = float(self._current)
        if threshold > 0:  # a floor of 0 is no floor, even if a rate rounds to 0
            shared = self.average == "batch" and several_processes(trainer)
            means = mean_over_processes(trainer, rates.detach()) if shared else None
            missing = self.factor(rates) * shortfall(rates, threshold, self.per, self.average, means)
            # In place, because Lightning has already divided the loss and keeps that tensor.
            loss.add_((self._read_weight(pl_module) * missing / trainer.accumulate_grad_batches).reshape(loss.shape))
        self._rates = rates.detach()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch = self._rates = None

    @override
    def _log(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        super()._log(trainer, pl_module, batch)
        if self._rates is not None:
            at_floor = count_at_floor(self._rates.float(), float(self._current), self.per, self.average).at_floor
            self.log_now(pl_module, {"latent/at_floor": at_floor})

    def factor(self, rates: Tensor) -> float:
        """Return the factor that the module's reduction applies to the rate.

        Args:
            rates: Rate of each observation and dimension in nats, shape ``(B, k)``.

        Returns:
            The ``c`` in a loss of ``reconstruction + w * c * rates.sum(1).mean()``.
        """
        return _REDUCTIONS[self.reduction](rates) if isinstance(self.reduction, str) else self.reduction

    def _refuse_what_is_not_exact(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, strategy = type(pl_module).__name__, type(trainer.strategy).__name__
        if hasattr(pl_module, "free_bits"):
            raise MisconfigurationException(
                f"EnforcedFreeBits: {name} has its own `free_bits`, so two floors would add up. Use `FreeBits`, which "
                "sets it."
            )
        if not pl_module.automatic_optimization:
            raise _refusal(
                f"{name} optimizes manually, so it is not known which of its losses contains the KL, and how scaled "
                "(that of a generator, not of a discriminator)."
            )
        if trainer.precision not in ("32-true", "64-true", "bf16-mixed"):
            raise _refusal(
                f"`precision` must be '32-true', '64-true' or 'bf16-mixed', got {trainer.precision!r}, which scales "
                "the loss or rounds all of it."
            )
        if trainer.precision == "bf16-mixed":
            rank_zero_info(
                "EnforcedFreeBits: bfloat16 rounds the module's own KL. A dimension under its floor keeps a gradient "
                "of that size: small compared with those of active dimensions, but not with a collapsed one's."
            )
        if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
            raise _refusal(f"`strategy` must be a single device or DDP, got {strategy}, which may shard the posterior.")
        if any(is_compiled(module) for module in pl_module.modules()):
            raise _refusal("Code compiled by `torch.compile` may run without the hooks that read the posterior.")
        for other in callbacks_of(trainer):
            if isinstance(other, EnforcedFreeBits) and other is not self and other.posterior == self.posterior:
                raise MisconfigurationException(
                    f"Two callbacks floor the rate of `posterior={self.posterior!r}`, and would add up. Remove one."
                )

    def _read_weight(self, pl_module: LightningModule) -> Any:
        """Return the module's weight; a tensor stays a tensor, on its device and with its gradient."""
        if not isinstance(self.weight, str):
            return self.weight
        value: Any = pl_module
        try:
            for name in self.weight.split("."):
                value = look_up(value, name, self.weight)[1]
            value = value() if inspect.isroutine(value) else value
        except TypeError as error:
            raise ValueError(
                f"EnforcedFreeBits: `weight={self.weight!r}` is a method that can't be called without arguments "
                f"({error}). Name a number, or a method without arguments."
            ) from error
        except ValueError as error:
            raise ValueError(f"EnforcedFreeBits: the weight's path leads nowhere. {error}") from error
        if not is_number(value):
            raise ValueError(
                f"EnforcedFreeBits: `weight={self.weight!r}` must lead to a number or a tensor of one element, got "
                f"{type(value).__name__}."
            )
        return value

    def _read_rates(self, pl_module: LightningModule) -> Tensor | None:
        """Compute the rates of the posterior in the loss, shape ``(B, k)``; ``None`` for a step without one."""
        views = self._reader.read(pl_module, self._batch)
        self._reader.listen(pl_module)  # some optimizers compute the loss several times in a step
        if not views:
            return None
        pairs = [self._normals(view[""]) for view in views]
        pairs = [pair for pair in pairs if has_gradient(pair[0])]
        if len(pairs) != 1:
            raise _refusal(
                f"`posterior={self.posterior!r}` must be called once in a step with a gradient, got {len(pairs)}."
            )
        [(posterior, prior)] = pairs
        if not (posterior.loc.requires_grad and posterior.scale.requires_grad):
            raise _refusal(
                f"`posterior={self.posterior!r}` must have a gradient for its mean and for its second parameter, and "
                f"has one for only one of them. {_HIDDEN}"
            )
        if not has_gradient(prior) and self._prior_learns(pl_module):
            raise _refusal(
                f"`prior={self.prior!r}` has parameters to train, and its output has no gradient. {_HIDDEN} If it is "
                "not meant to learn, set `requires_grad_(False)` on it."
            )
        posterior = Normal(widened(posterior.loc), widened(posterior.scale), validate_args=False)
        rates = kl_per_dimension(posterior, prior).flatten(1)
        if isinstance(self.per, int) and rates.shape[1] % self.per:
            raise ValueError(
                f"`per` as a number of dimensions must divide the number of latent dimensions, got {self.per} for "
                f"{rates.shape[1]}."
            )
        return rates

    def _normals(self, latent: Latent) -> tuple[Normal, Normal]:
        if not isinstance(latent.posterior, Normal):
            is_categorical = isinstance(latent.posterior, OneHotCategorical)
            hint = " `world_model_kl` floors the KL of categories." if is_categorical else ""
            raise _refusal(f"The posterior must be a diagonal Normal, got {type(latent.posterior).__name__}.{hint}")
        if not isinstance(latent.prior, Normal):
            kind = type(latent.prior).__name__
            raise _refusal(f"The prior must be a diagonal Normal, or left out for N(0, I), got {kind}.")
        return latent.posterior, latent.prior

    def _prior_learns(self, pl_module: LightningModule) -> bool:
        """Return whether the prior is all that some submodules output, and they have parameters to train."""
        paths = [self.prior] if isinstance(self.prior, str) else self.prior if is_sequence(self.prior) else []
        modules = dict(pl_module.named_modules(remove_duplicate=False))
        return any(each.requires_grad for path in paths if path in modules for each in modules[path].parameters())


def _without_noise(prior: Callable[[Any, Any], Any], pl_module: LightningModule, batch: Any) -> Any:
    """Call a prior, and refuse one that draws random numbers: they are not those of the loss."""
    before = _random_states(pl_module.device)
    value = prior(pl_module, batch)
    if not all(map(torch.equal, before, _random_states(pl_module.device))):
        raise _refusal(
            "The callable `prior` draws random numbers, as dropout does, and the loss has others. Name the submodule "
            "whose output the loss uses, `prior='prior_net'`."
        )
    return value


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def shortfall(
    rates: Tensor,
    threshold: float,
    per: Literal["dimension", "whole"] | int,
    average: str,
    global_mean: Tensor | None = None,
) -> Tensor:
    """Compute the shortfall of the rates below their floors.

    Args:
        rates: Rate of each observation and dimension in nats, shape ``(B, k)``.
        threshold: The floor in nats, above 0.
        per: Scope of each floor, as in :class:`EnforcedFreeBits`.
        average: ``"batch"`` floors the mean over the batch, ``"sample"`` each observation's rate.
        global_mean: The mean of the rates over the batch of all processes, shape ``(k,)``, if there are several. It
            decides which floors act; the gradient flows to this process's share.

    Returns:
        Nats per observation, a scalar.
    """
    grouped = rates_under_floors(rates, per, average)
    if global_mean is not None:
        grouped = grouped - grouped.detach() + rates_under_floors(global_mean.unsqueeze(0), per, average)
    # Use the clamp of the floored rate, so that a rate exactly at its floor has the same gradient too.
    missing: Tensor = grouped.clamp(min=torch.full_like(grouped, threshold)) - grouped
    return missing.sum(-1).mean()


def _refusal(reason: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"EnforcedFreeBits can't be exact here. {reason} Put the floor in the loss, and set it with `FreeBits`: "
        f"`{_LINE}`."
    )
