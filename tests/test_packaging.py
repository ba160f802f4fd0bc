import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch

import lightning_vae
from lightning_vae.callbacks import base
from lightning_vae.version import OLDEST

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "lightning_vae": "lightning_vae",
    "lightning_vae/callbacks": "callbacks",
    "lightning_vae/datamodules": "datamodules",
}
# What the callbacks may import at the top: what the base install has, and the standard library.
BASE_INSTALL = {
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
    "torchmetrics",
    "typing_extensions",
    "lightning_utilities",
} | sys.stdlib_module_names


def python(*arguments, cwd):
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(kind, target, cwd):
    """Build as pip does, but for the environment of its own."""
    python("-W", "ignore", "-c", f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})", cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy so that the checkout stays clean."""
    copy, dist = tmp_path_factory.mktemp("copy") / "checkout", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", "logs", "data", "build", "*.egg-info", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    build("sdist", dist, cwd=copy)
    build("wheel", dist, cwd=copy)
    return next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))


def contents(wheel):
    archive = zipfile.ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_one_name_at_its_top(wheel):
    assert {re.sub("-.*[.]", ".", name.partition("/")[0]) for name in contents(wheel[0])} == {
        "lightning_vae",
        "lightning_vae.dist-info",
    }


def modules(inside):
    """Each Python file of the folders, under its name inside an archive: every sub-package is among them."""
    return {
        f"{target if inside == 'wheel' else folder}/{path.relative_to(ROOT / folder)}"
        for target, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }


CONFIGS = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}


def test_the_wheel_holds_the_three_folders_and_the_configs_and_nothing_else(wheel):
    names = {name for name in contents(wheel[0]) if ".dist-info/" not in name}
    assert names == modules("wheel") | {"lightning_vae/py.typed"} | {f"lightning_vae/{config}" for config in CONFIGS}


