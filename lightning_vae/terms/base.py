"""The base class of a term, and what a term sees of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import override

from ..checkpoints.class_paths import build
from ..objective import check_single, checked_number
from ..observations import Observations
from ..posteriors import PosteriorHead


@dataclass(frozen=True, eq=False)
class Step:
    """One batch on its way through the model: all that a term may use.

    Attributes:
        observations: The batch as the model sees it.
        posterior: q(z|x) of the batch: batch shape ``(B, k)``, or ``(B,)`` where it is joint.
        prior: p(z) or p(z|c), broadcastable to the posterior.
        z: One sample of the posterior per observation, shape ``(B, k)``.
        likelihood: p(x|z) at ``z``, batch shape ``(B,)``, in the networks' scale.
        data_size: Number of observations in the data set that the batch is from; ``None`` if it is not known.
    """

    observations: Observations
    posterior: Distribution
    prior: Distribution
    z: Tensor
    likelihood: Distribution
    data_size: int | None = None


class Term(nn.Module):
    """Base class of a term, which the loss adds with a weight.

    A term of one's own derives from it and defines ``forward``. It may hold networks and parameters.

    Args:
        weight: Weight of the term in the loss. 0 leaves the training as it is without the term, as long as the term
            and its gradients are finite.

    Raises:
        ValueError: If the weight is negative or not finite.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = checked_number("weight", weight)

    def check(self, head: PosteriorHead | None) -> None:
        """Check that the term can be computed with the posterior of a model, when the model is built.

        Args:
            head: The posterior head of the model; ``None`` if its encoder gives the distribution.

        Raises:
            ValueError: If it can't.
        """

    @override
    def forward(self, step: Step) -> Tensor:
        """Compute the unweighted term.

        Args:
            step: The batch on its way through the model.

        Returns:
            A scalar, averaged over the batch, in nats unless the term says otherwise. Its gradient trains the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward(step)`, which returns a scalar.")


def checked_names(terms: Any, model: nn.Module) -> dict[str, Any]:
    """Return what was given for the terms of a model, by name.

    Args:
        terms: A mapping; ``None`` without terms.
        model: The model, which gets the knob ``<name>_weight`` of each.

    Raises:
        ValueError: If it is no mapping, or a name is no Python name or is taken.
    """
    terms = {} if terms is None else terms
    if not isinstance(terms, Mapping):
        raise ValueError(f"`terms` must be a mapping from names to terms, such as {{'mmd': MMD}}, got {terms!r}.")
    taken = nn.ModuleDict()
    for name in terms:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"`terms` must have names that are Python names, such as 'mmd', got {name!r}.")
        if hasattr(taken, name) or hasattr(model, f"{name}_weight"):
            raise ValueError(f"`terms` can't have the name {name!r}, which the model itself uses. Choose another one.")
    return dict(terms)


def build_terms(terms: Mapping[str, Any], head: PosteriorHead | None) -> nn.ModuleDict:
    """Build terms by name. What they draw leaves the random state of the run as it is without them.

    Args:
        terms: What was given for each: a term, or its constructor.
        head: The posterior head of the model, if it has one.

    Raises:
        ValueError: If a term can't be built, or can't be computed with this posterior.
        TypeError: If one is no term.
    """
    device = torch.get_default_device()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        built: dict[str, Term] = {name: build(f"terms.{name}", term, of=Term) for name, term in terms.items()}
    for term in built.values():
        term.check(head)
    return nn.ModuleDict(built)


def checked_values(values: Mapping[str, Any]) -> list[Tensor]:
    """Return the terms of a batch, after checking that each is one number. No number is read.

    Raises:
        ValueError: If a term is no tensor, or has an axis.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"`terms.{name}` must be one number as a tensor, got {type(value).__name__} {value!r}.")
        check_single(f"terms.{name}", value)
    return list(values.values())


def check_several(name: str, count: int) -> None:
    """Check that a batch holds at least the two observations that a statistic over the batch needs.

    Args:
        name: Name of the term.
        count: Number of observations.

    Raises:
        ValueError: If there are fewer.
    """
    if count < 2:
        raise ValueError(
            f"`{name}` compares the observations of a batch, so a batch must hold at least 2, got {count}. Set "
            "`drop_last=True` in the DataLoader, or another `batch_size`."
        )
