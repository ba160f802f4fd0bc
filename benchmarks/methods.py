"""What the knobs do on digits: a plain VAE, schedules, floors and other betas, each with the command that trains it."""

from __future__ import annotations

import tempfile
from statistics import median

from runs import SEEDS, Result, fit, header, heading, row

SCHEDULE = "--trainer.callbacks.schedule"
KL = f"--trainer.callbacks+=KLAnnealing {SCHEDULE}"
FLOOR = "--trainer.callbacks+=FreeBits --trainer.callbacks.threshold"
METHODS = {
    "plain": "",
    "annealed": f"{KL}=Linear {SCHEDULE}.fraction=0.3",
    "cyclical": f"{KL}=Cyclical {SCHEDULE}.period_fraction=0.15 {SCHEDULE}.cycles=4",
    "free bits 0.05": f"{FLOOR}=0.05",
    "free bits 0.1": f"{FLOOR}=0.1",
    "free bits 0.5": f"{FLOOR}=0.5",
    "free bits 2": f"{FLOOR}=2",
    "beta 0.1": "--model.beta=0.1",
    "beta 10": "--model.beta=10",
}
BASE = "--config configs/digits.yaml --trainer.callbacks=CollapseDetector"
# What does not move the figures: one validation pass, at the end, and no logs.
SHORT = "--trainer.check_val_every_n_epoch=120 --trainer.max_epochs=120 --trainer.logger=false"
WIDTHS = (14, 6, 17, 6, 10, 6, 6, 9)


def main() -> None:
    heading(
        "Methods. Scikit-learn's digits (1350 to train, 150 to validate), Bernoulli, 16 latents, MLP 256-256, 120 "
        "epochs; medians over seeds 0, 1, 2 of the validation split after the last epoch, in nats per image; `active` "
        "counts units, MI is capped at log 150 = 5.01. The runs:",
        f"python train.py fit {BASE} --seed_everything SEED, and",
        *(f"  {name:<14} {arguments}" for name, arguments in METHODS.items()),
    )
    header(("method", "-ELBO", "by seed", "rate", "distortion", "MI", "active", "state"), WIDTHS)
    for name, arguments in METHODS.items():
        with tempfile.TemporaryDirectory() as folder:
            short = f"{SHORT} --trainer.default_root_dir={folder}"
            results = [fit(f"{BASE} {arguments} {short}", seed) for seed in SEEDS]
        middle = Result(*(median(column) for column in list(zip(*results, strict=True))[:-1]), state="")
        states = "/".join(sorted({result.state for result in results}))
        seeds = " ".join(f"{result.negative_elbo:.2f}" for result in results)
        cells = (middle.negative_elbo, seeds, middle.rate, middle.distortion, middle.mutual_information)
        row((name, *cells, int(middle.active_units), states), WIDTHS)


if __name__ == "__main__":
    main()
