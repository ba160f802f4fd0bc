"""Hold the rate at a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from .control.weight_controller import WeightController
from .reading.distributions import Second
from .reading.latent_reader import Latent, LatentReader, Places, measured_rates
from .schedules import Schedule, at_least, check_number

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class TargetRate(WeightController):
    r"""Hold the rate at a target number of nats or bits by moving the weight of the KL term.

    ControlVAE's PI controller, in the logarithm of the weight,

    .. math::
        e = \frac{R - C}{\max(C, 1)}, \quad \log \beta = K_p e + I, \quad I \leftarrow I + K_i e

    where R is the moving average of the training batches' rates and C the target, each in nats per observation. The
    error is clamped to -1 and 1 and the weight to its bounds, where the integral stops. Apart from the proportional
    term, a step moves :math:`\log \beta` by at most :math:`K_i`.

    The weight starts at the module's configured value. Validation, checkpoints and the finished module have the weight
    that the controller has found. The controller's state is saved, so a resumed run continues from it. Logged on
    logging steps: ``knobs/beta`` (or the path's last part), ``knobs/target_rate`` and ``latent/controlled_rate``, the
    moving average, both in nats. A target that no weight within the bounds reaches is reported once.

    The ``val/loss`` and ``test/loss`` of ``lightning_vae.VAE`` then refer to the target at the schedule's end: they are
    the distortion, plus ``price`` for each nat of rate above the target and its tolerance. The validation loss of any
    other module contains the current weight: monitor something without it.

    Args:
        nats: The target in nats per observation: a number, a schedule of the training step with an explicit end, or
            another function of it, which ends with the run.
        bits: The same in bits, instead of ``nats``.
        attribute: Where the module keeps the weight: a dotted path as in :class:`KLAnnealing`, or several.
            In ``lightning_vae.VAE`` it must be ``beta``.
        posterior: Where to read the posterior, as in :class:`CollapseDetector`; ``None`` is the module's own
            ``posterior``. Several posteriors in a step count as that many observations; the rates of named groups add
            up.
        prior: Where the prior is, as in :class:`CollapseDetector`; ``None`` is the module's own ``prior``.
        z: Where the module's own sample is, at which a rate without a closed form is estimated.
        second: Meaning of the second parameter if the posterior is a pair of tensors.
        chunk: Axis along which the posterior is split into halves, if it is one tensor.
        start: The weight to start from; the module's configured weight if not given.
        min_beta: The smallest weight; a hundredth of the first if not given.
        max_beta: The largest weight; a hundred times the first if not given.
        proportional: Gain :math:`K_p`.
        integral: Gain :math:`K_i` per step. Lower it if rate and weight oscillate, in runs of very many steps.
        smoothing: Weight of the previous average in the moving average, from 0 to below 1.
        tolerance: Amount by which the rate may exceed the target in ``val/loss``, and may miss the target before it
            counts as not met: a fraction of the target, or of 1 nat for smaller targets.
        price: Price in ``val/loss`` of each nat above that. It must be more than the weight that holds the target,
            or exceeding the target would pay; if it turns out to be less, that is reported.
        patience: Number of steps at a bound, with the target not met, before that is reported.
        setter: Writes the weight instead, ``(pl_module, value) -> None``; needs a ``start``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.
        mask: Where the batch has a mask of the latents' positions, True where one is real: a key, an index or a
            callable. Padding then counts for nothing.

    Raises:
        ValueError: If an option is out of range, or, when fitting starts, if a path leads nowhere, there is no
            positive weight to start from, or the target does not end at a valid rate.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, if another callback moves
            the same weight, or a monitor watches ``train/loss``, which moves.

    References:
        Shao et al., "ControlVAE: Controllable Variational Autoencoder", ICML 2020, section 3.2; Burgess et al.,
        "Understanding disentangling in beta-VAE", 2018, for a target that moves.

    Example::

        >>> TargetRate(bits=8).state_key
        "TargetRate{'attribute': 'beta', 'name': 'beta'}"
    """

    _reader: LatentReader
    _nan_remedy = "Check the posterior: scales and variances are positive."
    _monitor_remedy = "Monitor a reconstruction error, or an ELBO without the weight once the rate is at its target."

    def __init__(
        self,
        nats: float | Schedule | Callable[[int], float] | None = None,
        bits: float | Schedule | Callable[[int], float] | None = None,
        attribute: str | Sequence[str] = "beta",
        posterior: Places = None,
        prior: Places = None,
        z: Places = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        start: float | None = None,
        min_beta: float | None = None,
        max_beta: float | None = None,
        proportional: float = 1.0,
        integral: float = 0.03,
        smoothing: float = 0.95,
        tolerance: float = 0.05,
        price: float = 10.0,
        patience: int = 500,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
        mask: int | str | Callable[[Any], Any] | None = None,
    ) -> None:
        if (nats is None) == (bits is None):
            raise ValueError(
                f"The target must be given as `nats` or as `bits`, got nats={nats}, bits={bits}. Give one."
            )
        target = bits if nats is None else nats
        if not callable(target):
            unit = "nats" if bits is None else "bits"
            check_number(unit, target, "a finite rate of at least 0, or a schedule", at_least(0))
        super().__init__(
            target,  # type: ignore[arg-type]  # one of the two was given
            attribute,
            setter,
            name,
            ("knobs/target_rate", "latent/controlled_rate"),
            start,
            min_beta,
            max_beta,
            proportional,
            integral,
            smoothing,
            tolerance,
            price,
            patience,
        )
        self.nats = nats
        self.bits = bits
        self.price = price
        self._reader = LatentReader(posterior, prior, z, second, chunk, self._title, mask)

    @override
    def target(self, step: int) -> float:
        """Return the target of a step, in nats."""
        return self._in_nats(super().target(step))

    def _in_nats(self, value: float) -> float:
        return value if self.bits is None else value * math.log(2)

    @override
    def _scale(self, target: float) -> float:
        return max(target, 1.0)

    @override
    def _measure(self, pl_module: LightningModule, batch: Any) -> Tensor:
        return sum_and_count(self._reader.read(pl_module, batch), pl_module.device)

    @override
    def _problems(self, average: float, weight: float, steps: float, target: float) -> Iterator[tuple[str, str]]:
        at_bound = f"`{self.name}` has been at its {{}}, {weight:.4g}, for {abs(steps):.0f} steps"
        missed = f", and the rate is {average:.4g} nats instead of {target:.4g}."
        if steps >= self.patience:
            remedy = "Raise `max_beta` or the target. If no weight lowers the rate, the loss does not read it."
            yield "high", f"{at_bound.format('largest')}{missed} {remedy}"
        elif steps <= -self.patience:
            remedy = "Lower `min_beta` or the target, or give the model more latent dimensions."
            yield "low", f"{at_bound.format('smallest')}{missed} {remedy}"
        met = abs(average - target) <= self.tolerance * self._scale(target)
        if met and self._sets_limit and weight > self.price:
            yield (
                "price",
                f"it takes `{self.name}` = {weight:.4g} to hold the rate, and `val/loss` charges {self.price:g} for a "
                "nat above the target: exceeding it would pay. Raise `price`.",
            )

    @override
    def _set_limit(self, pl_module: Any, end: float) -> None:
        limit = self._in_nats(end)
        if not 0 <= limit < math.inf:
            raise ValueError(f"{self._title}: the target must end at a finite rate of at least 0, got {limit}.")
        if self._sets_limit:
            pl_module.rate_limit = (limit + self.tolerance * self._scale(limit), self.price)


def sum_and_count(views: Sequence[Mapping[str, Latent]], device: torch.device) -> Tensor:
    """Sum the rates of all observations, and count them.

    Args:
        views: The groups of latents of each view; the rates of the groups of an observation add up.
        device: Where to return them.

    Returns:
        Nats and a number, float32, shape ``(2,)``.
    """
    rates = [torch.stack([measured_rates(each).sum(1) for each in latents.values()]).sum(0) for latents in views]
    total = sum((each.sum() for each in rates), start=torch.zeros((), device=device))
    count = torch.full((), float(sum(len(each) for each in rates)), device=device)
    return torch.stack([total.to(device), count])
