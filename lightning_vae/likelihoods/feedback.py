"""A warning of likelihoods that adapt to a weight of the rate."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn

from .base import Likelihood


def warn_of_feedback(beta: float, likelihood: Likelihood) -> None:
    """Warn about a beta other than 1 with a likelihood whose scale adapts.

    Below 1, a loss with a scale for each number of an observation has no minimum. Let a latent copy a number of
    variance 1 with noise of variance psi: the rate grows by 1/2 log(1/psi) while the distortion falls by as much, so
    the loss falls by (1 - beta) / 2 for each nat of log(1/psi).
    """
    if beta < 1 and likelihood.learns_each_scale:
        rank_zero_warn(
            f"`beta` is {beta:g} with a likelihood that learns a scale for each number of an observation: below 1 this "
            "loss has no minimum. A latent that copies a number lowers the distortion by more than it costs in rate, "
            "however small the scale already is, so scales fall until they reach their lower bound. Keep beta at 1 or "
            "above, or fix the scales, or share one (`variance='learned'` of the Gaussian)."
        )
    elif beta != 1 and likelihood.learns_scale:
        rank_zero_warn(
            f"`beta` is {beta:g} with a likelihood whose scale adapts: the two form a feedback loop. A larger beta "
            "worsens the reconstruction, which widens the scale, which weakens the reconstruction term again, until "
            "everything has collapsed. Fix the variance (train once at beta 1 and use its variance), or keep beta at 1."
        )
