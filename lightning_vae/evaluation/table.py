"""The table that ``test`` prints."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import Evaluation

_FEW = 10  # effective samples, below which the NLL depends on their number


def evaluation_table(result: Evaluation) -> str:
    """Lay an evaluation out as a readable table with the diagnosis below it."""
    cap = f"log M = {math.log(max(result.mutual_information_observations, 1)):.2f}"
    saturated = result.mutual_information_saturated
    pruned = result.latent_dim - result.active_units
    few = ": more would lower it" if result.effective_sample_size < min(_FEW, result.importance_samples / 2) else ""
    sections: dict[str, list[tuple[str, str, str]]] = {
        "likelihood, nats per observation": [
            ("ELBO", _number(result.elbo), ""),
            ("rate", _number(result.rate), f"beta {result.beta:g}"),
            ("distortion", _number(result.distortion), ""),
            (
                "NLL",
                f"{_number(result.nll)} +- {_number(result.nll_error)}",
                f"{result.importance_samples} importance samples, {result.effective_sample_size:.1f} effective{few}",
            ),
            ("NLL, active units only", _number(result.nll_active_only), f"{pruned} inactive ones removed"),
        ],
        "latent space": [
            ("active units", f"{result.active_units} of {result.latent_dim}", ""),
            (
                "mutual information",
                f">= {cap}" if saturated else _number(result.mutual_information),
                "saturated: more observations would show more"
                if saturated
                else f"bounds {_number(result.mutual_information_lower)}, {_number(result.mutual_information_upper)}",
            ),
            ("marginal KL", f"{'>= ' if saturated else ''}{_number(result.marginal_kl)}", "0: as the prior"),
            (
                "total correlation",
                f"{'~ ' if saturated else ''}{_number(result.total_correlation)}",
                "of a Gaussian with the same moments" if saturated else "0: independent",
            ),
            ("aggregate mean squared", _number(result.aggregate_mean_square), "prior 0"),
            ("aggregate variance", _number(result.aggregate_variance_mean), "prior 1"),
            ("posterior width", _number(result.posterior_width), "of active units; prior 1"),
            (
                "price of a nat of rate",
                "-" if math.isnan(result.rate_price) else f"{_number(result.rate_price)} +- {result.price_error:.1g}",
                "nats of distortion; the ELBO pays 1",
            ),
        ],
        "decoder": [
            ("z shuffled", f"{result.shuffled_gap:+.4g}", "nats of distortion; 0: z is not read"),
            ("error / claimed variance", _number(result.calibration), "1: calibrated"),
            ("prior samples", _number(result.sample_distance), "distance to the data; reconstructions 1"),
            ("interpolations", _number(result.interpolation_distance), "distance to the data; reconstructions 1"),
        ],
        "labels, from posterior means": [
            ("5 nearest neighbours", _number(result.knn_accuracy), "accuracy"),
            ("linear probe", _number(result.linear_probe_accuracy), "accuracy"),
        ],
        "own": [(name, _number(value), "") for name, value in result.own.items()],
    }
    lines = [f"{result.observations} observations"]
    for title, rows in sections.items():
        shown = [row for row in rows if row[1] != "-"]
        if shown:
            lines += ["", title, *(f"  {name:<26}{value:<20}{remark}".rstrip() for name, value, remark in shown)]
    lines += ["", f"Diagnosis: {result.diagnosis}"]
    for text in (*result.symptoms, f"-> {result.advice}"):
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
