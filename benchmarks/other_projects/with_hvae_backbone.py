"""hvae-backbone: two groups of latents, z2 and z1 given z2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from latents import Model, main
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader


def fit(names: dict[str, Any], callbacks: list[Any], **options: Any) -> None:
    loaders = DataLoader(names["data"], batch_size=32, shuffle=True), DataLoader(names["data"], batch_size=32)
    Trainer(callbacks=callbacks, **options).fit(names["TwoLevels"](), *loaders)


def spy(module: Any, record: Callable[[Tensor], None]) -> None:
    compute = module.rate

    def spied(pairs: Any) -> Tensor:
        record(rate := compute(pairs))
        return rate

    module.rate = spied


main(Model("hvae-backbone", fit, spy, weight="beta"))
