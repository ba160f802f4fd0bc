import itertools

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


def test_noise_is_the_same_in_every_version():
    """MurmurHash3's finaliser in Python's own integers; int32 overflows, and has no unsigned shift."""

    def mixed(key: int) -> int:
        key = (key ^ (key >> 16)) * 0x85EBCA6B % 2**32
        key = (key ^ (key >> 13)) * 0xC2B2AE35 % 2**32
        return key ^ (key >> 16)

    for index, seed in itertools.product((0, 7, 2**31, 2**32 - 1, 2**40 + 3), (0, 3, 0x9057E101)):
        row = mixed((mixed(seed) + (index % 2**32) * 0x9E3779B9 + (index >> 32)) % 2**32)
        bits = [mixed((row + column * 0x9E3779B9) % 2**32) for column in (1, 2, 3)]
        expected = torch.tensor([[((each >> 9) + 0.5) / 2**23 for each in bits]])
        assert torch.equal(uniform_by_index(torch.tensor([index]), 3, seed), expected)
