"""``sweep``: what is run, what is not run again, and what the tables and pictures show."""

import csv
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vae import VAE
from lightning_vae.datamodules import linear_vae_optimum
from lightning_vae.estimators.closed_forms import shannon_distortion
from lightning_vae.evaluation.figures import CurvePoint, compare_latents, rate_distortion
from lightning_vae.main import main
from lightning_vae.sweep.plan import grid
from lightning_vae.sweep.runner import Failed, Jobs, duration, remaining
from lightning_vae.sweep.tables import summary

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

    def call(self, arguments, point):
        made.append(arguments)
        try:
            main(list(arguments))
        except SystemExit as error:
            raise Failed("in this process") from error

    monkeypatch.setattr(Jobs, "_call", call)
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
    assert f"The variance at every beta is what linear beta=1 seed=0 has learned: {learned:.6g}" in said


def test_options_of_text_and_of_one_last_name_are_kept_apart(calls):
    main([*SWEEP, "--model.encoder=MLPEncoder", "--model.decoder=MLPDecoder", "--vary=model.encoder.hidden=[[4]]",
          "--vary=model.decoder.hidden=[[8]]", "--vary=data.seed=[3]", "--vary=optimizer=[SGD]"])  # fmt: skip
    (row,) = table("results")
    assert (row["model.encoder.hidden"], row["model.decoder.hidden"], row["optimizer"]) == ("[4]", "[8]", "SGD")
    assert (row["seed"], row["data.seed"]) == ("0", "3")
    assert "hidden=-4-model" in row["point"].replace("model.encoder.", "").replace("model.decoder.", "model")


def test_a_failure_stops_nothing_else_and_is_tried_again(calls, capsys, monkeypatch):
    call = Jobs._call

    def failing(self, arguments, point):
        if "--model.beta=2" in arguments:
            raise Failed("no memory")
        call(self, arguments, point)

    with monkeypatch.context() as context:
        context.setattr(Jobs, "_call", failing)
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


def test_a_process_that_fails_is_quoted_by_its_own_message(tmp_path):
    class Point:
        folder, label = tmp_path, "point"

    with pytest.raises(Failed, match=r"^`--ckpt_path`: there is no file 'nowhere.ckpt'\.$"):
        Jobs(1)._call(["test", "--config", LINEAR, "--ckpt_path=nowhere.ckpt"], Point())


