"""Write files atomically."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_HOST = re.sub(r"\W", "_", platform.node())
_PART = re.compile(r"\..+\.(?P<host>\w+)-(?P<pid>\d+)\.part")
_ABANDONED = 3600.0  # seconds without a write, for files of other machines


@contextmanager
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces the target once it is complete and on disk; until then the old file stays.

    The new file is written in the same folder: a rename is atomic only within one filesystem, and the folder for
    temporary files may be on another. Half-written files of killed processes are removed.

    Args:
        target: Path of the final file. Folders are created as needed.

    Yields:
        The file, open for bytes.

    Raises:
        OSError: If it can't be written; no partial file is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.with_name(f".{target.name}.{_HOST}-{os.getpid()}.part")
    try:
        with part.open("wb", buffering=1 << 20) as file:  # torch makes a separate write for each tensor
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may keep the new name and lose the content
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network filesystems without fsync on folders
                raise
        finally:
            os.close(folder)


def _sweep(folder: Path) -> None:
    for part in folder.glob(".*.part"):
        with suppress(FileNotFoundError):
            if (match := _PART.fullmatch(part.name)) and _is_abandoned(part, match["host"], int(match["pid"])):
                part.unlink()


def _is_abandoned(part: Path, host: str, pid: int) -> bool:
    if host != _HOST or os.name != "posix":
        return time.time() - part.stat().st_mtime > _ABANDONED
    try:
        with suppress(PermissionError):  # the process of another user
            os.kill(pid, 0)  # checks that the process exists; sends nothing
    except ProcessLookupError:
        return True
    return False
