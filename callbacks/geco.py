"""Hold the reconstruction error at a constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributions import Distribution
from typing_extensions import override

from .control.weight_controller import WeightController
from .reading.batch_fields import OBSERVATIONS, batch_part
from .reading.distribution_reader import DistributionReader
from .reading.distributions import describe
from .schedules import Schedule, check_number, is_positive

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

ErrorKind = Literal["squared_error", "distortion"]


class GECO(WeightController):
    r"""Find the least rate at which the reconstruction reaches a constraint, by moving the weight of the KL term.

    The Lagrangian of "least rate such that the error is at most L" is

    .. math:: \text{rate} + \lambda \, (\text{error} - L)

    Divided by the multiplier, it is ``distortion + beta * rate`` with ``beta`` proportional to :math:`1 / \lambda`, so
    the callback moves ``beta``: down while the error is above its limit, up while it is below. It does so by the
    controller of :class:`TargetRate`, in :math:`\log \lambda`,

    .. math::
        e = \frac{\bar E - L}{s}, \quad \log \lambda = K_p e + I, \quad I \leftarrow I + K_i e

    where :math:`\bar E` is the moving average of the training batches' errors, which starts at the first one, and the
    scale s is the limit of a squared error, or 1 nat or the absolute value of a limit on the distortion. The relative
    error is clamped to -1 and 1, and ``beta`` to its bounds, where the integral stops. Without the proportional term
    this is the paper's :math:`\lambda \leftarrow \lambda \exp(\eta \bar C)`.

    The error is that of the module's own sample of the posterior. At the posterior's mean the problem has no solution:
    a model that shrinks the means and enlarges the decoder has any error at no rate.

    The weight starts at the module's configured value. Validation, checkpoints and the finished module have the weight
    that the controller has found. The controller's state is saved, so a resumed run continues from it. Logged on
    logging steps: ``knobs/beta`` (or the path's last part), ``knobs/error_limit`` and ``train/constrained_error``, the
    moving average. A constraint that no weight within the bounds reaches, or that is met at the largest one, is
    reported once.

    The ``val/loss`` and ``test/loss`` of ``lightning_vae.VAE`` then are the rate, plus ``price`` for each unit of error
    above the limit at the schedule's end and its tolerance. Both log ``squared_error`` too, if that is constrained. The
    validation loss of any other module contains the current weight: monitor something without it.

    Args:
        squared_error: The constraint on the squared error, summed over an observation: a number, a schedule of the
            training step with an explicit end, or another function of it, which ends with the run. For
            ``lightning_vae.VAE`` it is in the networks' scale, where images are in [0, 1] and the numeric columns of a
            table are standardised. A table with other columns needs a ``distortion``.
        distortion: A constraint on the distortion in nats instead of ``squared_error``, in the same forms.
        factor: Multiplies ``squared_error``: 1.1 with the error that an autoencoder of this architecture reaches allows
            a tenth more. To measure that error, run with a ``squared_error`` near 0: the report that it is out of reach
            names the least error.
        attribute: Where the module keeps the weight of the KL term: a dotted path as in :class:`KLAnnealing`, or
            several. In ``lightning_vae.VAE`` it must be ``beta``. Where the loss has a weight of the reconstruction
            instead, use ``setter``.
        error: Where the error is. ``None`` is ``lightning_vae.VAE``'s own. A path, as for the posterior in
            :class:`CollapseDetector`, to a submodule's output or an attribute, or a callable ``(pl_module, batch) ->
            value``. The value is the reconstruction, in the shape of the observations; or a ``Distribution`` p(x|z),
            which a constraint on the distortion needs; or the error itself, one number an observation or their mean.
        x: Key or index of the observations in a batch, to compare with the reconstruction, or a callable that takes the
            batch. ``None`` searches the usual places.
        start: The weight to start from; the module's configured weight if not given.
        min_beta: The smallest weight; a hundredth of the first if not given.
        max_beta: The largest weight; a hundred times the first if not given.
        proportional: Gain :math:`K_p`.
        integral: Gain :math:`K_i` per step. Lower both gains if error and weight oscillate. With a ``distortion``, most
            of which often stays whatever the weight is, raise both if the weight moves too slowly.
        smoothing: Weight of the previous average in the moving average, from 0 to below 1.
        tolerance: Amount by which the error may exceed the limit in ``val/loss``, and may miss it before it counts as
            not met: a fraction of the scale.
        price: Nats of rate in ``val/loss`` for each unit of error above that. It must be more than the multiplier at
            the limit, or a violation would pay. If not given, 10 nats for each nat of distortion, or 1 nat for each
            hundredth of a limit on the squared error, of which a Gaussian likelihood needs half a nat for each hundred
            active dimensions. If a price on the distortion turns out to be too low, that is reported.
        patience: Number of steps at a bound, with the constraint not met or idle, before that is reported.
        setter: Writes the weight instead, ``(pl_module, value) -> None``; needs a ``start``.
        name: Logged as ``knobs/<name>``; the path's last part if not given.

    Raises:
        ValueError: If an option is out of range, or, when fitting starts, if a path leads nowhere, there is no
            positive weight to start from, the constraint ends at no valid number, or the likelihood's observations have
            no squared error. In the first step, if the error can't be read.
        lightning.pytorch.utilities.exceptions.MisconfigurationException: When fitting starts, if another callback moves
            the same weight, or a monitor watches ``train/loss``, which moves.

    References:
        Rezende and Viola, "Taming VAEs", 2018, algorithm 1.

    Example::

        >>> GECO(squared_error=2.0).state_key
        "GECO{'attribute': 'beta', 'name': 'beta'}"
    """

    _reader: DistributionReader
    sign = -1.0
    _nan_remedy = "Check the reconstruction, or the `error` that is given."
    _monitor_remedy = "Monitor the rate, once the error is at its limit."

    def __init__(
        self,
        squared_error: float | Schedule | Callable[[int], float] | None = None,
        distortion: float | Schedule | Callable[[int], float] | None = None,
        factor: float = 1.0,
        attribute: str | Sequence[str] = "beta",
        error: str | Callable[[Any, Any], Any] | None = None,
        x: str | int | Callable[[Any], Any] | None = None,
        start: float | None = None,
        min_beta: float | None = None,
        max_beta: float | None = None,
        proportional: float = 1.0,
        integral: float = 0.01,
        smoothing: float = 0.99,
        tolerance: float = 0.05,
        price: float | None = None,
        patience: int = 500,
        setter: Callable[[Any, float], None] | None = None,
        name: str | None = None,
    ) -> None:
        if (squared_error is None) == (distortion is None):
            raise ValueError(
                "The constraint must be given as `squared_error` or as `distortion`, got "
                f"squared_error={squared_error}, distortion={distortion}. Give one."
            )
        self.kind: ErrorKind = "distortion" if squared_error is None else "squared_error"
        limit = distortion if squared_error is None else squared_error
        if not callable(limit):
            is_error = self.kind == "squared_error"
            allowed = f"a finite number{' above 0' if is_error else ''}, or a schedule"
            check_number(self.kind, limit, allowed, is_positive if is_error else math.isfinite)
        check_number("factor", factor, "a finite number above 0", is_positive)
        if factor != 1 and distortion is not None:
            raise ValueError(
                f"`factor` must be 1 with a `distortion`, which has no natural zero, got {factor}. Give the product, "
                "or constrain the `squared_error`."
            )
        super().__init__(
            limit,  # type: ignore[arg-type]  # one of the two was given
            attribute,
            setter,
            name,
            ("knobs/error_limit", "train/constrained_error"),
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
        self.squared_error = squared_error
        self.distortion = distortion
        self.factor = factor
        self.price = price
        self.error = error
        self.x = x
        self._reader = DistributionReader(error, option="error")
        self._has_read = False

    @override
    def target(self, step: int) -> float:
        """Return the limit of a step's error."""
        return self.factor * super().target(step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "kind": self.kind}

    @override
    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, current: float | None, restored: dict[str, Any]
    ) -> None:
        saved = restored.get("kind", self.kind)
        if saved != self.kind:
            rank_zero_warn(
                f"{self._title}: the checkpoint was saved under a constraint on the {saved}, and this run has one on "
                f"the {self.kind}. The weight goes on where it was; the average starts with the next error."
            )
            restored = {**restored, "average": math.nan, "steps_at_bound": 0.0}
        super()._prepare(trainer, pl_module, current, restored)

    @override
    def _scale(self, target: float) -> float:
        return max(target, 1e-12) if self.kind == "squared_error" else max(abs(target), 1.0)

    @override
    def _measure(self, pl_module: LightningModule, batch: Any) -> Tensor:
        if self.error is not None:
            values = self._reader.values(pl_module, batch)
        else:
            own = getattr(pl_module, "constrained_error", None)
            values = [] if own is None else [own]
        if not values and not self._has_read:
            raise ValueError(
                f"{type(pl_module).__name__} has left no error in its first step. Say where it is with `error=`, a "
                "path or a callable `(pl_module, batch) -> value`."
            )
        self._has_read = True
        x = batch_part(batch, self.x, OBSERVATIONS, 0)
        sums = [sum_and_count(value, x, self.kind) for value in values]
        return sum((each.to(pl_module.device) for each in sums), start=torch.zeros(2, device=pl_module.device))

    @override
    def _problems(self, average: float, weight: float, steps: float, target: float) -> Iterator[tuple[str, str]]:
        what = self.kind.replace("_", " ")
        at_bound = f"`{self.name}` has been at its {{}}, {weight:.4g}, for {abs(steps):.0f} steps"
        missed = f", and the {what} is {average:.4g} instead of {target:.4g}: the constraint is"
        if steps <= -self.patience:
            remedy = "Raise it, lower `min_beta`, or give the model more latent dimensions or larger networks."
            yield "out of reach", f"{at_bound.format('smallest')}{missed} out of reach. {remedy}"
        elif steps >= self.patience:
            remedy = "Lower it, or raise `max_beta`. If no weight raises the error, the loss does not read the weight."
            yield "idle", f"{at_bound.format('largest')}{missed} idle. {remedy}"
        met = abs(average - target) <= self.tolerance * self._scale(target)
        if met and self._sets_limit and self.kind == "distortion" and 1 / weight > self._price(target):
            yield (
                "price",
                f"at `{self.name}` = {weight:.4g} a nat of distortion saves {1 / weight:.4g} nats of rate, and "
                f"`val/loss` charges {self._price(target):g} for it: a violation would pay. Raise `price`.",
            )

    def _price(self, limit: float) -> float:
        if self.price is not None:
            return self.price
        return 10.0 if self.kind == "distortion" else 100 / limit

    @override
    def _set_limit(self, pl_module: Any, end: float) -> None:
        limit = self.factor * end
        if not (math.isfinite(limit) and (limit > 0 or self.kind == "distortion")):
            allowed = "number" if self.kind == "distortion" else "number above 0"
            raise ValueError(f"{self._title}: the constraint must end at a finite {allowed}, got {limit}.")
        self._has_read = False
        self._sets_limit = self._sets_limit and self.error is None  # the module can't validate another error
        if self._sets_limit and getattr(pl_module, "importance_samples", 1) > 1:
            raise ValueError(
                f"{self._title}: {type(pl_module).__name__} trains on a multi-sample bound, `importance_samples="
                f"{pl_module.importance_samples}`, whose error is not known. Train on the ELBO."
            )
        if self._sets_limit:
            self._check_likelihood(getattr(pl_module, "likelihood", None))
            pl_module.error_limit = (self.kind, limit + self.tolerance * self._scale(limit), self._price(limit))

    def _check_likelihood(self, likelihood: Any) -> None:
        """Refuse a likelihood without a squared error, and warn of one that a small weight makes degenerate."""
        if self.kind == "squared_error" and hasattr(likelihood, "error_unit"):
            try:
                likelihood.error_unit()
            except ValueError as error:
                raise ValueError(f"{self._title}: {error}") from None
        assert self._first is not None
        smallest = self._smallest(self._first)
        if smallest < 1 and getattr(likelihood, "learns_each_scale", False):
            rank_zero_warn(
                f"{self._title}: `{self.name}` may fall to {smallest:g} with a likelihood that learns a scale for each "
                "number of an observation: below 1 this loss has no minimum, so scales fall until they reach their "
                "lower bound. Set `min_beta` to at least 1, or fix the scales, or share one."
            )


