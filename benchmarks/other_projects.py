"""Check the callbacks in other, unmodified projects."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = {"scvi-tools": "1.4.2", "disent": "0.8.0", "lightning-uq-box": "0.2.0"}
VERSIONS |= {"hvae-backbone": "0.1.126", "diffusers": "0.42.1"}
PROJECTS = ("scvi-tools", "disent", "lightning-uq-box")
MODELS = {  # by the name of their script
    "prob-unet": "lightning-uq-box",
    "sysvi": "scvi-tools",
    "hvae-backbone": "hvae-backbone",
    "diffusers": "diffusers",
}
WIDTHS = (22, 11, 19, 22, 19, 9, 22)
NAMES = (
    "project",
    "step 0, f64",
    "step 0, f32 (noise)",
    "schedule",
    "validation",
    "variances",
    "at mean 100",
)
COMPARED = (
    "Each project is installed unmodified from the registry beside this checkout, runs its example of "
    "docs/guides/drop_in.md, and is then trained in its own loop.",
    "Step 0: the relative error of loss(w) - loss(0) = w KL, w = 0.5, in the first step of two fits of one seed, in "
    "float64 and float32. The KL is what DistributionReader reads, reduced as the project reduces. In brackets the "
    "bound on rounding, 4 eps (|loss| + w terms) / (w KL), and 1e-5 is allowed besides.",
    "Schedule: the weight that the loss received, in every step of a fit with validation after each epoch and of one "
    "resumed halfway; the largest deviation from the formula, relative to the target. Validation: how many of its "
    "batches saw the target.",
    "Variances: CollapseDetector's of the posterior means against two passes in float64 over the outputs of the mean "
    "head in the same validation; the largest relative error of a dimension. At mean 100: the same with the head "
    "rescaled, to the mean and variance in brackets.",
)

WRITERS = (
    "The project's own schedule of the weight is left on. Loss: the largest deviation of the weight that the loss "
    "received in a step from the one that the callback logged (EnforcedFreeBits: read), relative to the target. "
    "Validation: how many of its batches saw the target. Said: a wrong weight has to be reported, and nothing else; "
    "the texts follow."
)
WRITER_NAMES = ("project", "callback", "weight at", "loss", "validation", "said")
WRITER_WIDTHS = (22, 16, 34, 7, 10, 8)

RATES = (
    "Other priors and latents. KL: the module's own in the last of three passes over the validation data, in nats per "
    "observation. The three columns after it are the largest relative errors of the measured rate, in float64: by "
    "CollapseDetector for a pass over the validation data and, in a run without them, over a training epoch; by "
    "TargetRate in each training step. Each averages the observations that the KL does, and where that is an estimate "
    "also the same samples.",
    "Trace: none if parameters and random state after a fit equal, to the bit, those of a fit without the detector.",
    "Training step, validation step: median without callbacks, and the ratio of the medians with KLAnnealing and "
    "CollapseDetector to that, in fits that take turns.",
)
RATE_WIDTHS = (32, 8, 10, 8, 8, 5, 15, 15)
RATE_NAMES = ("project", "KL", "validation", "training", "steps", "trace", "training step", "validation step")


def environment(folder: Path, project: str) -> Path:
    """Create or update the virtual environment of a project, and return its Python."""
    python = folder / project / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / project], check=True)
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*install, "--editable", HERE.parent, f"{project}=={VERSIONS[project]}"], check=True)
    return python


def check(python: Path, script: str) -> dict[str, Any]:
    """Run a script in its project's environment, and return what it measured."""
    path = HERE / "other_projects" / f"with_{script.replace('-', '_')}.py"
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([python, path], cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script}:\n{done.stdout}\n{done.stderr}")
    # The report of the first batch goes to stderr, among the progress bars.
    report = re.search(r"KLAnnealing\(.*(\n  .*)*", done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "report": report and report[0]}


def row(cells: tuple[object, ...], widths: tuple[int, ...] = WIDTHS) -> None:
    print("| " + " | ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def check_weights(folder: Path, projects: list[str]) -> bool:
    """Print the tables of the callbacks that write the weight; return whether all is right."""
    print("\n".join(textwrap.fill(line, 110) for line in COMPARED), end="\n\n")
    row(NAMES)
    row(tuple("-" * width for width in WIDTHS))
    ok, reports, conflicts = True, {}, []
    for project in projects:
        measured = check(environment(folder, project), project)
        row((f"{project} {VERSIONS[project]}", *measured["cells"]))
        ok = ok and measured["ok"]
        reports[project] = measured["report"]
        conflicts += [(project, each) for each in measured["conflicts"]]
    print(f"\n{textwrap.fill(WRITERS, 110)}\n")
    row(WRITER_NAMES, WRITER_WIDTHS)
    row(tuple("-" * width for width in WRITER_WIDTHS), WRITER_WIDTHS)
    for project, each in conflicts:
        row((project, *each["cells"]), WRITER_WIDTHS)
    for project, each in conflicts:
        for text in each["said"]:
            print(f"\n{project}, weight at {each['cells'][1] or 'no place'}: {' '.join(text.split())}")
    for project, report in reports.items():
        print(f"\nThe example of {project}: {report or 'no report of the first batch'}")
    return ok


def check_rates(folder: Path, models: list[str]) -> bool:
    """Print the table of the rates; return whether all is right."""
    print("\n" + "\n".join(textwrap.fill(line, 110) for line in RATES), end="\n\n")
    row(RATE_NAMES, RATE_WIDTHS)
    row(tuple("-" * width for width in RATE_WIDTHS), RATE_WIDTHS)
    ok, told = True, []
    for model in models:
        package = MODELS[model]
        measured = check(environment(folder, package), model)
        row((f"{model} ({package} {VERSIONS[package]})", *measured["cells"]), RATE_WIDTHS)
        ok = ok and measured["ok"]
        told += measured["told"]
    print("", *told, sep="\n")
    return ok


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, help="folder to keep the virtual environments in (6 GB each)")
    parser.add_argument("--only", choices=[*PROJECTS, *MODELS], help="one of the projects")
    options = parser.parse_args()
    projects, models = ([each for each in some if options.only in (None, each)] for some in (PROJECTS, MODELS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.environments or Path(scratch)).resolve()
        ok = not projects or check_weights(folder, projects)
        ok = (not models or check_rates(folder, models)) and ok
    sys.exit(not ok)


if __name__ == "__main__":
    main()
