import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import OneHotEncoder

from lightning_vae.estimators.probes import knn_accuracy, linear_probe_accuracy, linear_probe_r2, nearest_distance


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images[:300, ::7]) + 0.1 * torch.randn(
        300, 10, generator=torch.Generator().manual_seed(0)
    ), torch.from_numpy(labels[:300])


def test_knn_equals_scikit_learns(digits):
    means, labels = digits
    predicted = cross_val_predict(KNeighborsClassifier(5), means.numpy(), labels.numpy(), cv=LeaveOneOut())
    assert knn_accuracy(means, labels) == pytest.approx((predicted == labels.numpy()).mean())


@pytest.mark.parametrize("ridge", [1.0, 3000.0])
def test_linear_probe_equals_scikit_learns_with_each_left_out(digits, ridge):
    means, labels = digits
    targets = OneHotEncoder(sparse_output=False).fit_transform(labels.numpy()[:, None])
    predicted = cross_val_predict(Ridge(alpha=ridge), means.numpy(), targets, cv=LeaveOneOut())
    assert linear_probe_accuracy(means, labels, ridge) == pytest.approx((predicted.argmax(1) == labels.numpy()).mean())


def test_labels_that_have_nothing_to_do_with_the_means_are_not_told():
    means, labels = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)), torch.arange(1000) % 10
    assert knn_accuracy(means, labels) < 0.2
    assert linear_probe_accuracy(means, labels) < 0.2


def test_nearest_distance_equals_scikit_learns_and_leaves_out(digits):
    data, _ = digits
    points = data[:100] + 0.5
    nothing = torch.full((100, 1), 299)
    expected = NearestNeighbors(n_neighbors=1).fit(data[:299].numpy()).kneighbors(points.numpy())[0][:, 0]
    np.testing.assert_allclose(nearest_distance(points, data, nothing, rows=30), expected)
    itself = torch.arange(100)[:, None]
    assert nearest_distance(data[:100], data, nothing).max() < 1e-3
    others = NearestNeighbors(n_neighbors=2).fit(data.numpy()).kneighbors(data[:100].numpy())[0][:, 1]
    np.testing.assert_allclose(nearest_distance(data[:100], data, itself), others, rtol=1e-3)


def test_too_few_means_for_the_neighbours():
    with pytest.raises(ValueError, match="`neighbours` must be from 1 to 4 for 5 means, got 5"):
        knn_accuracy(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64))


def test_a_linear_function_of_the_means_is_predicted_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(500, 3, generator=generator).double()
    weight = torch.randn(3, 2, generator=generator).double()
    assert linear_probe_r2(means, means @ weight + 5, ridge=1e-9) == pytest.approx(1, abs=1e-9)
    noise = torch.randn(500, 2, generator=generator).double()
    assert linear_probe_r2(means, noise) == pytest.approx(0, abs=0.03)
    # Half of the variance of the sum.
    mixed = means[:, :1] + noise[:, :1]
    assert linear_probe_r2(means, mixed) == pytest.approx(0.5, abs=0.06)
    assert math.isnan(linear_probe_r2(means, torch.ones(500, 1)))


def test_each_observation_is_predicted_from_the_others():
    means, targets = torch.randn(20, 2).double(), torch.randn(20, 1).double()
    errors = []
    for left in range(20):
        others = torch.arange(20) != left
        inputs = torch.cat([torch.ones(20, 1), means], 1)
        penalty = torch.diag(torch.tensor([0.0, 0.7, 0.7], dtype=torch.float64))
        weight = torch.linalg.solve(inputs[others].T @ inputs[others] + penalty, inputs[others].T @ targets[others])
        errors.append((targets[left] - inputs[left] @ weight).square())
    expected = 1 - torch.stack(errors).sum() / (targets - targets.mean()).square().sum()
    assert linear_probe_r2(means, targets, 0.7) == pytest.approx(float(expected), rel=1e-9)


def test_targets_of_other_observations_are_refused():
    with pytest.raises(ValueError, match=r"`means` and `targets` must have shapes"):
        linear_probe_r2(torch.zeros(4, 2), torch.zeros(3, 2))
