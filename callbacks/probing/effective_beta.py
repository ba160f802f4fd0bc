"""The effect of the KL term's weight on a loss, in nats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812

from ..reading.distributions import Second, as_distribution, is_sequence
from .loss_probe import LossProbe

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_CLOSE = 2e-4
_LARGEST_UNCERTAINTY = 1e-3  # relative, of a rise in which a KL can be recognised
_SECONDS: tuple[Second, ...] = ("log_variance", "scale", "variance", "log_scale")
# Limits for outputs of one shape: more outputs, or more numbers to scan, are the layers of a deep network.
_MOST_ALIKE, _MOST_NUMBERS = 8, 2**24
_HUGE = 1e6


class Gaussian(NamedTuple):
    """A Gaussian that outputs of a network may parametrise.

    Attributes:
        what: Description of it.
        posterior: The distribution.
        paths: Names of the outputs.
        second: What the second output is taken for; ``None`` if the output is a ``Normal``.
    """

    what: str
    posterior: Normal
    paths: tuple[str, ...]
    second: Second | None = None


@dataclass(frozen=True)
class Term:
    """A recognised term of a loss.

    Attributes:
        what: Description of the term.
        scale: Units of the loss per nat per observation.
        twice: Whether the loss contains it twice, summed as in an ELBO.
        gaussian: The posterior, if it is a KL.
    """

    what: str
    scale: float
    twice: bool = False
    gaussian: Gaussian | None = None


@dataclass(frozen=True)
class WeightEffect:
    """The effect of the KL term's weight on the loss of one batch.

    Attributes:
        weight: The weight that was tried.
        losses: The loss at 0, at half that weight and at that weight.
        noise: Largest difference between the losses that rounding and noise can explain.
        is_ignored: Whether the loss is the same, bit for bit, at any weight.
        rate: The KL term, if recognised.
        distortion: The reconstruction term, if recognised.
        number: Number of the loss among those of the batch, from 1: manual optimization has several.
        count: How many losses the batch has.
    """

    weight: float
    losses: tuple[float, float, float]
    noise: float
    is_ignored: bool = False
    rate: Term | None = None
    distortion: Term | None = None
    number: int = 1
    count: int = 1

    @property
    def rise(self) -> float:
        """Increase of the loss from weight 0 to the tried weight."""
        return self.losses[2] - self.losses[0]

    @property
    def slope(self) -> float:
        """Units of the loss per unit of the weight."""
        return self.rise / self.weight

    @property
    def uncertainty(self) -> float:
        """Relative uncertainty of the rise."""
        return self.noise / abs(self.rise) if self.rise else math.inf

    @property
    def is_linear(self) -> bool:
        """Return whether the loss at half the weight lies halfway between the other two."""
        middle = 0.5 * (self.losses[0] + self.losses[2])
        return abs(self.losses[1] - middle) <= self.noise + 1e-3 * abs(self.rise)

    @property
    def is_squared(self) -> bool:
        """Return whether the loss grows with the square of the weight, as if it were applied twice."""
        first, second = self.losses[1] - self.losses[0], self.losses[2] - self.losses[1]
        return self.uncertainty < 1e-3 and abs(second - 3 * first) <= 0.02 * abs(second)

    @property
    def is_counted_twice(self) -> bool:
        """Return whether the loss counts the KL twice but the reconstruction once."""
        return self.rate is not None and self.rate.twice and not (self.distortion is not None and self.distortion.twice)

    @property
    def effective_beta(self) -> float | None:
        """Weight of a nat of KL against a nat of reconstruction, at a weight of 1; ``None`` if a term is unknown."""
        return self.rate.scale / self.distortion.scale if self.rate and self.distortion else None


def weight_effect(
    probe: LossProbe, paths: tuple[str, ...], held: Mapping[tuple[str, ...], float], batch: Any, weight: float
) -> WeightEffect:
    """Measure the effect of a weight on the loss of one batch, and recognise the terms of the loss.

    The loss is evaluated with the same random state at weight 0, at half the weight and at the full weight. Its rise is
    compared with the KL divergence from N(0, I) of every Gaussian that the outputs of the module's submodules may
    parametrise, in a usual reduction or, with a second trial at other parameters, with any factor, and its value at 0
    with the usual reconstruction terms of the batch and every output of its shape. If the effect of the weight is below
    the rounding of the loss, a weight of 1 is tried too; if there is no effect at all, a weight of a million. Of
    several losses, as of a generator and a discriminator under manual optimization, it is the first that changes.

    Args:
        probe: Evaluates the loss.
        paths: Where the module keeps the weight.
        held: Other numbers to write to the module, by their paths.
        batch: The batch that the probe evaluates.
        weight: The weight to try, not 0.

    Raises:
        LossProbe.NotPossible: If the loss can't be evaluated, or differs between evaluations.
    """
    tensors = [leaf.detach().cpu() for _, leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    rows = len(tensors[0]) if tensors else 0
    data = [x for x in tensors if x.is_floating_point() and len(x) == rows]
    outputs: dict[str, Tensor | Normal] = {}

    def at(value: float, look_on: Callable[[LightningModule], object] | None = None) -> tuple[float, ...]:
        losses = probe.losses({**held, paths: value}, look_on)
        if zeros and len(losses) != len(zeros):
            raise LossProbe.NotPossible("the number of its losses changes between evaluations")
        return losses

    most = max([4096 * rows, *(x.numel() for x in data)])
    zeros: tuple[float, ...] = ()
    zeros = at(0.0, partial(_look_on, outputs, rows, most))
    drifts = [abs(again - zero) for again, zero in zip(at(0.0), zeros, strict=True)]

    def effects_of(weight: float) -> list[WeightEffect]:
        effects: list[WeightEffect] = []
        for drift, *losses in zip(drifts, zeros, at(0.5 * weight), at(weight), strict=True):
            zero, half, full = losses
            noise = probe.noise((zero, full), drift)
            effects.append(WeightEffect(weight, (zero, half, full), noise, number=len(effects) + 1, count=len(zeros)))
        return effects

    # The first loss that changes, by more than its noise if there is one.
    effect = min(effects_of(weight), key=_is_unchanged)
    if effect.uncertainty > _CLOSE and abs(weight) < 1:
        effect = min(effects_of(1.0), key=_is_unchanged)
    zero, drift = zeros[effect.number - 1], drifts[effect.number - 1]
    if not all(map(math.isfinite, effect.losses)):
        raise LossProbe.NotPossible("its loss is not finite")
    if drift > 1e-3 * abs(effect.rise):
        raise LossProbe.NotPossible("its loss changes between evaluations")
    if len({*effect.losses}) == 1:
        changed = [i for i, huge in enumerate(at(_HUGE)) if huge != zeros[i]]
        return effects_of(effect.weight)[changed[0]] if changed else replace(effect, is_ignored=True)
    if effect.uncertainty > _LARGEST_UNCERTAINTY or not effect.is_linear or not rows:
        return effect
    rate = recognise_rate(outputs, effect.slope, rows, effect.uncertainty)
    if rate is None:  # perhaps a multiple of the KL: then it is the same one of another network
        others: dict[str, Tensor | Normal] = {}
        with suppress(LossProbe.NotPossible):  # some modules can't work at other parameters
            other_zero = at(0.0, partial(_look_on, others, rows, most, is_perturbed=True))[effect.number - 1]
            other_rise = at(effect.weight, _perturb)[effect.number - 1] - other_zero
            other_noise = probe.noise((other_zero, other_zero + other_rise), drift)
            uncertainty = effect.uncertainty + (other_noise / abs(other_rise) if other_rise else math.inf)
            rate = recognise_multiple((outputs, others), (effect.slope, other_rise / effect.weight), rows, uncertainty)
    return replace(effect, rate=rate, distortion=recognise_distortion(outputs, zero, data))


def _is_unchanged(effect: WeightEffect) -> tuple[bool, bool]:
    return effect.uncertainty >= 1, len({*effect.losses}) == 1


def recognise_rate(
    outputs: Mapping[str, Tensor | Normal], slope: float, rows: int, uncertainty: float = 0.0
) -> Term | None:
    """Find the Gaussian among a network's outputs whose KL divergence from N(0, I) equals a given number.

    Args:
        outputs: Outputs by name, on the CPU.
        slope: The number: the KL of a batch in any reduction.
        rows: Number of observations in the batch.
        uncertainty: Relative uncertainty of the number. If it is large, only outputs that are ``Normal`` are
            considered: among many pairs of tensors some would fit by chance.
    """
    for each in _gaussians(outputs):
        if each.second is not None and uncertainty > _CLOSE:
            continue
        rate, dimensions = _rate(each.posterior, rows), each.posterior.loc.numel() // rows
        scales = {
            "summed over the latents, mean over the batch": 1.0,
            "mean over the latents and the batch": 1 / dimensions,
            "summed over the latents and the batch": float(rows),
            "twice, summed over the latents, mean over the batch": 2.0,
        }
        for reduction, scale in scales.items():
            if rate and math.isclose(slope, scale * rate, rel_tol=_CLOSE + uncertainty):
                what = f"the KL ({each.what}), {rate:.4g} nats per observation, {reduction}"
                return Term(what, scale, scale == 2, each)
    return None


def recognise_multiple(
    outputs: tuple[Mapping[str, Tensor | Normal], Mapping[str, Tensor | Normal]],
    slopes: tuple[float, float],
    rows: int,
    uncertainty: float = 0.0,
) -> Term | None:
    """Find the Gaussian whose KL divergence from N(0, I) is in one ratio to the slopes of two networks.

    Args:
        outputs: Outputs by name of a network and of a perturbed one, on the CPU.
        slopes: The KL of each, in any reduction and with any factor.
        rows: Number of observations in the batch.
        uncertainty: Relative uncertainty of the ratio. Only outputs that are ``Normal`` are considered if it is large.
    """
    first, second = ({each.what: each for each in _gaussians(found)} for found in outputs)
    for what, each in first.items():
        if what not in second or (each.second is not None and uncertainty > _CLOSE):
            continue
        rate, other = _rate(each.posterior, rows), _rate(second[what].posterior, rows)
        if not rate or not other or math.isclose(rate, other, rel_tol=0.01):  # no second measurement
            continue
        factor = slopes[0] / rate
        if factor and math.isclose(factor, slopes[1] / other, rel_tol=_CLOSE + uncertainty):
            return Term(
                f"{factor:.3g} times the KL ({what}), {rate:.4g} nats per observation, summed over the latents, mean "
                "over the batch",
                factor,
                gaussian=each,
            )
    return None


def _rate(posterior: Normal, rows: int) -> float:
    """Return the KL divergence from N(0, I), summed over the latents, mean over the batch."""
    return float(kl_divergence(posterior, Normal(0.0, 1.0)).double().sum()) / rows


def recognise_distortion(outputs: Mapping[str, Tensor | Normal], loss: float, data: list[Tensor]) -> Term | None:
    """Find the reconstruction term that equals a given number.

    Args:
        outputs: A network's outputs by name, on the CPU.
        loss: The number: the term for a batch in any reduction.
        data: Tensors of the batch that may have been reconstructed.
    """
    for x, output in itertools.product(data, outputs.values()):
        if not isinstance(output, Tensor) or output.shape[:1] != x.shape[:1] or output.numel() != x.numel():
            continue
        rows, elements = len(x), x.numel() // len(x)
        for what, nats in _distortions(x.double(), output.double().reshape(x.shape)):
            scales = {
                f"{what}, summed over {elements} elements": 1.0,
                f"{what}, mean over {elements} elements": 1 / elements,
                f"{what}, summed over {elements} elements and the batch": float(rows),
            }
            doubled = {f"twice {name}".replace("twice half ", ""): 2 * scale for name, scale in scales.items()}
            for name, scale in (scales | doubled).items():
                if nats and math.isclose(loss, scale * nats / rows, rel_tol=_CLOSE):
                    return Term(name, scale, twice=name in doubled and scale == 2)
    return None


def _distortions(x: Tensor, output: Tensor) -> Iterator[tuple[str, float]]:
    """Yield the usual reconstruction terms in nats, summed over the batch, without constants."""
    for reconstruction in (output, output.sigmoid(), output.tanh()):
        yield "half the squared error", float(0.5 * (x - reconstruction).square().sum())
        yield "the absolute error", float((x - reconstruction).abs().sum())
    if x.min() >= 0 and x.max() <= 1:
        if output.min() >= 0 and output.max() <= 1:
            yield "the binary cross entropy", float(F.binary_cross_entropy(output, x, reduction="sum"))
        yield "the binary cross entropy", float(F.binary_cross_entropy_with_logits(output, x, reduction="sum"))


def _gaussians(outputs: Mapping[str, Tensor | Normal]) -> Iterator[Gaussian]:
    """Yield every Gaussian that the outputs may parametrise, the likeliest first."""
    alike: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, output in outputs.items():
        if isinstance(output, Normal):
            yield Gaussian(repr(name), output, (name,))
        elif output.ndim > 1:
            alike.setdefault(tuple(output.shape), {})[name] = output
    searched = [
        tensors
        for shape, tensors in sorted(alike.items(), key=lambda item: math.prod(item[0]))
        if len(tensors) <= _MOST_ALIKE and len(tensors) ** 2 * math.prod(shape) <= _MOST_NUMBERS
    ]
    for tensors in searched:
        for (name, mean), (other, second) in itertools.permutations(tensors.items(), 2):
            yield from _forms(f"{name!r}, {other!r}", (name, other), mean, second)
    for tensors in searched:
        for name, tensor in tensors.items():
            for axis in (1, -1):
                if tensor.shape[axis] % 2 == 0:
                    yield from _forms(f"{name!r}, chunk={axis}", (name,), *tensor.chunk(2, axis))


def _forms(name: str, paths: tuple[str, ...], mean: Tensor, second: Tensor) -> Iterator[Gaussian]:
    for form in _SECONDS:
        if form in ("log_variance", "log_scale") or bool((second > 0).all()):
            posterior = as_distribution((mean.double(), second.double()), form)
            assert isinstance(posterior, Normal)
            yield Gaussian(f"{name}, {form}", posterior, paths, form)


def _perturb(pl_module: LightningModule) -> None:
    """Enlarge and change the parameters, except single numbers, which may be weights of the loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pl_module.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.mul_(1.5).add_(0.2 * parameter.square().mean().sqrt() * noise)


