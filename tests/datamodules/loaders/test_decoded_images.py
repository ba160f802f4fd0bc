"""The memory of image files that were sound."""

import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from lightning_vae.datamodules.loaders import decoded_images
from lightning_vae.datamodules.loaders.decoded_images import decode_images


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded from now on."""
    names = []
    real = decoded_images.inspect_image

    def watched(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(decoded_images, "inspect_image", watched)
    return names


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(4):
        Image.new("L", (6, 6), number).save(folder / f"{number}.png")
    return folder


def check(root: Path):
    paths = sorted(root.iterdir())
    facts = decode_images(paths, [path.name for path in paths])
    return dict(zip([path.name for path in paths], facts, strict=True))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-25])  # its header is sound


def test_sound_files_are_decoded_once(root, decoded):
    first = check(root)
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]
    decoded.clear()
    assert check(root) == first
    assert decoded == []


def test_a_file_that_has_changed_is_decoded_again(root, decoded):
    check(root)
    decoded.clear()
    os.utime(root / "1.png", ns=(0, 1))
    Image.new("L", (6, 7), 2).save(root / "2.png")
    cut(root / "3.png")
    Image.new("L", (6, 6)).save(root / "4.png")
    facts = check(root)
    assert sorted(decoded) == ["1.png", "2.png", "3.png", "4.png"]
    assert [name for name, each in facts.items() if each.fault] == ["3.png"]


def test_a_fault_is_not_remembered(root, decoded):
    """A disk that fails once must not leave a sound file out for ever."""
    cut(root / "1.png")
    for _ in range(2):
        decoded.clear()
        assert "can't be read as an image" in check(root)["1.png"].fault
    assert decoded == ["1.png"]


def test_the_facts_are_remembered(root):
    Image.new("RGBA", (6, 6)).save(root / "clear.png")
    Image.new("L", (6, 6)).save(root / "moving.gif", save_all=True, append_images=[Image.new("L", (6, 6), 9)])
    first = check(root)
    assert first["clear.png"].is_transparent
    assert first["moving.gif"].has_pages
    assert check(root) == first


def test_the_memory_outlives_a_move_of_the_root(root, decoded):
    check(root)
    decoded.clear()
    check(root.rename(root.with_name("moved")))
    assert decoded == []


def test_other_data_sets_are_kept_in_the_memory_up_to_a_limit(root, tmp_path, decoded, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (6, 6)).save(tmp_path / name / f"{name}.png")
    check(tmp_path / "a")
    check(root)
    decoded.clear()
    check(tmp_path / "a")
    assert decoded == []
    monkeypatch.setattr(decoded_images, "_MOST", 4)
    check(tmp_path / "b")  # beside it the newest four
    decoded.clear()
    check(root)
    check(tmp_path / "b")
    assert decoded == []
    check(tmp_path / "a")
    assert decoded == ["a.png"]


def test_another_version_of_pillow_decodes_again(root, decoded, monkeypatch):
    check(root)
    decoded.clear()
    monkeypatch.setattr("PIL.__version__", "0.0")
    check(root)
    assert len(decoded) == 4


@pytest.mark.parametrize(
    "content", [b"", b"\xff\0\n \n\n", json.dumps({"a": 1}).encode(), b"0123456789abcdef tp\n" * 3]
)
def test_a_damaged_memory_is_replaced(root, decoded, content):
    memory = Path(os.environ["XDG_CACHE_HOME"], "lightning_vae", "decoded_images.txt")
    memory.parent.mkdir()
    memory.write_bytes(content)
    first = check(root)
    decoded.clear()
    assert check(root) == first
    assert decoded == []
    assert os.listdir(memory.parent) == [memory.name]


def test_a_cache_that_cannot_be_written_is_said_and_no_error(root, decoded, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert not any(each.fault for each in check(root).values())
    assert len(decoded) == 8
    assert "The next run will decode the images again" in caplog.text


def test_a_user_without_a_home_is_no_error(root, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def fail(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    assert not any(each.fault for each in check(root).values())


@pytest.mark.parametrize(("patience", "lines"), [(-1.0, 1), (1e9, 0)])
def test_a_long_check_is_announced_once(root, caplog, monkeypatch, patience, lines):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(decoded_images, "_PATIENCE", patience)
    monkeypatch.setattr(decoded_images, "_CHUNK", 1)
    check(root)
    announced = [text for text in caplog.messages if "Decoding 4 images" in text]
    assert len(announced) == lines
    assert all("about 0 seconds left" in text and "decoded_images.txt" in text for text in announced)


def test_an_interrupted_check_keeps_what_is_done(root, decoded, monkeypatch):
    real = decoded_images.inspect_image

    def interrupted(path):
        if path.name == "2.png":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(decoded_images, "inspect_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(root)
    decoded.clear()
    monkeypatch.setattr(decoded_images, "inspect_image", real)
    check(root)
    assert sorted(decoded) == ["2.png", "3.png"]
