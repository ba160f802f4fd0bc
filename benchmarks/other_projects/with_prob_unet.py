"""lightning-uq-box's probabilistic U-Net: the prior p(z|x) comes from a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from latents import Model, main
from lightning.pytorch import Trainer
from lightning_uq_box.uq_methods import ProbUNet
from torch import Tensor
from torch.utils.data import DataLoader


def fit(names: dict[str, Any], callbacks: list[Any], **options: Any) -> None:
    module = ProbUNet(copy.deepcopy(names["network"]), latent_dim=6, num_filters=[8, 16])
    loaders = DataLoader(names["images"], batch_size=16, shuffle=True), DataLoader(names["images"], batch_size=16)
    Trainer(callbacks=callbacks, **options).fit(module, *loaders)


def spy(module: Any, record: Callable[[Tensor], None]) -> None:
    compute = module.kl_divergence

    def spied(*args: Any, **kwargs: Any) -> Tensor:
        record(kl := compute(*args, **kwargs))
        return kl

    module.kl_divergence = spied


main(Model("A probabilistic U-Net", fit, spy, weight="beta"))
