"""diffusers' AutoencoderKL: spatial latents, a GAN loss and manual optimization."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from checks import QUIET
from latents import Model, main
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_vae.callbacks import CollapseDetector

EPOCHS, STEPS, SEEDS = 32, 16, (0, 1, 2)  # STEPS: batches in an epoch


def fit(
    names: dict[str, Any], callbacks: list[Any], kl_weight: float = 1e-6, adversarial_from: int = 1, **options: Any
) -> Any:
    module = names["LatentAutoencoder"](kl_weight, adversarial_from)
    images = names["images"]
    loaders = DataLoader(images, batch_size=16, shuffle=True), DataLoader(images, batch_size=64)
    Trainer(callbacks=callbacks, **options).fit(module, *loaders)
    return module


def spy(module: Any, record: Callable[[Tensor], None]) -> None:
    encode = module.vae.encode

    def spied(x: Tensor) -> Any:
        output = encode(x)
        record(output.latent_dist.kl())
        return output

    module.vae.encode = spied


def channels(names: dict[str, Any]) -> tuple[list[str], bool]:
    """Check the shift and scale of each channel, and the state at a weight of 1e-6 and of 1."""
    told, errors, ok = [], [], True
    for kl_weight in (1e-6, 1.0):
        for seed in SEEDS:
            seed_everything(seed, verbose=False)
            alarms: dict[str, int] = {}
            detector = CollapseDetector(**names["places"], warmup=0, patience=1, on_alarm=partial(_note, alarms))
            module = fit(names, [detector], kl_weight, adversarial_from=5, max_epochs=EPOCHS, **QUIET)
            errors.append(_error(module, names["images"], detector))
            ok = ok and ("deterministic" in alarms) == (kl_weight < 1)
            since = ", ".join(f"{name} at step {step}" for name, step in alarms.items()) or "none"
            told.append(
                f"diffusers, KL weight {kl_weight:g}, seed {seed}: new alarms: {since}; at step {EPOCHS * STEPS} "
                f"{detector.report.state}: {detector.report.reason}"
            )
    error = float(torch.tensor(errors).max())  # NaN wins
    return [*told, f"diffusers: the largest error of a shift or scale is {error:.0e}."], ok and error <= 1e-6


def _note(alarms: dict[str, int], trainer: Trainer, _module: Any, state: Any) -> None:
    alarms.setdefault(state.name, (trainer.current_epoch + 1) * STEPS)


@torch.no_grad()
def _error(module: Any, images: Tensor, detector: CollapseDetector) -> float:
    """Compare with two passes in float64 over the distributions of the last validation."""
    module.eval()
    found = [module.vae.encode(part).latent_dist for part in images.split(64)]
    mean, variance = (torch.cat([getattr(each, name) for each in found]).double() for name in ("mean", "var"))
    mean, variance = (each.transpose(0, 1).flatten(1) for each in (mean, variance))
    shift = mean.mean(1)
    scale = ((mean - shift[:, None]).square().mean(1) + variance.mean(1)).sqrt()
    return float(torch.cat([(detector.shift - shift) / scale, detector.scale / scale - 1]).abs().max())


main(Model("diffusers", fit, spy, weight="kl_weight", extra=channels))
