"""Files that are whole or not there."""

import errno
import os
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from lightning_vae.checkpoints.atomic_write import _HOST, atomic_write


def test_a_file_appears_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append((name, args)), real(*args)))
    with atomic_write(tmp_path / "new" / "file") as file:
        file.write(b"whole")
        assert not (tmp_path / "new" / "file").exists()
    assert [name for name, _ in calls] == ["fsync", "replace", "fsync"]  # of the file, and then of its folder
    part, target = calls[1][1]
    assert part.parent == target.parent
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with suppress(KeyboardInterrupt), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parts = {name: tmp_path / f".x.ckpt.{name}.part" for name in (
        f"{_HOST}-{dead.pid}", f"{_HOST}-{os.getppid()}", f"{_HOST}-1", "elsewhere-7", "elsewhere-8"
    )}  # fmt: skip
    for path in (*parts.values(), tmp_path / ".not_ours.part"):
        path.touch()
    os.utime(parts["elsewhere-8"], (0, 0))
    with atomic_write(tmp_path / "y.ckpt"):
        pass
    gone = {name for name, path in parts.items() if not path.exists()}
    assert gone == {f"{_HOST}-{dead.pid}", "elsewhere-8"}
    assert (tmp_path / ".not_ours.part").exists()


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_knows_no_flushing_is_no_fault_and_a_failing_disk_is(
    code: int, raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, "no")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    with pytest.raises(OSError, match="no") if raises else nullcontext(), atomic_write(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