@pytest.fixture
def _ctrl_c():
    """Have children listen to Ctrl-C, which those of a job in the background do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.usefixtures("_ctrl_c")
def test_a_sweep_that_is_stopped_leaves_no_process_behind(stop):
    command = [sys.executable, str(ROOT / "train.py"), *SWEEP, "--trainer.max_epochs=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        logs = Path("sweeps/linear")
        while not list(logs.glob("*/checkpoints/last.ckpt")):  # in the middle of its fit
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(stop)
        said = process.communicate()[1]  # the children write elsewhere
    if stop != signal.SIGKILL:
        assert process.returncode == 130
        assert said.endswith("Stopped. The same command goes on from here.\n")
        assert "Traceback" not in said
    for _ in range(300):  # they share its process group
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a process of the sweep is still there")


def test_trained_checkpoints_are_compared_too(calls, capsys):
    main(["fit", "--config", LINEAR, *TINY, "--seed_everything=5", "--trainer.enable_progress_bar=false"])
    checkpoint = "logs/linear/version_0/checkpoints/best.ckpt"
    with pytest.raises(SystemExit):
        main([*SWEEP, "--ckpt_path", checkpoint])
    assert "give `--checkpoints`" in capsys.readouterr().err
    main([*SWEEP, "--checkpoints", checkpoint])
    assert kinds(calls) == ["test", "fit", "test"]
    rows = table("results")
    assert [(row["config"], row["seed"]) for row in rows] == [(checkpoint, "5"), ("linear", "0")]
    assert rows[0]["rate"] != rows[1]["rate"]
    assert rows[0]["torch"] == torch.__version__
    assert len(list(Path("logs/linear").iterdir())) == 1  # nothing is written beside it


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


def test_all_scalars_of_the_evaluation_are_columns(calls, monkeypatch):
    call = Jobs._call

    def richer(self, arguments, point):
        call(self, arguments, point)
        if arguments[0] == "test":
            found = {"rate": 1.0, "distortion": 2.0, "nll": 2.5, "active_units": 3, "verdict": "balanced",
                     "knn_accuracy": None, "rate_per_dimension": [1.0]}  # fmt: skip
            point.evaluation.write_text(json.dumps(found))

    monkeypatch.setattr(Jobs, "_call", richer)
    main([*SWEEP, "--seeds", "[0, 1]"])
    (row, _), (mean,) = table("results"), table("summary")
    assert (row["nll"], row["verdict"], row["knn_accuracy"]) == ("2.5", "balanced", "")
    assert "rate_per_dimension" not in row
    assert (mean["nll_mean"], mean["nll_std"], mean["verdict"]) == ("2.5", "0.0", "balanced")
    assert "knn_accuracy_mean" not in mean


BROKEN = {
    "nothing": ([], "needs `--config` or `--checkpoints`"),
    "no list": (["--config", LINEAR, "--vary", "model.beta"], "must be OPTION=LIST"),
    "an empty list": (["--config", LINEAR, "--betas", "[]"], "must be a list"),
    "betas twice": (["--config", LINEAR, "--betas", "[1]", "--vary", "model.beta=[2]"], "are the same"),
    "half a seed": (["--config", LINEAR, "--seeds", "[0.5]"], "`--seeds` must be whole numbers"),
    "a negative seed": (["--config", LINEAR, "--seeds", "[-1]"], "`--seeds` must be whole numbers"),
    "an option twice": (["--config", LINEAR, *["--vary", "data.size=[9]"] * 2], "names an option twice"),
    "seeds as options": (["--config", LINEAR, "--vary", "seed_everything=[1]"], "Give them as `--seeds`"),
    "no folder": (["--config", LINEAR, "--folder", LINEAR], "can't be made"),
    "no jobs": (["--config", LINEAR, "--jobs", "0"], "at least 1"),
    "an option that fit does not know": (["--config", LINEAR, "--betaz", "[1]"], "betaz"),
    "an option that is nearly the sweep's": (["--config", LINEAR, "--beta", "[1]"], "train.py sweep --help"),
    "a value that the model refuses": (["--config", LINEAR, "--betas", "[1, -1]"], "`beta` must be a finite number"),
    "a missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "a missing checkpoint": (["--checkpoints", "nowhere.ckpt"], "there is no file 'nowhere.ckpt'"),
}


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


# ---- its parts


def test_grid_without_options_is_one_point():
    assert list(grid({})) == [{}]


def test_the_spread_of_one_seed_is_unknown():
    (row,) = summary([{"point": "a", "config": "c", "config_hash": "h", "seed": 0, "beta": 1, "rate": 2.0}])
    assert row == {"config": "c", "config_hash": "h", "seeds": 1, "beta": 1, "rate_mean": 2.0, "rate_std": None}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (60, "1 min 0 s"), (3599.5, "1 h 0 min"), (90, "1 min 30 s")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "jobs", "left"), [(1, 1, 500), (1, 2, 300), (2, 2, 200), (5, 2, 100 / 3), (3, 8, 100)]
)
def test_the_time_left_is_counted_in_rounds(done, jobs, left):
    assert remaining(100.0, done, total=6, jobs=jobs) == pytest.approx(left)


def test_jobs_run_at_once_and_no_more_than_that(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    jobs, running, most = Jobs(3), [], []

    class Point:
        label, folder = "p", Path()

    def work(point):
        running.append(point)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return "done"

    assert jobs.threads == 2
    assert jobs.run([Point() for _ in range(9)], work) == []
    assert max(most) == 3


@pytest.mark.parametrize("beta", [0.1, 0.5, 1, 4, 9, 20])
def test_shannons_curve_is_where_the_optimal_linear_vaes_are(beta):
    eigenvalues = (0.1, 5.0, 3.0, 0.8, 1.5, 0.3)
    optimum = linear_vae_optimum(eigenvalues, latent_dim=6, variance=0.4, beta=beta)
    assert shannon_distortion(eigenvalues, 0.4, optimum.rate) == pytest.approx(optimum.distortion, abs=1e-9)
    narrow = linear_vae_optimum(eigenvalues, latent_dim=1, variance=0.4, beta=beta)
    if beta < 1:
        assert shannon_distortion(eigenvalues, 0.4, narrow.rate) < narrow.distortion - 0.1


def test_shannons_curve_refuses_a_negative_rate():
    with pytest.raises(ValueError, match="`rate` must be at least 0"):
        shannon_distortion([1.0], 1.0, -0.1)


# ---- pictures


def vae(latent_dim, shape=(6,), levels=None):
    torch.manual_seed(latent_dim)
    return VAE(shape=shape, levels=levels, latent_dim=latent_dim)


def batches(shape=(6,), rows=40, labelled=True):
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    x = x if len(shape) == 1 else x.mul(4).abs().clamp(max=16).to(torch.uint8)
    whole = {"x": x, "index": torch.arange(rows), "label": torch.arange(rows) % 4}
    return [{name: part[start : start + 16] for name, part in whole.items() if labelled or name != "label"}
            for start in range(0, rows, 16)]  # fmt: skip


def drawn(figure):
    """The points of each latent space, in the order in which they are drawn."""
    return [
        torch.cat([torch.tensor(each.get_offsets().data) for each in panel.axes[0].collections])
        for panel in figure.subfigs
    ]


def means(model, loader):
    with torch.no_grad():
        return torch.cat([model.eval().encode(batch["x"]).mean for batch in loader]).double()


def test_two_dimensions_are_shown_as_they_are_and_more_by_their_principal_components():
    plane, space, loader = vae(2), vae(5), batches()
    two, five = drawn(compare_latents({"plane": plane, "space": space}, loader))
    order = torch.arange(40).reshape(-1, 4).T.flatten()  # one colour after the other
    torch.testing.assert_close(two, means(plane, loader)[order])
    centred = means(space, loader) - means(space, loader).mean(dim=0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / 40).flip(0)[:2]
    torch.testing.assert_close(five.square().mean(dim=0), variances)


def test_spaces_share_a_scale_and_carry_their_names():
    figure = compare_latents({"plane": vae(2), "space": vae(5)}, batches())
    assert figure.subfigs[0].axes[0].get_xlim() == figure.subfigs[1].axes[0].get_xlim()
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["plane", "space"]


def test_kinds_carry_their_names_where_there_is_room():
    labels = torch.arange(40) % 4
    figure = compare_latents([vae(2)], [(30 * torch.eye(6)[labels], labels)])
    assert [text.get_text() for text in figure.subfigs[0].axes[0].texts] == ["0", "1", "2", "3"]


def test_one_legend_says_which_colour_is_which_label():
    figure = compare_latents([vae(2), vae(5)], batches())
    (legend,) = figure.legends
    shown = {
        text.get_text(): dot.get_color() for text, dot in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert list(shown) == ["0", "1", "2", "3"]
    assert [to_hex(each.get_facecolor()[0]) for each in figure.subfigs[1].axes[0].collections] == list(shown.values())
    assert compare_latents([vae(2)], batches(labelled=False)).legends == []


def test_panels_line_up_under_captions_of_any_length():
    figure = compare_latents({"short": vae(2), "long [1, 2], " * 9: vae(2), "two\nlines": vae(2)}, batches())
    figure.draw_without_rendering()
    for row in range(3):
        heights = [panel.axes[row].get_window_extent().y0 for panel in figure.subfigs]
        assert heights == pytest.approx([heights[0]] * 3, abs=0.01)
    for panel in figure.subfigs:
        assert panel._suptitle.get_window_extent().y0 > panel.axes[0].get_window_extent().y1
        assert panel._suptitle.get_window_extent().y1 <= figure.bbox.y1


def test_images_their_reconstructions_and_samples():
    shape, model = (1, 8, 8), vae(2, (1, 8, 8), 17)
    figure = compare_latents([model], batches(shape))
    _, reconstructed, sampled = figure.subfigs[0].axes
    shown = torch.tensor(reconstructed.images[0].get_array().data)
    assert shown.shape == (2 * 9 - 1, 8 * 9 - 1)
    torch.testing.assert_close(shown[:8, :8], batches(shape)[0]["x"][0, 0] / 16)
    assert torch.tensor(sampled.images[0].get_array().data).shape == shown.shape
    again = compare_latents([model], batches(shape)).subfigs[0].axes[2]
    assert (again.images[0].get_array() == sampled.images[0].get_array()).all()


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 8, 8)])
def test_what_is_no_picture_is_drawn_as_lines_on_one_scale(shape):
    _, reconstructed, sampled = compare_latents([vae(2, shape)], [torch.rand(9, *shape)]).subfigs[0].axes
    assert len(reconstructed.lines) == 8
    assert len(sampled.lines) == 4
    assert sampled.get_ylim() == reconstructed.get_ylim()


def test_names_of_kinds_that_lie_on_each_other_and_of_many_are_left_to_their_colours():
    x = torch.randn(40, 6)
    one_place = compare_latents([vae(2)], [(x.repeat(2, 1), torch.arange(80) // 40)]).subfigs[0]
    assert [text.get_text() for text in one_place.axes[0].texts] == []
    many = compare_latents([vae(2)], [(x, torch.arange(40))])
    assert many.subfigs[0].axes[-1].get_ylabel() == "label"
    assert many.legends == []


def test_a_long_name_is_wrapped():
    figure = compare_latents({"word " * 20: vae(2)}, batches())
    assert max(map(len, figure.subfigs[0].get_suptitle().splitlines())) <= 36


def test_labels_come_from_mappings_and_from_pairs():
    pairs = [(batch["x"], batch["label"]) for batch in batches()]
    one, other = (compare_latents([vae(2)], each).subfigs[0].axes[0] for each in (pairs, batches()))
    assert len(one.collections) == len(other.collections) == 4


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_any_space_can_be_drawn(latent_dim, labelled, projection):
    (points,) = drawn(compare_latents([vae(latent_dim)], batches(labelled=labelled), 30, projection))
    assert points.shape == (30, 2)
    assert points.isfinite().all()


@pytest.mark.parametrize(
    ("models", "loader", "projection", "message"),
    [
        ([], batches(), "pca", "`models` must hold"),
        ([vae(2)], [], "pca", "`loader` must hold at least 2"),
        ([vae(2)], [torch.zeros(1, 6)], "pca", "`loader` must hold at least 2"),
        ({"good": vae(2), "bad": vae(2, (5,))}, batches(), "pca", "'bad' does not take these data"),
        ([vae(2)], batches(), "umap", "`projection` must be 'pca' or 'tsne'"),
    ],
)
def test_what_can_not_be_compared_is_an_error(models, loader, projection, message):
    with pytest.raises(ValueError, match=message):
        compare_latents(models, loader, projection=projection)


def test_another_model_is_refused_by_its_name():
    with pytest.raises(TypeError, match=r"'theirs' must be a lightning_vae.VAE, got Linear"):
        compare_latents({"ours": vae(2), "theirs": torch.nn.Linear(6, 2)}, batches())


def test_a_comparison_leaves_the_models_as_they_were():
    model = vae(2).train()
    state = torch.get_rng_state()
    compare_latents([model], batches())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_the_rate_distortion_figure_shows_points_bound_and_betas():
    points = [CurvePoint(2.0, 5.0, 0.1, 0.2, "β 1"), CurvePoint(1.0, 7.0, note="β 4")]
    axes = rate_distortion({"linear": points}, bound=([0.0, 3.0], [9.0, 4.0])).axes[0]
    shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([0.0, 3.0], [9.0, 4.0]) in shown
    assert ([1.0, 2.0], [7.0, 5.0]) in shown
    assert [text.get_text() for text in axes.texts] == ["β 4", "β 1"]
    assert "nats" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()
    assert math.isfinite(axes.get_ylim()[0])


def test_points_of_one_seed_have_no_bars():
    several, one = [CurvePoint(2.0, 5.0, 0.1, 0.2), CurvePoint(1.0, 7.0)], [CurvePoint(3.0, 4.0), CurvePoint(1.0, 8.0)]
    figure = rate_distortion({"several": several, "one": one})
    barred, plain = figure.axes[0].containers
    drawn = [torch.tensor(each) for bars in barred.lines[2] for each in bars.get_segments() if len(each)]
    assert sorted(float(each.diff(dim=0).norm()) for each in drawn) == pytest.approx([0.2, 0.4])
    assert (plain.has_xerr, plain.has_yerr) == (False, False)


def test_long_names_take_no_width_from_the_rate_distortion_figure():
    points = [CurvePoint(2.0, 5.0), CurvePoint(1.0, 7.0)]
    short = rate_distortion({"a": points, "b": points})
    long = rate_distortion({f"{'/folder' * 30}/version_{number}/best.ckpt": points for number in range(2)})
    for figure in (short, long):
        figure.draw_without_rendering()
        assert figure.legends[0].get_window_extent().y1 < figure.axes[0].get_window_extent().y0
        assert figure.legends[0].get_window_extent().width < figure.bbox.width
    widths = [figure.axes[0].get_window_extent().width for figure in (short, long)]
    assert widths[1] == pytest.approx(widths[0])
    assert long.legends[0].get_texts()[1].get_text().replace("\n", "").endswith("/version_1/best.ckpt")
