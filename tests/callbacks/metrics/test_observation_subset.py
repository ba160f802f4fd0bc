import math

import pytest
import torch

from lightning_vae.callbacks.metrics.observation_subset import ObservationSubset, random_keys, smallest_keys


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_subset_depends_on_the_indices_alone():
    rows, index = normal(300, 2), torch.randperm(300, generator=torch.Generator().manual_seed(5)) + 2**50
    expected = rows[random_keys(index).argsort()[:64]]
    for order in (torch.arange(300), torch.arange(300).flip(0), torch.arange(300).repeat(2)):
        metric = ObservationSubset(columns=2, size=64)
        for batch in order.split(50):
            metric.update(rows[batch], index[batch])
        assert torch.equal(metric.compute(), expected)
    small = ObservationSubset(columns=2, size=64)
    small.update(rows[:0], index[:0])
    small.update(rows[:5], index[:5])
    assert small.compute().shape == (5, 2)


def test_keys_are_distinct_and_do_not_follow_the_index():
    keys = random_keys(torch.arange(100_000))
    assert len(keys.unique()) == 100_000
    first = keys.argsort()[:2000].double()
    assert first.mean() == pytest.approx(50_000, rel=0.05)  # a standard error of 645
    assert first.std() == pytest.approx(100_000 / math.sqrt(12), rel=0.05)
    assert torch.equal(random_keys(torch.arange(10, dtype=torch.int32)), keys[:10])


def test_subsets_merge_and_a_row_of_both_counts_once():
    rows, index = normal(100, 2), torch.arange(100) + 50_000
    left, right = ObservationSubset(columns=2, size=64), ObservationSubset(columns=2, size=64)
    assert left(rows[:0], index[:0]).shape == (0, 2)
    left.update(rows[50:], index[50:])
    right.update(rows[:60], index[:60])
    left.merge_state(right)
    assert torch.equal(left.compute(), rows[random_keys(index).argsort()[:64]])
    tables = [right.state, left.state]
    right.sync(dist_sync_fn=lambda *_, **__: tables, distributed_available=lambda: True)
    assert torch.equal(right.rows, left.compute())


def test_smallest_keys_keeps_each_key_once():
    rows = torch.tensor([[7.0, 70.0], [2.0, 20.0], [7.0, 71.0], [math.inf, 0.0], [5.0, 50.0], [2.0, 21.0]])
    assert smallest_keys(rows, 2).tolist() == [[2.0, 20.0], [5.0, 50.0]]
    assert smallest_keys(rows, 3).tolist() == [[2.0, 20.0], [5.0, 50.0], [7.0, 70.0]]
    assert smallest_keys(rows, 4)[:, 0].tolist() == [2.0, 5.0, 7.0, math.inf]
