"""Train models that collapse, and the same models with a cure: the commands of configs/collapse*.yaml."""

from __future__ import annotations

import argparse
from statistics import median

from runs import SEEDS, Result, fit, header, heading, row

VARIANCE = "--config configs/collapse_variance.yaml"
ANNEALED = "--config configs/overlays/annealed.yaml"
RUNS = {
    "plain": "--config configs/collapse.yaml",
    "annealed": f"--config configs/collapse.yaml {ANNEALED}",
    "free_bits": "--config configs/collapse.yaml --config configs/overlays/free_bits.yaml",
    "variance_1": VARIANCE,
    "variance_1_annealed": f"{VARIANCE} {ANNEALED}",
    "learned_variance": f"{VARIANCE} --model.likelihood.variance learned",
}
CURES = (("plain", "annealed"), ("plain", "free_bits"), ("variance_1", "learned_variance"))
WIDTHS = (19, 4, 6, 5, 5, 6, 9)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    heading(
        "Collapse and cure. Scikit-learn's digits (1350 to train, 150 to validate), seeds 0, 1, 2; the validation "
        "split after the last epoch, in nats per image; `active` counts units, MI is capped at log 150 = 5.01. Every "
        "knob is at its target for the last 30 % of the run. The last three runs have a Gaussian likelihood, the "
        "others a Bernoulli. The runs, whose curves are in logs/collapse:",
        *(f"  {name:<20} python train.py fit {arguments}" for name, arguments in RUNS.items()),
    )
    header(("run", "seed", "-ELBO", "rate", "MI", "active", "state"), WIDTHS)
    results: dict[str, list[Result]] = {}
    for name, arguments in RUNS.items():
        for seed in SEEDS:
            result = fit(f"{arguments} --trainer.logger.name collapse/{name}", seed)
            results.setdefault(name, []).append(result)
            cells = (result.negative_elbo, result.rate, result.mutual_information, int(result.active_units))
            row((name, seed, *cells, result.state), WIDTHS)

    print("\nEach seed's cure against its collapse:")
    for collapsed, cured in CURES:
        pairs = list(zip(results[collapsed], results[cured], strict=True))
        gains = [before.negative_elbo - after.negative_elbo for before, after in pairs]
        informed = [after.mutual_information for _, after in pairs]
        print(
            f"  {cured} after {collapsed}: -ELBO lower by {min(gains):.2f} at least (median {median(gains):.2f}), "
            f"MI {min(informed):.2f} at least"
        )


if __name__ == "__main__":
    main()
