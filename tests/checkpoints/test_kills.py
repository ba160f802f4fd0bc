"""A handful of the kills that ``benchmarks/kills.py`` counts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("option", "saves", "others"),
    [
        ("--every=4", 2, 1),
        pytest.param("--every=4", 5, 3, marks=pytest.mark.exhaustive),  # one at each place but the random one
        pytest.param("--in-steps", 5, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_is_killed_in_its_saves_loses_nothing(option, saves, others, tmp_path):
    """TMPDIR is on another filesystem than the run, in memory, where the system has such a folder."""
    temporary = "/dev/shm" if Path("/dev/shm").is_dir() else tmp_path
    ended = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kills.py", f"--saves={saves}", f"--others={others}", "--epochs=12",
         option, f"--temporary={temporary}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen = dict(re.findall(r"^(\S.*\S) +(\S+)$", ended.stdout, re.MULTILINE))
    assert (seen["kills in all"], seen["of them in a save"]) == (str(saves + others), str(saves))
    assert seen["exit code of the last attempt"] == "0"
    assert int(seen["steps lost by a kill, at most"]) <= int(seen["steps from a save to the next"])
    for name in ("damaged checkpoints", "files left over", "points missing", "points too many"):
        assert seen[name] == "0", name
    for name in ("same curves", "same parameters", "same optimizer"):
        assert seen[name] == "True", name
