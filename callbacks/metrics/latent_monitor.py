"""Watch the posteriors of one pass over the data, in memory that does not grow with the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributions import Distribution, Normal, OneHotCategorical
from torchmetrics.wrappers.abstract import WrapperMetric

from ..reading.distributions import as_distribution, standard_prior, widened
from ..reading.kl_rates import kl_per_dimension
from ..reading.latent_reader import Latent
from ..reading.padding import mask_like
from ..schedules import at_least, check_number
from .active_units import ACTIVE
from .collapse_state import MAX_MARGINAL_KL, MIN_WIDTH
from .latent_layout import LatentLayout
from .latent_report import LatentReport, Thresholds, report
from .latent_sums import LatentSums
from .observation_subset import ObservationSubset
from .prior_units import prior_units

_MOST_DIMENSIONS = 1024  # that the mutual information is estimated from
_MOST_CLASSES = 2**14  # of all groups together
_MOST_NUMBERS = 2**21  # of one kind that are converted, or wait to be folded, at a time: 16 MiB
_SEED = 0x5EED
_GAUSSIAN, _CATEGORICAL, _OTHER = 1, 2, 3  # kinds of posteriors


class _Rows(NamedTuple):
    """The posteriors of some observations as rows, as the model made them.

    Attributes:
        index: Of shape ``(N,)``.
        mean: Means; of categories their probabilities. Of shape ``(N, columns)`` like the next three and the last.
        scale: Standard deviations, if known.
        loc: Means of the prior; ``None`` for N(0, I), and where they are not known.
        unit: Its standard deviations.
        rates: Rates in parts; ``None`` if they are those of Gaussians, in closed form.
        mask: Which positions count; ``None`` for all.
    """

    index: Tensor  # type: ignore[assignment]  # hides `tuple.index`, which is not needed
    mean: Tensor
    scale: Tensor | None
    loc: Tensor | None
    unit: Tensor | None
    rates: Tensor | None
    mask: Tensor | None

    def cut(self, rows: slice) -> _Rows:
        return _Rows(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]


class LatentMonitor(WrapperMetric):
    """Measure the posteriors of any VAE over a stream of batches, and judge them.

    This is what :class:`~lightning_vae.callbacks.CollapseDetector` measures, for a loop of one's own. Call
    :meth:`update` with each batch's posterior, :meth:`compute` at the end of a pass, and :meth:`reset` before the next.
    Under torch.distributed all processes are merged exactly; call both on all of them.

    Posteriors are measured in units of the prior, also of a joint one such as a mixture: a dimension is active by the
    variance of ``(mean - prior mean) / prior scale``, from the prior's mean and standard deviation in this dimension.
    That is the usual definition for N(0, I), and for a prior p(z|c) it leaves out what the condition alone explains.
    The shift and scale are those of the latents as they are.

    Args:
        observations: Number of observations that the mutual information is estimated from: a fixed random subset, by
            ``index`` where one is given, otherwise by position. With more than 1024 dimensions it is estimated from a
            fixed random choice of 1024, and is then a lower bound.
        pool: Axes of the latents ``(N, ...)`` over which a dimension extends: ``(2, 3)`` for ``(N, C, H, W)``, 2 for
            ``(N, C, T)``, 1 for ``(N, T, C)``. A channel's rate is the sum over its positions, and its variances are
            the means over them. A pooled axis may differ in size from batch to batch.
        min_rate: Rate in nats below which the active dimensions together count as collapsed.
        threshold: Variance of the posterior mean that an active dimension exceeds.
        min_width: Median ratio of the posterior's to the aggregate posterior's variance, over the active dimensions,
            below which a posterior counts as deterministic...
        max_marginal_kl: ...if the marginal KL also exceeds this number of nats per active dimension.
        unimix: Share of the uniform distribution that the model mixes into categorical posteriors
            (:func:`~.categorical.unimix`); it is left out when dead classes are counted.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an option is out of range.

    Example::

        >>> monitor = LatentMonitor()
        >>> mean = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
        >>> monitor.update((mean, torch.full((2, 2), -9.0)))  # mean and log-variance
        >>> monitor.compute().active_units
        1
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(
        self,
        observations: int = 2048,
        pool: int | Sequence[int] | None = None,
        min_rate: float = 0.5,
        threshold: float = ACTIVE,
        min_width: float = MIN_WIDTH,
        max_marginal_kl: float = MAX_MARGINAL_KL,
        unimix: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for option, value, least in (
            ("observations", observations, 2),
            ("min_rate", min_rate, 0),
            ("threshold", threshold, 0),
            ("min_width", min_width, 0),
            ("max_marginal_kl", max_marginal_kl, 0),
        ):
            check_number(option, value, f"a finite number of at least {least}", at_least(least))
        self.observations = observations
        self.pool = pool
        self.min_rate = min_rate
        self.threshold = threshold
        self.min_width = min_width
        self.max_marginal_kl = max_marginal_kl
        check_number("unimix", unimix, "at least 0 and below 1", lambda value: 0 <= value < 1)
        self.unimix = unimix
        self._layout = LatentLayout(pool)
        self._begin()

    def _begin(self) -> None:
        self._sums: LatentSums | None = None
        self._kept: ObservationSubset | None = None
        self._waiting: list[_Rows] = []
        self._numbers = 0  # that wait to be folded, in a column of `_Rows`
        self._seen = 0
        self._kind = 0
        self._joint_parts = 0  # of the rate; 0 if it has one for each column
        self._classes = 1
        self._has_estimates = False
        self._is_incomplete = False  # whether the kept rows lack positions that came later

    @property
    def has_begun(self) -> bool:
        """Return whether the pass has seen a batch."""
        return self._seen > 0

    def reset(self) -> None:
        """Start another pass."""
        super().reset()
        self._begin()
        if not self._layout.pool:  # pooled axes keep the largest size seen
            self._layout = LatentLayout(self.pool)

    def update(
        self,
        posterior: Any,
        prior: Any = None,
        z: Any = None,
        index: Tensor | None = None,
        mask: Tensor | Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the posteriors of a batch.

        Args:
            posterior: q(z|x) with the observations along its first axis: a ``Distribution``, a pair ``(mean,
                log_variance)`` or an object with such fields. Or a dict of them: named groups of latents, whose
                dimensions stand side by side and whose rates add up.
            prior: p(z) or p(z|c), which broadcasts to the posterior, or an object with ``log_prob``; for groups a dict.
                ``None`` is N(0, I), and uniform for categories.
            z: The model's own sample of the posterior, where a rate without a closed form is estimated; for groups a
                dict.
            index: Indices of the observations, integers of shape ``(N,)``. ``None`` counts them in the order in which
                DistributedSampler assigns them.
            mask: True where a position of the latents is real, of their shape or of shape ``(N, T)``; for groups a
                dict. Padding counts for nothing.

        Raises:
            ValueError: If shapes do not match, or change from batch to batch.
        """
        is_several = isinstance(posterior, Mapping) and not any(
            isinstance(value, Tensor) for value in posterior.values()
        )
        names = list(posterior) if is_several else [""]

        def of(values: Any, name: str) -> Any:
            return values.get(name) if is_several and isinstance(values, Mapping) else values

        latents = {name: _latent(of(posterior, name), of(prior, name), of(z, name), of(mask, name)) for name in names}
        self.add(latents, index)

    def add(self, latents: Mapping[str, Latent], index: Tensor | None = None) -> None:
        """Add the latents of a batch as a :class:`~..reading.latent_reader.LatentReader` returns them, by group."""
        with torch.no_grad():
            self._add([_Group.of(latent) for latent in latents.values()], index)

    def compute(self) -> LatentReport | None:
        """Merge the processes and judge the posteriors; ``None`` if there were no observations at all."""
        self._agree()
        if not self._layout.columns:
            return None
        self._fold()
        sums, kept = self._open(exact_device(self.device))
        with sums.sync_context(), kept.sync_context():
            if not sums.rates[0]:
                return None
            return report(
                self._layout,
                sums,
                kept.rows if self._kept_columns > 1 and not self._is_incomplete else None,
                self._chosen,
                classes=self._classes,
                unimix=self.unimix,
                is_estimate=self._has_estimates,
                thresholds=Thresholds(self.min_rate, self.threshold, self.min_width, self.max_marginal_kl),
            )

    # ---- a pass that a checkpoint interrupts

    def pass_state(self) -> dict[str, Any]:
        """Return the state from which :meth:`load_pass` continues the pass."""
        if not self.has_begun:
            return {}
        flags = (self._seen, self._kind, self._joint_parts, self._classes, self._has_estimates, self._is_incomplete)
        sums, kept = self._sums, self._kept
        folded = [] if sums is None or kept is None else [*sums.moments, kept.state]
        shapes = [list(shape) for shape in self._layout.shapes]
        return {
            "shapes": shapes,
            "flags": list(flags),
            "folded": folded,
            "waiting": [list(rows) for rows in self._waiting],
        }

    def load_pass(self, state: dict[str, Any], device: torch.device) -> bool:
        """Continue from a saved state, if there is one.

        Returns:
            Whether this version can read the state; if it can't, the pass begins with what comes.
        """
        if not state:
            return True
        if set(state) != {"shapes", "flags", "folded", "waiting"}:
            return False
        self._layout = LatentLayout(self.pool)
        self._layout.fit(state["shapes"])
        flags = state["flags"]
        self._seen, self._kind, self._joint_parts, self._classes, self._has_estimates, self._is_incomplete = flags
        device = exact_device(device)
        self._waiting = [
            _Rows._make(None if each is None else each.to(device) for each in rows) for rows in state["waiting"]
        ]
        self._numbers = sum(rows.mean.numel() for rows in self._waiting)
        if state["folded"]:
            sums, kept = self._open(device)
            *sums.moments, kept.state = [each.to(device) for each in state["folded"]]
        return True

    # ---- from groups of latents to rows

    def _add(self, groups: list[_Group], index: Tensor | None) -> None:
        rows = len(groups[0].mean)
        if index is not None and index.shape != (rows,):
            raise ValueError(f"`index` must have shape ({rows},), got {tuple(index.shape)}.")
        kinds, classes = {group.kind for group in groups}, {group.classes for group in groups}
        if len(kinds) > 1 or len(classes) > 1 or any(len(group.mean) != rows for group in groups):
            raise ValueError(
                "The groups of latents must be of one kind, Gaussian or categories of one number of classes, and have "
                "the same observations. Measure groups of different kinds apart, detectors distinguished with `name=`."
            )
        before = self._layout.shapes
        self._layout.fit([group.mean.shape[1:] for group in groups])
        is_joint = any(group.rates is not None and group.rates.shape[1:] != group.mean.shape[1:] for group in groups)
        joint_parts = sum(group.parts for group in groups) if is_joint else 0
        if self._seen and joint_parts != self._joint_parts:
            raise ValueError("The rate has a part for each dimension in one step and is joint in another.")
        self._kind, self._classes, self._joint_parts = kinds.pop(), classes.pop(), joint_parts
        if joint_parts and self._kind != _CATEGORICAL and any(group.mask is not None for group in groups):
            raise ValueError("`mask` needs a rate for each position, and this prior or posterior is joint.")
        if before not in ((), self._layout.shapes):
            self._grow(before)
        self._has_estimates = self._has_estimates or any(group.is_estimate for group in groups)
        index = self._places(rows, groups[0].mean.device) if index is None else index.to(groups[0].mean.device)
        arranged = self._arranged(groups, index)
        size = max(1, _MOST_NUMBERS // max(self._layout.columns, 1))
        for first in range(0, max(rows, 1), size):
            part = arranged if rows <= size else arranged.cut(slice(first, first + size))
            self._waiting.append(part)
            self._numbers += part.mean.numel()
            if self._crosses_block(len(part.index)) or self._numbers >= _MOST_NUMBERS:
                self._fold()

    def _crosses_block(self, added: int) -> bool:
        """Count observations; return whether as many as are kept have come since the last fold."""
        blocks = self._seen // self.observations
        self._seen += added
        return self._seen // self.observations > blocks

    def _places(self, rows: int, device: torch.device) -> Tensor:
        is_one = not (distributed.is_available() and distributed.is_initialized())
        rank, world = (0, 1) if is_one else (distributed.get_rank(), distributed.get_world_size())
        return rank + world * torch.arange(self._seen, self._seen + rows, device=device)

    def _arranged(self, groups: list[_Group], index: Tensor) -> _Rows:
        rows = self._layout.rows
        means = [group.mean.detach() for group in groups]  # a step's graph must not live on
        shapes = zip(groups, self._layout.shapes, strict=True)
        loc = unit = mask = None
        if any(group.mask is not None or tuple(group.mean.shape[1:]) != shape for group, shape in shapes):
            known = (torch.ones_like(group.mean) if group.mask is None else group.mask.float() for group in groups)
            mask = rows(list(known)).bool()
        if any(group.prior is not None for group in groups):
            loc = rows([torch.zeros_like(group.mean) if group.prior is None else group.prior.loc for group in groups])
            units = (torch.ones_like(group.mean) if group.prior is None else group.prior.scale for group in groups)
            unit = rows(list(units), 1.0)
        rates = None
        if any(group.rates is not None for group in groups):
            parts = [group.known_rates() for group in groups]
            rates = torch.cat([each.flatten(1) for each in parts], dim=1) if self._joint_parts else rows(parts)
        scales = [group.scale for group in groups]
        scale = None if any(each is None for each in scales) else rows(scales, 1.0)  # type: ignore[arg-type]
        return _Rows(index, rows(means), scale, loc, unit, rates, mask)

    # ---- folding

    @property
    def _chosen(self) -> Tensor | None:
        """The columns that the mutual information is estimated from; ``None`` for all."""
        columns = self._layout.columns
        if columns <= _MOST_DIMENSIONS or self._kind != _GAUSSIAN:
            return None
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(_SEED))
        return order[:_MOST_DIMENSIONS].sort().values

    @property
    def _kept_columns(self) -> int:
        """The length of a kept row: what the mutual information needs, if it can be estimated, and the rate."""
        columns = self._layout.columns
        if self._kind == _CATEGORICAL:
            return columns + 1 if columns <= _MOST_CLASSES else 1
        return 1 if self._kind == _OTHER else 2 * min(columns, _MOST_DIMENSIONS) + 1

    def _fold(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting, self._numbers = self._waiting, [], 0
        rows = _joined(waiting)
        sums, subset = self._open(exact_device(rows.mean.device))
        mean, variance, raw, rates = _measured(rows)
        mask = rows.mask
        if mask is not None:  # a position that is padding holds the prior: it has no rate and tells nothing
            rates = rates.where(mask[:, :: self._classes] if self._joint_parts else mask, 0.0)
            of_padding = 1 / self._classes if self._classes > 1 else 0.0
            mean, variance = mean.where(mask, of_padding), variance.where(mask, 1.0)
            raw = None if raw is None else (raw[0].where(mask, 0.0), raw[1].where(mask, 0.0))
        sums.update((mean, variance), raw, rates, mask)
        chosen = self._chosen
        kept = [mean, variance] if self._kind == _GAUSSIAN else [mean] if self._kept_columns > 1 else []
        if chosen is not None:
            chosen = chosen.to(mean.device)
            kept = [column[:, chosen] for column in kept]
            rates = rates if self._joint_parts else rates[:, chosen]
        subset.update(torch.cat([*kept, rates.sum(1, keepdim=True)], dim=1), rows.index)

    def _open(self, device: torch.device) -> tuple[LatentSums, ObservationSubset]:
        """Return the sums; create them once the number of dimensions is known."""
        if self._sums is None or self._kept is None:
            parts = self._joint_parts or self._layout.columns
            self._sums = LatentSums(self._layout.columns, parts).to(device, non_blocking=True)
            self._kept = ObservationSubset(self._kept_columns, self.observations).to(device, non_blocking=True)
        return self._sums, self._kept

    def _grow(self, before: tuple[tuple[int, ...], ...]) -> None:
        """Rearrange what has come so far for latents with more positions."""
        present, self._layout.shapes = self._layout.shapes, before
        self._fold()
        old, old_kept, self._layout.shapes = self._sums, self._kept, present
        if old is None or old_kept is None:
            return
        self._sums = self._kept = None
        sums, kept = self._open(old.rates.device)
        moved, k = self._layout.moved, old.standard.shape[1]
        count, rates = old.rates.split([1, len(old.rates) - 1])
        rates = rates if self._joint_parts else moved(rates, before)
        sums.moments = (
            moved(old.standard, before), moved(old.raw, before), moved(old.variances, before), torch.cat([count, rates])
        )  # fmt: skip
        if self._kind == _GAUSSIAN and self._layout.columns <= _MOST_DIMENSIONS:
            key, mean, variance, total = old_kept.state.split([1, k, k, 1], dim=1)
            kept.state = torch.cat([key, moved(mean, before), moved(variance, before, 1.0), total], dim=1)
        else:
            self._is_incomplete = True

    # ---- several processes

    def _agree(self) -> None:
        """Learn from the other processes what this one has not seen: it may have no batch, and must take part."""
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return
        sizes: list[int] = [size for shape in self._layout.shapes for size in (len(shape), *shape)]
        flags = [self._kind, self._joint_parts, self._classes, self._has_estimates, self._is_incomplete]
        numbers = [*map(int, flags), len(self._layout.shapes), *sizes]
        is_nccl = distributed.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
        known = torch.zeros(64, dtype=torch.long)
        known[: len(numbers)] = torch.tensor(numbers)
        known = known.to(device)
        distributed.all_reduce(known, op=distributed.ReduceOp.MAX)
        self._kind, self._joint_parts, self._classes, has_estimates, is_incomplete, groups, *sizes = known.tolist()
        self._has_estimates, self._is_incomplete = bool(has_estimates), bool(is_incomplete)
        before, shapes = self._layout.shapes, []
        for _ in range(groups):
            shapes.append(sizes[1 : 1 + sizes[0]])
            sizes = sizes[1 + sizes[0] :]
        self._layout.fit(shapes)
        if before not in ((), self._layout.shapes):
            self._grow(before)


class _Group(NamedTuple):
    """One group of latents of a batch, as the model made them."""

    kind: int
    mean: Tensor  # (N, ...); of categories the probabilities
    scale: Tensor | None  # of a Gaussian
    prior: Normal | None  # with the prior's moments, which are the units of the latents; `None` for those of N(0, I)
    rates: Tensor | None  # `None`: in closed form from these
    is_estimate: bool
    mask: Tensor | None
    classes: int

    @classmethod
    def of(cls, latent: Latent) -> _Group:
        posterior, prior, mask = latent.posterior, latent.prior, latent.mask
        if isinstance(posterior, OneHotCategorical):
            probs, (rates, is_estimate) = posterior.probs, latent.rates()
            of_groups = None if mask is None else mask_like(mask, rates)[..., None].expand(probs.shape)
            return cls(_CATEGORICAL, probs, None, None, rates, is_estimate, of_groups, probs.shape[-1])
        mean, scale = _moments(posterior)
        positions = None if mask is None else mask_like(mask, mean)
        kind = _GAUSSIAN if isinstance(posterior, Normal) else _OTHER
        if isinstance(posterior, Normal) and isinstance(prior, Normal):
            is_standard = (
                prior.loc.ndim == 0
                and prior.loc.device.type == "cpu"
                and bool(prior.loc == 0)
                and bool(prior.scale == 1)
            )
            unit = None if is_standard else _expanded(prior, posterior)
            return cls(kind, mean, scale, unit, None, False, positions, 1)
        rates, is_estimate = (torch.full_like(mean, -math.inf), False) if prior is None else latent.rates()
        return cls(kind, mean, scale, prior_units(prior, mean), rates, is_estimate, positions, 1)

    @property
    def parts(self) -> int:
        return math.prod((self.mean if self.rates is None else self.rates).shape[1:])

    def known_rates(self) -> Tensor:
        """Return the rates; those of Gaussians in closed form."""
        if self.rates is not None:
            return self.rates
        assert self.scale is not None
        prior = Normal(0.0, 1.0)
        if self.prior is not None:
            prior = Normal(exact(self.prior.loc), exact(self.prior.scale), False)
        return kl_per_dimension(Normal(exact(self.mean), exact(self.scale), False), prior)


def _latent(posterior: Any, prior: Any, z: Tensor | None, mask: Tensor | None) -> Latent:
    posterior = as_distribution(widened(posterior))
    if prior is None:
        prior = standard_prior(posterior)
    elif isinstance(prior, Distribution) or not callable(getattr(prior, "log_prob", None)):
        prior = as_distribution(widened(prior), of="prior")
    return Latent(posterior, prior, z, mask=mask)


def _joined(waiting: Sequence[_Rows]) -> _Rows:
    """Concatenate the rows of batches; what some leave out because it is trivial is filled in."""
    trivial = {"loc": 0.0, "unit": 1.0, "mask": True}
    columns = []
    for name, column in zip(_Rows._fields, zip(*waiting, strict=True), strict=True):
        if name in trivial and any(each is not None for each in column):
            column = tuple(
                rows.mean.new_full(rows.mean.shape, trivial[name], dtype=torch.bool if name == "mask" else None)
                if each is None
                else each
                for each, rows in zip(column, waiting, strict=True)
            )
        columns.append(None if column[0] is None else torch.cat(column))
    return _Rows(*columns)  # type: ignore[arg-type]


def _measured(rows: _Rows) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor]:
    """Return means and variances in units of the prior, as they are if that is something else, and rates; float64."""
    mean = exact(rows.mean)
    loc, unit = (None if each is None else exact(each) for each in (rows.loc, rows.unit))
    if rows.scale is None:
        assert rows.rates is not None
        # NaN in the place of what is not known would hide a scale that is negative.
        unknown, rates = torch.full_like(mean, -math.inf), exact(rows.rates)
        if loc is None or unit is None:
            return mean, unknown, None, rates
        return (mean - loc) / unit, unknown, (mean, unknown), rates
    scale = exact(rows.scale)
    prior = Normal(0.0, 1.0) if loc is None or unit is None else Normal(loc, unit, False)
    rates = exact(rows.rates) if rows.rates is not None else kl_per_dimension(Normal(mean, scale, False), prior)
    if loc is None or unit is None:
        return mean, scale.square(), None, rates
    return (mean - loc) / unit, (scale / unit).square(), (mean, scale.square()), rates


def _moments(posterior: Distribution) -> tuple[Tensor, Tensor | None]:
    """Return a posterior's mean and, if it has one, its standard deviation."""
    try:
        mean = posterior.mean
    except NotImplementedError:
        raise ValueError(
            f"The posterior, a {type(posterior).__name__}, has no `mean`, from whose variance the active units are "
            "computed. Pass a Normal, or another distribution with a mean, as a callable `posterior=lambda pl_module, "
            "batch: ...` of a callback."
        ) from None
    try:
        return mean, posterior.stddev.detach()
    except NotImplementedError:
        return mean, None


def _expanded(prior: Normal, posterior: Normal) -> Normal:
    shape, own = prior.batch_shape, posterior.batch_shape
    fits = len(shape) <= len(own) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(own), strict=False))
    if not fits:
        raise ValueError(
            f"The module's `prior` of shape {tuple(shape)} does not fit its posterior of shape {tuple(own)}: it must "
            "broadcast to it, axis by axis from the last."
        )
    loc, scale = (each.to(posterior.loc.device, non_blocking=True).expand(own) for each in (prior.loc, prior.scale))
    return Normal(loc, scale, validate_args=False)


def exact(values: Tensor) -> Tensor:
    """Return values in float64, detached."""
    return values.detach().to(exact_device(values.device)).double()


def exact_device(device: torch.device) -> torch.device:
    """Return the device for float64 values: the same one, but the CPU for Apple's GPUs, which lack float64."""
    return torch.device("cpu") if device.type == "mps" else device
