"""The passes of a model over data: validation, test and prediction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .checkpoints.guards import without_batches
from .distributed import rank_and_processes, sum_over_processes
from .module import RunModule
from .objective import (
    ELBOTerms,
    FreeBitsAverage,
    FreeBitsPer,
    capacity_loss,
    constrained_rate_loss,
    free_bits,
    limited_rate_loss,
    weighted_loss,
)
from .observations import Observations
from .running_sums import RunningSums, mean, named_terms


class PassModule(RunModule):
    """Base class of a model that reports the terms of its loss over a whole pass.

    Its loss is the model's own: a subclass says how a batch is observed and what its terms are.

    Attributes:
        rate_parts: Number of parts of the rate.
        terms: The terms that are added to the loss, by name.
        constrained_error: The error of each observation in the batch processed last, if there is a limit on it.
    """

    latent_dim: int
    importance_samples: int
    rate_parts: int
    terms: nn.ModuleDict
    beta: Tensor
    capacity: Tensor
    capacity_weight: float | None = None
    free_bits: Tensor
    free_bits_per: FreeBitsPer
    free_bits_average: FreeBitsAverage
    posterior: Any
    constrained_error: Tensor | None
    working_dtype: torch.dtype

    def __init__(self) -> None:
        super().__init__()
        self._evaluation_sums: dict[int, RunningSums] = {}
        self._count = 0  # observations so far in the pass
        self._loader = 0  # number of the loader that the pass is in
        self.constrained_error = None

    def observe(self, batch: Any, first: int = 0) -> Observations:
        """Return a batch as the model sees it at evaluation."""
        raise NotImplementedError

    def encode(self, x: Any) -> Any:
        """Return the posterior."""
        raise NotImplementedError

    def _checked_terms(self, x: Any, size: int) -> ELBOTerms:
        raise NotImplementedError

    def _bound(self, observations: Observations) -> Tensor | None:
        """Return the multi-sample bound that is trained on, shape ``(B,)``; ``None`` for the ELBO."""
        raise NotImplementedError

    def _added_terms(self) -> list[Tensor]:
        """Compute the terms that are added to the loss, unweighted, of the batch whose ELBO was computed last."""
        raise NotImplementedError

    def _weighted(self, terms: Iterable[Tensor]) -> Any:
        """Sum added terms with their weights."""
        return sum(getattr(self, f"{name}_weight") * term for name, term in zip(self.terms, terms, strict=True))

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        observations = self._observe_next(batch, batch_idx)
        self._loader = dataloader_idx
        if batch_idx == 0:
            self._evaluation_sums[dataloader_idx] = self._new_sums()
        if not len(observations):  # this process's share of a last batch may be empty
            self.posterior = None
            return
        distortion, rates = self._checked_terms(observations, len(observations))
        # A floor on each sample is a sum over observations; a floor on the mean needs the whole pass.
        floored = self._floored_rate(rates) * len(observations)
        added = self._sums_of_terms(observations) if self.terms else []
        bound = self._bound(observations)
        errors = [] if self.error_limit is None else [self._error_of_batch().sum()]
        columns = [distortion.sum(), floored, *added, *([] if bound is None else [bound.sum()]), *errors]
        sums = torch.cat([rates.sum(0), torch.stack(columns)])
        self._evaluation_sums[dataloader_idx].add(sums, len(observations))

    test_step = validation_step

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the posterior means with the indices and labels of the observations.

        Returns:
            ``"mean"``, shape ``(B, k)``; ``"index"``, ``(B,)``, from the batch or counted; and ``"label"`` if the batch
            has it.
        """
        observations = self._observe_next(batch, batch_idx)
        empty = observations.observed.new_empty(0, self.latent_dim)
        result = {"mean": self.encode(observations).mean if len(observations) else empty, "index": observations.index}
        return result if observations.label is None else {**result, "label": observations.label}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val", len(self.trainer.num_val_batches))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", len(self.trainer.num_test_batches))

    def _observe_next(self, batch: Any, batch_idx: int) -> Observations:
        """Observe the next batch of a pass, numbering the observations in order of arrival."""
        first = self._count if batch_idx else 0
        observations = self.observe(batch, first)
        self._count = first + len(observations)
        return observations

    def _log_evaluation(self, stage: str, loaders: int) -> None:
        _, processes = rank_and_processes(self.trainer)
        for number in range(loaders):
            sums = (self._evaluation_sums.pop(number, None) or self._new_sums()).flush()
            # The same type and device in every process, even in one whose share was empty.
            sums = sums.to(self.device, self.working_dtype)
            sums = sum_over_processes(sums) if processes > 1 else sums
            if not sums[-1]:
                step = self.test_step if stage == "test" else self.validation_step
                if getattr(step, "__func__", None) is PassModule.validation_step:
                    raise without_batches("validate" if stage == "val" else stage)
                continue  # a subclass's own step, which logs by itself
            means = mean(sums)
            rates, (distortion, floored, *others) = means[: self.rate_parts], means[self.rate_parts :]
            added, others = others[: len(self.terms)], others[len(self.terms) :]
            if added:
                compared, *others = others
                added = [term / compared for term in added]
            if self.free_bits_average == "batch":
                floored = self._floored_rate(rates[None])
            rate = rates.sum()
            if self.rate_limit is not None:
                loss = limited_rate_loss(distortion, rate, *self.rate_limit)
            elif self.error_limit is not None:
                loss = constrained_rate_loss(rate, others[-1], *self.error_limit[1:])
            elif self.importance_samples > 1:
                loss = -others[0]
            else:
                loss = self._weighted_loss(distortion, floored)
            if added:
                loss = loss + self._weighted(added)
            values = named_terms(stage, torch.stack([distortion, rate, floored, loss, *added]), list(self.terms))
            if self.error_limit is not None:
                values[f"{stage}/{self.error_limit[0]}"] = others[-1]
            if loaders > 1:  # named as Lightning does
                values = {f"{name}/dataloader_idx_{number}": value for name, value in values.items()}
            self.log_dict(values, batch_size=1, sync_dist=processes > 1, add_dataloader_idx=False)

    def _weighted_loss(self, distortion: Tensor, floored_rate: Tensor) -> Tensor:
        if self.capacity_weight is None:
            return weighted_loss(distortion, floored_rate, self.beta)
        return capacity_loss(distortion, floored_rate, self.capacity, self.capacity_weight)  # there is no floor

    def _new_sums(self) -> RunningSums:
        terms = len(self.terms) + bool(self.terms)
        optional = (self.importance_samples > 1) + (self.error_limit is not None)
        return RunningSums(self.rate_parts + 2 + terms + optional)

    def _sums_of_terms(self, observations: Observations) -> list[Tensor]:
        """Return the added terms times the number of observations, and that number.

        A last batch of one observation is left out: terms compare observations.
        """
        count = torch.tensor(float(len(observations)), dtype=self.working_dtype, device=self.device)
        if len(observations) < 2:
            return [torch.zeros_like(count)] * (len(self.terms) + 1)
        return [*(term * count for term in self._added_terms()), count]

    def _error_of_batch(self) -> Tensor:
        if self.constrained_error is None:
            raise ValueError(
                f"`{type(self).__name__}.elbo_terms` leaves no `constrained_error`, which `val/loss` needs under GECO. "
                "Call `super().elbo_terms`, or set it."
            )
        return self.constrained_error

    def _floored_rate(self, rates: Tensor) -> Tensor:
        return free_bits(rates, self.free_bits, self.free_bits_per, self.free_bits_average)


def wrong_terms(terms: ELBOTerms, size: int, parts: int) -> ValueError:
    """Return the error of terms that are not one row for each of ``size`` observations, with the model's parts."""
    found, remedy = tuple(terms.rate_per_dimension.shape), ""
    if found != (size, parts) and found[:-1] == (size,) and 1 in (found[-1], parts):
        remedy = (
            " The class of a `prior` or `posterior` must set `is_joint = True` if it gives one distribution over whole "
            "latents, and only then."
        )
    return ValueError(
        f"`elbo_terms` must return a distortion of shape {(size,)} and rates of shape {(size, parts)}, one row per "
        f"observation, got {tuple(terms.distortion.shape)} and {found}.{remedy}"
    )
