"""Compare a KL term with the loss that is declared to contain it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from ..reading.distribution_reader import DistributionReader
from ..reading.kl_rates import kl_per_dimension
from ..reading.latent_reader import LatentReader, has_gradient
from ..reading.module_call import part_of_output
from .loss_probe import LossProbe

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

# Log-variances that a module follows even if it clamps them, and those at which no noise changes the reconstruction.
_USUAL, _NARROW = (0.0, -2.0, -4.0), (-20.0, -24.0, -28.0)
_TOLERANCE = 2e-3  # relative, of a rise of the loss


@dataclass(frozen=True)
class DeclaredKL:
    """A KL term as a user declares it: ``weight * factor(rates) * rates.sum(1).mean()``.

    Attributes:
        reader: Reads the posterior of a module and its prior, with their gradients.
        weight: Where the module keeps the weight, or the weight itself.
        read_weight: Returns the weight of a module.
        factor: The factor that the module's reduction applies to rates of shape ``(B, k)``.
    """

    reader: LatentReader
    weight: str | float
    read_weight: Callable[[LightningModule], Any]
    factor: Callable[[Tensor], float]

    def contradiction(self, probe: LossProbe) -> str:
        """Compare the term with the loss of copies of the module, and say how they differ; empty if they agree.

        As each log-variance of the posterior falls, the loss has to rise like the term. Gaussian noise is replaced by
        its mean, so that the reconstruction does not depend on the log-variance. If the loss does not follow, it has to
        rise like the term between a weight of 0 and a weight of 1.

        Raises:
            LossProbe.NotPossible: If nothing can be compared; the message gives the reasons.
        """
        trials = [partial(self._lower, levels=levels) for levels in (_USUAL, _NARROW)]
        reasons = []
        for trial in trials + [self._weigh] * isinstance(self.weight, str):
            try:
                found = trial(probe)
            except Exception as reason:  # a trial must not end the training
                reasons.append(str(reason))
                continue
            if trial is trials[1] and not found:
                self._try_prior(probe)
            return found
        raise LossProbe.NotPossible("; ".join(dict.fromkeys(reasons)))

    def _lower(self, probe: LossProbe, levels: Sequence[float], held: float | None = None) -> str:
        """Compare as each log-variance falls; at a weight other than the module's own, if one is given."""

        def at(level: float, noise: float = 0.0) -> tuple[float, float, float]:
            with _Noise(noise):
                return self._evaluate(probe, held, partial(_fill_second, self.reader.posteriors[""], level))

        losses, terms, weights = zip(*map(at, levels), strict=True)
        if weights[0] == 0 and isinstance(self.weight, str) and held is None:  # as at the start of a warm-up
            return self._lower(probe, levels, held=1.0)
        noise = probe.noise(losses, at(levels[-1])[0] - losses[-1])
        what = f"as each log-variance falls from {levels[0]:g} to {levels[-1]:g}"
        difference = _difference(what, losses, terms, noise)
        # However narrow the posterior, its density at its own sample depends on the noise: half a nat per dimension.
        estimate = (terms[0] - terms[-1]) / (levels[0] - levels[-1])
        if levels == _NARROW and abs(at(levels[0], 1.0)[0] - losses[0] - estimate) <= 0.05 * abs(estimate) + noise:
            return "The KL in the loss is an estimate from a sample, `log q(z|x) - log p(z)`."
        return difference

    def _try_prior(self, probe: LossProbe) -> None:
        """Compare as the weight rises too, if it is a path: a narrow posterior shows nothing of the prior.

        Raises:
            LossProbe.NotPossible: If the loss rises by another number; the weight may multiply something else as well.
        """
        found = self._weigh(probe) if isinstance(self.weight, str) else ""
        if found:
            raise LossProbe.NotPossible(f"a narrow posterior agrees, which shows nothing of the prior. {found}")

    def _weigh(self, probe: LossProbe) -> str:
        """Compare as the weight rises."""
        (zero, _, _), (again, _, _), (one, term, weight) = (self._evaluate(probe, held) for held in (0.0, 0.0, 1.0))
        if not math.isclose(weight, 1.0, rel_tol=1e-2):
            raise LossProbe.NotPossible("the module sets the weight itself in its training step")
        return _difference("for a weight of 1", (zero, one), (0.0, term), probe.noise((zero, one), again - zero))

    def _evaluate(
        self, probe: LossProbe, held: float | None, prepare: Callable[[LightningModule], object] | None = None
    ) -> tuple[float, float, float]:
        """Return the loss of a copy, and the declared term and its weight there."""
        reader = self.reader.idle()
        copies: list[LightningModule] = []

        def look_on(module: LightningModule) -> None:
            if prepare is not None:
                prepare(module)
            reader.listen(module, probe.batch)
            copies.append(module)

        loss = probe({} if held is None else {(str(self.weight),): held}, look_on)
        [module] = copies
        latents = [view[""] for view in reader.read(module, probe.batch) if has_gradient(view[""].posterior)]
        if len(latents) != 1 or not all(isinstance(each, Normal) for each in (latents[0].posterior, latents[0].prior)):
            raise LossProbe.NotPossible("the posterior of the step is not one diagonal Normal, or its prior is none")
        rates = kl_per_dimension(latents[0].posterior, latents[0].prior).detach().flatten(1)
        weight = float(self.read_weight(module))
        return loss, weight * self.factor(rates) * float(rates.sum(1).mean()), weight


