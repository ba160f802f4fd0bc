"""Draw every schedule over one run of 1000 steps, for docs/guides/schedules.md: `python docs/plot_schedules.py`."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from lightning_vae.callbacks.schedules import Constant, Cosine, Cyclical, Join, Linear, Schedule, Sigmoid, Staged

STEPS = 1000
PANELS: dict[str, dict[str, Schedule]] = {
    "Constant": {"value 1": Constant(1.0)},
    "Linear": {"rising": Linear(stop=1.0, steps=500), "falling": Linear(start=1.0, stop=0.25, steps=500)},
    "Cosine": {"rising": Cosine(stop=1.0, steps=500), "falling": Cosine(start=1.0, stop=0.25, steps=500)},
    "Sigmoid": {f"steepness {k}": Sigmoid(stop=1.0, steps=500, steepness=k) for k in (4, 12, 40)},
    "Cyclical, 4 cycles": {
        "ratio 0.5 (Fu et al.)": Cyclical(stop=1.0, period_steps=200, cycles=4),
        "ratio 0.9, cosine": Cyclical(stop=1.0, period_steps=200, cycles=4, ratio=0.9, shape="cosine"),
    },
    "Cyclical, the sawtooth": {"ratio 1, for ever": Cyclical(stop=1.0, period_steps=200, ratio=1.0)},
    "Staged": {"0, 0.5, 1": Staged([0.0, 0.5, 1.0], at_steps=[200, 500])},
    "Join": {
        "hold, then ramp": Join([Constant(0.0, steps=250), Linear(stop=1.0, steps=250)]),
        "4 cycles of Optimus": Join(
            [Constant(0.0, steps=50), Cyclical(stop=1.0, period_steps=150, ratio=1 / 3, cycles=1)] * 4
        ),
    },
}


def main() -> None:
    """Write images/schedules.png."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for axis, (title, schedules) in zip(axes.flat, PANELS.items(), strict=True):
        for style, (label, schedule) in zip(("-", "--", ":"), schedules.items(), strict=False):
            axis.plot([schedule(step) for step in range(STEPS)], style, label=label)
        axis.set(title=title, ylim=(-0.05, 1.6), yticks=[0, 0.25, 0.5, 0.75, 1])
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", fontsize=8, frameon=False)
    figure.supxlabel("step")
    figure.supylabel("beta")
    figure.savefig(Path(__file__).parent / "images" / "schedules.png", dpi=80)


if __name__ == "__main__":
    main()
