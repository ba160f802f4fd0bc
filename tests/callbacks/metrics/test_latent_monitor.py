import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    kl_divergence,
)
from torch.utils.data import DataLoader

from lightning_vae.callbacks import CollapseDetector, LatentMonitor, categorical_mutual_information
from lightning_vae.callbacks.metrics.mutual_information import mutual_information
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes

STANDARD = Normal(0.0, 1.0)


def gaussians(rows, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(rows, *shape, generator=generator, dtype=torch.float64) + 0.5
    return Normal(mean, torch.rand(rows, *shape, generator=generator, dtype=torch.float64) + 0.1)


def part(posterior, rows):
    return Normal(posterior.loc[rows], posterior.scale[rows])


def measured(posterior, prior=None, batch=7, **options):
    monitor = LatentMonitor(**options)
    for first in range(0, len(posterior.loc), batch):
        monitor.update(part(posterior, slice(first, first + batch)), prior)
    return monitor.compute()


def test_a_vector_of_latents():
    posterior = gaussians(40, 3)
    report = measured(posterior)
    torch.testing.assert_close(report.variance, posterior.loc.var(0, correction=0))
    torch.testing.assert_close(report.rate_per_dimension, kl_divergence(posterior, STANDARD).mean(0))
    assert report.rate == pytest.approx(float(report.rate_per_dimension.sum()))
    assert report.mutual_information == pytest.approx(
        float(mutual_information(posterior.loc, posterior.variance)), abs=0.3
    )
    torch.testing.assert_close(report.shift, posterior.loc.mean(0))
    total = posterior.loc.var(0, correction=0) + posterior.variance.mean(0)
    torch.testing.assert_close(report.scale, total.sqrt())
    torch.testing.assert_close(report.width, posterior.variance.mean(0) / total)
    assert (report.count, report.observations, report.chosen, report.is_estimate) == (40, 40, None, False)


def test_channels_of_images():
    posterior = gaussians(20, 3, 4, 5)
    report = measured(posterior, pool=(2, 3))
    mean, variance = posterior.loc, posterior.variance
    torch.testing.assert_close(report.variance, mean.var(0, correction=0).mean((1, 2)))
    torch.testing.assert_close(report.rate_per_dimension, kl_divergence(posterior, STANDARD).mean(0).sum((1, 2)))
    by_channel = mean.transpose(0, 1).flatten(1)
    torch.testing.assert_close(report.shift, by_channel.mean(1))
    second = by_channel.var(1, correction=0) + variance.transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(report.scale, second.sqrt())
    torch.testing.assert_close(report.positions.variance, mean.var(0, correction=0).flatten())
    whole = measured(Normal(mean.flatten(1), posterior.scale.flatten(1)))
    assert report.rate == pytest.approx(whole.rate)
    assert report.mutual_information == pytest.approx(whole.mutual_information)
    assert report.marginal_kl == pytest.approx(whole.marginal_kl)


@pytest.mark.parametrize("pool", [1, -2])
def test_sequences_of_varying_length_with_padding(pool):
    lengths = [5, 3, 7, 2, 7, 4]
    sequences = [gaussians(length, 2, seed=length) for length in lengths]
    monitor = LatentMonitor(pool=pool)
    for first in range(0, 6, 2):
        pair = sequences[first : first + 2]
        longest = max(len(each.loc) for each in pair)
        mean, log_variance = torch.full((2, longest, 2), 99.0).double(), torch.full((2, longest, 2), 9.0).double()
        mask = torch.zeros(2, longest)
        for row, each in enumerate(pair):
            mean[row, : len(each.loc)], log_variance[row, : len(each.loc)] = each.loc, each.variance.log()
            mask[row, : len(each.loc)] = 1
        monitor.update((mean, log_variance), mask=mask)
    report = monitor.compute()
    rates = torch.stack([kl_divergence(each, STANDARD).sum(0) for each in sequences])
    torch.testing.assert_close(report.rate_per_dimension, rates.mean(0))
    together = torch.cat([each.loc for each in sequences])
    torch.testing.assert_close(report.shift, together.mean(0))
    variances = torch.cat([each.variance for each in sequences])
    torch.testing.assert_close(report.scale, (together.var(0, correction=0) + variances.mean(0)).sqrt())
    # at each position over the sequences that reach it, weighted by their number
    weighted = torch.zeros(2, dtype=torch.float64)
    for position in range(7):
        there = torch.stack([each.loc[position] for each in sequences if len(each.loc) > position])
        weighted += len(there) * there.var(0, correction=0)
    torch.testing.assert_close(report.variance, weighted / sum(lengths))
    assert report.mutual_information is not None


def test_padding_and_batching_change_nothing():
    posterior, mask = gaussians(12, 4, 2), torch.rand(12, 4) > 0.3
    posterior = Normal(0.1 * posterior.loc, 1.0 + posterior.scale)  # far from the limit of the mutual information
    padded = Normal(posterior.loc.where(mask[..., None], 1e3), posterior.scale)
    whole, parts = LatentMonitor(), LatentMonitor()
    whole.update(posterior, mask=mask)
    for first in range(0, 12, 5):
        rows = slice(first, first + 5)
        parts.update(part(padded, rows), mask=mask[rows])
    one, two = whole.compute(), parts.compute()
    torch.testing.assert_close(one.variance, two.variance)
    torch.testing.assert_close(one.rate_per_dimension, two.rate_per_dimension)
    assert one.mutual_information == pytest.approx(two.mutual_information)


def test_padded_categories_tell_nothing():
    probs = torch.softmax(2 * torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0)), dim=-1).double()
    mask = torch.arange(3) < torch.tensor([2, 3]).repeat(20)[:, None]
    monitor, short = LatentMonitor(), probs.where(mask[..., None], 0.25)
    monitor.update(OneHotCategorical(probs=probs), mask=mask)
    expected = categorical_mutual_information(short).mutual_information
    assert monitor.compute().mutual_information == pytest.approx(float(expected))


