import torch
from scipy import stats

from lightning_vae.noise import uniform_by_index


def test_noise_belongs_to_the_observation():
    noise = uniform_by_index(torch.arange(100), 7)
    order = torch.randperm(100)
    assert torch.equal(uniform_by_index(order, 7), noise[order])
    assert torch.equal(uniform_by_index(torch.tensor([42]), 7), noise[42:43])
    assert torch.equal(uniform_by_index(torch.arange(100), 5), noise[:, :5])
    assert not torch.equal(uniform_by_index(torch.arange(100), 7, seed=1), noise)


def test_noise_is_uniform_and_independent():
    noise = uniform_by_index(torch.arange(2000), 50).double().numpy()
    assert 0 < noise.min() < noise.max() < 1
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 0.001
    for other in (noise[1:, :], noise[:, 1:], uniform_by_index(torch.arange(2000), 50, seed=1).numpy()):
        rows, columns = other.shape
        assert abs(stats.pearsonr(noise[:rows, :columns].ravel(), other.ravel()).statistic) < 0.015


def test_noise_stays_inside_the_interval_where_half_precision_is_the_default():
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        noise = uniform_by_index(torch.arange(2000), 50)
    finally:
        torch.set_default_dtype(default)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, uniform_by_index(torch.arange(2000), 50))
    assert noise.max() < 1


def test_noise_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    uniform_by_index(torch.arange(3), 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_far_indices_differs():
    index = torch.tensor([5, 5 + 2**32, 5 + 2**33])
    assert len(uniform_by_index(index, 3).unique(dim=0)) == 3
