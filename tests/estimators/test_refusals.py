"""Estimators refuse shapes and values that they have no meaning for."""

import math

import pytest
import torch

from lightning_vae.estimators import (
    ImportanceWeightedLikelihood,
    aggregate_moments,
    cross_fitted_marginal_kl,
    effective_sample_size,
    gaussian_total_correlation,
    importance_weighted_bound,
    mixture_estimates,
    shannon_distortion,
)
from lightning_vae.estimators.probes import knn_accuracy, linear_probe_accuracy, nearest_distance

MEAN, ONE, FACTORS = torch.zeros(8, 3), torch.ones(8, 3), torch.eye(3).expand(8, 3, 3)
CLASSES, PLACES = torch.arange(8) % 2, torch.zeros(8, 1, dtype=torch.long)
CALLS = {
    "moments of a negative variance": ("variance", lambda: aggregate_moments(MEAN, -ONE)),
    "moments of a variance of NaN": ("variance", lambda: aggregate_moments(MEAN, ONE * math.nan)),
    "moments of none": ("mean", lambda: aggregate_moments(MEAN[:0], ONE[:0])),
    "a marginal KL of a negative variance": ("variance", lambda: cross_fitted_marginal_kl(MEAN, -ONE)),
    "a marginal KL of one posterior": ("mean", lambda: cross_fitted_marginal_kl(MEAN[:1], ONE[:1])),
    "a mixture of a negative variance": ("variance", lambda: mixture_estimates(MEAN, -ONE)),
    "covariances for factors": ("scale_tril", lambda: mixture_estimates(MEAN, scale_tril=torch.ones(8, 3, 3))),
    "factors without a positive diagonal": ("scale_tril", lambda: mixture_estimates(MEAN, scale_tril=-FACTORS)),
    "one factor for all": ("scale_tril", lambda: mixture_estimates(MEAN, scale_tril=FACTORS[:1])),
    "variances and factors": ("variance", lambda: mixture_estimates(MEAN, ONE, scale_tril=FACTORS)),
    "neither variances nor factors": ("variance", lambda: mixture_estimates(MEAN)),
    "a mixture of points": ("variance", lambda: mixture_estimates(MEAN, 0 * ONE)),
    "a covariance of two sizes": ("covariance", lambda: gaussian_total_correlation(torch.ones(2, 3))),
    "variances for a covariance": ("covariance", lambda: gaussian_total_correlation(torch.ones(3))),
    "a batch of covariances": ("covariance", lambda: gaussian_total_correlation(torch.eye(2)[None])),
    "an indefinite covariance": ("covariance", lambda: gaussian_total_correlation(torch.tensor([[1.0, 2], [2, 1]]))),
    "a triangle for a covariance": ("covariance", lambda: gaussian_total_correlation(torch.tensor([[1.0, 0], [1, 1]]))),
    "a covariance of NaN": ("covariance", lambda: gaussian_total_correlation(torch.eye(2) * math.nan)),
    "no eigenvalues": ("eigenvalues", lambda: shannon_distortion([], 1.0, 1.0)),
    "a negative eigenvalue": ("eigenvalues", lambda: shannon_distortion([1.0, -0.1], 1.0, 1.0)),
    "no signal": ("eigenvalues", lambda: shannon_distortion([0.0, 0.0], 1.0, 1.0)),
    "a variance of 0": ("variance", lambda: shannon_distortion([1.0], 0.0, 1.0)),
    "a rate of NaN": ("rate", lambda: shannon_distortion([1.0], 1.0, math.nan)),
    "log-weights of one axis": ("log_weights", lambda: importance_weighted_bound(torch.zeros(4))),
    "log-weights of three axes": ("log_weights", lambda: importance_weighted_bound(torch.zeros(4, 2, 2))),
    "no log-weights": ("log_weights", lambda: importance_weighted_bound(torch.zeros(0, 4))),
    "a size of no samples": ("log_weights", lambda: effective_sample_size(torch.zeros(0, 4))),
    "a size of one axis": ("log_weights", lambda: effective_sample_size(torch.zeros(4))),
    "a metric of one axis": ("log_weights", lambda: ImportanceWeightedLikelihood().update(torch.zeros(4))),
    "fewer labels than means": ("labels", lambda: knn_accuracy(MEAN, CLASSES[:7], 2)),
    "more labels than means": ("labels", lambda: knn_accuracy(MEAN[:6], CLASSES, 2)),
    "labels of two axes": ("labels", lambda: knn_accuracy(MEAN, CLASSES[:, None], 2)),
    "fractions for labels": ("labels", lambda: knn_accuracy(MEAN, CLASSES / 2, 2)),
    "one label for all": ("labels", lambda: linear_probe_accuracy(MEAN, CLASSES[:1])),
    "means of one axis": ("means", lambda: linear_probe_accuracy(MEAN[:, 0], CLASSES)),
    "one mean to predict": ("means", lambda: linear_probe_accuracy(MEAN[:1], CLASSES[:1])),
    "a negative penalty": ("ridge", lambda: linear_probe_accuracy(MEAN, CLASSES, ridge=-1.0)),
    "points of another width": ("points", lambda: nearest_distance(MEAN[:, :1], MEAN, PLACES)),
    "one point is excluded for all": ("excluded", lambda: nearest_distance(MEAN, MEAN, PLACES[:1])),
    "no data to be near": ("data", lambda: nearest_distance(MEAN, MEAN[:0], PLACES)),
}


@pytest.mark.parametrize(("name", "call"), CALLS.values(), ids=CALLS)
def test_refused(name, call):
    with pytest.raises(ValueError, match=f"`{name}`.* must"):
        call()


def test_an_eigenvalue_of_zero_takes_no_rate():
    assert shannon_distortion([2.0, 0.0], 1.0, 0.5) == pytest.approx(
        shannon_distortion([2.0], 1.0, 0.5) + 0.5 * math.log(2 * math.pi)
    )
