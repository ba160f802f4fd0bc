import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_vae import VAE
from lightning_vae.cli.checkpoint_checks import read_checkpoint, warn_of_other_data_set
from lightning_vae.cli.vae_cli import VAECLI, Unrun
from lightning_vae.datamodules import Images
from lightning_vae.main import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DIGITS = ["--config", str(ROOT / "configs" / "digits.yaml")]
SHORT = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=5", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false"]  # fmt: skip

# Two epochs are too short for the latents to be used, which the callbacks rightly say.
pytestmark = [pytest.mark.filterwarnings("ignore:FreeBits"), pytest.mark.filterwarnings("ignore:CollapseDetector")]


class OwnEncoder(nn.Module):
    def __init__(self, shape, latent_dim, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * latent_dim))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run of the main job, which several tests look at."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        main(["fit", *DIGITS, *SHORT, "--model.beta=0.5"])
    return folder / "logs" / "digits" / "version_0"


def scalars(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_whole(config, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(config), "--print_config"])
    assert exit_.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"] == "lightning_vae.VAE"
    assert "shape" not in yaml.safe_load(config.read_text())["model"]["init_args"]


def test_fit_leaves_logs_a_checkpoint_and_its_config(run):
    curves = scalars(run)
    assert {"train/elbo", "train/rate", "val/loss", "knobs/beta", "latent/active_units"} <= curves.keys()
    assert (run / "checkpoints" / "best.ckpt").is_file()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["beta"] == 0.5


def test_fit_ends_by_saying_where_everything_is(capsys):
    main(["fit", *DIGITS, *SHORT])
    printed = capsys.readouterr().out
    assert "Run:        logs/digits/version_0" in printed
    assert re.search(r"At the end: ELBO -\d+\.\d+, rate .*, distortion .* nats, \d+ of 16 units active", printed)
    assert "Checkpoint: logs/digits/version_0/checkpoints/best.ckpt  (val/loss " in printed
    assert "Look at it: tensorboard --logdir logs" in printed


def test_a_run_of_the_command_line_loads_without_another_argument(run):
    vae = VAE.load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert (vae.shape, vae.levels, vae.beta.item()) == ((1, 8, 8), 17, 0.5)
    assert vae.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("encoder", ["ConvEncoder", f"{__name__}.OwnEncoder"])
def test_networks_by_class_path_load_too(encoder):
    main(["fit", *DIGITS, *SHORT, f"--model.encoder={encoder}"])
    vae = VAE.load_from_checkpoint("logs/digits/version_0/checkpoints/best.ckpt", weights_only=True)
    assert type(vae.encoder).__name__ == encoder.rpartition(".")[2]


def test_the_data_tell_the_model_their_shape():
    main(["fit", "--config", str(ROOT / "configs" / "linear.yaml"), *SHORT, "--data.eigenvalues=[3, 2, 1]",
          "--data.size=512", "--model.latent_dim=2"])  # fmt: skip
    vae = VAE.load_from_checkpoint("logs/linear/version_0/checkpoints/best.ckpt", weights_only=True)
    assert (vae.shape, vae.levels) == ((3,), None)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_each_beta_of_an_annealed_config_ends_at_its_own(beta):
    main(["fit", *DIGITS, *SHORT, f"--model.beta={beta}", "--trainer.max_epochs=4"])
    path = "logs/digits/version_0/checkpoints/last.ckpt"
    assert VAE.load_from_checkpoint(path, weights_only=True).beta.item() == pytest.approx(beta)
    curve = [value for _, value in scalars("logs/digits/version_0")["knobs/beta"]]
    assert curve[0] < curve[1]
    assert curve[-3:] == pytest.approx([beta] * 3)


def test_validation_of_a_checkpoint(run, capsys):
    main(["validate", *DIGITS, *SHORT, "--model.beta=0.5", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])
    assert "val/loss" in capsys.readouterr().out


def own_metric(vae, loader) -> float:
    return vae.latent_dim + sum(len(batch["x"]) for batch in loader) / 1000


