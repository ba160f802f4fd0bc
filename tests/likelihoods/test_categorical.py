import pytest
import torch
from torch.nn import functional

from lightning_vae import VAE, Categorical


def test_the_loss_is_the_cross_entropy_of_the_classes():
    torch.manual_seed(0)
    likelihood = Categorical((2, 3, 1), 5)
    assert likelihood.output_shape == (10, 3, 1)
    output, classes = torch.randn(4, 10, 3, 1, requires_grad=True), torch.randint(0, 5, (4, 2, 3, 1))
    loss = -likelihood(output).log_prob(classes / 4)
    expected = functional.cross_entropy(output.view(4, 5, 2, 3, 1), classes, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(loss, expected)
    for each, other in zip(*(torch.autograd.grad(every.sum(), output) for every in (loss, expected)), strict=True):
        torch.testing.assert_close(each, other)


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_every_class_is_found_in_the_networks_scale(levels):
    likelihood = Categorical((1,), levels)
    output = torch.randn(1, levels)
    values = (torch.arange(levels) / (levels - 1)).view(-1, 1)
    torch.testing.assert_close(likelihood(output).log_prob(values), output[0].log_softmax(0))


def test_what_is_no_class_has_no_probability_and_no_effect_on_the_device():
    distribution = Categorical((1,), 3)(torch.randn(2, 3))
    for value in (-1.0, 7.0, torch.nan, 1e30):
        assert (distribution.log_prob(torch.full((2, 1), value)) == -torch.inf).all()


def test_data_that_are_no_classes_are_refused():
    with pytest.raises(ValueError, match="`levels` must be the number of classes for the Categorical likelihood"):
        Categorical((2,))
    vae = VAE((2,), 4, 2, likelihood=Categorical)
    vae.elbo_terms(torch.tensor([[0, 3]]))
    with pytest.raises(
        ValueError, match=r"`likelihood` Categorical needs integers from 0 to 3, but a batch holds 2[.]5"
    ):
        vae.elbo_terms(torch.tensor([[0, 2.5]]))
