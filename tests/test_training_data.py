"""Pseudo-inputs that start at the training data, in one process and in two."""

from functools import partial

import pytest
import torch

from lightning_vae import VAE, Condition, Gaussian, VampPrior
from lightning_vae.datamodules import TensorLoader
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes

X = torch.arange(24.0).view(12, 2) / 24


def fitted(folder, components, **options):
    torch.manual_seed(0)
    prior = partial(VampPrior, components=components, pseudo_inputs="data")
    condition = partial(Condition, classes=12)
    vae = VAE((2,), latent_dim=2, likelihood=partial(Gaussian, variance=1.0), prior=prior, condition=condition)
    trainer = quiet_trainer(folder, max_epochs=1, **options)
    rows = {"x": X, "index": torch.arange(12), "label": torch.arange(12)}
    trainer.fit(vae, TensorLoader(rows, 3, shuffle=True))
    return vae


def rows_of(values):
    return sorted(map(tuple, values.tolist()))


def share(rank, folder, components):
    options = {"devices": 2, "strategy": "ddp"}
    try:
        vae = fitted(folder, components, **options)
        started = torch.cat([vae.prior_module.inputs.data, vae.prior_module.conditions], dim=1)
        torch.save([started, [each.data for each in vae.encoder.parameters()]], folder / f"{rank}")
    except ValueError as error:
        (folder / f"{rank}").write_text(str(error))


def test_training_still_sees_all_of_the_data_that_the_prior_started_from(tmp_path):
    seen = []

    class Seen(VAE):
        def training_step(self, batch, batch_idx):
            seen.append(batch["index"])
            return super().training_step(batch, batch_idx)

    prior = partial(VampPrior, components=12, pseudo_inputs="data")
    vae = Seen((2,), latent_dim=2, likelihood=partial(Gaussian, variance=1.0), prior=prior)
    quiet_trainer(tmp_path, max_epochs=1).fit(vae, TensorLoader({"x": X, "index": torch.arange(12)}, 3, shuffle=True))
    assert sorted(torch.cat(seen).tolist()) == list(range(12))
    assert rows_of(vae.prior_module.inputs) == rows_of(X)
    with pytest.raises(ValueError, match=r"there are only 12 for training\. Set its `components` to at most 12"):
        fitted(tmp_path, 13)


def test_two_processes_start_from_the_same_observations_of_both(tmp_path):
    in_two_processes(share, tmp_path, 12)
    (one, ours), (other, theirs) = (torch.load(tmp_path / f"{rank}") for rank in range(2))
    assert rows_of(one) == rows_of(torch.cat([X, torch.arange(12.0)[:, None]], dim=1)), "each with its own label"
    assert torch.equal(one, other)
    assert all(map(torch.equal, ours, theirs))


def test_two_processes_refuse_too_few_together(tmp_path):
    in_two_processes(share, tmp_path, 13)
    for rank in range(2):
        assert "only 12 for training" in (tmp_path / f"{rank}").read_text()
