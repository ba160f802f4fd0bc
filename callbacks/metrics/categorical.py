"""Categorical latents: the use of each class, and the information of the groups about the data.

Posteriors have the shape ``(M, groups, classes)``, a row for each observation. Leave padding out: ``probs[mask]``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.special import entr, xlogy
from torchmetrics import Metric

from ..schedules import at_least, check_number, integer_from
from .mutual_information import SEED, controlled_mean, tenths

DEAD = 0.01
"""Share of the uniform usage that a class in use exceeds."""

_JOINT_CLASSES = 4096  # of all groups together, up to which they are enumerated
_TOLERANCE = 0.01  # of a sum of probabilities: half precision
_ROWS = 64  # samples that are compared with all posteriors at a time


def unimix(probs: Tensor, share: float = 0.01) -> Tensor:
    """Mix categorical distributions with the uniform one, which keeps every KL divergence between them finite.

    Args:
        probs: Probabilities, of shape ``(..., classes)``. Make them of logits by ``softmax(-1)``.
        share: Share of the uniform distribution, from 0 to 1.

    Returns:
        Probabilities of the same shape. Build posterior and prior of them: ``OneHotCategorical(probs=unimix(probs))``.

    Raises:
        ValueError: If the share is out of range.

    References:
        Hafner et al., "Mastering Diverse Domains through World Models", arXiv:2301.04104, 2023.

    Example::

        >>> unimix(torch.tensor([1.0, 0.0]), share=0.5)
        tensor([0.7500, 0.2500])
    """
    check_number("share", share, "from 0 to 1", lambda value: 0 <= value <= 1)
    return (1 - share) * probs + share / probs.shape[-1]


def class_usage(probs: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
    """Average each class's probability over the data: the aggregate posterior of each group.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``.
        logits: Their logits instead, of the same shape.

    Returns:
        Of shape ``(groups, classes)``, float64.

    Raises:
        ValueError: If there are no posteriors, they have another shape, or the values are not probabilities.

    Example::

        >>> class_usage(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))
        tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """
    probs = _probabilities(probs, logits)
    if not len(probs):
        raise ValueError(f"A usage needs observations, got posteriors of shape {tuple(probs.shape)}.")
    return _usage(probs.sum(0), len(probs))


def perplexity(usage: Tensor) -> Tensor:
    """Compute the perplexity of each group: the effective number of classes in use.

    Args:
        usage: Usage of the classes, of shape ``(groups, classes)``, from :func:`class_usage`.

    Returns:
        The exponential of the entropy of the usage, from 1 to the number of classes, of shape ``(groups,)``.

    Raises:
        ValueError: If the usage has another shape, or does not sum to 1 in each group.

    Example::

        >>> perplexity(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
        tensor([2., 1.])
    """
    _check_usage(usage)
    entropy: Tensor = entr(usage).sum(-1)
    return entropy.exp()


def dead_classes(usage: Tensor, threshold: float = DEAD, share: float = 0.0) -> Tensor:
    """Count the classes of each group that are hardly used.

    Args:
        usage: Usage of the classes, of shape ``(groups, classes)``, from :func:`class_usage`.
        threshold: Share of the uniform usage, ``1 / classes``, below which a class is dead.
        share: Share of the uniform distribution that :func:`unimix` has mixed in. It is taken out first, because 1 % of
            it alone lifts every class to the default threshold: no class would ever be dead.

    Returns:
        Integers, of shape ``(groups,)``.

    Raises:
        ValueError: If the usage has another shape or does not sum to 1 in each group, the threshold is negative, or the
            share is not from 0 to below 1.

    Example::

        >>> dead_classes(torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.3, 0.4]]))
        tensor([1, 0])
    """
    _check_usage(usage)
    check_number("threshold", threshold, "at least 0", at_least(0))
    check_number("share", share, "from 0 to below 1", lambda value: 0 <= value < 1)
    classes = usage.shape[1]
    return (usage - share / classes < (1 - share) * threshold / classes).sum(-1)


class CategoricalInformation(NamedTuple):
    """The mutual information of data and categorical latents.

    Attributes:
        mutual_information: In nats, float64, a scalar.
        exact: Whether it is exact for these posteriors. Otherwise it is an estimate.
    """

    mutual_information: Tensor
    exact: bool


def categorical_mutual_information(
    probs: Tensor | None = None, logits: Tensor | None = None, seed: int = SEED
) -> CategoricalInformation:
    r"""Compute the mutual information of data and latents from M categorical posteriors.

    .. math::
        I = H\Bigl[\tfrac1M \sum_n q(z|x_n)\Bigr] - \frac1M \sum_n H[q(z|x_n)]
        = \frac1M \sum_n E_{q(z|x_n)} \Bigl[\log q(z|x_n) - \log \tfrac1M \sum_m q(z|x_m)\Bigr]

    with z all groups together. Up to 4096 joint classes, ``classes ** groups``, are enumerated. Beyond that it is the
    estimate of the right side at one sample of each posterior, as in :func:`~.mutual_information.mutual_information`.
    It is 0 if all posteriors are equal, and part of its sampling noise is removed. Either number refers to these M
    observations and is at most log M (the estimate, about log M). Above :math:`0.9 \log M`, read it as "at least".

    The noise is drawn on the CPU from a separate generator: the result is deterministic and the same on any device.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``.
        logits: Their logits instead, of the same shape.
        seed: Seed of the noise.

    Returns:
        Nats, and whether they are exact; NaN if M is 0.

    Raises:
        ValueError: If the posteriors have another shape, or the values are not probabilities.

    References:
        Hoffman, Johnson, "ELBO surgery: yet another way to carve up the variational evidence lower bound", 2016.

    Example::

        >>> categorical_mutual_information(torch.eye(2)[:, None])  # log 2
        CategoricalInformation(mutual_information=tensor(0.6931, dtype=torch.float64), exact=True)
    """
    check_number("seed", seed, "an integer", integer_from())
    probs = _normalised(probs, logits)
    count, groups, classes = probs.shape
    exact = classes**groups <= _JOINT_CLASSES
    if not count:
        return CategoricalInformation(probs.new_full((), math.nan), exact)
    information = _enumerated_information(probs) if exact else _sampled_information(probs, seed)
    return CategoricalInformation(information.clamp(min=0), exact)


def leave_one_out_information(probs: Tensor) -> Tensor:
    r"""Estimate an upper bound on the mutual information of data and latents from M categorical posteriors, M >= 2.

    It is the estimate at one sample of each posterior, without the sample's own component in the mixture; far too large
    where posteriors hardly overlap, and infinite if some sample is impossible under all others.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``.

    References:
        Poole et al., "On Variational Bounds of Mutual Information", ICML 2019, section 2.
    """
    return _sampled_information(_normalised(probs), SEED, leave_one_out=True)


def information_of_groups(probs: Tensor) -> Tensor:
    r"""Compute the mutual information of data and each group from M categorical posteriors.

    .. math:: \sum_g I(x; z_g) = I(x; z) + TC, \qquad TC = KL\Bigl(q(z) \,\Big\|\, \prod_g q(z_g)\Bigr)

    because the groups are independent given x.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``.

    Returns:
        Nats of these M observations, of shape ``(groups,)``.
    """
    probs = _normalised(probs)
    information: Tensor = entr(probs.mean(0)).sum(-1) - entr(probs).sum(-1).mean(0)
    return information


def information_bound_of_groups(probs: Tensor) -> Tensor:
    """Estimate an upper bound on the mutual information of data and latents: the sum of the groups' own.

    The usage of the classes is that of nine tenths of the observations and of one that is uniform, so that no class has
    none, and is tested on the last tenth: the usage of all M would make the sum too small by up to
    ``groups * (classes - 1) / 2M`` nats.

    Args:
        probs: Probabilities of the posteriors, of shape ``(M, groups, classes)``, M at least 2.

    Returns:
        A scalar, at most the logarithm of the number of joint classes.
    """
    probs = _normalised(probs)
    count, groups, classes = probs.shape
    cross_entropy = probs.new_zeros(groups)
    for tried in tenths(count, probs.device):
        usage = (probs[~tried].sum(0) + 1 / classes) / (1 + (~tried).sum())
        cross_entropy -= xlogy(probs[tried], usage).sum((0, 2))
    bound: Tensor = (cross_entropy / count).clamp(max=math.log(classes)).sum() - entr(probs).sum((1, 2)).mean()
    return bound


class ClassUsage(Metric):
    """Average each class's probability over a stream of batches, over any number of processes.

    As input to ``forward`` and ``update`` the metric accepts ``probs`` or ``logits`` of posteriors, of shape
    ``(N, groups, classes)``; N may be 0. As output of ``forward`` and ``compute`` it returns the usage, of shape
    ``(groups, classes)``, float64, NaN without observations; see :func:`perplexity` and :func:`dead_classes`.

    Args:
        groups: Number of groups.
        classes: Number of classes of each.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there is no group, there are fewer than two classes, or posteriors of another shape arrive; on
            reading, if the probabilities do not sum to 1.

    Example::

        >>> metric = ClassUsage(groups=1, classes=2)
        >>> metric.update(torch.tensor([[[1.0, 0.0]]]))
        >>> metric.update(logits=torch.zeros(1, 1, 2))
        >>> metric.compute()
        tensor([[0.7500, 0.2500]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, groups: int, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value, least in (("groups", groups, 1), ("classes", classes, 2)):
            check_number(name, value, f"at least {least}", integer_from(least))
        self.groups = groups
        self.classes = classes
        self.add_state("total", torch.zeros(groups, classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probs: Tensor | None = None, logits: Tensor | None = None) -> None:
        """Add the posteriors of a batch, without waiting for their device."""
        probs = _of_either(probs, logits).detach()
        if probs.shape[1:] != self.total.shape:
            raise ValueError(
                f"Posteriors must have shape (N, {self.groups}, {self.classes}), got {tuple(probs.shape)}."
            )
        self.total = self.total + probs.sum(0)
        self.count = self.count + len(probs)

    def compute(self) -> Tensor:
        """Return the usage."""
        if self.count:
            _check_simplex("probs", self.total / self.count)
        return _usage(self.total, self.count)


def _usage(total: Tensor, count: Tensor | int) -> Tensor:
    usage = total / count
    return usage / usage.sum(-1, keepdim=True)  # in half precision the probabilities sum to 1 only nearly


def _enumerated_information(probs: Tensor) -> Tensor:
    half = probs.shape[1] // 2  # the mean of a product of two tables is a product of matrices
    aggregate = _joint(probs[:, :half]).T @ _joint(probs[:, half:]) / len(probs)
    information: Tensor = entr(aggregate).sum() - entr(probs).sum((1, 2)).mean()
    return information


def _joint(probs: Tensor) -> Tensor:
    """Multiply the probabilities of groups, ``(M, G, C)``, to those of their joint classes, ``(M, C ** G)``."""
    joint = probs.new_ones(len(probs), 1)
    for group in probs.unbind(1):
        joint = (joint.unsqueeze(2) * group.unsqueeze(1)).flatten(1)
    return joint


def _sampled_information(probs: Tensor, seed: int, leave_one_out: bool = False) -> Tensor:
    count, groups, classes = probs.shape
    # The class with the largest ratio of probability and exponential noise is a sample.
    noise = torch.empty(probs.shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    sample = (probs / noise.to(probs.device)).argmax(-1)
    places = sample + classes * torch.arange(groups, device=probs.device)
    table = probs.log().flatten(1).T.contiguous()  # [group and class, m]: sums of its rows are fast
    terms, control = [], []
    for first in range(0, count, _ROWS):
        joint = embedding_bag(places[first : first + _ROWS], table, mode="sum")  # [n, m]: log q(z_n|x_m)
        log_own = joint.diagonal(first).clone()
        if leave_one_out:
            joint.diagonal(first).fill_(-math.inf)
        terms.append(log_own - joint.logsumexp(1) + math.log(count - leave_one_out))
        control.append(log_own + entr(probs[first : first + _ROWS]).sum((1, 2)))
    information = torch.cat(terms)
    return information.max() if information.isinf().any() else controlled_mean(information, torch.cat(control))


def _normalised(probs: Tensor | None, logits: Tensor | None = None) -> Tensor:
    """Return probabilities that sum to 1; in half precision they do only nearly."""
    probs = _probabilities(probs, logits)
    return probs / probs.sum(-1, keepdim=True)


def _probabilities(probs: Tensor | None, logits: Tensor | None) -> Tensor:
    """Return probabilities in float64, checked, which waits for their device."""
    probabilities = _of_either(probs, logits)
    _check_simplex("probs" if logits is None else "logits", probabilities)
    return probabilities


def _of_either(probs: Tensor | None, logits: Tensor | None) -> Tensor:
    if probs is not None and logits is not None:
        raise ValueError("Give `probs` or `logits`, not both.")
    name, values = ("probs", probs) if logits is None else ("logits", logits)
    if values is None:
        raise ValueError("Give `probs` or `logits`, got neither.")
    if values.ndim != 3 or values.shape[1] < 1 or values.shape[2] < 2:
        raise ValueError(
            f"`{name}` must have shape (M, groups, classes), with at least two classes, got {tuple(values.shape)}. For "
            "a single group insert its axis, `[:, None]`; `flatten(0, 1)` a batch of sequences."
        )
    return values.double() if logits is None else values.double().softmax(-1)


def _check_simplex(name: str, probs: Tensor) -> None:
    off = (probs.sum(-1) - 1).abs()
    if not ((probs >= 0).all() and (off <= _TOLERANCE).all()):
        hint = " Logits go to `logits=`." if name == "probs" else ""
        raise ValueError(
            f"`{name}` must give probabilities of at least 0 that sum to 1 over the last axis, got values down to "
            f"{float(probs.min()):.4g} and a sum that is off by {float(off.max()):.4g}.{hint}"
        )


def _check_usage(usage: Tensor) -> None:
    if usage.ndim != 2:
        raise ValueError(f"`usage` must have shape (groups, classes), got {tuple(usage.shape)}.")
    _check_simplex("usage", usage)
