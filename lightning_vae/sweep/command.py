"""``sweep``: train and evaluate a grid of runs, and compare them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ..datamodules import Gaussian as GaussianData
from ..estimators.closed_forms import shannon_distortion
from ..evaluation import figures
from ..likelihoods import Gaussian
from ..vae import VAE
from . import plan, tables
from .plan import BETA, Point
from .runner import Jobs, duration, evaluation
from .tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TERMS = ("ELBO", "rate", "distortion")
_EVALUATION = ("importance_samples", "observations", "samples")
_PRINTED = ("elbo", "rate", "distortion", "nll", "active_units", "above_shannon")
_PLAIN = int | float | str | bool  # what TensorBoard takes for an option
_SHOWN = 16  # latent spaces in a picture
_DESCRIPTION = """\
Train and evaluate every combination of the given lists, one process a point, and compare them: a table, means over
seeds, the rate-distortion curve, and the latent spaces side by side. What is done is not done again: give the same
command once more to go on, or with more values. Options that are not listed here go to each `fit`, such as
`--trainer.max_epochs 5`.
"""


def sweep(arguments: Sequence[str]) -> None:
    """Run the sweep that a command line asks for.

    Args:
        arguments: The command line behind ``sweep``.
    """
    options, rest = _parser().parse_known_args(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is as good as Ctrl-C
    try:
        _sweep(options, rest)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _sweep(options: argparse.Namespace, rest: Sequence[str]) -> None:
    base = Path(options.folder) / (options.name or _default_name(options))
    jobs = Jobs(options.jobs)
    try:
        bases, betas = _bases(options, rest, base)
        planned = [plan.existing(path, base) for path in options.checkpoints]
        references = [each.reference for each in bases if each.reference is not None]
        if options.print_commands and any(reference.checkpoint is None for reference in references):
            print("# These learn the variance that all betas get. Give this command again when they are done.")
            _print_commands(references)
            return
        if references and not options.print_commands:
            _make(base)
            _train_references(references, jobs)
        planned += _points(bases, betas, options.seeds, rest, base)
        planned = [replace(point, evaluated_by=_evaluation(options)) for point in planned]
    except ValueError as error:
        _exit(error)
    if options.print_commands:
        _print_commands(planned)
        return
    _make(base)
    failed = _run(planned, jobs, base)
    finished = [point for point in planned if point.evaluation.is_file()]
    if finished:
        _report(finished, base, options.projection)
    if failed:
        print(f"\n{len(failed)} of {len(planned)} points failed; the same command tries them again.", file=sys.stderr)
        raise SystemExit(1)


def _make(base: Path) -> None:
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _exit(f"`--folder`, `--name`: {base} can't be made: {error.strerror}.")


# ---- what is asked for


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _exit(f"{message}\nAll options: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{Path(sys.argv[0]).name} sweep",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE",
        help="Config to compare, or several with one --config each. `a.yaml+b.yaml` lays b over a.")  # fmt: skip
    add("--betas", type=_list, metavar="LIST", help='Betas, such as "[0.1, 1, 10]".')
    add("--vary", type=_varied, action="append", default=[], metavar="OPTION=LIST",
        help='Values of any option of `fit`, such as model.latent_dim="[2, 8, 32]". Repeatable: a grid.')  # fmt: skip
    add("--seeds", type=_list, metavar="LIST", help='Seeds, such as "[0, 1, 2]"; by default the config\'s own.')
    add("--checkpoints", nargs="+", default=[], metavar="FILE", help="Checkpoints of earlier runs to compare with.")
    add("--jobs", type=_positive, default=1, metavar="N", help="Processes at once; they share the threads.")
    add("--name", help="Name of the sweep; by default that of its configs.")
    add("--folder", default="sweeps", help="Folder that the sweep's folder is made in.")
    add("--projection", choices=("pca", "tsne"), default="pca", help="How latents of more than 2 dimensions are shown.")
    for name in _EVALUATION:
        add(f"--evaluation.{name}", type=_positive, metavar="N", help="As of `test`, for every point.")
    add("--print_commands", action="store_true",
        help="Print the `fit` commands of what is not trained yet, for a cluster's scheduler, and run nothing. When "
        "they are done, the same command without this evaluates and compares them.")  # fmt: skip
    return parser


def _evaluation(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the arguments that every point's ``test`` gets."""
    given = {name: getattr(options, f"evaluation.{name}") for name in _EVALUATION}
    return tuple(f"--evaluation.{name}={value}" for name, value in given.items() if value is not None)