def test_test_leaves_a_table_json_and_pictures(run, capsys):
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    own = f"--evaluation.metrics={{own_metric: {__name__}.own_metric}}"
    main(["test", *DIGITS, *SHORT, "--model.beta=0.5", checkpoint, own, "--evaluation.importance_samples=3"])
    printed = capsys.readouterr().out
    folder = Path("logs/digits/version_0")
    assert f"Written:  {folder}/evaluation.json, reconstructions.png, samples.png" in printed
    assert "3 importance samples" in printed
    assert re.search(r"own_metric +16\.3\b", printed)
    assert "Verdict: " in printed
    written = json.loads((folder / "evaluation.json").read_text())
    assert written["own_metric"] == 16.297
    assert (written["observations"], written["beta"], len(written["rate_per_dimension"])) == (297, 0.5, 16)
    assert written["importance_samples"] == 3
    logged = scalars(folder)
    assert logged["test/nll"][0][1] == pytest.approx(written["nll"])
    assert logged["test/elbo"][0][1] == pytest.approx(written["elbo"], abs=0.5)  # other samples of the posterior
    assert [len(logged[f"test/{name}"]) for name in ("elbo", "loss", "shuffled_gap")] == [1, 1, 1]
    for name in ("reconstructions", "samples"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size == (528, 528)


def test_without_a_logger_the_evaluation_is_printed_alone(run, capsys, tmp_path):
    checkpoint = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    with pytest.warns(UserWarning, match="only printed"):
        main(["test", *DIGITS, *SHORT, "--model.beta=0.5", checkpoint, "--trainer.logger=false"])
    assert "Verdict: " in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.exhaustive
def test_two_processes_evaluate_as_one(run, tmp_path):
    options = [*DIGITS, *SHORT, "--model.beta=0.5", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"]
    main(["test", *options, "--evaluation.importance_samples=2"])
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "test", *options, "--evaluation.importance_samples=2",
         "--trainer.devices=2", "--trainer.strategy=ddp"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Verdict: ") == 1
    one, two = (json.loads(Path(f"logs/digits/version_{n}/evaluation.json").read_text()) for n in range(2))
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-6)
    assert two["rate_per_dimension"] == pytest.approx(one["rate_per_dimension"], rel=1e-5)


def test_a_wrong_option_of_the_evaluation_ends_in_one_message(run, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["test", *DIGITS, *SHORT, "--model.beta=0.5", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}",
              "--evaluation.importance_samples=0"])  # fmt: skip
    assert exit_.value.code == 2
    assert "`importance_samples` must be at least 1, a whole number, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_evaluated(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, *DIGITS, *SHORT])
    assert exit_.value.code == 2
    assert f"`{command}` needs `--ckpt_path`" in capsys.readouterr().err


def test_predict_runs(run):
    main(["predict", *DIGITS, *SHORT, "--model.beta=0.5", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])


def test_optimizer_and_scheduler_come_from_the_config():
    main(["fit", *DIGITS, *SHORT, "--optimizer=SGD", "--optimizer.lr=1e-4", "--lr_scheduler=StepLR",
          "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.1"])  # fmt: skip
    checkpoint = torch.load("logs/digits/version_0/checkpoints/last.ckpt", weights_only=True)
    group = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert "momentum" in group
    assert group["initial_lr"] == 1e-4
    assert group["lr"] < 1e-4


def test_a_scheduler_runs_with_an_optimizer_that_needs_a_closure():
    main(["fit", *DIGITS, *SHORT, "--optimizer=LBFGS", "--optimizer.lr=1e-3", "--lr_scheduler=StepLR",
          "--lr_scheduler.step_size=1"])  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("overlay", sorted((ROOT / "configs" / "overlays").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["collapse", "collapse_variance"])
def test_every_overlay_adds_a_callback_to_a_config(base, overlay, capsys):
    base = ROOT / "configs" / f"{base}.yaml"
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(base), "--config", str(overlay), "--print_config"])
    assert exit_.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert len(callbacks) == len(yaml.safe_load(base.read_text())["trainer"]["callbacks"]) + 1


# ---- resuming


