"""scvi-tools: the training plan computes the weight from two numbers, in a read-only property."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scvi
from checks import Project, Spied, main
from lightning.pytorch import Callback


def fit(callbacks: list[Any], **options: Any) -> None:
    scvi.settings.seed = 0  # of the split
    adata = scvi.data.synthetic_iid()
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata)
    model.train(callbacks=callbacks, check_val_every_n_epoch=1, **options)


def spy(plan: Any, record: Callable[[Any], None]) -> None:
    plan.module.loss = Spied(plan.module.loss, lambda *_, kl_weight, **__: record(kl_weight))


class OwnSchedule(Callback):
    """The plan's warm-up, which is on by default, made short."""

    def setup(self, _trainer: Any, plan: Any, stage: str) -> None:  # noqa: ARG002
        plan.n_epochs_kl_warmup = 4  # 400 if nothing is given


main(
    Project(
        "scvi-tools",
        fit,
        spy,
        mean_head=lambda plan: plan.module.z_encoder.mean_encoder,
        reduce=lambda kl: kl.sum(1).mean(),
        target=1.0,
        floor={"weight": "loss_kwargs.kl_weight"},
        own=OwnSchedule,
        others=("max_kl_weight", "loss_kwargs.kl_weight", ["min_kl_weight", "max_kl_weight"]),
    )
)
