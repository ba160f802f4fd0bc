"""The report of ``test``: a table, the same numbers for the logger and as JSON, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..checks import check_number, integer_from
from ..estimators.ex_post import ExPostDensity
from ..vae import VAE
from .chunks import decode
from .ex_post_fit import fit_density
from .generation import prior_sample
from .measure import OwnMetric, check_model, check_own_metrics, check_rereadable, check_sizes, evaluate

_COLUMNS = 8
_PICTURE_SIZE = 64  # pixels that a small image is enlarged to, about
_SEED = 0x9A12


class EvaluationReport(Callback):
    """Evaluate the model when a test ends: print the table, log the numbers, write ``evaluation.json`` and pictures.

    All files go to the folder of the test run, ``trainer.log_dir``: ``evaluation.json``, and for images
    ``reconstructions.png`` and ``samples.png``. The JSON is flat: see
    :meth:`~lightning_vae.evaluation.record.Evaluation.to_dict`. Its keys, prefixed with ``test/``, are those in the
    logger.

    Args:
        importance_samples: Number K of samples for each observation, for the log-likelihood.
        observations: Number M of observations for mutual information, marginal KL, total correlation and probes.
        samples: Maximum number of prior samples, and of observations that they are compared with.
        metrics: The user's own metrics by name: import paths of functions ``(vae, loader) -> float``.
        ex_post: Number of Gaussians of an ex-post density: a mixture that is fitted to the latents of the data module's
            training data, written as ``ex_post.pt``, and whose samples are compared with those of the prior. ``None``
            fits none.

    Raises:
        ValueError: If a number is too small, the name of an own metric is taken, or ``limit_test_batches`` of a run is
            0.
        TypeError: If the model of a run is not a VAE of this package.
    """

    def __init__(
        self,
        importance_samples: int = 100,
        observations: int = 2048,
        samples: int = 1000,
        metrics: Mapping[str, OwnMetric] | None = None,
        ex_post: int | None = None,
    ) -> None:
        if ex_post is not None:
            check_number("ex_post", ex_post, "an integer of at least 1, or None for none", integer_from(1))
        check_sizes(importance_samples=importance_samples, observations=observations, samples=samples)
        check_own_metrics(metrics)
        self.importance_samples = importance_samples
        self.observations = observations
        self.samples = samples
        self.metrics = metrics
        self.ex_post = ex_post
        self._density: ExPostDensity | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_model(pl_module)
        if trainer.limit_test_batches == 0:
            raise ValueError(
                "`limit_test_batches` is 0, so nothing would be evaluated. Leave out the limit or the report."
            )

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = all_loaders(trainer.test_dataloaders)
        if len(loaders) > 1:
            rank_zero_warn(f"Only the first of {len(loaders)} test loaders is evaluated.")
        check_rereadable(loaders[0])
        if self.ex_post is not None:  # before the test, as it may fail
            assert isinstance(pl_module, VAE)
            self._density = fit_density(pl_module, _training_data(trainer), self.ex_post)
        if not trainer.loggers or trainer.log_dir is None:
            rank_zero_warn("Without a logger the evaluation is only printed: there is no run folder to write it to.")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VAE)
        loader = all_loaders(trainer.test_dataloaders)[0]
        number = trainer.num_test_batches[0]
        limit = int(number) if number < (sized_len(loader) or math.inf) else None  # `limit_test_batches`
        if limit is not None or _has_transfer_hooks(trainer):
            loader = _AsTested(trainer, loader, limit)
        density, self._density = self._density, None
        result = evaluate(
            pl_module, loader, self.importance_samples, self.observations, self.samples, self.metrics, density
        )
        pictures = draw(pl_module, next(iter(loader)))
        folder = trainer.log_dir  # broadcasts: every process must call it
        if not trainer.is_global_zero:
            return
        print(f"\n{result.table()}\n")
        # The VAE has logged its own estimates of these, from one sample each.
        own = ("elbo", "rate", "distortion")
        numbers = {f"test/{name}": value for name, value in result.scalars().items() if name not in own}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                for name, picture in pictures.items():
                    logger.experiment.add_image(f"test/{name}", picture, trainer.global_step)
        if not trainer.loggers or folder is None:
            return
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            _write(picture, target / f"{name}.png")
        others = [f"{name}.png" for name in pictures]
        if density is not None:
            torch.save(vars(density), target / "ex_post.pt")
            others.append("ex_post.pt")
        whole = target / ".evaluation.json"  # a file under the final name is complete, and is written last
        whole.write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")
        whole.replace(target / "evaluation.json")
        print("Written:  " + ", ".join([f"{target}/evaluation.json", *others]))


def _training_data(trainer: Trainer) -> Iterable[Any]:
    """Return the training data of the data module, a share for each process.

    Raises:
        ValueError: If there is no data module.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if data is None:
        raise ValueError("`ex_post` needs the training data: test with a data module, `trainer.test(vae, datamodule)`.")
    data.setup("fit")
    return _AsTested(trainer, all_loaders(data.train_dataloader())[0], None)


