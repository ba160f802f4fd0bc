"""Images in folders, broken on purpose."""

import os
import struct
import zlib
from io import BytesIO

import pytest
from PIL import Image

from lightning_vae.datamodules.loaders.image_files import find_images, inspect_image, read_image


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

    assert len(find_images(tmp_path)[0]) == 2
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match=r"b can't be read \(Permission denied\)"):
        find_images(tmp_path)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _saved(suffix: str, **options) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), (0, 128, 255)).save(file, suffix, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "chunk",
    [
        _chunk(b"eXIf", b"broken" * 9),
        _chunk(b"iCCP", b"name\0\0" + b"broken" * 9),
        _chunk(b"iCCP", b""),
        _chunk(b"gAMA", b""),
        _chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(3_000_000))),
        _chunk(b"tEXt", b"name\0text")[:-1] + b"?",  # another checksum
    ],
)
def test_metadata_that_cannot_be_parsed_do_not_refuse_a_png(tmp_path, chunk):
    path, data = tmp_path / "0.png", _saved("png")
    path.write_bytes(data[:33] + chunk + data[33:])
    assert read_image(path, (3, 8, 8))[:, 0, 0].tolist() == [0, 128, 255]
    assert inspect_image(path).fault == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("marker", "content"),
    [(0xE1, b"Exif\0\0" + b"broken" * 9), (0xE2, b"ICC_PROFILE\0"), (0xEE, b"Adobe"), (0xE0, b"JFIF")],
)
def test_metadata_that_cannot_be_parsed_do_not_refuse_a_jpeg(tmp_path, marker, content):
    path, data = tmp_path / "0.jpg", _saved("jpeg")
    path.write_bytes(data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:])
    plain = tmp_path / "plain.jpg"
    plain.write_bytes(data)
    assert read_image(path, (3, 8, 8)).equal(read_image(plain, (3, 8, 8)))
    assert inspect_image(path).fault == ""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["LAB", "La", "RGBa", "CMYK"])
def test_what_decodes_can_be_read(tmp_path, mode, channels):
    path = tmp_path / "0.tif"
    Image.new(mode.upper(), (8, 8)).save(path)
    if mode.endswith("a"):  # multiplied by alpha: Pillow reads such files and writes none
        unassociated, associated = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
        path.write_bytes(path.read_bytes().replace(unassociated, associated))
    with Image.open(path) as image:
        assert image.mode == ("RGBA" if mode == "RGBa" else mode)
    assert inspect_image(path).fault == ""
    assert read_image(path, (channels, 8, 8)).shape == (channels, 8, 8)
