"""Probes of a trained model: distances of decoded latents to the data, and labels predicted from posterior means.

Pure functions of tensors. Each leaves out the observation itself, so no second split is needed.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..checks import check_number, integer_from, is_positive


def nearest_distance(points: Tensor, data: Tensor, excluded: Tensor, rows: int = 256) -> Tensor:
    """Compute the Euclidean distance from each point to the nearest of the data, with some of the data excluded.

    Args:
        points: Of shape ``(N, d)``.
        data: Of shape ``(M, d)``.
        excluded: Positions in ``data`` that are excluded for each point, int64, of shape ``(N, e)``.
        rows: Number of points compared at a time: memory is ``rows * M`` numbers.

    Returns:
        In the data's unit, of shape ``(N,)``.

    Raises:
        ValueError: If the shapes are not these.
    """
    check_number("rows", rows, "an integer of at least 1", integer_from(1))
    shapes = [tuple(each.shape) for each in (points, data, excluded)]
    is_table = all(len(shape) == 2 for shape in shapes)
    if not is_table or points.shape[1] != data.shape[1] or len(points) != len(excluded) or not len(data):
        raise ValueError(
            "`points`, `data` and `excluded` must have shapes (N, d), (M, d) and (N, e), M at least 1, got "
            f"{', '.join(map(str, shapes))}."
        )
    nearest = []
    for part, hidden in zip(points.split(rows), excluded.split(rows), strict=True):
        distances = torch.cdist(part, data)
        nearest.append(distances.scatter(1, hidden, torch.inf).amin(dim=1))
    return torch.cat(nearest)


def knn_accuracy(means: Tensor, labels: Tensor, neighbours: int = 5) -> float:
    """Classify each observation by a majority vote of its nearest neighbours; a tie goes to the smallest label.

    Args:
        means: Posterior means, of shape ``(N, k)``, N greater than ``neighbours``.
        labels: Classes, int64, of shape ``(N,)``.
        neighbours: Number of neighbours that vote.

    Returns:
        Share of observations that are given their own label.

    Raises:
        ValueError: If there is not one class for each of the means, or there are too few observations.
    """
    _check(means, labels)
    allowed = f"from 1 to {len(means) - 1} for {len(means)} means"
    check_number("neighbours", neighbours, allowed, lambda number: 1 <= operator.index(number) < len(means))
    labels = labels.unique(return_inverse=True)[1]
    right = []
    for rows in torch.arange(len(means), device=means.device).split(256):
        distances = torch.cdist(means[rows], means).scatter(1, rows[:, None], torch.inf)
        votes = F.one_hot(labels[distances.topk(neighbours, largest=False).indices]).sum(dim=1)
        right.append(votes.argmax(dim=1) == labels[rows])
    return float(torch.cat(right).double().mean())


def linear_probe_accuracy(means: Tensor, labels: Tensor, ridge: float = 1.0) -> float:
    r"""Classify each observation by ridge regression on the others: by the largest of the predicted indicators.

    With :math:`H = X (X^T X + \alpha I)^{-1} X^T` of the means and an intercept (not penalised), the prediction for
    observation i without it is :math:`(\hat y_i - H_{ii} y_i) / (1 - H_{ii})`: a single fit leaves each out in turn.

    Args:
        means: Posterior means, of shape ``(N, k)``.
        labels: Classes, int64, of shape ``(N,)``.
        ridge: Penalty alpha on the squared weights.

    Returns:
        Share of observations that get their own label.

    Raises:
        ValueError: If there is not one class for each of the means, or the penalty is not positive.
    """
    _check(means, labels)
    check_number("ridge", ridge, "positive", is_positive)
    labels = labels.unique(return_inverse=True)[1]
    predicted = _left_out(means, F.one_hot(labels).double(), ridge)
    return float((predicted.argmax(dim=1) == labels).double().mean())


def linear_probe_r2(means: Tensor, targets: Tensor, ridge: float = 1.0) -> float:
    r"""Predict numbers of each observation by ridge regression on the others, as :func:`linear_probe_accuracy` does.

    Of the condition of a conditional model it is the part that the latents hold a second time.

    Args:
        means: Posterior means, of shape ``(N, k)``.
        targets: Numbers, of shape ``(N, columns)``.
        ridge: Penalty alpha on the squared weights.

    Returns:
        Share of the targets' variance that is predicted, :math:`1 - \sum (y - \hat y)^2 / \sum (y - ar y)^2`, over
        all columns together: at most 1, and 0 or slightly below if the means say nothing. NaN if the targets are
        constant.

    Raises:
        ValueError: If there is not one row of targets for each of the means, or the penalty is not positive.
    """
    if means.ndim != 2 or targets.ndim != 2 or len(means) != len(targets) or len(means) < 2:
        raise ValueError(
            "`means` and `targets` must have shapes (N, k) and (N, columns) of at least 2 observations, got "
            f"{tuple(means.shape)} and {tuple(targets.shape)}."
        )
    check_number("ridge", ridge, "positive", is_positive)
    targets = targets.double()
    spread = (targets - targets.mean(dim=0)).square().sum()
    error = (targets - _left_out(means, targets, ridge)).square().sum()
    return float(1 - error / spread) if spread > 0 else math.nan


def _left_out(means: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Predict the targets of each observation by ridge regression on the other observations."""
    inputs = torch.cat([torch.ones_like(means[:, :1]), means], dim=1).double()
    penalty = torch.full_like(inputs[0], ridge)
    penalty[0] = 0
    solved = torch.linalg.solve(inputs.T @ inputs + penalty.diag(), inputs.T)
    leverage = (inputs * solved.T).sum(dim=1, keepdim=True)  # the diagonal of H
    predicted: Tensor = (inputs @ (solved @ targets) - leverage * targets) / (1 - leverage)
    return predicted


def _check(means: Tensor, labels: Tensor) -> None:
    """Refuse means and labels that are not one row and one class for each observation."""
    if means.ndim != 2 or labels.shape != means.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            "`means` must have shape (N, k), and `labels` must be integers of shape (N,), got "
            f"{tuple(means.shape)} and {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if len(means) < 2:
        raise ValueError(f"`means` must be those of at least 2 observations, got {len(means)}.")
