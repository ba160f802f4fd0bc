"""Save the config in the run's folder."""

from __future__ import annotations

import itertools
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from ..checkpoints.atomic_write import atomic_write


class SaveConfig(SaveConfigCallback):
    """Save the resolved config in the run's folder.

    A run resumed in its own folder keeps its earlier configs and adds ``config-resumed-1.yaml`` and so on.
    """

    filename = "config.yaml"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # broadcasts: every process must call it
        super().setup(trainer, pl_module, stage)

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        target = self._folder / self.filename
        if self.config["ckpt_path"] or not self.config["same_run"]:  # otherwise the run starts over in its folder
            resumed = (self._folder / f"config-resumed-{n}.yaml" for n in itertools.count(1))
            target = next(path for path in itertools.chain([target], resumed) if not path.exists())
        with atomic_write(target) as file:
            file.write(self.parser.dump(self.config, skip_none=False).encode())
