"""The AUROC of a score that finds outliers."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def auroc(scores: Tensor, is_outlier: Tensor) -> Tensor:
    """Compute the area under the ROC curve of a score that is higher for outliers.

    It is the probability that an outlier has a higher score than another observation, where equal scores count half:
    1 is perfect, 0.5 is chance. For a score that is lower for outliers, such as the ELBO, pass its negative.

    Args:
        scores: The score of each observation, of shape ``(N,)``, in any unit.
        is_outlier: Whether each observation is an outlier, of shape ``(N,)``, boolean.

    Returns:
        A scalar, from 0 to 1.

    Raises:
        ValueError: If the shapes differ, a score is NaN, or there are no outliers or nothing else.

    References:
        Fawcett, "An Introduction to ROC Analysis", Pattern Recognition Letters 2006, section 7.

    Example::

        >>> import torch
        >>> auroc(torch.tensor([210.0, 250.0, 230.0, 220.0]), torch.tensor([False, True, False, True]))
        tensor(0.7500)
    """
    if scores.ndim != 1 or is_outlier.shape != scores.shape:
        raise ValueError(
            f"`scores` and `is_outlier` must have shape (N,), got {tuple(scores.shape)} and {tuple(is_outlier.shape)}."
        )
    if scores.isnan().any():
        raise ValueError(f"`scores` must be numbers, got {int(scores.isnan().sum())} NaNs of {len(scores)}.")
    outliers = int(is_outlier.sum())
    if not 0 < outliers < len(scores):
        raise ValueError(f"`is_outlier` must have both kinds, got {outliers} outliers of {len(scores)} observations.")
    # Their ranks, from 0 to 1: other numbers would be taken for logits, and a sigmoid makes most nats equal to 1.
    _, ranks = scores.unique(return_inverse=True)
    return binary_auroc(ranks.double() / len(scores), is_outlier.long(), validate_args=False)
