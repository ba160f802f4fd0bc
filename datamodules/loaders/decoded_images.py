"""Decode image files once, and remember which are sound."""

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_info

from .image_files import ImageFacts, inspect_image

_CHUNK = 256  # files between two looks at the clock
_PATIENCE = 5.0  # seconds until a message says how long it will take
_MOST = 2_000_000  # files of other data sets that are remembered, 17 bytes each


def decode_images(paths: Sequence[Path], names: Sequence[str]) -> list[ImageFacts]:
    """Decode image files, several at a time, except those that were sound in an earlier run.

    Sound files are remembered by name, size, time of the last change and Pillow's version, in a file of the user's
    cache folder (`$XDG_CACHE_HOME`, by default `~/.cache`). A cache that can't be written is no error. Files with a
    fault are decoded in each run, because the fault may have been the disk's.

    Args:
        paths: The files.
        names: Their paths below the root of the data, so that the memory outlives a move of the root.
    """
    from PIL import Image

    Image.init()  # registers the formats, which threads must not do at the same time
    known = _remembered()
    keys = [_key(path, name) for path, name in zip(paths, names, strict=True)]
    facts = {
        number: ImageFacts(is_transparent="t" in known[key], has_pages="p" in known[key])
        for number, key in enumerate(keys)
        if key in known
    }
    unknown = [number for number in range(len(paths)) if number not in facts]
    start, is_said = time.monotonic(), False
    try:
        with ThreadPoolExecutor() as pool:
            for done in range(0, len(unknown), _CHUNK):
                chunk = unknown[done : done + _CHUNK]
                facts.update(zip(chunk, pool.map(inspect_image, [paths[number] for number in chunk]), strict=True))
                passed, left = time.monotonic() - start, len(unknown) - done - len(chunk)
                if left and passed > _PATIENCE and not is_said:
                    is_said = True
                    rank_zero_info(
                        f"Decoding {len(unknown)} images, to find damaged ones before the first step:"
                        f" {_duration(passed * left / (done + len(chunk)))} left. This is done once: sound files are"
                        f" remembered in {_memory()}."
                    )
    finally:  # an interrupted run keeps what it has done
        sound = {keys[number]: _letters(each) for number, each in facts.items() if not each.fault}
        if sound.keys() - known.keys():
            _remember(sound)
    return [facts[number] for number in range(len(paths))]


def _key(path: Path, name: str) -> str:
    import PIL

    try:
        stat = path.stat()
    except OSError:  # decoding will say what is wrong
        return ""
    known_by = f"{PIL.__version__}\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(known_by.encode()).hexdigest()[:16]


def _letters(facts: ImageFacts) -> str:
    return "t" * facts.is_transparent + "p" * facts.has_pages


def _memory() -> Path:
    """Return the file of the memory: for each sound file a line with its key and a letter for each fact."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_vae" / "decoded_images.txt"


def _remembered() -> dict[str, str]:
    """Return the letters of each sound file, by its key; empty if nothing can be read."""
    with suppress(OSError, RuntimeError):  # the latter if there is no home folder
        lines = _memory().read_text(encoding="ascii", errors="ignore").splitlines()
        return {key: letters for key, _, letters in (line.partition(" ") for line in lines) if key}
    return {}


def _remember(found: Mapping[str, str]) -> None:
    """Add sound files to the memory, which then holds them and the newest of the others."""
    others = [(key, letters) for key, letters in _remembered().items() if key not in found]
    lines = (f"{key} {letters}".rstrip() for key, letters in [*others[-_MOST:], *found.items()] if key)
    try:
        path = _memory()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a reader never finds half a file
            whole = Path(folder, path.name)
            whole.write_text("\n".join(lines), encoding="ascii")
            os.replace(whole, path)
    except (OSError, RuntimeError) as error:
        rank_zero_info(
            f"The next run will decode the images again, because the result can't be saved ({error}). Set"
            " XDG_CACHE_HOME to a folder that can be written."
        )


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds > 90 else f"about {seconds:.0f} seconds"
