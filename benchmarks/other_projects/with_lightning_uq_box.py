"""lightning-uq-box: the weight is in the loss function, and each fit makes new heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from checks import Project, Spied, main
from lightning.pytorch import Callback, Trainer
from lightning_uq_box.uq_methods import VAE
from torch.utils.data import DataLoader
from torchseg.encoders import get_encoder


def fit(callbacks: list[Any], ckpt_path: str | None = None, **options: Any) -> None:
    images = [{"input": image, "target": image} for image in torch.rand(64, 3, 32, 32)]
    encoder = get_encoder("resnet18", in_channels=3, depth=5, weights=None)
    module = VAE(encoder, latent_size=8, num_samples=2, out_channels=3, img_size=32)
    loaders = DataLoader(images, batch_size=16, shuffle=True), DataLoader(images, batch_size=16)
    Trainer(callbacks=callbacks, **options).fit(module, *loaders, ckpt_path=ckpt_path)


def spy(module: Any, record: Callable[[Any], None]) -> None:
    module.loss_fn.forward = Spied(module.loss_fn.forward, lambda *_: record(module.loss_fn.kl_scale))


class OwnSchedule(Callback):
    """A schedule as its users write it: the project's VAE has none."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        module.loss_fn.kl_scale = 1e-4 * min(1.0, trainer.global_step / 10)


main(
    Project(
        "lightning-uq-box",
        fit,
        spy,
        mean_head=lambda module: module.latent_mu[-1],
        reduce=lambda kl: kl.sum(1).mean(),
        target=1e-4,
        floor={"weight": "loss_fn.kl_scale"},
        own=OwnSchedule,
    )
)
