import re
from pathlib import Path

import pytest
import torch
from torch import distributions as td
from torch import nn

from lightning_vae import Observations, Term
from lightning_vae.terms import DIP
from tests.terms.steps import normal, step_of

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "terms.md"


def example():
    """The class of the guide's term of one's own."""
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL) if "(Term)" in each]
    namespace = {}
    exec(block, namespace)
    return namespace["Perceptual"]


def test_the_guides_term_compares_features():
    features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)).double()
    term = example()(features, weight=0.5)
    x, decoded = normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1).requires_grad_()
    observations = Observations(x, x, x, torch.arange(4))
    likelihood = td.Independent(td.Normal(decoded, 1.0), 3)
    step = step_of(
        td.Normal(torch.zeros(4, 2), 1.0), torch.zeros(4, 2), observations=observations, likelihood=likelihood
    )
    value = term(step)
    expected = sum((features(x)[row] - features(decoded)[row]).square().sum() for row in range(4)) / 4
    torch.testing.assert_close(value, expected)
    value.backward()
    assert decoded.grad.abs().max() > 0
    assert all(each.grad is None for each in features.parameters())
    assert term.weight == 0.5


def test_a_term_defines_forward():
    with pytest.raises(NotImplementedError, match=r"Unfinished must define `forward\(step\)`"):
        type("Unfinished", (Term,), {})()(None)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), "1", True])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ValueError, match=f"`weight` must be a finite number of at least 0, got {weight!r}"):
        Term(weight)


def test_a_covariance_is_computed_in_full_precision():
    mean = normal(300, 2).float() * 3 + 100
    step = step_of(td.Normal(mean, 1.0), mean)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = DIP()(step)
    assert torch.equal(inside, DIP()(step))