def test_a_gaussian_prior_is_the_unit():
    posterior = gaussians(30, 3)
    loc, scale = torch.tensor([3.0, -1.0, 0.0]).double(), torch.tensor([0.5, 2.0, 1.0]).double()
    moved = Normal(posterior.loc * scale + loc, posterior.scale * scale)
    one, two = measured(posterior), measured(moved, Normal(loc, scale))
    torch.testing.assert_close(one.variance, two.variance)
    torch.testing.assert_close(one.rate_per_dimension, two.rate_per_dimension)
    assert one.mutual_information == pytest.approx(two.mutual_information)
    assert one.marginal_kl == pytest.approx(two.marginal_kl)
    torch.testing.assert_close(two.shift, moved.loc.mean(0))


def test_a_conditional_prior_that_explains_everything_leaves_nothing():
    posterior = gaussians(30, 3)
    report = LatentMonitor()
    report.update(posterior, posterior)
    found = report.compute()
    assert found.active_units == 0
    assert found.rate == pytest.approx(0.0, abs=1e-12)
    assert found.mutual_information == pytest.approx(0.0, abs=1e-12)
    assert found.state == "collapsed"


def test_groups_stand_side_by_side_and_their_rates_add_up():
    top, bottom, prior = gaussians(30, 2), gaussians(30, 3, 2, seed=1), gaussians(30, 3, 2, seed=2)
    monitor = LatentMonitor()
    monitor.update({"top": top, "bottom": bottom}, {"top": None, "bottom": prior})
    report = monitor.compute()
    expected = [kl_divergence(top, STANDARD).mean(0), kl_divergence(bottom, prior).mean(0).flatten()]
    torch.testing.assert_close(report.rate_per_dimension, torch.cat(expected))
    assert report.variance.shape == (8,)


def test_a_joint_prior_has_one_rate_at_the_sample():
    posterior = Normal(torch.randn(30, 2).double(), 0.5)
    components = Independent(Normal(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double(), 1.0), 1)
    prior, z = MixtureSameFamily(Categorical(torch.ones(2).double()), components), posterior.sample()
    monitor = LatentMonitor()
    monitor.update(posterior, prior, z)
    report = monitor.compute()
    assert report.is_estimate
    assert report.rate_per_dimension is None
    assert report.rate == pytest.approx(float((posterior.log_prob(z).sum(1) - prior.log_prob(z)).mean()))
    assert report.mutual_information is not None
    assert "the rate is" in report.reason