class _Noise(TorchFunctionMode):
    """Replace Gaussian noise by one number of standard deviations."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self._number = number

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.randn, torch.randn_like):
            mean, std = 0.0, 1.0
        elif func in (torch.normal, Tensor.normal_):
            mean, std = _mean_and_std(*args[func is Tensor.normal_ :], **(kwargs or {}))
        else:
            return output
        with torch.no_grad():
            return output.copy_(torch.as_tensor(mean + self._number * std))


def _mean_and_std(mean: Any = 0.0, std: Any = 1.0, *_: Any, **__: Any) -> tuple[Any, Any]:
    return mean, std


def _difference(what: str, losses: Sequence[float], terms: Sequence[float], noise: float) -> str:
    """Compare the rises of a loss and of its declared term; an empty text says that they agree."""
    rise, declared = losses[-1] - losses[0], terms[-1] - terms[0]
    if noise > 0.3 * abs(declared):
        raise LossProbe.NotPossible(f"a KL term of {declared:.6g} can't be told from rounding and noise")
    if len(losses) > 2 and not (abs(rise) > noise and _is_linear(losses, terms, noise)):
        raise LossProbe.NotPossible(f"the loss does not follow the KL {what}, which the module may clamp or change")
    if abs(rise - declared) <= _TOLERANCE * abs(declared) + noise:
        return ""
    return (
        f"The loss of the first batch rises by {rise:.6g} {what}, and the declared KL term by {declared:.6g}. Correct "
        "`weight`, `reduction`, `second`, `posterior` or `prior`."
    )


def _is_linear(losses: Sequence[float], terms: Sequence[float], noise: float) -> bool:
    slope = (losses[-1] - losses[0]) / (terms[-1] - terms[0])
    middle = losses[0] + slope * (terms[1] - terms[0])
    return abs(losses[1] - middle) <= 0.5 * _TOLERANCE * abs(losses[-1] - losses[0]) + noise


def _fill_second(reader: DistributionReader, log_variance: float, module: LightningModule) -> None:
    """Give the posterior in a module's output one log-variance, at each call."""
    path = reader.paths[-1]

    def fill(_module: Any, _inputs: Any, output: Any) -> None:
        value = part_of_output(output, path)
        value = value.base_dist if isinstance(value, Independent) else value
        kind = reader.second
        if isinstance(value, Normal):
            kind, second = "scale", value.scale
        elif isinstance(value, Tensor):
            second = value if reader.chunk is None else value.chunk(2, reader.chunk)[1]
        else:
            second = value[1]
        if callable(kind):
            raise LossProbe.NotPossible(
                "`second` is a function, so it is not known which number gives a narrow posterior"
            )
        log = log_variance / 2 if kind.endswith("scale") else log_variance
        second.data.fill_(log if kind.startswith("log") else math.exp(log))

    module.get_submodule(path.partition(":")[0]).register_forward_hook(fill)
