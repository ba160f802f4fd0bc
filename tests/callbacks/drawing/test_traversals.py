import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lightning_vae.callbacks.drawing.traversals import interpolations, prior_samples, traversals


def test_interpolations_are_straight():
    latents = torch.randn(5, 2, 3)
    paths = interpolations(latents, 3, 4)
    assert paths.shape == (2, 4, 2, 3)
    assert paths[:, 0].equal(latents[:2])
    assert paths[:, -1].equal(latents[2:4])
    torch.testing.assert_close(paths[:, 1], latents[:2] * 2 / 3 + latents[2:4] / 3)
    assert interpolations(latents[:1], 3, 4).shape[0] == 0


def test_a_prior_with_axes_of_its_own():
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(torch.zeros(2, 3), 2.0), 1))
    assert prior_samples(mixture, (7, 3)).shape == (7, 3)
    assert prior_samples(Normal(0.0, 1.0), (7, 2, 3)).shape == (7, 2, 3)
    assert prior_samples(Normal(torch.zeros(2, 1), 1.0), (7, 2, 3)).unique().numel() == 42
    assert traversals(torch.ones(3), [1], mixture, 3)[0].tolist() == [[1, -5, 1], [1, 0, 1], [1, 5, 1]]


class Unexpandable(Normal):
    def expand(self, *_):
        raise NotImplementedError


def test_a_prior_that_cannot_be_expanded_is_sampled_by_shape():
    prior = Unexpandable(torch.tensor([100.0, -100.0]), torch.ones(2))
    samples = prior_samples(prior, (50, 2))
    assert samples.shape == (50, 2)
    assert samples[:, 0].min() > 90
    assert samples[:, 1].max() < -90
    assert traversals(torch.zeros(2), [1], prior, 3)[0].tolist() == [[0, -102.5], [0, -100], [0, -97.5]]


def test_traversals_move_one_dimension_in_units_of_the_prior():
    prior = Normal(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0]))
    latent = torch.tensor([5.0, 6.0, 7.0])
    moved = traversals(latent, [1, 0], prior, 3)
    assert moved[0].tolist() == [[5, -4, 7], [5, 1, 7], [5, 6, 7]]
    assert moved[1].tolist() == [[-2.5, 6, 7], [0, 6, 7], [2.5, 6, 7]]
