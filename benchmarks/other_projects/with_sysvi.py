"""scvi-tools' SysVI: a VampPrior, which calls the encoder on pseudo-inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scvi
from checks import QUIET
from latents import Model, main
from torch import Tensor

from lightning_vae.callbacks import CollapseDetector

BATCH = 32


def fit(names: dict[str, Any], callbacks: list[Any], pseudo_inputs: int = 5, **options: Any) -> None:
    scvi.settings.seed = 0  # of the split
    model = scvi.external.SysVI(names["adata"], prior="vamp", n_prior_components=pseudo_inputs)
    model.train(callbacks=callbacks, train_size=0.5, batch_size=BATCH, check_val_every_n_epoch=1, **options)


def spy(plan: Any, record: Callable[[Tensor], None]) -> None:
    compute = plan.module.loss

    def spied(*args: Any, **kwargs: Any) -> Any:
        losses = compute(*args, **kwargs)
        record(losses.kl_local["kl_local"])
        return losses

    plan.module.loss = spied


def count_calls(names: dict[str, Any]) -> tuple[list[str], bool]:
    """Count what is read at the encoder itself, with as many pseudo-inputs as a batch has cells."""
    detector = CollapseDetector(posterior="module.encoder:q_dist", z="module.encoder:q", prior="module.prior")
    fit(names, [detector], pseudo_inputs=BATCH, max_epochs=1, **QUIET)
    cells, count = len(names["adata"]) // 2, detector.report.count
    told = (
        f"sysvi: at the encoder, called for batch, cycle and pseudo-inputs, {count} posteriors of {cells} cells count."
    )
    return [told], count == 2 * cells


weights = ["loss_kwargs.kl_weight", "min_kl_weight", "max_kl_weight"]
main(Model("SysVI", fit, spy, weights, extra=count_calls))
