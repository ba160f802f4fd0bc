"""``sweep``: train and evaluate a grid of runs, and compare them."""

from __future__ import annotations

import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import yaml
from jsonargparse import Namespace, get_loader

from ..cli.errors import exit_with, readable_errors
from ..cli.vae_cli import Parser, Unrun, expand_home
from ..evaluation.measure import LEAST
from ..likelihoods import Gaussian
from ..vae import VAE
from . import plan, runner
from .plan import BETA, Point
from .report import report

_TERMS = ("ELBO", "rate", "distortion")
_DESCRIPTION = (
    "Train and evaluate every combination of the given lists, one process per point, and compare them: a table, means "
    "over seeds, the rate-distortion curve, and the latent spaces side by side. Finished points are not run again: "
    "repeat the command to continue, or to add values. Options that are not listed here are passed to each `fit`, such "
    "as `--trainer.max_epochs 5`."
)


def sweep(arguments: Sequence[str]) -> None:
    """Run the sweep described by a command line.

    Args:
        arguments: The command line after ``sweep``.
    """
    options, rest = _parse(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat a scheduler's stop like Ctrl-C
    try:
        _sweep(options, rest)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues from here.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _sweep(options: Namespace, rest: Sequence[str]) -> None:
    base = Path(options.folder) / (options.name or _default_name(options.config))
    try:
        _check(options)
        bases, betas = _bases(options, rest, base)
        points = [plan.existing(path, base) for path in options.checkpoints]
        references = [each.reference for each in bases if each.reference is not None]
        if options.print_commands and any(reference.checkpoint is None for reference in references):
            print("# These learn the variance used at all betas. Repeat this command when they are done.")
            _print_commands(references)
            return
        if references and not options.print_commands:
            _make(base)
            _train_references(references, options.jobs)
        points += _points(bases, betas, options.seeds, rest, base)
        points = [replace(point, evaluated_by=_evaluation(options)) for point in points]
    except ValueError as error:
        exit_with(error)
    if options.print_commands:
        _print_commands(points)
        return
    _make(base)
    missing = [point for point in points if not point.evaluation.is_file()]
    threads = runner.threads_each(options.jobs)
    print(
        f"{base}: {len(points)} points, {len(points) - len(missing)} done already; {options.jobs} at once, "
        f"{threads} thread{'s' * (threads > 1)} each"
    )
    failed = runner.run(missing, options.jobs, _result)
    if finished := [point for point in points if point.evaluation.is_file()]:
        report(finished, base, options.projection)
    if failed:
        print(f"\n{len(failed)} of {len(points)} points failed; the same command tries them again.", file=sys.stderr)
        raise SystemExit(1)


def _make(base: Path) -> None:
    """Make the sweep's folder, and make sure that files can be written there."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=base).close()
    except OSError as error:
        exit_with(f"`--folder`, `--name`: {base} can't be made or written to: {error.strerror}.")


def _result(point: Point) -> str:
    found = point.found()
    return ", ".join(f"{name} {found[name.lower()]:.4g}" for name in _TERMS if name.lower() in found) + " nats"


# ---- the command line


def _parse(arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Separate the sweep's own options from those of ``fit``."""
    parser = _parser()
    own = {"-h", "--help", "-c", *(f"--{name}" for name in parser.get_defaults().keys())}  # noqa: SIM118
    mine: list[str] = []
    rest: list[str] = []
    target = rest
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument):  # the values of an option follow it
            target = mine if argument.partition("=")[0] in own else rest
        target.append(argument)
    return expand_home(parser.parse_args(mine)), rest


