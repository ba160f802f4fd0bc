"""The scores of single observations: exact on the linear VAE, and on average the numbers of `test`."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributions as td
from torch import nn

from lightning_vae import Gaussian, evaluate, score
from lightning_vae.conditions import Condition
from lightning_vae.datamodules import Gaussian as GaussianData
from lightning_vae.evaluation import chunks
from lightning_vae.posteriors import FullCovariance
from lightning_vae.priors import ConditionalNormal, MixturePrior
from tests.doubles import digits, optimal_linear_vae, quiet_trainer, small_vae
from tests.processes import in_two_processes

SPECTRUM, VARIANCE = (5.0, 3.0, 1.5, 0.8, 0.3, 0.1), 0.4


@pytest.fixture(scope="module")
def x():
    data = GaussianData(SPECTRUM, size=512)
    data.setup("test")
    return data._splits["test"]["x"]


def scores(vae, batches, importance_samples=None):
    """The scores of all observations, in the order of their indices."""
    count, found, indices = 0, [], []
    for batch in batches:
        observations = vae.observe(batch, first=count)
        count += len(observations)
        found.append(score(vae, observations, importance_samples))
        indices.append(observations.index)
    order = torch.cat(indices).argsort()
    return {name: torch.cat([each[name] for each in found])[order] for name in found[0]}


@pytest.mark.parametrize("samples", [1, 7, 60])
def test_at_the_optimum_every_observation_has_its_exact_likelihood_and_all_samples_count(x, samples):
    vae = optimal_linear_vae(x, 4, VARIANCE)
    found = score(vae, vae.observe(x), samples)
    covariance = vae.decoder.map.weight @ vae.decoder.map.weight.T + VARIANCE * torch.eye(6)
    exact = td.MultivariateNormal(torch.zeros(6).double(), covariance.detach()).log_prob(x.double())
    torch.testing.assert_close(found["nll"], -exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["effective_sample_size"], torch.full((512,), samples).double(), rtol=1e-6, atol=0)


def test_the_rate_and_the_expected_distortion_are_in_closed_form_on_the_linear_vae(x):
    vae = optimal_linear_vae(x, 4, VARIANCE, beta=2.0)
    found = score(vae, vae.observe(x), 2000)
    posterior = vae.encode(x)
    rate = 0.5 * (posterior.mean**2 + posterior.variance - 1 - posterior.variance.log()).sum(1)
    torch.testing.assert_close(found["rate"], rate.detach(), rtol=0, atol=1e-9)
    # E|x - Wz|^2 = |x - W mean|^2 + tr(W V W'), and six log-normalisers.
    weight = vae.decoder.map.weight
    error = (x.double() - posterior.mean @ weight.T).square().sum(1) + posterior.variance @ weight.square().sum(0)
    distortion = error / (2 * VARIANCE) + 3 * torch.tensor(2 * torch.pi * VARIANCE).double().log()
    difference = found["distortion"] - distortion.detach()
    assert difference.abs().max() < 0.3  # a standard error of 2000 samples is at most 0.05
    assert float(difference.mean()) == pytest.approx(0, abs=0.01)
    torch.testing.assert_close(found["elbo"], -(found["rate"] + found["distortion"]), rtol=1e-15, atol=0)


@pytest.mark.parametrize("samples", [1, 7])
def test_their_means_are_the_numbers_of_test(samples):
    vae = small_vae()
    result = evaluate(vae, digits(batch_size=50), importance_samples=samples).to_dict()
    found = scores(vae, digits(batch_size=64), samples)
    assert list(found) == ["elbo", "rate", "distortion", "nll", "effective_sample_size"]
    for name, values in found.items():
        assert values.shape == (297,)
        assert values.dtype == torch.float64
        assert float(values.mean()) == pytest.approx(result[name], abs=1e-9), name


OPEN = {
    "a joint prior": {"prior": partial(MixturePrior, components=3)},
    "a condition and its prior": {"condition": partial(Condition, classes=10), "prior": ConditionalNormal},
    "a joint posterior": {"posterior": FullCovariance},
}


@pytest.mark.parametrize("options", OPEN.values(), ids=OPEN)
def test_their_means_are_the_numbers_of_test_for_other_parts_of_the_model(options, tmp_path):
    vae, trainer = small_vae(**options), quiet_trainer(tmp_path)
    result = evaluate(vae, digits(50), importance_samples=3).to_dict()
    found = scores(vae, digits(50, batch_size=11), 3)
    assert {name: float(values.mean()) for name, values in found.items()} == pytest.approx(
        {name: result[name] for name in found}, abs=1e-9
    )
    trainer.test(vae, digits(50), verbose=False)
    logged = {name: float(trainer.callback_metrics[f"test/{name}"]) for name in ("elbo", "rate", "distortion")}
    found = scores(vae, digits(50, batch_size=11))
    assert {name: float(values.mean()) for name, values in found.items()} == pytest.approx(logged, abs=1e-9)


def test_without_importance_samples_their_means_are_what_a_test_logs(tmp_path):
    vae, trainer = small_vae(), quiet_trainer(tmp_path)
    trainer.test(vae, digits(), verbose=False)
    found = scores(vae, digits())
    assert list(found) == ["elbo", "rate", "distortion"]
    for name, values in found.items():
        assert float(values.mean()) == pytest.approx(float(trainer.callback_metrics[f"test/{name}"]), abs=1e-9), name


class Backwards:
    """The same observations in another order, numbered."""

    def __iter__(self):
        for batch in reversed(list(digits(batch_size=23))):
            yield {name: rows.flip(0) for name, rows in batch.items()}


def test_neither_batches_nor_order_nor_parts_change_a_score(monkeypatch):
    vae = small_vae(partial(Gaussian, variance="optimal"))
    whole = scores(vae, digits(batch_size=297), 5)
    same = partial(torch.testing.assert_close, expected=whole, rtol=1e-12, atol=1e-12)
    same(scores(vae, digits(batch_size=10), 5))
    same(scores(vae, Backwards(), 5))
    monkeypatch.setattr(chunks, "_NUMBERS_AT_ONCE", {"cpu": 7 * 64})
    same(scores(vae, digits(batch_size=297), 5))


def of_share(rank: int, folder: Path) -> None:
    batches = [rows[:, None].expand(-1, 6).float() for rows in torch.arange(rank, 11, 2).split(4)]  # not numbered
    torch.save(scores(linear(), batches, 5), folder / f"{rank}.pt")


def linear():
    data = GaussianData(SPECTRUM, size=64)
    data.setup("test")
    return optimal_linear_vae(data._splits["test"]["x"], 4, VARIANCE, beta=0.5)


def test_two_processes_give_the_scores_of_one(tmp_path):
    in_two_processes(of_share, tmp_path)
    alone = scores(linear(), [torch.arange(11)[:, None].expand(-1, 6).float()], 5)
    for rank in range(2):
        mine = {name: values[rank::2] for name, values in alone.items()}
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), mine, rtol=1e-12, atol=1e-12)


class Counting(nn.Module):
    """A decoder that remembers how many latents it was given at most."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder, self.most, self.all = decoder, 0, 0

    def forward(self, z):
        self.most, self.all = max(self.most, len(z)), self.all + len(z)
        return self.decoder(z)


