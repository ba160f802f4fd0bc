"""Latents of every kind give on two processes what they give on one."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributions import Categorical as Weights
from torch.distributions import Independent, MixtureSameFamily, Normal, OneHotCategorical
from torch.utils.data import DataLoader, DistributedSampler

from lightning_vae.callbacks import LatentMonitor, TargetRate
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes

ROWS, BATCHES = 8, 4


def gaussian(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5
    return Normal(mean, torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1)


def categories(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return OneHotCategorical(logits=2 * torch.randn(*shape, generator=generator, dtype=torch.float64))


MIXTURE = MixtureSameFamily(Weights(torch.ones(3).double()), Independent(gaussian(3, 2, seed=99), 1))


def two_groups(number):
    posterior = {"top": gaussian(ROWS, 3, seed=number), "bottom": gaussian(ROWS, 2, seed=number + 10)}
    return {"posterior": posterior, "prior": {"top": None, "bottom": gaussian(ROWS, 2, seed=number + 20)}}


def two_maps(number):
    return {
        "posterior": {name: gaussian(ROWS, 2, 3, size, seed=number + 10 * size) for name, size in (("a", 3), ("b", 4))}
    }


def sequences(number):
    length = 3 + number
    lengths = torch.randint(1, length + 1, (ROWS, 1), generator=torch.Generator().manual_seed(number))
    return {"posterior": gaussian(ROWS, length, 2, seed=number), "mask": torch.arange(length) < lengths}


def predicted_classes(number):
    return {"posterior": categories(ROWS, 3, 4, seed=number), "prior": categories(ROWS, 3, 4, seed=number + 10)}


def a_mixture(number):
    posterior = gaussian(ROWS, 2, seed=number)
    return {"posterior": posterior, "prior": MIXTURE, "z": posterior.loc + posterior.scale}


KINDS = {
    "groups": (two_groups, {}),
    "groups of maps, pooled": (two_maps, {"pool": (2, 3)}),
    "padded sequences, pooled": (sequences, {"pool": 1}),
    "categories against predicted ones": (predicted_classes, {"unimix": 0.01}),
    "a joint prior": (a_mixture, {}),
}


def measured(kind, numbers):
    batch_of, options = KINDS[kind]
    monitor = LatentMonitor(observations=16, **options)
    for number in numbers:
        index = torch.arange(ROWS * number, ROWS * (number + 1))
        monitor.update(index=index, **batch_of(number))
    report = monitor.compute()
    of_positions = {} if report.positions is None else vars(report.positions)
    numbers = {field.name: getattr(report, field.name) for field in fields(report)}
    return {**numbers, "collapse": report.reason, "positions": of_positions}


class Conditional(LightningModule):
    """Without noise, so that two processes and one compute the same; its prior p(z|c) learns too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.prior_net = nn.Linear(3, 4), nn.Linear(2, 3), nn.Linear(3, 4)
        self.kl_weight, self.used = 1.0, []
        self.prior_net.weight.data.mul_(0.2)
        self.double()

    def training_step(self, batch, batch_idx):
        self.used.append(float(self.kl_weight))
        mean, log_variance = self.encoder(batch).chunk(2, 1)
        loc, log_scale = self.prior_net(batch.abs()).chunk(2, 1)
        ratio = (0.5 * log_variance - log_scale).exp()
        kl = 0.5 * (ratio.square() + ((mean - loc) / log_scale.exp()).square() - 1) - ratio.log()
        return (self.decoder(mean) - batch).square().sum(1).mean() + self.kl_weight * kl.sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.002)


def prior_of(module, batch):
    loc, log_scale = module.prior_net(batch.abs()).chunk(2, 1)
    return Normal(loc, log_scale.exp())


def steered(folder, batch_size, **options):
    model = Conditional()
    data = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampler = DistributedSampler(data, shuffle=False) if options else None
    target = TargetRate(4.0, attribute="kl_weight", posterior="encoder", prior=prior_of, chunk=1, smoothing=0.5)
    trainer = quiet_trainer(folder, callbacks=[target], max_epochs=3, use_distributed_sampler=False, **options)
    trainer.fit(model, DataLoader(list(data), batch_size, sampler=sampler))
    return model.used, float(model.kl_weight), model.state_dict()


def share(rank, folder):
    reports = {kind: measured(kind, range(rank, BATCHES, 2)) for kind in KINDS}
    torch.save([reports, steered(folder, 2, devices=2, strategy="ddp")], f"{folder}/{rank}.pt")


@pytest.mark.exhaustive  # the sample is that of tests/callbacks/metrics/test_latent_monitor.py
def test_two_processes_measure_and_steer_as_one(tmp_path):
    in_two_processes(share, tmp_path)
    used, last, weights = steered(tmp_path, 4)
    assert len(set(used)) == len(used)
    assert len({round(later / before, 6) for before, later in pairwise(used)}) > 10, "the error is within its limits"
    for rank in range(2):
        reports, (their_used, their_last, their_weights) = torch.load(tmp_path / f"{rank}.pt")
        for kind, theirs in reports.items():
            for name, value in measured(kind, range(BATCHES)).items():
                if name == "collapse":
                    assert theirs[name] == value
                else:
                    torch.testing.assert_close(theirs[name], value, msg=lambda text, at=(kind, name): f"{at}: {text}")
        torch.testing.assert_close(torch.tensor(their_used), torch.tensor(used), rtol=1e-6, atol=0)
        assert their_last == pytest.approx(last, rel=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(their_weights[name], value, rtol=1e-6, atol=1e-9)