def test_a_full_covariance_has_a_rate_and_no_mutual_information():
    posterior = MultivariateNormal(
        torch.randn(20, 2).double(), scale_tril=torch.tensor([[1.0, 0.0], [0.5, 1.0]]).double()
    )
    monitor = LatentMonitor()
    monitor.update(posterior)
    report = monitor.compute()
    expected = kl_divergence(posterior, MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())).mean()
    assert report.rate == pytest.approx(float(expected))
    assert report.mutual_information is None


def test_categories():
    probs = torch.tensor([[[0.9, 0.1, 0.0]], [[0.2, 0.7, 0.1]], [[0.1, 0.1, 0.8]]], dtype=torch.float64)
    monitor = LatentMonitor()
    for each in probs.split(2):
        monitor.update(OneHotCategorical(each))
    report = monitor.compute()
    usage = probs.mean(0)
    entropy = -(usage * usage.log()).sum()
    conditional = -torch.special.xlogy(probs, probs).sum((1, 2)).mean()
    assert report.rate == pytest.approx(float(torch.tensor(3.0).log() - conditional), abs=1e-6)
    assert report.mutual_information == pytest.approx(float(entropy - conditional), abs=1e-9)
    assert report.marginal_kl == pytest.approx(report.rate - report.mutual_information)
    torch.testing.assert_close(report.perplexity, entropy.exp()[None])
    assert report.dead_classes.tolist() == [0]
    assert report.shift is None
    torch.testing.assert_close(report.variance, probs.var(0, correction=0).sum(1))


def test_very_many_classes_have_no_mutual_information():
    monitor = LatentMonitor()
    monitor.update(OneHotCategorical(logits=torch.randn(3, 2, 2**14)))
    report = monitor.compute()
    assert report.rate is not None
    assert report.mutual_information is None


def test_another_posterior_without_a_prior_has_active_units_alone():
    monitor = LatentMonitor()
    monitor.update(Laplace(torch.tensor([[-1.0, 5.0], [1.0, 5.0]]), 1.0))
    report = monitor.compute()
    assert report.variance.tolist() == [1.0, 0.0]
    assert report.rate is report.mutual_information is report.marginal_kl is None


def test_a_deterministic_encoder_is_a_state_of_its_own():
    mean = 30**0.5 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = measured(Normal(mean, torch.full_like(mean, 1e-6)), batch=100)
    assert report.state == "deterministic"
    assert report.collapse.alarm
    assert "(z - shift) / scale" in report.remedy
    near_the_prior = measured(Normal(mean / 30**0.5, torch.full_like(mean, 1e-6)), batch=100)
    assert near_the_prior.state == "healthy"
    wide = measured(Normal(mean, torch.full_like(mean, 0.5)), batch=100)
    assert wide.state == "healthy"
    assert measured(Normal(mean, torch.full_like(mean, 1e-6)), batch=100, min_width=0.0).state == "healthy"
    for factor, state in ((0.9, "deterministic"), (1.1, "healthy")):
        limit = factor * report.marginal_kl / report.active_units
        again = measured(Normal(mean, torch.full_like(mean, 1e-6)), batch=100, max_marginal_kl=limit)
        assert again.state == state


def test_very_many_dimensions_are_estimated_from_a_choice():
    posterior = gaussians(64, 16, 16, 8)
    report = measured(posterior, batch=16, pool=(2, 3))
    assert report.chosen == 1024
    assert report.positions is None
    torch.testing.assert_close(report.rate_per_dimension, kl_divergence(posterior, STANDARD).mean(0).sum((1, 2)))
    assert report.state == "healthy"


def test_a_pass_shares_nothing_with_the_one_before():
    monitor = LatentMonitor()
    monitor.update(gaussians(8, 3))
    monitor.reset()
    monitor.update(gaussians(4, 5))  # of another number of dimensions
    assert monitor.compute().variance.shape == (5,)
    assert monitor.compute().count == 4


