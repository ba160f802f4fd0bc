"""The test suite's own rules, and the checks of .ci/run."""

import os
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml

from tests.conftest import pytest_collection_modifyitems
from tests.doubles import quiet_trainer

ROOT = Path(__file__).parent.parent


def test_lightnings_hint_at_srun_is_no_error(tmp_path, monkeypatch):
    """The login node of a cluster has `srun` on its PATH."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    quiet_trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="The `srun` command is available"):
            quiet_trainer(tmp_path)


class Case:
    """A collected test with a mark `sampled(n)`."""

    def __init__(self, nodeid, n=None):
        self.nodeid, self.n, self.marks = nodeid, n, []
        self.add_marker = self.marks.append

    def get_closest_marker(self, name):
        return pytest.mark.sampled(self.n).mark if self.n and name == "sampled" else None


def test_the_default_run_samples_each_function_evenly():
    cases = [Case(f"test_a[{number}]", 2) for number in range(6)] + [Case("test_b[0]", 2), Case("test_c[0]")]
    pytest_collection_modifyitems(cases)
    assert [case.nodeid for case in cases if not case.marks] == ["test_a[0]", "test_a[3]", "test_b[0]", "test_c[0]"]
    assert all(case.marks == ["exhaustive"] for case in cases if case.marks)


def test_ci_checks_what_pre_commit_checks():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(any(line.startswith(hook["entry"]) for line in commands) for hook in repo["hooks"])


def test_a_new_file_must_be_given_its_place_in_the_rule_of_imports():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert all(contract["exhaustive"] for contract in contracts if contract["type"] == "layers")
    callbacks = next(each for each in contracts if "lightning_vae.datamodules" in each.get("source_modules", ()))
    rest = {path.stem for path in (ROOT / "lightning_vae").iterdir()} - {"callbacks", "configs", "datamodules", "py"}
    rest = {name for name in rest if not name.startswith("_")}
    assert set(callbacks["forbidden_modules"]) == {f"lightning_vae.{name}" for name in rest}


def test_the_benchmark_of_a_step_counts_every_file_that_the_vaes_hooks_are_in(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from speed import part_of

    for name in ("vae", "module", "knobs", "checkpoints/exact_resume"):
        file = ROOT / "lightning_vae" / f"{name}.py"
        hook = file.read_text().partition("def on_")[2].partition("(")[0]
        assert part_of(file, f"on_{hook}") == "the VAE's hooks"
    assert part_of(ROOT / "lightning_vae" / "checkpoints" / "guards.py", "on_fit_start") == "resuming and saving"
