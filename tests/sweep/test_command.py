"""``sweep``: what is run, what is not run again, and what the tables and pictures show."""

import csv
import io
import json
import re
import shlex
import statistics
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset

from lightning_vae import VAE
from lightning_vae.cli import vae_cli
from lightning_vae.cli.errors import exit_with
from lightning_vae.main import main
from lightning_vae.sweep import runner
from lightning_vae.sweep.point import work

ROOT = Path(__file__).parents[2]
LINEAR = str(ROOT / "configs" / "linear.yaml")
TINY = ["--trainer.max_epochs=1", "--data.size=256", "--data.batch_size=128", "--trainer.enable_model_summary=false",
        "--trainer.log_every_n_steps=1", "--lr_scheduler=null"]  # fmt: skip
SWEEP = ["sweep", "--config", LINEAR, *TINY]

pytestmark = pytest.mark.filterwarnings("ignore:CollapseDetector")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture
def calls(monkeypatch):
    """Run the points in this process, which saves seconds each, and record what is run."""
    made = []

    def run(arguments, run=vae_cli.run):
        made.append(arguments)
        return run(arguments)

    def start(point, evaluate, threads):
        point.folder.mkdir(parents=True, exist_ok=True)
        code = 0
        with (point.folder / runner.LOG).open("w") as log, redirect_stderr(log):
            try:
                work(**point.commands(evaluate))
            except SystemExit as error:
                code = error.code
        process = SimpleNamespace(poll=lambda: code, returncode=code, stdin=io.BytesIO())
        return runner.Running(point, process, time.monotonic(), 0)

    monkeypatch.setattr(vae_cli, "run", run)
    monkeypatch.setattr(runner, "start", start)
    return made