@pytest.mark.exhaustive
def test_resuming_starts_a_new_run_or_goes_on_in_the_same_one():
    options = ["fit", *DIGITS, "--trainer.log_every_n_steps=5", "--trainer.enable_progress_bar=false"]
    main([*options, "--trainer.max_epochs=4"])
    whole = scalars("logs/digits/version_0")
    checkpoint = "--ckpt_path=logs/digits/version_1/checkpoints/last.ckpt"

    main([*options, "--trainer.max_epochs=2"])
    with pytest.warns(UserWarning, match="the run was 44 steps long when it began and is 88"):
        main([*options, "--trainer.max_epochs=4", checkpoint])
    assert {path.name for path in Path("logs/digits").iterdir()} == {"version_0", "version_1", "version_2"}
    assert min(step for step, _ in scalars("logs/digits/version_2")["train/elbo"]) >= 44

    with pytest.warns(UserWarning, match="the run was 44 steps long"):
        main([*options, "--trainer.max_epochs=4", checkpoint, "--same_run=true"])
    assert {path.name for path in Path("logs/digits").iterdir()} == {"version_0", "version_1", "version_2"}
    resumed = scalars("logs/digits/version_1")
    for tag in ("train/elbo", "val/loss", "knobs/beta", "latent/active_units"):
        assert [step for step, _ in resumed[tag]] == [step for step, _ in whole[tag]], tag
    configs = {path.name for path in Path("logs/digits/version_1").glob("*.yaml")}
    assert {"config.yaml", "config-resumed-1.yaml"} <= configs
    config = yaml.safe_load(Path("logs/digits/version_1/config-resumed-1.yaml").read_text())
    assert config["trainer"]["logger"]["class_path"] == "lightning.pytorch.loggers.TensorBoardLogger"


def test_a_checkpoints_model_replaces_the_configs_and_says_so(run):
    path = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    with pytest.warns(UserWarning, match=r"not used: latent_dim 4 -> 16, beta 3.0 -> 0.5"):
        main(["validate", *DIGITS, *SHORT, path, "--model.beta=3", "--model.latent_dim=4"])


