"""disent: the weight is a field of a dataclass, and the encoder returns one tensor that it splits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checks import Project, Spied, main
from disent.dataset import DisentDataset
from disent.dataset.data import XYObjectData
from disent.dataset.sampling import SingleSampler
from disent.dataset.transform import ToImgTensorF32
from disent.frameworks.vae import BetaVae
from disent.model import AutoEncoder
from disent.model.ae import DecoderFC, EncoderFC
from disent.schedule import LinearSchedule
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader


def fit(callbacks: list[Any], ckpt_path: str | None = None, **options: Any) -> None:
    data = XYObjectData(grid_size=16, min_square_size=3, max_square_size=7, rgb=False, palette="greys_1")
    dataset = DisentDataset(data, SingleSampler(), transform=ToImgTensorF32())
    model = AutoEncoder(EncoderFC(data.x_shape, z_size=6, z_multiplier=2), DecoderFC(data.x_shape, z_size=6))
    loaders = DataLoader(dataset, batch_size=15, shuffle=True), DataLoader(dataset, batch_size=15)
    # Its checkpoints hold the model and the config as objects.
    Trainer(callbacks=callbacks, **options).fit(BetaVae(model), *loaders, ckpt_path=ckpt_path, weights_only=False)


def spy(module: Any, record: Callable[[Any], None]) -> None:
    module.compute_ave_reg_loss = Spied(module.compute_ave_reg_loss, lambda *_: record(module.cfg.beta))


class OwnSchedule(Callback):
    """A schedule that the framework runs in each training step."""

    def setup(self, _trainer: Any, framework: Any, stage: str) -> None:  # noqa: ARG002
        framework.register_schedule("beta", LinearSchedule(0, 20))


class Removed(OwnSchedule):
    """The same schedule, removed as the warning says."""

    def setup(self, trainer: Any, framework: Any, stage: str) -> None:
        super().setup(trainer, framework, stage)
        framework.remove_schedule("beta")


main(
    Project(
        "disent",
        fit,
        spy,
        mean_head=lambda module: module._model._encoder.model[-1],
        reduce=lambda kl: kl.mean(),  # the default, `loss_reduction="mean"`
        target=0.003,
        floor={"weight": "cfg.beta", "reduction": "mean"},
        own=OwnSchedule,
        cured=Removed,
    )
)
