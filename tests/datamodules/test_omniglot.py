from PIL import Image

from lightning_vae.datamodules import Omniglot
from tests.datamodules.doubles import ready, splits


def test_omniglot_is_small_and_white_on_black(tmp_path):
    for part, characters in (("background", 3), ("evaluation", 2)):
        for number in range(characters):
            folder = tmp_path / "omniglot-py" / f"images_{part}" / "Alphabet" / f"character{number}"
            folder.mkdir(parents=True)
            for drawing in range(4):
                image = Image.new("1", (105, 105), 1)
                image.paste(0, (40, 40, 66, 66))
                image.save(folder / f"{drawing}.png")
    train, val, test = splits(ready(Omniglot(tmp_path, val_fraction=0.25)))
    assert [len(split["x"]) for split in (train, val, test)] == [9, 3, 8]
    assert test["x"].shape == (8, 1, 28, 28)
    assert test["label"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert test["x"][0, 0, 0, 0] == 0
    assert test["x"][0, 0, 14, 14] == 255
