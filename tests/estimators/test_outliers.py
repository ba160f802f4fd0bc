import itertools

import pytest
import torch

from lightning_vae.estimators import auroc


def by_pairs(scores, is_outlier):
    """The share of pairs in which the outlier has the higher score, equal ones counting half."""
    pairs = list(itertools.product(scores[is_outlier].tolist(), scores[~is_outlier].tolist()))
    return sum((high > low) + 0.5 * (high == low) for high, low in pairs) / len(pairs)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, -700.0])
def test_it_is_the_share_of_pairs_in_order_in_any_unit_and_with_ties(unit, offset):
    torch.manual_seed(0)
    scores = unit * (offset + torch.randint(0, 30, (200,)).double())
    is_outlier = torch.rand(200) < 0.2
    scores = scores + unit * 5 * is_outlier
    assert float(auroc(scores, is_outlier)) == pytest.approx(by_pairs(scores, is_outlier), abs=1e-6)
    assert float(auroc(-scores, is_outlier)) == pytest.approx(1 - by_pairs(scores, is_outlier), abs=1e-6)


def test_perfect_wrong_and_equal_scores():
    is_outlier = torch.tensor([True, False, False, True])
    for scores, value in (([300.1, 300, 299, torch.inf], 1), ([-9, 0, 1, -8], 0), ([7, 7, 7, 7], 0.5)):
        assert float(auroc(torch.tensor(scores), is_outlier)) == value


@pytest.mark.parametrize(
    ("scores", "is_outlier", "message"),
    [
        ([1.0, 2.0], [True, True], "must have both kinds, got 2 outliers of 2"),
        ([1.0, 2.0], [False, False], "must have both kinds, got 0 outliers of 2"),
        ([1.0, float("nan")], [False, True], "must be numbers, got 1 NaNs of 2"),
        ([1.0, 2.0], [True], r"must have shape \(N,\), got \(2,\) and \(1,\)"),
        ([[1.0], [2.0]], [[True], [False]], r"must have shape \(N,\), got \(2, 1\)"),
    ],
)
def test_what_has_no_curve_is_refused(scores, is_outlier, message):
    with pytest.raises(ValueError, match=message):
        auroc(torch.tensor(scores), torch.tensor(is_outlier))
