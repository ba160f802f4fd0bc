"""Half precision, accumulated gradients and clipping, with every callback."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vae import VAE, MLPDecoder, MLPEncoder
from lightning_vae.callbacks import (
    GECO,
    CollapseDetector,
    Dashboard,
    EnforcedFreeBits,
    FreeBits,
    KLAnnealing,
    LatentSpace,
    Linear,
    Pictures,
    TargetRate,
)
from lightning_vae.datamodules import Digits
from tests.doubles import ForeignModule, loader, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:FreeBits"),  # what is trained for a few steps is no model
    pytest.mark.filterwarnings("ignore:CollapseDetector"),
    pytest.mark.filterwarnings("ignore:TargetRate"),
]

CALLBACKS = {
    "annealing": (lambda: [KLAnnealing(Linear(steps=4))], "knobs/beta", 1.0),
    "free bits": (lambda: [FreeBits(Linear(stop=0.2, steps=4))], "latent/at_floor", None),
    "target rate": (lambda: [TargetRate(1.0)], "knobs/beta", None),
    "constraint": (lambda: [GECO(squared_error=6.0)], "train/constrained_error", None),
    "detector": (lambda: [CollapseDetector()], "latent/active_units", None),
    "pictures": (lambda: [Pictures()], None, None),
    "latent space": (lambda: [LatentSpace()], None, None),
    "dashboard": (lambda: [Dashboard()], None, None),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.5},
    "all": {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
}


def fit(folder: Path, callbacks: list[Callback], **options: Any) -> tuple[VAE, EventAccumulator]:
    torch.manual_seed(0)
    narrow = {"encoder": partial(MLPEncoder, hidden=(16,)), "decoder": partial(MLPDecoder, hidden=(16,))}
    vae = VAE(Digits.shape, Digits.levels, latent_dim=4, **narrow)
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    trainer = quiet_trainer(folder, callbacks=callbacks, logger=logger, max_epochs=3, log_every_n_steps=2, **options)
    trainer.fit(vae, datamodule=Digits(batch_size=270))  # 5 batches an epoch
    events = EventAccumulator(str(folder))
    events.Reload()
    return vae, events


@pytest.mark.sampled(10)
@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize("name", list(CALLBACKS))
def test_every_callback_works_with(name: str, kind: str, tmp_path: Path) -> None:
    make, key, last = CALLBACKS[name]
    vae, events = fit(tmp_path / "run", make(), **OPTIONS[kind])
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    for tag in ("train/loss", "train/rate", "train/distortion", "val/loss", *([key] if key else [])):
        assert torch.tensor([each.value for each in scalars[tag]]).isfinite().all(), tag
    assert vae.beta.dtype == vae.free_bits.dtype == torch.float32
    if key is None:
        assert any(events.Tags()[each] for each in ("images", "tensors"))
    if last is not None:
        assert scalars[key][-1].value == last
    if name not in ("target rate", "constraint"):
        assert float(vae.beta) == 1.0  # its target, after the fit
    if kind == "bf16":
        plain, _ = fit(tmp_path / "plain", make())
        found, expected = (each.trainer.callback_metrics["val/loss"] for each in (vae, plain))
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.0)


def test_that_each_accumulated_batch_has_its_floor_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, [FreeBits(0.2)], accumulate_grad_batches=2)
    assert "accumulated over 2 batches, and the floor applies to the mean of each" in caplog.text


class Reads(ForeignModule):
    """Offers a posterior and weights its KL by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(2, 4)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        mean, log_variance = self.encoder(batch).chunk(2, dim=-1)
        return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_an_enforced_floor_works_with(kind: str, tmp_path: Path) -> None:
    floor = EnforcedFreeBits(0.5, posterior="encoder", chunk=1, weight=1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[floor], max_epochs=3, log_every_n_steps=2, **OPTIONS[kind])
    trainer.fit(Reads(), loader())
    assert trainer.callback_metrics["latent/at_floor"].isfinite()