def _list(text: str) -> list[Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    values = values if isinstance(values, list) else [values]
    if not values or None in values:
        raise argparse.ArgumentTypeError(f"must be a list such as [1, 2], got {text!r}")
    return [_number(value) for value in values]


def _number(value: Any) -> Any:
    """Read what YAML 1.1 takes for text, such as 1e-3."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _varied(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise argparse.ArgumentTypeError(f'must be OPTION=LIST such as model.latent_dim="[2, 8]", got {text!r}')
    return name, _list(values)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _default_name(options: argparse.Namespace) -> str:
    stems = ["+".join(Path(path).stem for path in files.split("+")) for files in options.config]
    return "-".join(dict.fromkeys(stems)) or "checkpoints"


class _Base(NamedTuple):
    """A config with all that the sweep varies but beta and the seed."""

    files: str
    options: dict[str, Any]
    reference: Point | None
    """The run at beta 1 whose learned variance all betas get."""


def _bases(options: argparse.Namespace, rest: Sequence[str], base: Path) -> tuple[list[_Base], list[Any]]:
    """Lay out what is trained at each of the betas, and list the betas (none, where they are the configs' own)."""
    if not options.config and not options.checkpoints:
        raise ValueError("`sweep` needs `--config` or `--checkpoints`: there is nothing to figures.")
    if any(
        not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32 for seed in options.seeds or []
    ):
        raise ValueError(f"`--seeds` must be whole numbers from 0 to {2**32 - 1}, got {options.seeds}.")
    varied = dict(options.vary)
    if len(varied) < len(options.vary):
        raise ValueError("`--vary` names an option twice. Give all its values in one list.")
    if "seed_everything" in varied:
        raise ValueError("`--vary seed_everything` would take seeds for configurations. Give them as `--seeds`.")
    if options.betas and BETA in varied:
        raise ValueError("`--betas` and `--vary model.beta` are the same. Give one of them.")
    betas = options.betas or varied.pop(BETA, [])
    bases = []
    for files in options.config:
        for choice in plan.grid(varied):
            reference = None
            if len(betas) > 1:
                configuration, model = _configure(files, {**choice, BETA: 1}, rest)
                if isinstance(model.likelihood, Gaussian) and model.likelihood.learns_scale:
                    reference = plan.points(configuration, options.seeds, base)[0]
                elif model.likelihood.learns_scale:
                    print(
                        f"Note: {configuration.name}: the scale of {type(model.likelihood).__name__} can't be fixed. "
                        "It differs from beta to beta, and the distortions with it."
                    )
            bases.append(_Base(files, choice, reference))
    return bases, betas


def _points(
    bases: Sequence[_Base], betas: Sequence[Any], seeds: Sequence[int] | None, rest: Sequence[str], base: Path
) -> list[Point]:
    """Lay out the runs, once the reference runs are done."""
    planned: list[Point] = []
    for each in bases:
        fixed = list(rest)
        if each.reference is not None:
            fixed = plan.with_variance(rest, _learned_variance(each.reference))
        for choice in plan.grid({BETA: betas} if betas else {}):
            configuration, _ = _configure(each.files, {**each.options, **choice}, fixed)
            planned += plan.points(configuration, seeds, base)
    return list({point.folder: point for point in planned}.values())  # a config given twice is one


def _configure(files: str, options: Mapping[str, Any], rest: Sequence[str]) -> tuple[plan.Configuration, VAE]:
    """Resolve a config. An option that ``fit`` refuses may have been meant for the sweep."""
    try:
        return plan.configure(files, options, rest)
    except SystemExit:
        if rest:
            print(f"Options of the sweep itself: {_parser().prog} --help", file=sys.stderr)
        raise


def _learned_variance(reference: Point) -> float:
    """Read the variance that a reference run has learned, in the digits that a config is given."""
    assert reference.checkpoint is not None
    likelihood = VAE.load_from_checkpoint(reference.checkpoint, map_location="cpu", weights_only=True).likelihood
    assert isinstance(likelihood, Gaussian)
    return float(f"{likelihood.log_variance.detach().clamp(min=likelihood.min_log_variance).exp().item():.6g}")


# ---- what is done


def _train_references(references: Sequence[Point], jobs: Jobs) -> None:
    """Train what the fixed variances come from, and say which they are."""
    untrained = [reference for reference in references if reference.checkpoint is None]
    if untrained:
        print("A learned variance would differ from beta to beta. It is learned at beta 1 first, and fixed there:")
        if jobs.run(untrained, lambda point: _fitted(jobs, point)):
            _exit("without the learned variance the betas can't be compared.")
    for reference in references:
        print(f"The variance at every beta is what {reference.label} has learned: {_learned_variance(reference):.6g}")


def _fitted(jobs: Jobs, point: Point) -> str:
    jobs.fit(point)
    return "trained"


def _run(planned: Sequence[Point], jobs: Jobs, base: Path) -> list[Point]:
    """Train and evaluate what is not done; return what failed."""
    missing = [point for point in planned if not point.evaluation.is_file()]
    threads = f"{jobs.threads} thread{'s' * (jobs.threads > 1)} each"
    print(f"{base}: {len(planned)} points, {len(planned) - len(missing)} done already; {jobs.jobs} at once, {threads}")

    def work(point: Point) -> str:
        start = time.monotonic()
        if point.trained is None:
            jobs.fit(point)
        found = jobs.evaluate(point)
        terms = ", ".join(f"{name} {found[name.lower()]:.4g}" for name in _TERMS if name.lower() in found)
        return f"{terms} nats ({duration(time.monotonic() - start)})"

    return jobs.run(missing, work)


def _print_commands(planned: Sequence[Point]) -> None:
    """Print the commands that a scheduler may run in any order, on any machine that sees this folder."""
    for point in planned:
        if point.checkpoint is None:
            print(shlex.join(["python", "-m", "lightning_vae", *point.fit()]))


# ---- what is left


def _report(planned: Sequence[Point], base: Path, projection: figures.Projection) -> None:
    """Write the tables and the figures, and say where they are."""
    rows: list[Row] = []
    shown: dict[str, dict[str, VAE]] = {}  # by data set
    sources: dict[str, LightningDataModule] = {}
    several = len({point.configuration.name for point in planned if point.configuration}) > 1
    data_of: dict[str, tuple[str, LightningDataModule]] = {}
    for point in planned:
        group = point.configuration.digest if point.configuration else point.folder.name
        first = group not in data_of
        if first:
            data_of[group] = plan.data_of(point.run / "config.yaml")
        identity, data = data_of[group]
        assert point.checkpoint is not None
        model = VAE.load_from_checkpoint(point.checkpoint, map_location="cpu", weights_only=True)
        rows.append(tables.row(point, evaluation(point), model, data))
        if first:
            sources.setdefault(identity, data)
            shown.setdefault(identity, {})[_caption(point, rows[-1], several)] = model

    means = tables.summary(rows)
    tables.write(base / "results.csv", rows)
    tables.write(base / "summary.csv", means)
    drawn = {"rate_distortion": figures.rate_distortion(_curves(planned, means), _bound(rows, sources.values()))}
    for number, (identity, models) in enumerate(shown.items()):
        data = sources[identity]
        data.prepare_data()
        data.setup("test")
        some = dict(_spread(list(models.items()), _SHOWN))
        if len(some) < len(models):
            print(f"Of {len(models)} latent spaces {len(some)} are shown.")
        name = "latents" if len(shown) == 1 else f"latents_{number}"
        drawn[name] = figures.compare_latents(some, data.test_dataloader(), projection=projection)
    for name, figure in drawn.items():
        figure.savefig(base / f"{name}.png", dpi=150)
    _to_tensorboard(rows, drawn, base)
    print()
    print(_table(means))
    lines = {
        "Tables": f"{base}/results.csv, {base}/summary.csv",
        "Figures": ", ".join(f"{base}/{n}.png" for n in drawn),
    }
    lines["Compare"] = f"tensorboard --logdir {base}/comparison"
    lines["Curves"] = f"tensorboard --logdir {base}"
    print("\n" + "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items()))


def _caption(point: Point, row: Row, several: bool) -> str:
    """Name a latent space in the picture: what sets it apart, and what was measured."""
    if point.configuration is None:
        name = os.path.relpath(point.run)
    else:
        varied = [f"{option} {value}" for option, value in point.configuration.varied.items()]
        name = ", ".join(([point.configuration.name] if several or not varied else []) + varied)
    measured = f"rate {row['rate']:.3g} nats" if "rate" in row else ""
    if row.get("active_units") is not None:
        measured += f", {row['active_units']:.0f} active"
    return f"{name}\n{measured}"


def _spread(items: Sequence[Any], number: int) -> list[Any]:
    """Pick a number of items, evenly from the first to the last."""
    if len(items) <= number:
        return list(items)
    return [items[round(place * (len(items) - 1) / (number - 1))] for place in range(number)]


def _curves(planned: Sequence[Point], means: Sequence[Row]) -> dict[str, list[figures.CurvePoint]]:
    """Join the points that differ in beta alone."""
    configurations = {point.configuration.digest: point.configuration for point in planned if point.configuration}
    curves: dict[str, list[figures.CurvePoint]] = {}
    for row in means:
        if "rate_mean" not in row or "distortion_mean" not in row:
            continue
        configuration = configurations.get(row["config_hash"])
        name, note = row["config"], ""
        if configuration is not None:
            options = dict(configuration.options)
            note = f"\u03b2 {options.pop(BETA):g}" if BETA in options else ""
            name = replace(configuration, options=options).label
        point = figures.CurvePoint(
            rate=row["rate_mean"],
            distortion=row["distortion_mean"],
            rate_spread=row["rate_std"] or 0.0,
            distortion_spread=row["distortion_std"] or 0.0,
            note=note,
        )
        curves.setdefault(name, []).append(point)
    return curves


def _bound(rows: Sequence[Row], sources: Iterable[LightningDataModule]) -> tuple[list[float], list[float]] | None:
    """Compute Shannon's curve where there is one: Gaussian data, and one fixed variance."""
    spectra = {data.eigenvalues if isinstance(data, GaussianData) else None for data in sources}
    variances = {row.get("variance") for row in rows}
    (spectrum, *other_data), (variance, *other_variances) = spectra, variances
    if spectrum is None or variance is None or other_data or other_variances:
        return None
    rates = torch.linspace(0, 1.05 * max(row["rate"] for row in rows), 200).tolist()
    return rates, [shannon_distortion(spectrum, variance, rate) for rate in rates]


def _to_tensorboard(rows: Sequence[Row], figures: Mapping[str, Figure], base: Path) -> None:
    """Write the figures, and each point's options and results under HParams, in place of those of the time before."""
    folder = base / "comparison"
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(f"sweep/{name}", figure)
    for row in rows:
        names = list(row)
        options = {name: row[name] for name in names[1 : names.index("beta") + 1] if row[name] is not None}
        options = {name: value if isinstance(value, _PLAIN) else str(value) for name, value in options.items()}
        results = {f"sweep/{name}": row[name] for name in names[names.index("beta") + 1 :]}
        metrics = {name: float(value) for name, value in results.items() if isinstance(value, int | float)}
        with SummaryWriter(str(folder / row["point"])) as writer:
            for part in hparams(options, metrics):
                writer.file_writer.add_summary(part)
            for name, value in metrics.items():
                writer.add_scalar(name, value)


def _table(means: Sequence[Row]) -> str:
    """Lay out the means for the terminal, with the spread behind each."""
    names = tables.columns(means)
    varied = [name for name in names[: names.index("beta") + 1] if name != "config_hash"]
    measured = [name for name in _PRINTED if any(f"{name}_mean" in row for row in means)]
    lines = [[*varied, *measured]]
    for row in means:
        cells = [str(row.get(name, "")) for name in varied]
        for name in measured:
            mean, spread = row.get(f"{name}_mean"), row.get(f"{name}_std")
            cells.append("" if mean is None else f"{mean:.4g}" + ("" if spread is None else f" \u00b1 {spread:.2g}"))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _exit(error: object) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
