"""What a model observes of a batch."""

import pytest
import torch

from tests.image_vae import SHAPE, images, small, small_like, trainer


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (torch.rand(8, 5, 5), {}, "`shape` is"),
        ("text", {}, "A batch must be"),
        (torch.rand(8, *SHAPE), {}, "as if already scaled"),
        (images(8) * 2, {"levels": 3}, "needs data from 0 to 2"),
        (torch.randn(8, *SHAPE), {"levels": None}, "needs data from 0 to 1"),
    ],
)
def test_data_in_another_shape_or_scale_are_refused(tmp_path, batch, options, message):
    data = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, num_sanity_val_steps=0).fit(small(**options), data)


def test_a_batch_is_observed_in_every_scale():
    vae, x = small(), images(5)
    observations = vae.observe({"x": x, "index": torch.arange(5, 10), "label": torch.arange(5)})
    assert torch.equal(observations.x, x)
    torch.testing.assert_close(observations.scaled, x / 16)
    assert torch.equal(observations.observed, vae.likelihood.observe(x / 16, torch.arange(5, 10)))
    assert torch.equal(observations.label, torch.arange(5))
    twin = small_like(vae)
    torch.testing.assert_close(vae.encode(observations).mean, twin(observations.observed))
    terms, again = vae.elbo_terms(observations), vae.elbo_terms(x, torch.arange(5, 10))
    assert torch.equal(terms.distortion, again.distortion)
    first, second = observations.split(3)
    assert (first.index.tolist(), second.index.tolist()) == ([5, 6, 7], [8, 9])
    assert torch.equal(vae.observe({"x": x[3:], "index": torch.arange(8, 10)}).observed, second.observed)


@pytest.mark.parametrize(
    ("batch", "label"),
    [
        (images(3), None),
        ([images(3)], None),
        ([images(3), torch.arange(3)], [0, 1, 2]),
        ([images(3), torch.zeros(3, 2)], None),
        ({"x": images(3)}, None),
    ],
)
def test_observations_without_an_index_are_counted(batch, label):
    observations = small().observe(batch, first=4)
    assert observations.index.tolist() == [4, 5, 6]
    assert (None if observations.label is None else observations.label.tolist()) == label


def test_labels_may_be_anything():
    assert small().observe({"x": images(3), "label": ["a", "b", "c"]})[1:].label == ["b", "c"]
    assert small().observe({"x": images(3), "label": torch.arange(3).numpy()})[1:].label.tolist() == [1, 2]


@pytest.mark.parametrize("label", [{"digit": torch.arange(3)}, 7, "abc", torch.tensor(7), torch.arange(4), ["a", "b"]])
def test_labels_that_are_not_one_for_each_observation_are_left_out(label):
    assert small().observe({"x": images(3), "label": label}).label is None


def test_the_first_batch_is_checked_for_its_scale():
    vae = small()
    with pytest.raises(ValueError, match="as if already scaled"):
        vae.observe(images(3) / 16)
    vae.observe(images(3) / 16, first=3)