@torch.no_grad()
def sum_and_count(value: Any, x: Any, kind: ErrorKind) -> Tensor:
    """Sum the errors of a batch's observations, and count them.

    Args:
        value: The reconstruction, in the shape of ``x``; a distribution p(x|z); or the error itself, shape ``(B,)`` or
            a mean, a scalar.
        x: The observations, shape ``(B, ...)``.
        kind: The error of a reconstruction.

    Returns:
        Sum and number, float32, shape ``(2,)``.

    Raises:
        ValueError: If the value is none of these.
    """
    if isinstance(value, Tensor) and value.ndim < 2:
        count = len(value) if value.ndim else len(x) if isinstance(x, Tensor) and x.ndim else 1
        total = value.float().sum() if value.ndim else value.float() * count
    else:
        errors = _errors(value, x, kind)
        count, total = len(errors), errors.sum()
    return torch.stack([total, torch.full_like(total, float(count))])


def _errors(value: Any, x: Any, kind: ErrorKind) -> Tensor:
    """Return the error of each observation, float32, shape ``(B,)``."""
    if not isinstance(x, Tensor):
        raise ValueError(f"`x` must be the observations in the batch, a tensor, got {describe(x)}.")
    if isinstance(value, Distribution):
        shape = value.batch_shape + value.event_shape
    elif isinstance(value, Tensor) and kind == "squared_error":
        shape = value.shape
    else:
        wanted = "a Distribution p(x|z)" if kind == "distortion" else "a reconstruction, a Distribution p(x|z)"
        raise ValueError(f"`error` must be {wanted} or the error itself, (B,) or a scalar, got {describe(value)}.")
    if shape[:1] != x.shape[:1] or shape.numel() != x.numel():
        raise ValueError(
            f"`error` is a reconstruction of shape {tuple(shape)}, which can't be compared with observations of shape "
            f"{tuple(x.shape)}. Say where these are with `x=`, or give a callable that returns the error."
        )
    x = x.reshape(shape)
    errors: Tensor
    if kind == "distortion":
        errors = -value.log_prob(x).float()
    else:
        errors = ((value.mean if isinstance(value, Distribution) else value).float() - x.float()).square()
    return errors.reshape(len(x), -1).sum(1)