@pytest.mark.filterwarnings("ignore:.*steps long when it began")
def test_a_fit_that_goes_on_trains_at_the_beta_that_the_command_gives(run, tmp_path):
    options = ["fit", *DIGITS, *SHORT, "--model.beta=3", "--trainer.max_epochs=3"]
    options += [f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}", f"--trainer.logger.save_dir={tmp_path}"]
    with pytest.warns(UserWarning, match=r"saved with `beta=0\.5`; the run continues with `beta=3`"):
        main(options)
    (last,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(last, weights_only=True)
    assert (saved["lightning_vae"]["knob_values"]["beta"], saved["hyper_parameters"]["beta"]) == (3.0, 3.0)


def test_a_run_with_another_folder_goes_on_in_it(tmp_path):
    options = ["fit", *DIGITS, *SHORT, f"--trainer.logger.save_dir={tmp_path / 'elsewhere'}"]
    main(options)
    run = tmp_path / "elsewhere" / "digits" / "version_0"
    with pytest.warns(UserWarning, match="steps long when it began"):
        main([*options, "--trainer.max_epochs=3", f"--ckpt_path={run}/checkpoints/last.ckpt", "--same_run=true"])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2
    assert "hp_metric" not in scalars(run)


# A thread of gloo that lets go of a tensor while the interpreter ends would abort the process.
COMMAND = """
import atexit
import sys
from pathlib import Path

from lightning_vae.main import main


@atexit.register
def count():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    # In one piece: `print` would write two, and the other process's may come between.
    sys.stdout.write("gloo's threads: %d\\n" % sum("gloo" in name for name in names))


main()
main([*sys.argv[1:], "--trainer.max_epochs=1", "--trainer.logger=false"])  # which still needs the group
"""


@pytest.mark.exhaustive
def test_two_processes_from_the_command_line(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    result = subprocess.run(
        [sys.executable, "command.py", "fit", *DIGITS, *SHORT, "--trainer.devices=2", "--trainer.strategy=ddp"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gloo's threads: 0") == 2
    assert result.stdout.count("Look at it: tensorboard --logdir logs") == 1
    assert VAE.load_from_checkpoint("logs/digits/version_0/checkpoints/best.ckpt", weights_only=True).latent_dim == 16


# ---- what is wrong with the input


BROKEN = {
    "an unknown key": (["--model.betta=1"], "model: VAE has no option 'betta', only shape, "),
    "an unknown class": (["--data=Digitz"], "Did you mean Digits"),
    "a wrong type": (["--trainer.max_epochs=many"], "trainer.max_epochs: Expected a <class 'int'>, got many"),
    "a wrong type deep down": (["--model.encoder.hidden=x"], "model.encoder.hidden: Expected"),
    "a range only the constructor knows": (["--model.beta=-1"], "`beta` must be a finite number of at least 0"),
    "a likelihood's option": (
        ["--model.likelihood=Gaussian", "--model.likelihood.variance=-1"],
        "`variance` must be a positive number",
    ),
    "a layer of no images": (["--model.encoder=ConvEncoder", "--model.encoder.channels=[]"], "`channels` must list"),
    "a missing config": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "a missing checkpoint": (["--ckpt_path=nowhere.ckpt"], "there is no file 'nowhere.ckpt'"),
    "no run to go on with": (["--same_run=true"], "`--same_run` needs `--ckpt_path`"),
    "a monitor that moves": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"],
        "monitors 'train/loss', which moves",
    ),
    "a monitor the wrong way round": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/elbo"],
        "a higher ELBO is better",
    ),
    "a path that leads nowhere": (
        ["--trainer.callbacks+=KLAnnealing", "--trainer.callbacks.schedule=Linear",
         "--trainer.callbacks.schedule.steps=5", "--trainer.callbacks.attribute=bta"],
        "Did you mean 'beta'?",
    ),
    "a schedule without a length": (
        ["--trainer.callbacks+=KLAnnealing", "--trainer.callbacks.schedule=Linear"],
        "A length must be given as exactly one of `steps`",
    ),
    "a scheduler that minimises the elbo": (
        ["--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val/elbo"],
        "a higher ELBO is better",
    ),
    "data that are not there": (
        ["--data=MNIST", "--data.root=nowhere", "--data.download=false"],
        "nowhere",
    ),
}  # fmt: skip


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", BROKEN)
def test_wrong_input_ends_in_one_message_and_exit_code_2(case, capsys):
    arguments, message = BROKEN[case]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *DIGITS, *SHORT, *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error) < 500


@pytest.mark.filterwarnings("ignore:.*the model comes from the checkpoint", "ignore:.*whose scale adapts")
@pytest.mark.filterwarnings(
    "ignore:.*trained on Digits, but the data are Gaussian", "ignore:.*was saved with `beta=0.5`"
)
def test_a_broken_yaml_or_checkpoint_ends_likewise(run, capsys):
    configs = ROOT / "configs"
    Path("broken.yaml").write_text("model: [")
    whole = (run / "checkpoints" / "best.ckpt").read_bytes()
    Path("truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": 1}, "other.ckpt")
    Path("hello.ckpt").write_text("hello")
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    torch.save({key: value for key, value in saved.items() if key not in ("loops", "optimizer_states")}, "weights.ckpt")
    for arguments, message in (
        (["--config=broken.yaml"], "parsing"),
        ([*DIGITS, "--ckpt_path=other.ckpt"], "is not a checkpoint of a Lightning Trainer"),
        ([*DIGITS, "--ckpt_path=weights.ckpt"], "holds only weights"),
        ([*DIGITS, "--ckpt_path=truncated.ckpt"], "truncated.ckpt"),
        ([*DIGITS, "--ckpt_path=hello.ckpt"], "hello.ckpt"),
        (
            [f"--config={configs}/linear.yaml", f"--ckpt_path={run}/checkpoints/best.ckpt"],
            "does not fit the model that",
        ),
        ([*DIGITS, f"--config={configs}/overlays/annealed.yaml"], "two `KLAnnealing` would save"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["fit", *arguments])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.sampled(1)
@pytest.mark.parametrize("command", [[str(ROOT / "train.py")], ["-m", "lightning_vae"]])
def test_the_commands_themselves(command):
    result = subprocess.run(
        [sys.executable, *command, "fit", *DIGITS, *SHORT, "--model.beta=-1"],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert result.returncode == 2
    assert "`beta` must be" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_a_gpu_torch_need_not_look_for_one_at_each_step(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "to be put back")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


# ---- Lightning's private names

OVERRIDDEN = ("_prepare_subcommand_parser", "_parse_ckpt_path", "_instantiate_trainer", "_run_subcommand")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_private_method_of_lightning_cli_that_ours_overrides_is_there(name):
    theirs, ours = (inspect.signature(getattr(each, name)).parameters for each in (LightningCLI, VAECLI))
    assert list(theirs) == list(ours)


def test_lightning_cli_calls_the_private_methods_that_ours_overrides():
    called = set()

    class Watched(Unrun):
        pass

    for name in OVERRIDDEN:
        real = getattr(Unrun, name)

        def watched(self, *args, name=name, real=real, **kwargs):
            called.add(name)
            return real(self, *args, **kwargs)

        setattr(Watched, name, watched)
    Watched(["fit", *DIGITS])
    assert called == set(OVERRIDDEN)


def test_no_other_file_names_them():
    for folder in ("lightning_vae", "callbacks", "datamodules"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "vae_cli.py":
                assert not re.search("|".join(OVERRIDDEN), path.read_text()), path


@pytest.mark.parametrize("config", [["--config=linear"], ["-c", "configs/linear.yaml"], ["--config", "linear.yaml"]])
def test_a_config_of_the_package_is_found_by_its_name(config, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *config, "--config", "overlays/annealed", "--print_config"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "Gaussian" in printed
    assert "KLAnnealing" in printed


def test_a_file_comes_before_a_config_of_the_package(capsys):
    Path("linear.yaml").write_text("data: {class_path: Digits}")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "linear.yaml", "--print_config"])
    assert "Digits" in capsys.readouterr().out


def test_a_config_that_is_nowhere_lists_those_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "digts.yaml"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "`--config`: there is no file 'digts.yaml'. The package brings arrays, collapse, " in error
    assert " digits, " in error


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of 40 images, and a cache of one's own for what is remembered of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("RGB", (6, 6), (number, 0, 0)).save(tmp_path / "images" / f"{number:02}.png")
    return tmp_path / "images"


STREAMED = ["--data=Images", "--data.root=images", "--data.size=6", "--data.memory_budget=0", "--data.num_workers=0",
            "--data.batch_size=1", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu",
            "--trainer.logger=false", *SHORT]  # fmt: skip


def test_an_image_damaged_amid_a_streamed_epoch_is_one_message(images, capsys):
    Images("images", size=6).setup("fit")
    path = images / "07.png"
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-25] + bytes(25))
    os.utime(path, ns=(before, before))  # so it counts as checked
    with pytest.raises(SystemExit) as ended:
        main(["fit", *STREAMED])
    assert ended.value.code in (1, 2)
    error = capsys.readouterr().err
    assert "07.png can't be read as an image" in error
    assert "Traceback" not in error


