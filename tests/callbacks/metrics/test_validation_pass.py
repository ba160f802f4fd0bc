import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_vae.callbacks.metrics.validation_pass import ValidationPass


def see(watched, rows, dim):
    posterior = Normal(torch.randn(rows, dim), torch.ones(rows, dim))
    watched.append(posterior.mean, posterior.variance, kl_divergence(posterior, Normal(0.0, 1.0)))


def measure(watched):
    return watched.measure(lambda values, reduce_op: values, torch.device("cpu"))


def test_a_pass_shares_nothing_with_the_one_before():
    watched = ValidationPass(observations=8)
    see(watched, 8, 3)
    assert len(watched.state()["moments"]) == 3
    watched.restart()
    see(watched, 4, 5)  # of another number of dimensions
    assert watched.state()["moments"] == ()
    see(watched, 4, 5)
    units, _, rates = watched.state()["moments"]
    assert units[0].tolist() == [8.0] * 5
    assert rates.shape == (5,)


def test_large_moments_are_freed_between_passes():
    watched = ValidationPass(observations=2)
    for dim, are_kept in ((2**17, True), (2**18 + 1, False)):
        watched.append(torch.zeros(2, dim))
        watched.restart()
        assert hasattr(watched, "_posteriors") == are_kept


def test_a_saved_pass_continues_to_the_same_measurements():
    torch.manual_seed(0)
    parts = [(torch.randn(5, 2, 3), torch.rand(5, 2, 3) + 0.1, torch.rand(5, 2, 3)) for _ in range(7)]
    whole, begun, continued = (ValidationPass(observations=8) for _ in range(3))
    for number, part in enumerate(parts):
        whole.append(*part)
        (begun if number < 4 else continued).append(*part)
        if number == 3:
            continued.load(begun.state(), torch.device("cpu"))
    one, two = measure(whole), measure(continued)
    assert torch.equal(one.variance, two.variance)
    assert torch.equal(one.rate, two.rate)
    assert (one.mutual_information, one.marginal_kl) == (two.mutual_information, two.marginal_kl)
    assert one.observations == two.observations == 8


def test_a_saved_pass_of_another_width_is_not_continued():
    begun, fresh = ValidationPass(observations=4), ValidationPass(observations=4)
    see(begun, 6, 3)
    state = begun.state()
    units, rows, rates = state["moments"]
    older = {**state, "moments": (units, rows[:, :-1], rates)}  # kept no rates of the observations
    assert not fresh.load(older, torch.device("cpu"))
    assert not fresh.has_begun
    see(fresh, 6, 3)
    assert measure(fresh).observations == 4
    assert not fresh.load({**state, "batches": [(torch.zeros(1), torch.zeros(1, 3))]}, torch.device("cpu"))
    assert fresh.load({}, torch.device("cpu"))


def test_without_variances_and_rates_only_the_active_units_are_measured():
    watched = ValidationPass(observations=8)
    watched.append(torch.tensor([[-1.0, 5.0], [1.0, 5.0]]))
    measured = measure(watched)
    assert measured.variance.tolist() == [1.0, 0.0]
    assert measured.rate is measured.mutual_information is measured.marginal_kl is None


def test_no_observation_is_no_measurement():
    assert measure(ValidationPass(observations=8)) is None


def test_latents_of_another_shape():
    watched = ValidationPass(observations=8)
    watched.append(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"^The latents of .* shape \(1, 4\) in one step and \(2, 4\) in another"):
        watched.append(torch.zeros(2, 2, 4))
