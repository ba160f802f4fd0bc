"""A folder of your own images."""

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from ..checks import check_number, integer_from
from .base import (
    check_held_out,
    check_left,
    class_counts,
    shortened,
    sizes,
    split_of_name,
)
from .file_data import FileDataModule
from .loaders.batch_loader import DataError
from .loaders.decoded_images import decode_images
from .loaders.image_files import ImageFiles, find_images

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_NAMED = 100  # files with a fault in a message


@dataclass(frozen=True)
class _Image:
    """An image file.

    Attributes:
        path: The file.
        name: Its path below the root.
        class_name: Its class folder; empty without classes.
        split: The split that its folder fixes; empty if none does.
        is_deeper: Whether it lies in a further folder below its class folder.
    """

    path: Path
    name: str
    class_name: str
    split: str
    is_deeper: bool


class Images(FileDataModule):
    """A folder of images of any size, flat or with one sub-folder for each class.

    Images are resized until they just cover `size`, then cropped in the centre. Files come in the order of their paths.
    With class folders, the label of an image is the number of its class folder in alphabetical order. Links to files
    and folders are followed.

    The split of an image depends only on its path below `root`, the seed and the fractions. So images that are added or
    removed move no other, and the sizes of the splits are approximate. Folders called `train`, `val` (`valid`,
    `validation`) and `test` are splits, not classes: their images, flat or in class folders, are used as such, and a
    split without a folder is taken from `train`.

    Before the first step each file is decoded, and all files that can't be used are named. Sound files are remembered
    in the user's cache folder, so later runs decode only what has changed. `fit` prints what was found, what was passed
    over and how it was split.

    Images within `memory_budget` are kept in memory as uint8. More images than that are read from their files during
    training, in the same order and with the same flips. A file that is damaged later ends the run with one message.

    Args:
        root: Folder of images, or of class folders of images. `~` is the home folder.
        size: Height and width of each image as a tensor, or one number for both.
        channels: 1 for grey, 3 for colour.
        flip: Whether to mirror each training image left to right with probability one half.
        test_root: Folder of the test images, laid out like `root`. Without it they are a part of `root`.
        val_fraction: Approximate share kept for validation, of the images that are not for the test, if there is no
            folder `val`.
        test_fraction: Approximate share kept for the test, if there is no `test_root` and no folder `test`.
        background: Colour behind transparent pixels: a name, such as `"white"`, or `"#rrggbb"`.
        skip_broken: Whether to leave out files that can't be read, and name them, instead of ending.
        memory_budget: Memory in GiB that the images of all splits may take as tensors.
        num_workers: Processes that read ahead for each loader, if the images exceed the memory budget; 0 for none.
        batch_size: Observations in a batch of one process.
        seed: Seed of the splits, the training order and the flips.
        held_out: Class folders to leave out of training and validation, by name.

    Raises:
        ValueError: If an option is out of range.
    """

    levels = 256

    def __init__(
        self,
        root: str | Path,
        size: int | tuple[int, int],
        channels: int = 3,
        flip: bool = False,
        test_root: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        background: str = "white",
        skip_broken: bool = False,
        memory_budget: float = 2.0,
        num_workers: int = 2,
        batch_size: int = 128,
        seed: int = 0,
        held_out: Sequence[int | str] = (),
    ) -> None:
        super().__init__(val_fraction, test_fraction, memory_budget, num_workers, batch_size, seed, held_out)
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        remedy = "Give one number, or height and width."
        check_number("size", size, "at least 1", lambda _: len(sides) == 2 and all(map(integer_from(1), sides)), remedy)
        check_number("channels", channels, "1 (grey) or 3 (colour)", lambda number: number in (1, 3))
        self.root = Path(root).expanduser()
        self.test_root = Path(test_root).expanduser() if test_root is not None else None
        self.flip = flip
        self.background = background
        self.skip_broken = skip_broken
        self.shape: tuple[int, int, int] = (channels, sides[0], sides[1])
        self._colour = _rgb(background)

    @override
    def prepare_data(self) -> None:
        """Check the images in one process, whose result the others find remembered."""
        with suppress(ValueError, OSError):  # `setup` reports it in each process, so that none waits for another
            self._files = self._files or self._find()

    @override
    def _training_options(self) -> dict[str, Any]:
        return {**super()._training_options(), "flip": self.flip}

    @override
    def _size(self) -> int:
        return sum(map(len, self._files.values())) * math.prod(self.shape)

    @override
    def _find(self) -> dict[str, ImageFiles]:
        images, passed_over = _scan(self.root)
        if self.test_root is not None:
            if any(image.split == "test" for image in images):
                raise ValueError(
                    f"`test_root` is {self.test_root}, but `root` ({self.root}) has a folder of test images too."
                    " Leave out `test_root`, or move that folder."
                )
            test_images, also_passed_over = _scan(self.test_root, split="test")
            images += test_images
            for reason, names in also_passed_over.items():
                passed_over.setdefault(reason, []).extend(names)
        paths = [image.path for image in images]
        facts = decode_images(paths, [image.name for image in images])
        faults = [f"{path} {each.fault}" for path, each in zip(paths, facts, strict=True) if each.fault]
        if faults and (not self.skip_broken or len(faults) == len(images)):
            raise DataError(
                f"{len(faults)} of {len(images)} images can't be used. Repair or remove them, or set `skip_broken` to"
                f" leave them out:{_listed(faults)}"
            )
        images = [image for image, each in zip(images, facts, strict=True) if not each.fault]
        self.class_names = self._classes(images)
        splits = self._split(images)
        self._check_overlap(splits)
        check_held_out(self.held_out, self.class_names)
        seen = splits["train"] + splits["val"]
        left_out = Counter(image.class_name for image in seen if image.class_name in self.held_out)
        for name in ("train", "val"):
            splits[name] = [image for image in splits[name] if image.class_name not in self.held_out]
        check_left({name: len(splits[name]) for name in ("train", "val")}, self.held_out)
        self._identity = {name: _identity(split) for name, split in splits.items()}
        self._identity |= {"classes": self.class_names, "shape": list(self.shape)}
        files = {name: self._image_files(split) for name, split in splits.items()}

        observations = {name: len(split) for name, split in splits.items()}
        lines = [f"{type(self).__name__}: {self.root} has {sizes(observations)}."]
        if derived := sorted({"val", "test"} - {image.split for image in images}):
            lines.append(f"A hash of each path has chosen {' and '.join(derived)}, so the shares are approximate.")
        if labels := [split.labels for split in files.values() if split.labels is not None]:
            lines.append(class_counts(torch.cat(labels), self.class_names))
        if left_out:
            counts = shortened(f"{name} ({count})" for name, count in sorted(left_out.items()))
            lines.append(f"Held out of training and validation: {counts}.")
        if deeper := sum(image.is_deeper for image in images):
            lines.append(f"Images in further folders below the class folders, which are not classes: {deeper}.")
        if pages := [str(path) for path, each in zip(paths, facts, strict=True) if each.has_pages]:
            passed_over["files, from their second page or frame on"] = pages
        for reason, names in sorted(passed_over.items(), key=lambda entry: -len(entry[1])):
            lines.append(f"Passed over, {len(names)} {reason}: {shortened(names)}.")
        if transparent := sum(each.is_transparent for each in facts):
            self._identity["background"] = "#{:02x}{:02x}{:02x}".format(*self._colour)
            lines.append(f"Images with transparency: {transparent}, put on a background of {self.background}.")
        if faults:
            lines.append(f"Left out, {len(faults)}:{_listed(faults)}")
        rank_zero_info("\n  ".join(lines))
        return files

    def _split(self, images: Sequence[_Image]) -> dict[str, list[_Image]]:
        given = {image.split for image in images}
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        fractions = {name: fraction for name, fraction in fractions.items() if name not in given}
        splits: dict[str, list[_Image]] = {"train": [], "val": [], "test": []}
        for image in images:
            is_given = image.split in ("val", "test")
            name = image.split if is_given else split_of_name(image.name, fractions, self.seed)
            splits[name].append(image)
        if empty := [name for name, split in splits.items() if not split]:
            options = ", ".join(f"`{name}_fraction` {fraction}" for name, fraction in fractions.items())
            raise ValueError(
                f"{' and '.join(empty)} would have none of the {len(images)} images of {self.root}, with {options}. A"
                " hash of each path decides, so a small set may miss a split: choose other fractions or another `seed`,"
                " add images, or put them in folders called train, val and test."
            )
        return splits

    def _check_overlap(self, splits: Mapping[str, Sequence[_Image]]) -> None:
        """Check that no file is in two splits, through a link or because `test_root` and `root` overlap."""
        first: dict[str, tuple[str, _Image]] = {}
        shared = []
        for split, images in splits.items():
            for image in images:
                before, other = first.setdefault(os.path.realpath(image.path), (split, image))
                if before != split:
                    shared.append(f"{other.path} ({before}) and {image.path} ({split})")
        if shared:
            raise ValueError(
                f"{len(shared)} files are in two splits, so a model would be judged on images that it was trained on,"
                f" such as {', '.join(shared[:3])}. Remove the links, or choose a `test_root` that does not overlap"
                " with `root`."
            )

    def _classes(self, images: Sequence[_Image]) -> list[str]:
        """Return the class folders of the training images, which the other splits must share."""
        found: dict[str, set[str]] = {"train": set()}
        for image in images:
            found.setdefault(image.split or "train", set()).add(image.class_name)
        classes = found["train"] - {""}
        for split, names in found.items():
            if not (names <= classes if classes else names == {""}):
                outer = "`test_root`" if split == "test" and self.test_root else f"The folder {split} of `root`"
                inner = "`root`" if outer == "`test_root`" else "train"
                raise ValueError(
                    f"{outer} must be laid out like {inner}, with the class folders {sorted(classes) or 'none'}, got"
                    f" {sorted(names - {''}) or 'none'}. Move or rename the images."
                )
        return sorted(classes)

    def _image_files(self, images: Sequence[_Image]) -> ImageFiles:
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = torch.tensor([numbers[image.class_name] for image in images]) if numbers else None
        names = [image.name for image in images]
        return ImageFiles([image.path for image in images], names, labels, self.shape, self._colour)


