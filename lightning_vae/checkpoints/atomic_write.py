"""Write a file so that under its name there is never half of it."""

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
_ABANDONED = 3600.0  # seconds without a write, for those of other machines


@contextmanager
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name once it is whole and on the disk; until then the old one stays.

    It is written beside its place: a rename is atomic within one filesystem alone, and the folder for temporary files
    may lie on another. What processes that were killed have left half-written is removed.

    Args:
        target: Where it is to appear. Folders are made as needed.

    Yields:
        The file, open for bytes.

    Raises:
        OSError: If it can't be written; nothing of it is left then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    part = target.with_name(f".{target.name}.{_HOST}-{os.getpid()}.part")
    try:
        with part.open("wb", buffering=1 << 20) as file:  # torch writes each tensor by itself
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may keep the new name and lose what it names
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network filesystems that know no such thing
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
        with suppress(PermissionError):  # somebody else's
            os.kill(pid, 0)  # asks, without a signal
    except ProcessLookupError:
        return True
    return False
