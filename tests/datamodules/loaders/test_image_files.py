"""Images in folders, broken on purpose."""

import os

import pytest
from PIL import Image

from lightning_vae.datamodules.loaders.image_files import find_images, read_image


def test_pipes_and_huge_images_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png is not a regular file"):
        read_image(tmp_path / "pipe.png", (3, 8, 8))
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png can't be read.*exceeds limit"):
        read_image(tmp_path / "huge.png", (3, 8, 8))


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    scandir = os.scandir

    def refusing(path):  # root may read everything
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    assert len(find_images(tmp_path)) == 2
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"b can't be read \(Permission denied\)"):
        find_images(tmp_path)
