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
PROJECTS = {"scvi-tools": "1.4.2", "disent": "0.8.0", "lightning-uq-box": "0.2.0"}
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


def environment(folder: Path, project: str, version: str) -> Path:
    """Create or update the virtual environment of a project, and return its Python."""
    python = folder / project / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / project], check=True)
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*install, "--editable", HERE.parent, f"{project}=={version}"], check=True)
    return python


def check(python: Path, project: str) -> dict[str, Any]:
    """Run the checks of a project in its environment."""
    script = HERE / "other_projects" / f"with_{project.replace('-', '_')}.py"
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([python, script], cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{project}:\n{done.stdout}\n{done.stderr}")
    # The report of the first batch goes to stderr, among the progress bars.
    report = re.search(r"KLAnnealing\(.*(\n  .*)*", done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "report": report and report[0]}


def row(cells: tuple[object, ...], widths: tuple[int, ...] = WIDTHS) -> None:
    print("| " + " | ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, help="folder to keep the virtual environments in (6 GB each)")
    parser.add_argument("--only", choices=PROJECTS, help="one of the projects")
    options = parser.parse_args()
    print("\n".join(textwrap.fill(line, 110) for line in COMPARED), end="\n\n")
    row(NAMES)
    row(tuple("-" * width for width in WIDTHS))
    ok, reports, conflicts = True, {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.environments or Path(scratch)).resolve()
        for project, version in PROJECTS.items():
            if options.only in (None, project):
                measured = check(environment(folder, project, version), project)
                row((f"{project} {version}", *measured["cells"]))
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
    sys.exit(not ok)


if __name__ == "__main__":
    main()