def all_loaders(loaders: Any) -> list[Iterable[Any]]:
    """List the loaders of a Trainer or a data module, which may be one, or several in a sequence or a mapping."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, Sequence) else [loaders]


class _AsTested:
    """The batches of a loader as a test step sees them, on every iteration: not all, and after the transfer's hooks."""

    def __init__(self, trainer: Trainer, loader: Iterable[Any], limit: int | None) -> None:
        self.trainer, self.loader, self.limit = trainer, loader, limit

    def __iter__(self) -> Iterator[Any]:
        return map(self.trainer.strategy.batch_to_device, islice(self.loader, self.limit))


def _has_transfer_hooks(trainer: Trainer) -> bool:
    """Return whether the data module or the model changes batches on their way to the device."""
    data: Any = getattr(trainer, "datamodule", None)
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    return any(is_overridden(hook, owner) for owner in (data, trainer.lightning_module) if owner for hook in hooks)


@torch.no_grad()
def draw(vae: VAE, batch: object) -> dict[str, Tensor]:
    """Draw reconstructions and samples of an image model.

    Args:
        vae: The model.
        batch: A batch as the VAE accepts it; its first 32 images are shown.

    Returns:
        ``"reconstructions"``, rows of images above their reconstructions, and ``"samples"``, the means of p(x|z) for 64
        latents from the prior: uint8, of shape ``(3, height, width)``. An empty dict unless the data are images with 1
        or 3 channels.
    """
    if len(vae.shape) != 3 or vae.shape[0] not in (1, 3):
        return {}
    observations = vae.observe(batch)[: 4 * _COLUMNS]
    condition, places = observations.condition, torch.arange(_COLUMNS**2, device=vae.device)
    posterior = vae.encode(observations.x) if condition is None else vae.encode(observations.x, condition)
    reconstructions = decode(vae, posterior.mean, condition).mean
    own = None if condition is None else condition[places % len(condition)]
    samples = decode(vae, prior_sample(vae, places, own, _SEED), own).mean
    pairs = [
        row
        for images in zip(observations.scaled.split(_COLUMNS), reconstructions.split(_COLUMNS), strict=True)
        for row in images
    ]
    return {"reconstructions": _grid(pairs), "samples": _grid(list(samples.split(_COLUMNS)))}


def _grid(rows: list[Tensor]) -> Tensor:
    """Arrange rows of images in [0, 1], each of shape ``(n, C, H, W)``, in one picture with lines in between."""
    scale = max(1, _PICTURE_SIZE // max(rows[0].shape[-2:]))
    wide = [torch.nn.functional.pad(row, (0, 0, 0, 0, 0, 0, 0, _COLUMNS - len(row)), value=1.0) for row in rows]
    images = torch.stack(wide).clamp(0, 1).mul(255).round().to(torch.uint8)
    images = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)
    rows_, columns, channels, height, width = images.shape
    picture = images.permute(2, 0, 3, 1, 4).reshape(channels, rows_ * height, columns * width)
    return picture.expand(3, -1, -1).cpu()


def _write(picture: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