@pytest.mark.parametrize("weights", [600, 5])
def test_memory_is_bounded_for_any_number_of_samples_and_batch_size(monkeypatch, weights):
    vae = small_vae()
    vae.decoder = Counting(vae.decoder)
    monkeypatch.setattr(chunks, "_NUMBERS_AT_ONCE", {"cpu": 40 * 64})
    monkeypatch.setattr(chunks, "_WEIGHTS_AT_ONCE", weights)
    kept = []
    bound = "lightning_vae.evaluation.scores.importance_weighted_bound"
    monkeypatch.setattr(bound, lambda log_weights: kept.append(log_weights.numel()) or log_weights[0])
    (batch,) = digits(50)
    score(vae, vae.observe(batch), 30)
    assert vae.decoder.all == 50 * 30
    assert vae.decoder.most <= 40
    assert max(kept) <= max(weights, 30)  # at least the weights of one observation


def test_an_empty_share_has_the_same_scores():
    vae = small_vae()
    (batch,) = digits(4)
    empty = vae.observe(batch)[:0]
    assert {name: tuple(values.shape) for name, values in score(vae, empty, 3).items()} == dict.fromkeys(
        ("elbo", "rate", "distortion", "nll", "effective_sample_size"), (0,)
    )


def test_the_model_and_the_random_state_are_left_as_they_were():
    vae = small_vae().train()
    (batch,) = digits(4)
    before = torch.get_rng_state()
    assert not score(vae, vae.observe(batch), 2)["nll"].requires_grad
    assert vae.training
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_train_differently_are_scored_as_evaluated():
    vae = small_vae()
    vae.decoder = nn.Sequential(vae.decoder, nn.Dropout(0.9))
    (batch,) = digits(4)
    observations = vae.observe(batch)
    torch.testing.assert_close(score(vae.train(), observations), score(vae.eval(), observations), rtol=0, atol=0)


@pytest.mark.parametrize("samples", [0, 1.5, "2"])
def test_a_number_of_samples_that_is_none_is_refused(samples):
    vae = small_vae()
    (batch,) = digits(4)
    with pytest.raises(ValueError, match="`importance_samples` must be at least 1, a whole number, got"):
        score(vae, vae.observe(batch), samples)


def test_another_model_is_refused():
    with pytest.raises(TypeError, match=r"must be a lightning_vae\.VAE, got Linear"):
        score(nn.Linear(2, 2), None)
