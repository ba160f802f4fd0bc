import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy so that the checkout stays clean."""
    copy, dist = tmp_path_factory.mktemp("copy") / "checkout", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", "logs", "data", "build", "*.egg-info", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    build = f"import setuptools.build_meta as b; b.build_sdist({str(dist)!r}); b.build_wheel({str(dist)!r})"
    python("-W", "ignore", "-c", build, cwd=copy)
    return next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))


def test_the_wheel_holds_the_three_folders_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel[0]).namelist() if ".dist-info/" not in name}
    expected = {f"{target}/{path.name}" for target, folder in FOLDERS.items() for path in (ROOT / folder).glob("*.py")}
    assert names == expected | {"lightning_vae/py.typed"}


def test_the_sdist_has_what_a_wheel_is_built_from(wheel):
    with tarfile.open(wheel[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "callbacks/kl_annealing.py", "datamodules/digits.py",
            "train.py", "configs/digits.yaml"} <= names  # fmt: skip


def test_the_wheel_works_beside_a_project_with_callbacks_of_its_own(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path / "site")
    project = tmp_path / "project"
    (project / "callbacks").mkdir(parents=True)
    (project / "callbacks" / "__init__.py").write_text("OWN = True\n")
    script = (
        "import sys; sys.path.append(sys.argv[1]); import callbacks, lightning_vae.callbacks as ours;"
        "assert callbacks.OWN; print(ours.__file__, ours.KLAnnealing.__name__)"
    )
    assert str(tmp_path / "site") in python("-c", script, str(tmp_path / "site"), cwd=project)


def test_importing_the_callbacks_is_light():
    heavy = "{'torchvision', 'sklearn', 'matplotlib', 'jsonargparse', 'lightning_vae.vae', 'lightning_vae.datamodules'}"
    script = (
        "import sys, lightning.pytorch, pytorch_lightning; before = set(sys.modules);"
        f"import lightning_vae.callbacks; print(({heavy} & set(sys.modules)) - before)"
    )
    assert python("-c", script, cwd=ROOT).strip() == "set()"


def test_a_copied_callbacks_folder_works_under_another_name(tmp_path):
    shutil.copytree(ROOT / "callbacks", tmp_path / "mine" / "vae_tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mine" / "__init__.py").touch()
    script = (
        "import sys; from mine.vae_tools import KLAnnealing, Linear;"
        "print(KLAnnealing(Linear(steps=3, stop=1)).state_key);"
        "assert not any(name.startswith('lightning_vae') for name in sys.modules)"
    )
    assert "KLAnnealing" in python("-c", script, cwd=tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.stem)
def test_callbacks_import_the_base_install_and_their_siblings_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            assert not isinstance(node, ast.ImportFrom) or node.level == 1
            continue
        assert {name.partition(".")[0] for name in names} <= BASE_INSTALL


def test_the_module_does_not_know_the_callbacks():
    for path in (ROOT / "lightning_vae").glob("*.py"):
        if path.stem != "cli":
            imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            assert not any("callbacks" in (node.module or "") for node in imported if node.level), path