def test_all_damaged_images_are_named_before_the_first_step(images, capsys):
    for number in range(0, 40, 2):
        path = images / f"{number:02}.png"
        path.write_bytes(path.read_bytes()[:-25])  # its header is sound
    with pytest.raises(SystemExit) as ended:
        main(["fit", *STREAMED])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "20 of 40 images can't be used" in error
    assert error.count(".png can't be read as an image") == 20
    assert "Traceback" not in error


def test_a_path_in_a_config_may_begin_with_the_home_folder(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    images.rename(tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    (tmp_path / "home" / "run.yaml").write_text(
        """
        data: {class_path: Images, init_args: {root: ~/, size: 6, batch_size: 8}}
        model: {init_args: {latent_dim: 2}}
        trainer: {accelerator: cpu, limit_val_batches: 0, logger: {class_path: TensorBoardLogger, init_args:
          {save_dir: ~/logs}}, callbacks: [{class_path: LatentsWriter, init_args: {path: ~/latents.csv}}]}
        """.replace("LatentsWriter", "lightning_vae.evaluation.latents_writer.LatentsWriter")
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    main(["fit", "--config=~/run.yaml", *SHORT])
    run = tmp_path / "home" / "logs" / "lightning_logs" / "version_0"
    assert list((run / "checkpoints").glob("*.ckpt"))
    with pytest.raises(SystemExit):
        main(["fit", "--config=~/run.yaml", "--ckpt_path=last", "--same_run=true", *SHORT])
    assert f"{run} has finished" in capsys.readouterr().out
    main(["predict", "--config=~/run.yaml", "--ckpt_path=~/logs/lightning_logs/version_0", *SHORT[1:]])
    assert (tmp_path / "home" / "latents.csv").is_file()
    assert not list(elsewhere.iterdir())


def test_a_checkpoint_of_another_data_set_is_said(run):
    with pytest.warns(UserWarning, match="the checkpoint was trained on Digits, but the data are MNIST"):
        warn_of_other_data_set(read_checkpoint(str(run / "checkpoints" / "last.ckpt"), False), "some.path.MNIST")
