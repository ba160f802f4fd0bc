"""Save checkpoints atomically, and verify their checksums when reading."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from typing_extensions import override

from .atomic_write import atomic_write

MODULE_KEY = "lightning_vae"
"""Key in a checkpoint under which a VAE stores its additions."""


class SaveError(OSError):
    """A checkpoint could not be saved. Those saved before are untouched."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save a checkpoint to a temporary file in the same folder, flush it to disk and rename it.

    Whatever ends the process, and whenever, the checkpoint is either the complete new file or the complete old one. A
    save needs space for one more file. Remote filesystems (``s3://...``) are left to Lightning.

    Example::

        Trainer(plugins=[AtomicCheckpointIO()])
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: Where to.
            storage_options: Passed on to Lightning, which then does the saving.

        Raises:
            SaveError: If the disk is full, the folder can't be written to, or the like.
        """
        if _is_remote(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch's writer fails at the write, then again with an error of its own about the position.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            kept = "the previous one is untouched" if Path(path).exists() else "no partial file is left"
            raise SaveError(f"The checkpoint {path} can't be saved: {reason.strerror or reason}; {kept}.") from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint, which may hold only data unless ``weights_only`` is ``False``.

        Args:
            path: Its file.
            map_location: As for :func:`torch.load`.
            weights_only: ``False`` to allow code in it to run.

        Raises:
            FileNotFoundError: If there is no such file.
            OSError: If it is damaged or holds more than data.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location)
        return read(path, map_location, weights_only is not False)


def read(
    path: str | Path, map_location: str | Callable[..., Any] | None = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint and verify its checksums, which :func:`torch.load` does not.

    Args:
        path: Its file.
        map_location: As for :func:`torch.load`.
        weights_only: ``False`` to allow code in it to run.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it is damaged or holds more than data.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # compares checksums
                    raise zipfile.BadZipFile
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # unpickling arbitrary bytes may raise anything
        if isinstance(error, OSError) and error.filename:
            raise
        raise OSError(
            f"{str(path)!r} can't be read. It is damaged, or not a checkpoint that holds only data."
        ) from error
    return checkpoint


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