def _look_on(
    outputs: dict[str, Tensor | Normal], rows: int, most: int, pl_module: LightningModule, is_perturbed: bool = False
) -> None:
    if is_perturbed:
        _perturb(pl_module)
    for name, module in pl_module.named_modules():
        module.register_forward_hook(partial(_keep, outputs, rows, most, name))


def _keep(
    outputs: dict[str, Tensor | Normal], rows: int, most: int, name: str, _module: Any, _inputs: Any, output: Any
) -> None:
    """Keep possible posteriors and reconstructions: a row per observation, and no more numbers than the data."""
    for part, leaf in _leaves(output):
        path = f"{name}:{part}" if part else name
        if isinstance(leaf, Normal):
            if leaf.batch_shape[:1] == (rows,):
                outputs[path] = Normal(leaf.loc.detach().cpu(), leaf.scale.detach().cpu(), validate_args=False)
        elif leaf.is_floating_point() and leaf.ndim and len(leaf) == rows and leaf.numel() <= most:
            # An output that is passed on has several names; prefer that of a whole module, and a short one.
            leaf = leaf.detach()
            kept = leaf if leaf.device.type == "cpu" else leaf.cpu()
            same = [known for known, other in outputs.items() if isinstance(other, Tensor) and _is_same(other, kept)]
            best = min([path, *same], key=lambda known: (":" in known, len(known)))
            for known in same:
                del outputs[known]
            outputs[best] = kept


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _leaves(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor | Normal]]:
    """Yield the tensors and the Gaussians in a structure, each with its path."""
    if isinstance(value, Normal):
        yield path, value
    elif isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield path, value
    elif depth < 4:
        fields = enumerate(value) if is_sequence(value) else getattr(value, "__dict__", {}).items()
        for name, part in value.items() if isinstance(value, Mapping) else fields:
            if depth == 0 or isinstance(part, Tensor | Normal | Mapping) or is_sequence(part):
                yield from _leaves(part, f"{path}.{name}" if path else str(name), depth + 1)
