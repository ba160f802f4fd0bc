"""Terms and the multi-sample bound are a part of a compiled loss, which is one graph."""

import pytest
import torch
from torch import distributions as td

from lightning_vae import DIP, MMD, TotalCorrelation, multi_sample_bound
from tests.terms.steps import normal, step_of

NOISE = normal(2, 6, 3, seed=1)


class Drawn(td.Normal):
    """A normal distribution whose samples have given noise."""

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * NOISE


def term_loss(term):
    def loss(mean):
        posterior = td.Normal(mean, torch.ones_like(mean), validate_args=False)
        return term(step_of(posterior, mean + NOISE[0], data_size=20))

    return loss


def bound_loss(mean):
    prior = td.Normal(torch.zeros_like(mean), 1.0, validate_args=False)
    posterior = Drawn(mean, torch.ones_like(mean), validate_args=False)
    return multi_sample_bound(posterior, prior, lambda z: z.cos().sum(-1), 2).loss.sum()


LOSSES = {
    "MMD": term_loss(MMD()),
    "TotalCorrelation": term_loss(TotalCorrelation()),
    "DIP": term_loss(DIP()),
    "multi-sample bound": bound_loss,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_graph(loss):
    mean = normal(6, 3).requires_grad_()
    plain = loss(mean)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(mean)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(*(torch.autograd.grad(each, mean)[0] for each in (compiled, plain)))