def _parser() -> Parser:
    parser = Parser(prog=_program(), description=_DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE",
        help="Config to compare, or several with one --config each. `a.yaml+b.yaml` lays b over a.")  # fmt: skip
    add("--betas", type=Any, metavar="LIST", help='Betas, such as "[0.1, 1, 10]".')
    add("--vary", action="append", default=[], metavar="OPTION=LIST",
        help='Values of any option of `fit`, such as model.latent_dim="[2, 8, 32]". Repeatable: a grid.')  # fmt: skip
    add("--seeds", type=Any, metavar="LIST",
        help='Seeds, such as "[0, 1, 2]"; by default the config\'s own.')  # fmt: skip
    add("--checkpoints", nargs="+", default=[], metavar="FILE", help="Checkpoints of earlier runs to compare with.")
    add("--jobs", type=Any, default=1, metavar="N", help="Processes at once; they share the threads.")
    add("--name", type=str | None, help="Name of the sweep; by default that of its configs.")
    add("--folder", type=str, default="sweeps", help="Folder that the sweep's folder is made in.")
    add("--projection", type=Literal["pca", "tsne"], default="pca",
        help="How latents of more than 2 dimensions are shown.")  # fmt: skip
    for name in LEAST:
        add(f"--evaluation.{name}", type=Any, metavar="N", help="As of `test`, for every point.")
    add("--print_commands", action="store_true",
        help="Print the `fit` commands of the untrained points, for a cluster's scheduler, and run nothing. When they "
        "are done, the same command without this option evaluates and compares them.")  # fmt: skip
    return parser


def _program() -> str:
    return f"{Path(sys.argv[0]).name} sweep"


def _evaluation(options: Namespace) -> tuple[str, ...]:
    """Return the arguments passed to every point's ``test``."""
    given = options.evaluation.as_dict()
    return tuple(f"--evaluation.{name}={given[name]}" for name in LEAST if given[name] is not None)


def _check(options: Namespace) -> None:
    """Make lists of the betas and seeds, and refuse numbers that the options do not take.

    The parser takes any value: its own errors show neither the value nor what is allowed.
    """
    largest = 2**32 - 1
    if options.betas is not None:
        options.betas = _listed(options.betas)
        if not options.betas or not all(type(beta) in (int, float) for beta in options.betas):
            _refuse("--betas", "a list of numbers such as [0.1, 1, 10]", options.betas)
    if options.seeds is not None:
        options.seeds = _listed(options.seeds)
        if not options.seeds or not all(type(seed) is int and 0 <= seed <= largest for seed in options.seeds):
            _refuse("--seeds", f"a list of whole numbers from 0 to {largest} such as [0, 1, 2]", options.seeds)
    counts = {f"evaluation.{name}": value for name, value in options.evaluation.as_dict().items() if value is not None}
    for name, count in {"jobs": options.jobs, **counts}.items():
        least = LEAST.get(name.rpartition(".")[2], 1)
        if type(count) is not int or count < least:
            _refuse(f"--{name}", f"a whole number of at least {least}", count)
    for package in ("matplotlib", *(["sklearn"] if options.projection == "tsne" else [])):
        if find_spec(package) is None:
            raise ValueError(f"the figures need {package}, which is not installed: pip install 'lightning-vae[train]'.")


def _refuse(option: str, allowed: str, given: Any) -> NoReturn:
    raise ValueError(f"`{option}` must be {allowed}, got {given!r}.")


def _listed(value: Any) -> list[Any]:
    """Return a list as it is, and a single value as a list of one."""
    return value if isinstance(value, list) else [value]


