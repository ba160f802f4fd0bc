import pickle
from pathlib import Path

import pytest
import torch

from lightning_vae.callbacks.metrics.active_units import ActiveUnits, active_units, variance_of_means
from tests.processes import in_two_processes


def hard_means(rows: int = 1000) -> torch.Tensor:
    """Means of 100 with a variance of 0.0025 beside an active dimension: float32 sums of squares get these wrong."""
    noise = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.tensor([100.0, 0.0, -100.0]) + noise * torch.tensor([0.05, 1.0, 0.05])


def two_pass(means: torch.Tensor) -> torch.Tensor:
    return (means - means.mean(dim=0)).square().mean(dim=0)


def test_active_units_counts_variances_strictly_above_the_threshold():
    half = 2**-4  # its square, 2**-8, is exact
    means = torch.tensor([[-half, -2 * half, 7.0], [half, 2 * half, 7.0]])
    assert active_units(means, threshold=2**-8) == ActiveUnits(dim=3, threshold=2**-8)(means) == 1
    assert active_units(means, threshold=2**-9) == 2


def test_active_units_of_means_far_from_zero():
    means = hard_means()
    torch.testing.assert_close(variance_of_means(means), two_pass(means), rtol=1e-12, atol=0)
    assert active_units(means) == 1


@pytest.mark.parametrize("sizes", [(1000,), (300, 700), (1,) * 1000, (0, 17, 0, 983), (999, 1)])
def test_stream_equals_two_passes_for_any_batches(sizes):
    means = hard_means()
    metric = ActiveUnits(dim=3)
    for batch in means.split(sizes):
        metric.update(batch)
    assert metric.count == 1000
    assert metric.compute() == 1
    torch.testing.assert_close(metric.variance, two_pass(means), rtol=1e-12, atol=0)


def test_forward_returns_the_batch_value_and_keeps_the_whole():
    means = hard_means()
    metric = ActiveUnits(dim=3)
    for batch in means.split(300):
        assert metric(batch) == 1
    torch.testing.assert_close(metric.variance, two_pass(means), rtol=1e-12, atol=0)


def test_merge_state():
    means = hard_means()
    left, right = ActiveUnits(dim=3), ActiveUnits(dim=3)
    left.update(means[:123])
    right.update(means[123:])
    left.merge_state(right)
    torch.testing.assert_close(left.variance, two_pass(means), rtol=1e-12, atol=0)


def test_state_has_a_constant_size_and_pickles():
    metric = ActiveUnits(dim=3)
    for batch in hard_means().split(10):
        metric.update(batch)
        assert metric.moments.shape == (3, 3)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).variance, metric.variance)
    metric.reset()
    assert metric.count == 0


def share(rank: int, folder: Path) -> None:
    means = hard_means()
    uneven, lopsided = ActiveUnits(dim=3), ActiveUnits(dim=3)
    uneven.update(means[:300] if rank == 0 else means[300:])
    if rank == 0:
        lopsided.update(means)
    for metric in (uneven, lopsided):
        metric.sync()
    torch.save([uneven.variance, lopsided.variance], folder / f"{rank}.pt")


def test_two_processes_equal_one(tmp_path):
    in_two_processes(share, tmp_path)
    for rank in range(2):
        for variance in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(variance, two_pass(hard_means()), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dim": 0}, "`dim` must be at least 1, got 0"), ({"dim": 1, "threshold": -1}, "threshold")],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        ActiveUnits(**options)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 3, 1)])
def test_invalid_shape(shape):
    with pytest.raises(ValueError, match=r"must have shape \(N, 3\)"):
        ActiveUnits(dim=3).update(torch.zeros(shape))
