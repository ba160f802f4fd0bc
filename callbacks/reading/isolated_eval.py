"""An extra forward pass of a module that leaves no trace in its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@contextmanager
def isolated_eval(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run a module in eval mode, without gradients, in the Trainer's precision, with separate random numbers.

    The random numbers are the same each time. Afterwards the random state and every submodule's mode are restored.
    """
    device = pl_module.device
    devices = [device] if device.type == "cuda" else []
    modes = {module: module.training for module in pl_module.modules()}
    with torch.random.fork_rng(devices=devices), torch.no_grad(), trainer.precision_plugin.val_step_context():
        torch.default_generator.manual_seed(0)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        pl_module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
