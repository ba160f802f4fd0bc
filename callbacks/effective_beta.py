"""What the weight of the KL term does to a loss, in nats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812

from .loss_probe import LossProbe
from .posterior import as_distribution

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_CLOSE = 1e-4
_TWICE = "counted twice"
_SECONDS = ("log_variance", "scale", "variance", "log_scale")
_MOST_ALIKE = 8  # outputs of one shape: more of them are the layers of a deep network


@dataclass(frozen=True)
class Term:
    """A term of a loss that was recognised.

    Attributes:
        what: What it is, in words.
        scale: How many units of the loss one nat per observation counts.
    """

    what: str
    scale: float


@dataclass(frozen=True)
class WeightEffect:
    """What the weight of the KL term does to the loss of one batch.

    Attributes:
        weight: The weight that was tried.
        losses: The loss at 0, at half that weight and at that weight.
        noise: What the losses may differ by without a reason.
        rate: The KL term, if recognised.
        distortion: The reconstruction term, if recognised.
    """

    weight: float
    losses: tuple[float, float, float]
    noise: float
    rate: Term | None = None
    distortion: Term | None = None

    @property
    def rise(self) -> float:
        """How much more the loss is at the weight than at 0."""
        return self.losses[2] - self.losses[0]

    @property
    def slope(self) -> float:
        """Units of the loss for one unit of the weight."""
        return self.rise / self.weight

    @property
    def is_precise(self) -> bool:
        """Whether the rise is known to three digits, so that what it is made of can be recognised."""
        return self.noise < 1e-3 * abs(self.rise)

    @property
    def is_ignored(self) -> bool:
        """Whether the loss does not depend on the weight."""
        return max(self.losses) - min(self.losses) <= self.noise

    @property
    def is_squared(self) -> bool:
        """Whether the loss grows with the weight's square, as when it is multiplied by it twice."""
        first, second = self.losses[1] - self.losses[0], self.losses[2] - self.losses[1]
        return abs(second - 3 * first) <= 0.02 * abs(second) + 4 * self.noise < abs(second)

    @property
    def is_counted_twice(self) -> bool:
        """Whether a KL was recognised that the loss contains twice."""
        return self.rate is not None and self.rate.what.endswith(_TWICE)

    @property
    def effective_beta(self) -> float | None:
        """Nats of reconstruction that a nat of KL counts at a weight of 1; ``None`` where a term is not recognised."""
        return self.rate.scale / self.distortion.scale if self.rate and self.distortion else None


def weight_effect(
    probe: LossProbe, write: Callable[[LightningModule, float], None], batch: Any, weight: float
) -> WeightEffect:
    """Find out what a weight does to the loss of one batch, and which terms the loss is made of.

    The loss is evaluated with the same random state at weight 0, half the weight and the weight. Its rise is compared
    with the KL divergence from N(0, I) of every Gaussian that the outputs of the module's submodules may stand for, and
    its value at 0 with the usual reconstruction terms of the batch and every output of its shape. A weight whose effect
    drowns in the loss's rounding is tried at 1 as well.

    Args:
        probe: Evaluates the loss.
        write: Writes the weight to a module.
        batch: The batch that the probe evaluates.
        weight: The weight to try, not 0.

    Raises:
        LossProbe.NotPossible: If the loss can't be evaluated, or is another one each time.
    """
    outputs: dict[str, Tensor | Normal] = {}

    def at(value: float) -> float:
        return probe(lambda pl_module: write(pl_module, value))

    def at_zero_looking_on(pl_module: LightningModule) -> None:
        write(pl_module, 0.0)
        for name, module in pl_module.named_modules():
            module.register_forward_hook(partial(_keep, outputs, name))

    zero = probe(at_zero_looking_on)
    drift = abs(at(0.0) - zero)
    effect = _effect(weight, zero, at, drift)
    if not effect.is_precise and abs(weight) < 1:
        effect = _effect(1.0, zero, at, drift)
    if drift > 1e-3 * abs(effect.rise):
        raise LossProbe.NotPossible("its loss is another one each time")
    data = [leaf for _, leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim]
    if not data or not effect.is_precise:
        return effect
    tolerance = _CLOSE + effect.noise / abs(effect.rise)
    return replace(
        effect,
        rate=recognise_rate(outputs, effect.slope, len(data[0]), tolerance),
        distortion=recognise_distortion(outputs, zero, data),
    )


def _effect(weight: float, zero: float, at: Callable[[float], float], drift: float) -> WeightEffect:
    half, full = at(0.5 * weight), at(weight)
    if not all(map(math.isfinite, (zero, half, full))):
        raise LossProbe.NotPossible("its loss is not finite")
    noise = 16 * torch.finfo(torch.float32).eps * max(abs(zero), abs(full)) + 4 * drift
    return WeightEffect(weight, (zero, half, full), noise)