def table(name, base="sweeps/linear"):
    with (Path(base) / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def kinds(calls):
    return [arguments[0] for arguments in calls]


# ---- a sweep


def test_each_point_is_a_process_of_its_own(capsys):
    main(SWEEP)
    said = capsys.readouterr().out
    assert "sweeps/linear: 1 points, 0 done already; 1 at once" in said
    assert re.search(r"\[1/1\] linear seed=0: ELBO -\d.*, rate \d.*, distortion \d.* nats \(", said)
    (row,) = table("results")
    log = (Path("sweeps/linear") / row["point"] / "sweep.log").read_text()
    assert "`Trainer.fit` stopped: `max_epochs=1` reached" in log
    assert "Restoring states" in log


@pytest.mark.exhaustive
def test_the_grid_its_table_its_means_and_its_pictures(calls, capsys):
    main([*SWEEP, "--betas", "[0.5, 2]", "--vary", "model.latent_dim=[2, 3]", "--seeds", "[0, 1]"])
    assert kinds(calls) == ["fit", "test"] * 8
    rows = table("results")
    assert {(row["model.latent_dim"], row["beta"], row["seed"]) for row in rows} == {
        (k, beta, seed) for k in "23" for beta in ("0.5", "2.0") for seed in "01"
    }
    assert len({row["config_hash"] for row in rows}) == 4
    assert all(row["torch"] == torch.__version__ and row["lightning_vae"] for row in rows)
    for row in rows:
        vae = VAE.load_from_checkpoint(row["checkpoint"], weights_only=True)
        assert (vae.latent_dim, vae.beta.item()) == (int(row["model.latent_dim"]), float(row["beta"]))
        assert float(row["elbo"]) == pytest.approx(-float(row["rate"]) - float(row["distortion"]), abs=1e-4)

    means = table("summary")
    assert [row["seeds"] for row in means] == ["2"] * 4
    assert [(row["model.latent_dim"], row["beta"]) for row in means] == [(k, b) for k in "23" for b in ("0.5", "2.0")]
    for mean in means:
        rates = [float(row["rate"]) for row in rows if row["config_hash"] == mean["config_hash"]]
        assert rates[0] != rates[1]
        assert float(mean["rate_mean"]) == pytest.approx(statistics.fmean(rates))
        assert float(mean["rate_std"]) == pytest.approx(statistics.stdev(rates))

    base = Path("sweeps/linear")
    assert all((base / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("latents", "rate_distortion"))
    events = EventAccumulator(str(base / "comparison")).Reload()
    assert set(events.Tags()["images"]) == {"sweep/latents", "sweep/rate_distortion"}
    one = EventAccumulator(str(base / "comparison" / rows[0]["point"])).Reload()
    assert one.Scalars("sweep/rate")[0].value == pytest.approx(float(rows[0]["rate"]))
    assert "_hparams_/session_start_info" in one.summary_metadata
    assert "tensorboard --logdir sweeps/linear/comparison" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_what_is_done_is_not_done_again(calls):
    main([*SWEEP, "--betas", "[0.5, 2]"])
    before = table("results")
    calls.clear()
    main([*SWEEP, "--betas", "[0.5, 2, 4]"])
    assert kinds(calls) == ["fit", "test"]
    assert table("results")[:2] == before
    point = Path("sweeps/linear") / before[0]["point"]
    calls.clear()
    main([*SWEEP, "--betas", "[0.5]", "--evaluation.importance_samples=7", "--evaluation.observations", "64"])
    assert kinds(calls) == ["test"]  # another evaluation, beside the first
    (row,) = table("results")
    assert (row["importance_samples"], row["mutual_information_observations"]) == ("7", "64")
    (point / "test" / "evaluation.json").unlink()
    calls.clear()
    main([*SWEEP, "--betas", "[0.5, 2, 4]"])
    assert kinds(calls) == ["test"]
    (point / "test" / "evaluation.json").unlink()
    (point / "fit.json").unlink()  # as if it had been cut off behind its last checkpoint
    calls.clear()
    main([*SWEEP, "--betas", "[0.5, 2, 4]"])
    assert kinds(calls) == ["fit", "test"]
    assert f"--ckpt_path={point}/checkpoints/last.ckpt" in calls[0]
    assert "--same_run=true" in calls[0]
    calls.clear()
    main([*SWEEP, "--betas", "[0.5]", "--trainer.gradient_clip_val=1"])  # another config
    assert kinds(calls) == ["fit", "test"]


@pytest.mark.exhaustive
def test_a_learned_variance_is_fixed_at_its_value_at_beta_1(calls, capsys):
    main([*SWEEP, "--betas", "[0.5, 1, 4]", "--model.likelihood.variance=learned"])
    assert kinds(calls) == ["fit"] + ["fit", "test"] * 3
    assert "--model.beta=1" in calls[0]
    folder = next(each for each in Path("sweeps/linear").iterdir() if each.is_dir() and not (each / "test").exists()
                  and each.name != "comparison")  # fmt: skip
    reference = VAE.load_from_checkpoint(folder / "checkpoints" / "best.ckpt", weights_only=True)
    learned = reference.likelihood.log_variance.exp().item()
    assert learned != pytest.approx(0.4)
    rows = table("results")
    assert [row["beta"] for row in rows] == ["0.5", "1.0", "4.0"]
    assert [float(row["variance"]) for row in rows] == pytest.approx([learned] * 3, rel=1e-5)
    said = capsys.readouterr().out
    assert f"Variance at every beta, learned by linear beta=1 seed=0: {learned:.6g}" in said


@pytest.mark.exhaustive
def test_many_learned_variances_are_not_fixed_at_one(capsys):
    main([*SWEEP, "--betas", "[0.5, 1]", "--model.likelihood.variance=per_dimension", "--print_commands"])
    said = capsys.readouterr().out
    assert "the scale of Gaussian can't be fixed. It differs between betas" in said
    assert said.count("fit") == 2


@pytest.mark.exhaustive
def test_options_of_text_and_of_one_last_name_are_kept_apart(calls):
    main([*SWEEP, "--model.encoder=MLPEncoder", "--model.decoder=MLPDecoder", "--vary=model.encoder.hidden=[[4]]",
          "--vary=model.decoder.hidden=[[8]]", "--vary=data.seed=[3]", "--vary=optimizer=[SGD]"])  # fmt: skip
    (row,) = table("results")
    assert (row["model.encoder.hidden"], row["model.decoder.hidden"], row["optimizer"]) == ("[4]", "[8]", "SGD")
    assert (row["seed"], row["data.seed"]) == ("0", "3")
    assert "hidden=-4-model" in row["point"].replace("model.encoder.", "").replace("model.decoder.", "model")


@pytest.mark.exhaustive
def test_a_failure_stops_nothing_else_and_is_tried_again(calls, capsys, monkeypatch):
    def failing(arguments, run=vae_cli.run):
        if "--model.beta=2" in arguments:
            exit_with("no memory")
        return run(arguments)

    with monkeypatch.context() as context:
        context.setattr(vae_cli, "run", failing)
        with pytest.raises(SystemExit) as exit_:
            main([*SWEEP, "--betas", "[2, 0.5]"])
    assert exit_.value.code == 1
    said = capsys.readouterr()
    assert "linear beta=2 seed=0: FAILED: no memory" in said.out
    assert "1 of 2 points failed" in said.err
    assert [row["beta"] for row in table("results")] == ["0.5"]
    calls.clear()
    main([*SWEEP, "--betas", "[2, 0.5]"])
    assert kinds(calls) == ["fit", "test"]
    assert [row["beta"] for row in table("results")] == ["2.0", "0.5"]


@pytest.mark.exhaustive
def test_trained_checkpoints_are_compared_too(calls, capsys):
    main(["fit", "--config", LINEAR, *TINY, "--seed_everything=5", "--trainer.enable_progress_bar=false"])
    checkpoint = "logs/linear/version_0/checkpoints/best.ckpt"
    with pytest.raises(SystemExit):
        main([*SWEEP, "--ckpt_path", checkpoint])
    assert "use `--checkpoints`" in capsys.readouterr().err
    main([*SWEEP, "--checkpoints", checkpoint])
    assert kinds(calls) == ["test", "fit", "test"]
    rows = table("results")
    assert [(row["config"], row["seed"]) for row in rows] == [(checkpoint, "5"), ("linear", "0")]
    assert rows[0]["rate"] != rows[1]["rate"]
    assert rows[0]["torch"] == torch.__version__
    assert len(list(Path("logs/linear").iterdir())) == 1  # nothing is written beside it


@pytest.mark.exhaustive
def test_the_commands_for_a_cluster_are_all_that_is_left_to_train(calls, capsys):
    command = [*SWEEP, "--betas", "[0.5, 2]", "--model.likelihood.variance=learned"]
    printed = []
    for expected in (1, 2, 0):
        main([*command, "--print_commands"])
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python -m")]
        assert len(printed) == expected
        for line in printed:
            main(shlex.split(line)[3:])
        capsys.readouterr()
    assert calls == []
    main(command)
    assert kinds(calls) == ["test", "test"]


@pytest.mark.exhaustive
def test_all_scalars_of_the_evaluation_are_columns(calls, monkeypatch):
    def richer(arguments, run=vae_cli.run):
        cli = run(arguments)
        if arguments[0] == "test":
            found = {"rate": 1.0, "distortion": 2.0, "nll": 2.5, "active_units": 3, "verdict": "balanced",
                     "knn_accuracy": None, "rate_per_dimension": [1.0]}  # fmt: skip
            (Path(cli.trainer.log_dir) / "evaluation.json").write_text(json.dumps(found))
        return cli

    monkeypatch.setattr(vae_cli, "run", richer)
    main([*SWEEP, "--seeds", "[0, 1]"])
    (row, _), (mean,) = table("results"), table("summary")
    assert (row["nll"], row["verdict"], row["knn_accuracy"]) == ("2.5", "balanced", "")
    assert "rate_per_dimension" not in row
    assert (mean["nll_mean"], mean["nll_std"], mean["verdict"]) == ("2.5", "0.0", "balanced")
    assert "knn_accuracy_mean" not in mean


class FewForTheTest(LightningDataModule):
    """Vectors, ``size`` of them for the test, in loaders that may ask for a Trainer."""

    shape, levels = (3,), None

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        self.size = size

    def train_dataloader(self):
        return DataLoader(1e30 * self.x, 20)

    def val_dataloader(self):
        return DataLoader(1e30 * self.x, 20)

    def test_dataloader(self):
        return {"only": DataLoader(1e30 * self.x[: self.size], 2 * self.trainer.world_size)}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch / 1e30


class NoneForTheTest(FewForTheTest):
    test_dataloader = LightningDataModule.test_dataloader


class NoLoaderForTheTest(FewForTheTest):
    def test_dataloader(self):
        return []


class OnceForTheTest(FewForTheTest):
    def test_dataloader(self):
        return iter([self.x])


class StreamForTheTest(FewForTheTest):
    def test_dataloader(self):
        return DataLoader(Stream(self.x), 20)


class Stream(IterableDataset):
    """Rows of a tensor, without a length."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


FEW = ["sweep", "--config", LINEAR, f"--data={FewForTheTest.__module__}.FewForTheTest", "--trainer.max_epochs=1",
       "--trainer.log_every_n_steps=1", "--lr_scheduler=null", "--model.latent_dim=2",
       "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers", "ignore:.*does not have many")
@pytest.mark.parametrize("size", [pytest.param(6, marks=pytest.mark.exhaustive), 1])
def test_a_point_with_few_test_observations_is_measured(size, calls, capsys):
    """Case `sweep_trains_what_it_cant_evaluate`."""
    main([*FEW, f"--data.size={size}"])
    assert kinds(calls) == ["fit", "test"]
    (row,) = table("results")
    assert (row["observations"], row["verdict"]) == (str(size), "")
    assert float(row["nll"]) > 0
    assert ("latents.png can't be drawn: ValueError: `loader` must hold at least 2" in capsys.readouterr().out) == (
        size == 1
    )


BETAS = "a list of numbers such as [0.1, 1, 10]"
SEEDS = "a list of whole numbers from 0 to 4294967295 such as [0, 1, 2]"
VARIED = 'OPTION=LIST such as model.latent_dim="[2, 8]"'
BROKEN = {
    "nothing": ([], "needs `--config` or `--checkpoints`"),
    "no list": (["--config", LINEAR, "--vary", "model.beta"], f"`--vary` must be {VARIED}, got 'model.beta'."),
    "no value": (["--config", LINEAR, "--vary", "model.beta="], f"`--vary` must be {VARIED}, got 'model.beta='."),
    "half a list": (["--config", LINEAR, "--vary", "data.size=[1"], f"`--vary` must be {VARIED}, got 'data.size=[1'."),
    "an empty list": (["--config", LINEAR, "--betas", "[]"], f"`--betas` must be {BETAS}, got []."),
    "betas twice": (["--config", LINEAR, "--betas", "[1]", "--vary", "model.beta=[2]"], "are the same"),
    "half a seed": (["--config", LINEAR, "--seeds", "[0.5]"], f"`--seeds` must be {SEEDS}, got [0.5]."),
    "no seed": (["--config", LINEAR, "--seeds", "true"], f"`--seeds` must be {SEEDS}, got [True]."),
    "a beta of text": (["--config", LINEAR, "--betas", "[one]"], f"`--betas` must be {BETAS}, got ['one']."),
    "a negative seed": (["--config", LINEAR, "--seeds", "[-1]"], f"`--seeds` must be {SEEDS}, got [-1]."),
    "an option twice": (["--config", LINEAR, *["--vary", "data.size=[9]"] * 2], "names an option twice"),
    "seeds as options": (["--config", LINEAR, "--vary", "seed_everything=[1]"], "Give them as `--seeds`"),
    "no folder": (["--config", LINEAR, "--folder", LINEAR], "can't be made"),
    "no jobs": (["--config", LINEAR, "--jobs", "0"], "`--jobs` must be a whole number of at least 1, got 0."),
    "jobs in words": (["--config", LINEAR, "--jobs", "many"], "at least 1, got 'many'."),
    "no samples": (["--config", LINEAR, "--evaluation.samples", "0"], "`--evaluation.samples` must be a whole number"),
    "few to compare": (["--config", LINEAR, "--evaluation.samples", "9"], "a whole number of at least 10, got 9."),
    "no checkpoint": (
        ["--config", LINEAR, "--trainer.callbacks=CollapseDetector", "--trainer.enable_checkpointing=false"],
        "`trainer.callbacks` must hold a ModelCheckpoint",
    ),
    "a checkpoint that comes too late": (
        ["--config", LINEAR, "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=9", *TINY],
        "`trainer.callbacks` must hold a ModelCheckpoint that saves within the run",
    ),
    "a checkpoint that keeps nothing": (
        ["--config", LINEAR, "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_top_k=0", *TINY],
        "`trainer.callbacks` must hold a ModelCheckpoint that saves within the run",
    ),
    **{
        f"no {name}": (
            ["--config", LINEAR, f"--trainer.{name}=0"],
            f"`trainer.{name}` is 0, so there would be nothing to {verb}.",
        )
        for name, verb in {
            "max_epochs": "train",
            "max_steps": "train",
            "limit_train_batches": "train",
            "limit_test_batches": "test",
        }.items()
    },
    "no test, for a cluster": (
        ["--config", LINEAR, "--print_commands", "--trainer.limit_test_batches=0"],
        "`trainer.limit_test_batches` is 0",
    ),
    "a trial run": (["--config", LINEAR, "--trainer.fast_dev_run=true"], "`trainer.fast_dev_run` saves no checkpoint"),
    "too small a share of the test": (
        ["--config", LINEAR, *TINY, "--trainer.limit_test_batches=0.4"],
        "`trainer.limit_test_batches` must leave at least one of the test's 2 batches, got 0.4.",
    ),
    "a share of a stream": (
        [*FEW[1:], f"--data={FewForTheTest.__module__}.StreamForTheTest", "--trainer.limit_test_batches=0.5"],
        "`trainer.limit_test_batches` must leave at least one of the test's batches, whose number is not known",
    ),
    "a monitor of nothing": (
        ["--config", LINEAR, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/lss"],
        "EarlyStopping(monitor='val/lss'): this run never logs that value. The nearest are 'val/loss'",
    ),
    "a monitor of no validation": (
        [
            "--config",
            LINEAR,
            "--trainer.limit_val_batches=0",
            "--trainer.callbacks=ModelCheckpoint",
            "--trainer.callbacks.monitor=val/loss",
        ],
        "ModelCheckpoint(monitor='val/loss') needs validation",
    ),
    "no test data": (
        [*FEW[1:], f"--data={FewForTheTest.__module__}.NoneForTheTest"],
        "`test_dataloader` must be implemented",
    ),
    "no test loader": (
        [*FEW[1:], f"--data={FewForTheTest.__module__}.NoLoaderForTheTest"],
        "`test_dataloader` of NoLoaderForTheTest must return a loader, got none.",
    ),
    "test data that are read once": (
        [*FEW[1:], f"--data={FewForTheTest.__module__}.OnceForTheTest"],
        "`loader` is read twice",
    ),
    "an empty test set": ([*FEW[1:], "--data.size=0"], "`loader` is empty"),
    "a share of an empty test set": (
        [*FEW[1:], "--data.size=0", "--trainer.limit_test_batches=0.5"],
        "`loader` is empty",
    ),
    "a beta that is wrong once the variance is known": (
        ["--config", LINEAR, "--model.likelihood.variance=learned", "--betas=[1, -1]"],
        "`beta` must be a finite number",
    ),
    "an option that fit does not know": (["--config", LINEAR, "--betaz", "[1]"], "betaz"),
    "an option that is nearly the sweep's": (["--config", LINEAR, "--beta", "[1]"], "train.py sweep --help"),
    "a value that the model refuses": (["--config", LINEAR, "--betas", "[1, -1]"], "`beta` must be a finite number"),
    "a missing config": (["--config", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
    "a missing overlay": (["--config", "digits+overlays/anneald"], "overlays/annealed"),
    "a missing checkpoint": (["--checkpoints", "nowhere.ckpt"], "there is no file 'nowhere.ckpt'"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", BROKEN)
def test_wrong_input_ends_in_one_message_before_anything_is_run(case, calls, capsys):
    arguments, message = BROKEN[case]
    with pytest.raises(SystemExit) as exit_:
        main(["sweep", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error) < 500
    assert calls == []
    assert list(Path().iterdir()) == []


def test_a_folder_that_can_not_be_written_to_is_said_before_anything_is_run(calls, capsys, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_vae.sweep.command.tempfile.TemporaryFile", refuse)
    with pytest.raises(SystemExit):
        main(SWEEP)
    assert (
        "`--folder`, `--name`: sweeps/linear can't be made or written to: Permission denied." in capsys.readouterr().err
    )
    assert calls == []


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit):
        main(["sweep", "--folder=~/sweeps", "--checkpoints=~/none.ckpt"])
    assert f"there is no file '{tmp_path}/home/none.ckpt'" in capsys.readouterr().err
    main([*SWEEP, "--folder=~/sweeps", "--print_commands"])
    assert f"save_dir={tmp_path}/home/sweeps" in capsys.readouterr().out
