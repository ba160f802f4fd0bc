from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vae.callbacks.base import writes_hparams
from lightning_vae.callbacks.drawing.media_logger import MediaLogger


@pytest.mark.parametrize("grey", [True, False])
def test_tensorboard_gets_the_pixels(tmp_path, grey):
    picture = torch.randint(0, 256, (1 if grey else 3, 7, 5), dtype=torch.uint8).expand(3, -1, -1)
    logger = TensorBoardLogger(tmp_path)
    MediaLogger(SimpleNamespace(loggers=[logger], is_global_zero=True)).image("tag", picture, 3)
    logger.finalize("success")
    [shown] = EventAccumulator(logger.log_dir).Reload().Images("tag")
    assert shown.step == 3
    image = Image.open(BytesIO(shown.encoded_image_string))
    pixels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).view(7, 5, 3)
    assert pixels.permute(2, 0, 1).equal(picture)


class Other(Logger):
    """A logger that takes pictures and asks who is there."""

    name, version = "other", 0
    experiment = SimpleNamespace(add_image=lambda *_: None)

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, *_, **__):
        pass


@pytest.mark.parametrize("first", [True, False])
def test_only_the_process_that_writes_has_a_media_logger(first):
    class Trap(Other):
        @property
        def experiment(self):
            assert first, "another process would open files, or a run of its own"
            return Other.experiment

    found = MediaLogger(SimpleNamespace(loggers=[Trap()], is_global_zero=first))
    assert bool(found) == first
    found.image("tag", torch.zeros(3, 2, 2, dtype=torch.uint8), 0)


@pytest.mark.parametrize("default", [True, False])
def test_lightning_still_says_who_fills_the_hparams_page(tmp_path, default):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    assert logger._default_hp_metric == default, "Lightning has moved TensorBoardLogger._default_hp_metric"
    assert writes_hparams(logger) == default
    assert writes_hparams(Other())
