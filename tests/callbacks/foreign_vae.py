"""A VAE of another project, whose loss has free bits of its own or has never heard of them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from lightning_vae import free_bits
from lightning_vae.callbacks import EnforcedFreeBits
from tests.doubles import loader, quiet_trainer

TO_SCALE = {
    "log_variance": lambda second: (second / 2).exp(),
    "variance": lambda second: second.sqrt(),
    "scale": lambda second: second,
    "log_scale": lambda second: second.exp(),
}
LATENTS = 4
THRESHOLD = 0.4  # some of the four latents of `Encoder` sit below it, and some above


class Encoder(nn.Module):
    """Outputs mean and second parameter in one of the ways that projects do it."""

    def __init__(self, form: str = "pair", second: str = "log_variance") -> None:
        super().__init__()
        self.form, self.second = form, second
        self.map = nn.Linear(2, 2 * LATENTS)
        with torch.no_grad():  # rates that differ
            self.map.weight[:LATENTS] *= torch.tensor([0.1, 0.5, 1.0, 4.0])[:, None]

    def forward(self, x: Tensor) -> Any:
        mean, second = self.map(x).chunk(2, dim=-1)
        second = second if self.second.startswith("log") else nn.functional.softplus(second)
        if self.form == "normal":
            return Independent(Normal(mean, TO_SCALE[self.second](second)), 1), x
        if self.form == "map":  # (B, 2k, H, W), two latents at each of two places
            shape = (len(x), LATENTS // 2, 2, 1)
            return torch.cat([mean.reshape(shape), second.reshape(shape)], dim=1)
        return mean, second


class Foreign(LightningModule):
    """Somebody else's VAE. With ``own_floor`` its loss has the one line, and else it has never heard of free bits."""

    def __init__(
        self,
        form: str = "pair",
        second: str = "log_variance",
        weight: Any = 0.7,
        reduction: str | float = "sum",
        own_floor: dict[str, Any] | None = None,
        skip: bool = False,
    ) -> None:
        super().__init__()
        self.form, self.second, self.reduction, self.own_floor, self.skip = form, second, reduction, own_floor, skip
        self.encoder = Encoder("pair" if form == "heads" else form, second)
        if form == "heads":
            self.encoder_mean, self.encoder_second = nn.Linear(2, LATENTS), nn.Linear(2, LATENTS)
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 8), nn.Tanh(), nn.Linear(8, 2))
        self.weight = copy.deepcopy(weight)
        if own_floor is not None:
            self.free_bits = 0.0
        self.gradients: list[list[Tensor]] = []

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "heads":
            mean, second = self.encoder_mean(x), self.encoder_second(x)
        elif self.form == "normal":
            posterior = self.encoder(x)[0].base_dist
            return posterior.loc, posterior.scale
        elif self.form == "map":
            mean, second = self.encoder(x).chunk(2, dim=1)
        else:
            mean, second = self.encoder(x)
        return mean, TO_SCALE[self.second](second)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        mean, scale = self.encode(batch)
        z = mean + scale * torch.randn_like(scale)
        reconstruction = (self.decoder(z.flatten(1)) - batch).square().sum(1).mean()
        if self.skip:
            reconstruction = reconstruction + (mean.flatten(1).sum(1) - batch.sum(1)).square().mean()
        kl = (0.5 * (scale**2 + mean**2 - 1) - scale.log()).flatten(1)
        rate = kl.sum(1).mean() if self.own_floor is None else free_bits(kl, self.free_bits, **self.own_floor)
        factors = {"sum": 1.0, "mean": 1 / LATENTS, "batch_sum": len(batch)}
        factor = factors[self.reduction] if isinstance(self.reduction, str) else self.reduction
        loss: Tensor = (reconstruction + self.weight * factor * rate).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        with torch.enable_grad():
            self.encode(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.gradients.append([torch.zeros(()) if p.grad is None else p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.02)


PLACES: dict[str, dict[str, Any]] = {
    "pair": {"posterior": "encoder"},
    "normal": {"posterior": "encoder:0"},
    "map": {"posterior": "encoder", "chunk": 1},
    "heads": {"posterior": ("encoder_mean", "encoder_second")},
}


def fit(root: Path, model: Any, *callbacks: Any, rows: int = 20, validate: bool = False, **options: Any) -> Any:
    """Fit in two epochs of five batches, the same each time."""
    double = options.get("precision") == "64-true"
    data = loader(rows, batch_size=4)
    torch.manual_seed(1)
    trainer = quiet_trainer(root, callbacks=list(callbacks), **{"max_epochs": 2, **options})
    trainer.fit(model.double() if double else model, data, data if validate else None)
    return model


LINE = r"Put the floor in the loss.*`loss = reconstruction \+ w \* free_bits\(kl_per_dimension, self.free_bits\)`"


def refused(root: Path, model: Any, message: str, **options: Any) -> None:
    given = {"posterior": "encoder", "weight": "weight", **options.pop("floor", {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, about what the run was to be
        with pytest.raises(
            MisconfigurationException, match=rf"EnforcedFreeBits can't be exact here. {message}.*{LINE}"
        ):
            fit(root, model, EnforcedFreeBits(THRESHOLD, **given), **options)
    assert not any(module._forward_hooks for module in model.modules())