def test_a_saved_pass_continues_to_the_same_measurements():
    parts = [gaussians(5, 2, 3, seed=seed) for seed in range(7)]
    prior = gaussians(1, 2, 3, seed=9)
    whole, begun, continued = (LatentMonitor(observations=8) for _ in range(3))
    for number, each in enumerate(parts):
        whole.update(each, prior)
        (begun if number < 4 else continued).update(each, prior)
        if number == 3:
            assert continued.load_pass(begun.pass_state(), torch.device("cpu"))
    one, two = whole.compute(), continued.compute()
    assert torch.equal(one.variance, two.variance)
    assert torch.equal(one.rate_per_dimension, two.rate_per_dimension)
    assert (one.mutual_information, one.marginal_kl) == (two.mutual_information, two.marginal_kl)
    assert one.observations == two.observations == 8


def test_the_pass_of_another_version_is_not_continued():
    fresh = LatentMonitor()
    assert not fresh.load_pass({"batches": [], "rows": 0, "shape": None, "moments": ()}, torch.device("cpu"))
    assert not fresh.has_begun
    assert fresh.load_pass({}, torch.device("cpu"))


def test_no_observation_is_no_measurement():
    assert LatentMonitor().compute() is None
    empty = LatentMonitor()
    empty.update(gaussians(0, 3))
    assert empty.compute() is None


def test_latents_of_another_shape():
    monitor = LatentMonitor()
    monitor.update(gaussians(2, 1, 4))
    with pytest.raises(ValueError, match=r"^The latents of .* shape \(1, 4\) in one step and \(2, 4\) in another"):
        monitor.update(gaussians(2, 2, 4))


def share(rank, folder):
    results = []
    for owner in (None, 0):  # both have batches, or one has none at all
        monitor = LatentMonitor(observations=16, pool=1)
        for number, length in enumerate((3, 5, 4, 5)):
            if owner == rank or (owner is None and number % 2 == rank):
                index = torch.arange(10 * number, 10 * number + 10)
                monitor.update(gaussians(10, length, 2, seed=number), gaussians(1, 1, 2, seed=9), index=index)
        report = monitor.compute()
        results.append(
            (report.variance, report.rate_per_dimension, report.shift, report.scale, report.mutual_information)
        )
    by_place = LatentMonitor(observations=16)
    for first in range(0, 20, 5):
        by_place.update(part(gaussians(40, 2), slice(rank + 2 * first, rank + 2 * first + 10, 2)))
    torch.save([results, by_place.compute().mutual_information], f"{folder}/{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    in_two_processes(share, tmp_path)
    alone = LatentMonitor(observations=16, pool=1)
    for number, length in enumerate((3, 5, 4, 5)):
        index = torch.arange(10 * number, 10 * number + 10)
        alone.update(gaussians(10, length, 2, seed=number), gaussians(1, 1, 2, seed=9), index=index)
    report = alone.compute()
    for rank in range(2):
        results, by_place = torch.load(tmp_path / f"{rank}.pt")
        # Without an index, observations count in the order of DistributedSampler: every second one.
        assert by_place == pytest.approx(measured(gaussians(40, 2), observations=16).mutual_information)
        for variance, rate, shift, scale, information in results:
            torch.testing.assert_close(variance, report.variance)
            torch.testing.assert_close(rate, report.rate_per_dimension)
            torch.testing.assert_close(shift, report.shift)
            torch.testing.assert_close(scale, report.scale)
            assert information == pytest.approx(report.mutual_information)


def test_a_plain_loop_equals_the_callback_to_the_bit(tmp_path):
    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)

        def training_step(self, batch, batch_idx):
            mean, log_variance = self.encoder(batch).chunk(2, dim=1)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
            return (0.5 * (self.decoder(z) - batch).square().sum(1) + kl).mean()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    data = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    model, detector = Plain(), CollapseDetector(posterior="encoder", chunk=1)
    loader = DataLoader(data, 20)
    quiet_trainer(tmp_path, callbacks=[detector], max_epochs=3).fit(model, loader, loader)
    monitor = LatentMonitor()
    with torch.no_grad():
        for batch in loader:
            monitor.update(model.encoder(batch).chunk(2, dim=1))
    report = monitor.compute()
    for name, value in vars(detector.report).items():
        other = getattr(report, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