def _scan(root: Path, split: str = "") -> tuple[list[_Image], dict[str, list[str]]]:
    """Find the images of a folder, their class folders and their splits.

    Args:
        root: The folder.
        split: The split of all images. Without it, folders called train, val and test are splits.

    Returns:
        The images, and the entries that were passed over, by the reason.

    Raises:
        ValueError: If folders of splits are mixed with others, or images with folders of images.
    """
    paths, passed_over = find_images(root)
    places = [path.relative_to(root) for path in paths]
    folders = sorted({place.parts[0] for place in places if len(place.parts) > 1})
    splits = {} if split else {name: _SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in _SPLIT_FOLDERS}
    if splits and not (sorted(splits) == folders and sorted({*splits.values(), "train"}) == sorted(splits.values())):
        raise ValueError(
            f"{root} has the folders {shortened(folders)}. Folders called train, val and test are splits: then there"
            " must be one for train, at most one for each other split, and no other folder. Rename a class of such a"
            " name, or move the other folders away."
        )
    if not (split or splits) and (alike := _split_names(folders)):
        raise ValueError(
            f"{root} has the folders {shortened(alike)}, which look like splits and would be classes. Rename them to"
            " train, val and test, or to names that differ in more than that word."
        )
    images = []
    for path, place in zip(paths, places, strict=True):
        folder = place.parts[:-1]
        below = folder[1:] if splits else folder
        if inner := [name for name in below if name.lower() in _SPLIT_FOLDERS]:
            raise ValueError(
                f"{path} lies in a folder {inner[0]} that is not directly below {root}. Folders called train, val and"
                " test are splits: put them at the top, with the class folders inside, or rename them."
            )
        name = os.fsencode(place.as_posix()).decode("utf-8", "backslashreplace")
        its_split = splits[folder[0]] if splits else split
        images.append(_Image(path, name, below[0] if below else "", its_split, len(below) > 1))
    for its_split in {image.split for image in images}:
        names = {image.class_name for image in images if image.split == its_split}
        if "" in names and len(names) > 1:
            raise ValueError(
                f"{root / its_split if splits else root} has images beside folders of images. Put all of them in class"
                " folders, or all in one folder without others."
            )
    return images, passed_over