def _varied(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse ``--vary`` into the values of each option."""
    varied: dict[str, list[Any]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        try:
            values = _listed(get_loader("yaml")(listed))
        except yaml.YAMLError:
            values = []
        if not values or None in values or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
            _refuse("--vary", 'OPTION=LIST such as model.latent_dim="[2, 8]"', text)
        if name in varied:
            raise ValueError("`--vary` names an option twice. Put all its values in one list.")
        varied[name] = values
    return varied


def _default_name(configs: Sequence[str]) -> str:
    stems = ["+".join(Path(path).stem for path in files.split("+")) for files in configs]
    return "-".join(dict.fromkeys(stems)) or "checkpoints"


class _Base(NamedTuple):
    """A config with everything that the sweep varies except beta and the seed."""

    files: str
    options: dict[str, Any]
    reference: Point | None
    """The run at beta 1 whose learned variance is used at all betas."""


def _bases(options: Namespace, rest: Sequence[str], base: Path) -> tuple[list[_Base], list[Any]]:
    """Plan the models to train at each beta, and list the betas (empty if each config keeps its own)."""
    if not options.config and not options.checkpoints:
        raise ValueError("`sweep` needs `--config` or `--checkpoints`: there is nothing to compare.")
    betas = options.betas or []
    varied = _varied(options.vary)
    if "seed_everything" in varied:
        raise ValueError("`--vary seed_everything` would treat seeds as configurations. Give them as `--seeds`.")
    if betas and BETA in varied:
        raise ValueError("`--betas` and `--vary model.beta` are the same. Give one of them.")
    betas = betas or varied.pop(BETA, [])
    bases = []
    for files in options.config:
        for choice in plan.grid(varied):
            reference = None
            several = len(betas) > 1
            configuration, built = _configure(
                files, {**choice, **({BETA: 1 if several else betas[0]} if betas else {})}, rest
            )
            likelihood = built.model.likelihood
            with readable_errors():
                plan.check_run(built)
                if not options.print_commands:  # the data may be only where the commands will run
                    plan.rehearse(built)
            if (
                several
                and isinstance(likelihood, Gaussian)
                and likelihood.learns_scale
                and not likelihood.learns_each_scale
            ):
                reference = plan.points(configuration, options.seeds, base)[0]
                for beta in betas:  # refuse a wrong one before the reference is trained
                    _configure(files, {**choice, BETA: beta}, rest)
            elif several and likelihood.learns_scale:
                print(
                    f"Note: {configuration.name}: the scale of {type(likelihood).__name__} can't be fixed. "
                    "It differs between betas, and so do the units of the distortions."
                )
            bases.append(_Base(files, choice, reference))
    return bases, betas


def _points(
    bases: Sequence[_Base], betas: Sequence[Any], seeds: Sequence[int] | None, rest: Sequence[str], base: Path
) -> list[Point]:
    """Plan the runs, once the reference runs are done."""
    points: list[Point] = []
    for each in bases:
        fixed = list(rest)
        if each.reference is not None:
            fixed = plan.with_variance(rest, _learned_variance(each.reference))
        for choice in plan.grid({BETA: betas} if betas else {}):
            configuration, _ = _configure(each.files, {**each.options, **choice}, fixed)
            points += plan.points(configuration, seeds, base)
    return list({point.folder: point for point in points}.values())  # a config given twice counts once


def _configure(files: str, options: Mapping[str, Any], rest: Sequence[str]) -> tuple[plan.Configuration, Unrun]:
    """Resolve a config. If ``fit`` refuses an option, it may have been meant for the sweep."""
    try:
        return plan.configure(files, options, rest)
    except SystemExit:
        if rest:
            print(f"Options of the sweep itself: {_program()} --help", file=sys.stderr)
        raise


def _learned_variance(reference: Point) -> float:
    """Read the variance that a reference run has learned, in the digits used for a config."""
    assert reference.checkpoint is not None
    likelihood = VAE.load_from_checkpoint(reference.checkpoint, map_location="cpu", weights_only=True).likelihood
    assert isinstance(likelihood, Gaussian)
    return float(f"{likelihood.log_variance.detach().clamp(min=likelihood.min_log_variance).exp().item():.6g}")


def _train_references(references: Sequence[Point], jobs: int) -> None:
    """Train the reference runs for the fixed variances, and print the variances."""
    untrained = [reference for reference in references if reference.checkpoint is None]
    if untrained:
        print("A learned variance would differ between betas. It is learned at beta 1 first, and then fixed:")
        if runner.run(untrained, jobs, lambda _: "trained", evaluate=False):
            exit_with("without the learned variance the betas can't be compared.")
    for reference in references:
        print(f"Variance at every beta, learned by {reference.label}: {_learned_variance(reference):.6g}")


def _print_commands(points: Sequence[Point]) -> None:
    """Print commands that a scheduler may run in any order, on any machine with access to this folder."""
    for point in points:
        if point.checkpoint is None:
            print(shlex.join(["python", "-m", "lightning_vae", *point.fit()]))