def recognise_rate(
    outputs: Mapping[str, Tensor | Normal], slope: float, rows: int, tolerance: float = _CLOSE
) -> Term | None:
    """Find the Gaussian among a network's outputs whose KL divergence from N(0, I) is a given number.

    Args:
        outputs: Outputs by name.
        slope: The number: the KL of a batch in whatever reduction.
        rows: Number of observations in the batch.
        tolerance: Relative difference up to which numbers are the same.
    """
    for what, posterior in _gaussians(outputs, rows):
        rates = kl_divergence(posterior, Normal(0.0, 1.0)).double().reshape(rows, -1)
        rate, dimensions = float(rates.sum(-1).mean()), rates.shape[1]
        scales = {
            "summed over the latents, mean over the batch": 1.0,
            "mean over the latents and the batch": 1 / dimensions,
            "summed over the latents and the batch": float(rows),
            _TWICE: 2.0,
        }
        for reduction, scale in scales.items():
            if rate and math.isclose(slope, scale * rate, rel_tol=tolerance):
                return Term(f"KL ({what}), {rate:.4g} nats per observation, {reduction}", scale)
    return None


def recognise_distortion(outputs: Mapping[str, Tensor | Normal], loss: float, data: list[Tensor]) -> Term | None:
    """Find the reconstruction term that is a given number.

    Args:
        outputs: A network's outputs by name.
        loss: The number: the term for a batch in whatever reduction.
        data: What may have been reconstructed.
    """
    for x, output in itertools.product(data, outputs.values()):
        if not isinstance(output, Tensor) or output.shape[:1] != x.shape[:1] or output.numel() != x.numel():
            continue
        rows, elements = len(x), x.numel() // len(x)
        for what, nats in _distortions(x.double(), output.double().reshape(x.shape)):
            scales = {
                "summed over {} elements": 1.0,
                "mean over {} elements": 1 / elements,
                "summed over {} elements and the batch": float(rows),
            }
            for reduction, scale in scales.items():
                for factor in (1.0, 2.0) if what == "squared error" else (1.0,):
                    if nats and math.isclose(loss, factor * scale * nats / rows, rel_tol=_CLOSE):
                        half = "half the " if what == "squared error" and factor == 1 else ""
                        return Term(f"{half}{what}, {reduction.format(elements)}", factor * scale)
    return None


def _distortions(x: Tensor, output: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the usual reconstruction terms in nats, summed over the batch, constants left out."""
    for reconstruction in (output, output.sigmoid(), output.tanh()):
        yield "squared error", float(0.5 * (x - reconstruction).square().sum())
        yield "absolute error", float((x - reconstruction).abs().sum())
    if x.min() >= 0 and x.max() <= 1:
        if output.min() >= 0 and output.max() <= 1:
            yield "binary cross entropy", float(F.binary_cross_entropy(output, x, reduction="sum"))
        yield "binary cross entropy", float(F.binary_cross_entropy_with_logits(output, x, reduction="sum"))


def _gaussians(outputs: Mapping[str, Tensor | Normal], rows: int) -> Iterator[tuple[str, Normal]]:
    """Yield every Gaussian that the outputs may stand for, the likeliest first."""
    alike: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, output in outputs.items():
        if isinstance(output, Normal):
            yield repr(name), output
        elif output.ndim > 1 and len(output) == rows:
            alike.setdefault(tuple(output.shape), {})[name] = output
    for tensors in sorted(alike.values(), key=lambda group: next(iter(group.values())).numel()):
        if len(tensors) > _MOST_ALIKE:
            continue
        for (name, mean), (other, second) in itertools.permutations(tensors.items(), 2):
            yield from _forms(f"{name!r}, {other!r}", mean, second)
    for tensors in alike.values():
        for name, tensor in tensors.items() if len(tensors) <= _MOST_ALIKE else ():
            for axis in (1, -1):
                if tensor.shape[axis] % 2 == 0:
                    yield from _forms(f"{name!r}, chunk={axis}", *tensor.chunk(2, axis))


def _forms(name: str, mean: Tensor, second: Tensor) -> Iterator[tuple[str, Normal]]:
    for form in _SECONDS:
        if form in ("log_variance", "log_scale") or bool((second > 0).all()):
            posterior = as_distribution((mean.double(), second.double()), form)
            assert isinstance(posterior, Normal)
            yield f"{name}, {form}", posterior


def _keep(outputs: dict[str, Tensor | Normal], name: str, _module: Any, _inputs: Any, output: Any) -> None:
    for part, leaf in _leaves(output):
        path = f"{name}:{part}" if part else name
        if isinstance(leaf, Normal):
            outputs[path] = Normal(leaf.loc.detach(), leaf.scale.detach())
        elif leaf.is_floating_point():
            # What a module hands on has several names; the one that says most is a whole module's, and short.
            same = [known for known, other in outputs.items() if isinstance(other, Tensor) and _is_same(other, leaf)]
            best = min([path, *same], key=lambda known: (":" in known, len(known)))
            for known in same:
                del outputs[known]
            outputs[best] = leaf.detach()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor | Normal]]:
    """Yield the tensors and Gaussians in a structure, each with where it is."""
    if isinstance(value, Tensor | Normal):
        yield path, value
        return
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, tuple | list):
        parts = list(enumerate(value))
    else:
        parts = list(getattr(value, "__dict__", {}).items())
    for name, part in parts:
        if isinstance(part, Tensor | Normal | Mapping | tuple | list):
            yield from _leaves(part, f"{path}.{name}" if path else str(name))