def _split_names(folders: Sequence[str]) -> list[str]:
    """Return the folders whose names differ in the word for a split alone, such as `train2017` and `val2017`."""
    found: dict[tuple[str, ...], dict[str, str]] = {}  # by the rest of the name, the folder of each split
    for folder in folders:
        parts = re.split(r"([\W\d_]+)", folder.lower())
        splits = [part for part in parts if part in _SPLIT_FOLDERS]
        if len(splits) == 1:
            rest = tuple("" if part in splits else part for part in parts)
            found.setdefault(rest, {})[_SPLIT_FOLDERS[splits[0]]] = folder
    return [folder for alike in found.values() if len(alike) > 1 for folder in alike.values()]


def _listed(faults: Sequence[str]) -> str:
    """Return a line for each of the first hundred faults, and how many follow."""
    rest = [f"and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
    return "".join(f"\n    {fault}" for fault in [*faults[:_NAMED], *rest])


def _identity(images: Sequence[_Image]) -> dict[str, Any]:
    entries = (f"{image.name}\0{image.path.stat().st_size}\n".encode() for image in images)
    return {"observations": len(images), "checksum": hashlib.sha256(b"".join(entries)).hexdigest()[:16]}


def _rgb(background: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        red, green, blue = ImageColor.getcolor(background, "RGB")  # type: ignore[misc]  # three numbers in this mode
    except ValueError:
        raise ValueError(
            f'`background` must be a colour without transparency, such as "white" or "#ffcc00", got {background!r}.'
        ) from None
    return red, green, blue
