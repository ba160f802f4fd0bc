"""README and the pages of the documentation: their commands, imports, files and links exist, and README's code runs."""

import re
import shlex
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_vae import VAE
from lightning_vae.cli.vae_cli import VAECLI
from lightning_vae.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
# One command a line or between backticks; a backslash continues it, and `#` starts a remark.
JOINED = re.sub(r"\\\n\s*", "", TEXT)
COMMANDS = sorted(set(re.findall(r"^ *(python .*)$|`(python [^`\n]+)`", JOINED, flags=re.MULTILINE)))
COMMANDS = [one or other for one, other in COMMANDS]


def test_the_two_commands_of_the_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    train = 'python -m pip install -e ".[train]" && python train.py fit --config configs/digits.yaml'
    assert lines.count(train) == 1
    assert lines.count('python -m pip install -e ".[test]" && python -m pytest') == 1
    assert lines.index(train) < 40


@pytest.mark.sampled(10)
# `labelled.yaml` is a file of the architecture page, which a test of its own writes and trains.
@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if "train.py" in line and " pip " not in line and "labelled" not in line]
)
def test_commands_of_the_command_line_parse(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(ROOT)
    # A checkpoint need not be there to see that the command is well formed, and the shell takes what follows `>`.
    command = re.sub(r"--(ckpt_path|same_run) \S+| > \S+", "", command)
    command = re.sub(r"logs/\S+/config.yaml", "configs/digits.yaml", command)  # that of a run, which need not be there
    _, script, *arguments = shlex.split(command, comments=True)
    assert (ROOT / script).exists()
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help" if arguments[0] == "auroc" else "--print_config"])
    assert exit_.value.code == 0, capsys.readouterr().err


class FirstStepError(BaseException):
    """Raised in place of the first step; the command line handles no such error."""


# Those that need no data of the reader's, no earlier run and no second process.
TRAININGS = [
    line
    for line in COMMANDS
    if re.search(r"fit --config configs/(digits|collapse|linear)\.yaml", line)
    and not re.search("devices|num_nodes|ckpt_path|labelled|print_config|precision", line)
]


@pytest.mark.sampled(8)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", TRAININGS)
def test_trainings_reach_their_first_step(command, tmp_path, monkeypatch):
    def reached(*_):
        raise FirstStepError

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(VAE, "training_step", reached)
    monkeypatch.chdir(ROOT)
    short = f"--trainer.logger.save_dir {tmp_path} --trainer.enable_progress_bar false"
    arguments = shlex.split(command.partition("train.py ")[2], comments=True)
    with pytest.raises(FirstStepError):
        main([*arguments, *shlex.split(short)])


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python benchmarks/")])
def test_benchmarks_exist(command):
    assert (ROOT / shlex.split(command, comments=True)[1]).is_file()


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text()):
            path = target[0] or target[1]
            assert path.startswith("https://") or (page.parent / path).exists(), (page.name, path)


# What a page names in the repository, and what it imports from the package.
FILES = sorted(set(re.findall(r"(?<![\w/.])(?:tests|benchmarks|callbacks|configs|datamodules)/[\w/]+\.\w+", TEXT)))
IMPORTS = sorted(set(re.findall(r"^from lightning_vae[\w.]* import .*$", TEXT, flags=re.MULTILINE)))


def test_files_that_the_pages_name_exist():
    assert [path for path in FILES if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("line", IMPORTS)
def test_names_that_the_pages_import_exist(line):
    exec(line, {})


@pytest.mark.filterwarnings("ignore:FreeBits.* the run is too short")
def test_the_new_term_of_the_architecture_page_is_trained_annealed_and_saved(tmp_path, monkeypatch):
    page = (ROOT / "docs/architecture.md").read_text().partition("### An example: a new term")[2]
    for kind, name in (("python", "label_loss.py"), ("yaml", "labelled.yaml")):
        (tmp_path / name).write_text(re.search(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)[1])
    command = re.search(r"```bash\npython train.py (.*?)\n```", page)[1].replace("labelled", str(tmp_path / "labelled"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)
    short = f"--trainer.max_epochs 10 --trainer.logger.save_dir {tmp_path} --trainer.enable_progress_bar false"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    trainer = VAECLI(shlex.split(f"{command} {short}")).trainer
    found = trainer.callback_metrics
    assert float(found["train/term_labels"]) < 2.0  # log 10 is 2.3
    loss = found["val/distortion"] + found["val/floored_rate"] + 5 * found["val/term_labels"]
    assert float(found["val/loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(found["knobs/labels_weight"]) == 5.0
    vae = trainer.lightning_module
    [saved] = tmp_path.rglob("last.ckpt")
    loaded = type(vae).load_from_checkpoint(saved)
    assert torch.equal(loaded.terms["labels"].classifier.weight, vae.terms["labels"].classifier.weight.cpu())


def test_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


class TheirModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.kl_weight, self.free_bits = 1.0, 0.0
        self.fc_mu, self.fc_var, self.decoder = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(3, 6)


class TheirModule(pl.LightningModule):
    """Somebody's own VAE, as README's example supposes it."""

    def __init__(self):
        super().__init__()
        self.model = TheirModel()

    def training_step(self, batch, batch_idx):
        from lightning_vae import free_bits

        mean, log_variance = self.model.fc_mu(batch), self.model.fc_var(batch)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
        reconstruction = F.mse_loss(self.model.decoder(z), batch, reduction="sum") / len(batch)
        return reconstruction + self.model.kl_weight * free_bits(kl, self.model.free_bits)

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("ignore:FreeBits", "ignore:CollapseDetector")
def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = torch.utils.data.DataLoader(torch.randn(40, 6), batch_size=10)  # type: ignore[arg-type]
    quiet = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    namespace = {"module": TheirModule(), "loader": loader, "quiet": quiet}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        if "class " in block or "VAE(" in block or "..." in block:
            continue
        exec(block.replace("Trainer(", "Trainer(**quiet, "), namespace)
    assert namespace["module"].model.kl_weight == 1.0
    assert namespace["module"].model.free_bits == 0.5