def test_the_sdist_has_what_a_wheel_is_built_from(wheel):
    with tarfile.open(wheel[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert modules("sdist") | CONFIGS | {"pyproject.toml", "README.md", "LICENSE", "train.py"} <= names


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(wheel[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    build("wheel", tmp_path, cwd=unpacked)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel[0].name
    assert contents(again) == contents(wheel[0])


@pytest.mark.exhaustive
def test_the_wheel_works_beside_folders_of_the_same_names(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path / "site")
    project = tmp_path / "project"
    for folder in ("callbacks", "datamodules"):
        (project / folder).mkdir(parents=True)
        (project / folder / "__init__.py").write_text("OWN = True\n")
    script = (
        "import sys; sys.path.insert(1, sys.argv[1]); import callbacks, datamodules, lightning_vae.callbacks as ours;"
        "from lightning_vae.datamodules import Digits; assert callbacks.OWN and datamodules.OWN; print(ours.__file__)"
    )
    assert str(tmp_path / "site") in python("-c", script, str(tmp_path / "site"), cwd=project)


@pytest.mark.exhaustive
def test_the_configs_of_a_wheel_are_found_by_name_from_any_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path / "site")
    script = "import sys; sys.path.insert(1, sys.argv.pop(1)); from lightning_vae.main import main; main()"
    arguments = ["fit", "--config", "digits", "--config=configs/overlays/annealed.yaml", "--print_config"]
    printed = python("-c", script, str(tmp_path / "site"), *arguments, cwd=tmp_path)
    assert "Digits" in printed
    assert "KLAnnealing" in printed


def test_importing_the_callbacks_is_light():
    heavy = "{'torchvision', 'sklearn', 'matplotlib', 'jsonargparse', 'lightning_vae.vae', 'lightning_vae.datamodules'}"
    script = (
        "import sys, lightning.pytorch, pytorch_lightning; before = set(sys.modules);"
        f"import lightning_vae.callbacks; print(({heavy} & set(sys.modules)) - before)"
    )
    assert python("-c", script, cwd=ROOT).strip() == "set()"


def test_what_the_package_offers_is_listed():
    assert {"VAE", "compare_latents", "evaluate", "free_bits"} <= set(dir(lightning_vae))


# A project that has copied the folder: its arguments are the package it trains with and those it can't import.
PROJECT = """
import sys
from importlib import import_module

package, *missing = sys.argv[1:]


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
pl = import_module(package)

import torch
from torch.distributions import Normal, kl_divergence
from mine.vae_tools import CollapseDetector, FreeBits, KLAnnealing, Linear


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(2, 4), torch.nn.Linear(2, 2)
        self.beta, self.free_bits, self.posterior, self.used = 1.0, 0.0, None, []

    def training_step(self, batch, batch_idx):
        self.used.append((self.beta, self.free_bits))
        mean, log_variance = self.encoder(batch).chunk(2, -1)
        self.posterior = Normal(mean, log_variance.exp().sqrt())
        rates = kl_divergence(self.posterior, Normal(0.0, 1.0)).mean(0).clamp(min=self.free_bits)
        return (self.decoder(mean) - batch).square().sum(-1).mean() + self.beta * rates.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


model = Model()
trainer = pl.Trainer(
    callbacks=[KLAnnealing(Linear(steps=4)), FreeBits(0.25), CollapseDetector()],
    accelerator="cpu", max_epochs=2, log_every_n_steps=1,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(model, torch.utils.data.DataLoader(torch.randn(12, 2), 4))
assert not set(missing) & set(sys.modules), missing
print(model.used, sorted(trainer.callback_metrics))
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("package", "missing"),
    [("lightning.pytorch", ["pytorch_lightning"]), ("pytorch_lightning", ["lightning"]), ("pytorch_lightning", [])],
    ids=["lightning alone", "pytorch_lightning alone", "both"],
)
def test_a_copied_callbacks_folder_trains_under_another_name(package, missing, tmp_path):
    shutil.copytree(ROOT / "callbacks", tmp_path / "mine" / "vae_tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mine" / "__init__.py").touch()
    used = [(step / 4, 0.25) for step in range(4)] + [(1.0, 0.25)] * 2
    keys = ["collapse/alarm", "knobs/beta", "knobs/free_bits", "latent/active_fraction", "latent/active_units",
            "latent/at_floor", "latent/marginal_kl", "latent/mutual_information", "latent/rate"]  # fmt: skip
    assert python("-c", PROJECT, package, "lightning_vae", *missing, cwd=tmp_path).strip() == f"{used} {keys}"


def test_the_oldest_versions_are_those_that_the_package_declares():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split("[><=]", each)[0]: re.search(r">=([\d.]+)", each)[1] for each in dependencies}
    assert {name: declared[name] for name in OLDEST} == OLDEST
    oldest = {"torch": declared["torch"]} | dict.fromkeys(
        ("lightning.pytorch", "pytorch_lightning"), declared["lightning"]
    )
    assert oldest == base._OLDEST


@pytest.mark.parametrize(("package", "installed"), [("lightning", "1.9.5"), ("torch", "2.5.1+cu121")])
def test_importing_the_package_names_what_is_too_old(package, installed):
    script = (
        "import importlib.metadata as metadata; version = metadata.version;"
        f"metadata.version = lambda name: {installed!r} if name == {package!r} else version(name);"
        "import lightning_vae"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    needed = f"lightning_vae needs {package} {OLDEST[package]} or newer, but {installed} is installed"
    assert result.stderr.splitlines()[-1].startswith(f"ImportError: {needed}")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning", "torch"])
def test_a_copied_callbacks_folder_names_what_is_too_old(package, tmp_path):
    """Set a version back; of a Lightning there is nothing else, as its names must not be read before that."""
    shutil.copytree(ROOT / "callbacks", tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    script = f"""
import sys, types, torch
for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
    sys.modules[name] = None
if {package!r} == "torch":
    torch.__version__ = "2.5.1"
else:
    for name in ({package!r}.partition(".")[0], {package!r}):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__version__ = "1.9.5"
import mine
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    said = result.stderr.splitlines()[-1]
    found = "torch 2.5.1" if package == "torch" else f"{package} 1.9.5"
    assert said.startswith(
        "ImportError: These callbacks need torch 2.6 and lightning or pytorch_lightning 2.5, or newer"
    )
    assert found in said


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").rglob("*.py")), ids=lambda path: path.stem)
def test_callbacks_import_the_base_install_and_their_siblings_alone(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    within = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            assert not isinstance(node, ast.ImportFrom) or node.level <= len(path.relative_to(ROOT).parts) - 1
            continue
        # What takes long to import, or comes with tensorboard, is imported where it is needed.
        also = {"tensorboard", "PIL"} if node in within else set()
        assert {name.partition(".")[0] for name in names} <= BASE_INSTALL | also


def test_the_model_does_not_know_the_callbacks():
    for path in (ROOT / "lightning_vae").glob("*.py"):
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any("callbacks" in (node.module or "") for node in imported if node.level), path


# ---- the private names of Lightning's loops, connectors, callbacks and command line

MAY_NAME_THEM = {
    "callbacks/base.py",
    "lightning_vae/checkpoints/exact_resume.py",
    "lightning_vae/checkpoints/flush_loggers.py",
    "lightning_vae/checkpoints/last_checkpoint.py",
    "lightning_vae/cli/vae_cli.py",
}


def private_names(tree):
    """The private names that a file defines itself, and those that it uses, overrides or imports from Lightning."""
    defines, uses = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            given = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
            (defines if given else uses).add(node.attr)
        elif isinstance(node, ast.FunctionDef):
            (uses if "override" in map(ast.unparse, node.decorator_list) else defines).add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defines.add(node.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning."):
            uses.update(alias.name for alias in node.names)
    return defines, uses


def test_lightnings_private_names_are_in_few_files():
    lightning = Path(import_module("lightning.pytorch").__file__).parent
    parts = ("loops/**/*", "trainer/connectors/**/*", "trainer/trainer", "callbacks/*", "cli")
    text = "".join(path.read_text() for part in parts for path in lightning.glob(f"{part}.py"))
    theirs = set(re.findall(r"\b(?:def |class |self\.)(_(?!_)\w+)", text)) - set(dir(torch.nn.Module()))
    found = {
        str(path.relative_to(ROOT)): private_names(ast.parse(path.read_text()))
        for folder in FOLDERS.values()
        for path in (ROOT / folder).rglob("*.py")
    }
    theirs -= set.union(*(defines for defines, _ in found.values()))
    named = {path: uses & theirs for path, (_, uses) in found.items() if uses & theirs}
    assert {path: names for path, names in named.items() if path not in MAY_NAME_THEM} == {}
    assert named["callbacks/base.py"] >= {"_batches_that_stepped", "_generate_state_key", "_should_accumulate"}
    assert "_logger_connector" in named["lightning_vae/checkpoints/flush_loggers.py"]
