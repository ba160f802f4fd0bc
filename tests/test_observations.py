"""What a model observes of a batch."""

from collections import UserDict, UserList

import pytest
import torch

from lightning_vae import VAE, Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian
from lightning_vae.callbacks.reading import batch_fields
from lightning_vae.datamodules import TensorLoader
from lightning_vae.observations import _NUMBERS, LABELS
from tests.image_vae import SHAPE, fitted, images, small, small_like, trainer


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


@pytest.mark.parametrize("key", ["label", "labels", "y", "target", "targets", "class"])
def test_labels_have_the_usual_keys(key):
    assert small().observe({"x": images(3), key: torch.arange(3)}).label.tolist() == [0, 1, 2]


def test_labels_and_indices_in_one_column_are_labels_and_indices():
    column = torch.arange(3)[:, None]
    observations = small().observe({"x": images(3), "y": column, "index": column + 5})
    assert (observations.label.tolist(), observations.index.tolist()) == ([0, 1, 2], [5, 6, 7])
    assert small().observe((images(3), column)).label.tolist() == [0, 1, 2]


@pytest.mark.parametrize("labels", [["a", "b", "c"], ("a", "b", "c"), UserList("abc")])
def test_words_beside_the_observations_are_labels(labels):
    assert list(small().observe((images(3), labels)).label) == ["a", "b", "c"]


def test_both_sides_of_the_seam_know_the_same_labels():
    """The model can't import the callbacks, so the names exist twice."""
    assert LABELS == batch_fields.LABELS
    x, y = images(3), torch.arange(3)
    batches = [
        (x, y),
        [x, y],
        UserList([x, y]),
        *({"x": x, name: y} for name in LABELS),
        {"y": y, "label": y + 1, "x": x},
    ]
    for batch in batches:
        found = batch_fields.batch_part(dict(batch) if isinstance(batch, dict) else list(batch), None, LABELS, 1)
        assert torch.equal(small().observe(batch).label, found)


@pytest.mark.parametrize(
    "batch", [UserList([images(3)]), UserDict(x=images(3)), UserList([images(3), torch.arange(3)])]
)
def test_any_sequence_and_any_mapping_is_a_batch(batch):
    assert torch.equal(small().observe(batch).x, images(3))


@pytest.mark.parametrize("batch", [{"image": images(3), "labels": torch.arange(3)}, UserDict(image=1, labels=2)])
def test_a_mapping_without_the_data_is_explained_by_its_keys(batch):
    """Case `batch_without_the_key_x`."""
    with pytest.raises(ValueError, match=r"`shape` is .* a mapping with 'image', 'labels'.*with the key 'x'"):
        small().training_step(batch, 0)


@pytest.mark.parametrize("index", [torch.arange(4), torch.arange(3.0), torch.arange(6).view(3, 2), ["a", "b", "c"]])
def test_indices_of_another_kind_are_refused(index):
    with pytest.raises(ValueError, match=r"`index` must be an integer for each observation, of shape \(3,\), got"):
        small().observe({"x": images(3), "index": index})


DOORS = {
    "training_step": lambda vae, x: vae.training_step(x, 0),
    "observe": lambda vae, x: vae.observe(x),
    "encode": lambda vae, x: vae.encode(x),
    "reconstruct": lambda vae, x: vae.reconstruct(x),
    "forward": lambda vae, x: vae(x),
    "elbo_terms": lambda vae, x: vae.elbo_terms(x),
    "elbo_terms at an index": lambda vae, x: vae.elbo_terms(x, torch.arange(len(x))),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(3) / 16, "as if already scaled"),
        (images(3) + 17, "needs data from 0 to 16"),
        (images(3) * torch.nan, "The data must be finite"),
        (images(3)[:, 0], r"`shape` is \(1, 4, 4\), but a batch holds \(4, 4\)"),
        (images(1)[0], r"a batch holds \(4, 4\)"),
        (images(3)[None], r"a batch holds \(3, 1, 4, 4\)"),
        (images(3).numpy(), r"the data in a batch are a ndarray\. Convert it with `torch\.from_numpy`, or leave out"),
        (images(3).to(torch.complex64), "got torch.complex64"),
        (images(3).to_sparse(), "in the layout torch.sparse_coo"),
    ],
)
def test_every_door_refuses_the_same_data_in_the_same_words(door, x, message):
    """Cases `encode_takes_the_wrong_scale` and `elbo_terms_broadcasts`."""
    vae = small()
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            DOORS[door](vae.train(mode), x)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_data_are_refused_by_name():
    with pytest.raises(ValueError, match=r"got torch\.quint8"):
        small().encode(torch.quantize_per_tensor(images(3).float(), 1.0, 0, torch.quint8))


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_black_images_of_any_type(door):
    DOORS[door](small(), torch.zeros(3, *SHAPE))
    DOORS[door](small(), images(3).new_zeros(3, *SHAPE))


NO_ZERO = {getattr(torch, "float8_e8m0fnu", None)}  # holds powers of two only
TYPES = {torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn}
TYPES |= {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64}


@pytest.mark.parametrize("dtype", sorted((TYPES | _NUMBERS) - NO_ZERO, key=str), ids=str)
def test_all_types_that_hold_the_numbers_give_the_same(dtype):
    vae, x = small(levels=2), (images(3) > 8).float()
    index = torch.arange(3)
    assert torch.equal(vae.observe(x.to(dtype)).scaled, x)
    assert torch.equal(vae.encode(x.to(dtype)).mean, vae.encode(x).mean)
    assert torch.equal(vae.elbo_terms(x.to(dtype), index).elbo, vae.elbo_terms(x, index).elbo)
    vae.training_step(x.to(dtype), 0)


@pytest.mark.parametrize("index", [torch.arange(1), torch.zeros(3), torch.zeros(3, 1).long()])
def test_the_terms_refuse_an_index_that_would_be_shared(index):
    with pytest.raises(ValueError, match=r"`index` must be an integer for each observation, of shape \(3,\)"):
        small(likelihood=Gaussian).elbo_terms(images(3), index)


def test_a_resumed_fit_checks_its_first_batch(tmp_path):
    vae = small()
    path = fitted(tmp_path, vae)
    wrong = TensorLoader({"x": images(70) / 16}, batch_size=16)
    for resumed in (small(), vae):
        with pytest.raises(ValueError, match="as if already scaled"):
            trainer(tmp_path, max_epochs=2).fit(resumed, wrong, ckpt_path=path)


@pytest.mark.parametrize("door", ["elbo_terms", "encode", "reconstruct", "forward"])
def test_every_door_refuses_what_a_model_of_another_shape_has_observed(door):
    other = VAE(shape=(4, 4, 1), levels=17, latent_dim=2)  # as many numbers
    observations = other.observe(images(3).permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"`shape` is \(1, 4, 4\), but a batch holds \(4, 4, 1\)"):
        DOORS[door](small(), observations)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("x", [images(3) / 16 * 5 - 1, images(3) + 1.5], ids=["standardised", "too large"])
def test_levels_bound_the_data_of_every_likelihood(door, x):
    with pytest.raises(ValueError, match=r"`levels` is 17, so the data should be integers from 0 to 16"):
        DOORS[door](small(likelihood=Gaussian), x)


def test_levels_leave_room_for_noise_of_one_level():
    small(likelihood=Gaussian).encode(images(3).float().clamp(max=16) + 0.99)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64])
def test_an_index_may_be_any_integer(kind):
    vae, index = small(), torch.arange(3)
    assert torch.equal(vae.elbo_terms(images(3), index.to(kind)).elbo, vae.elbo_terms(images(3), index).elbo)


def test_a_mask_is_no_index():
    with pytest.raises(ValueError, match=r"`index` must be an integer for each observation.*got torch\.bool"):
        small().elbo_terms(images(3), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("likelihood", [Bernoulli, ContinuousBernoulli, Gaussian, DiscretisedLogistic])
def test_no_observations_have_no_terms(likelihood):
    terms = small(likelihood=likelihood).elbo_terms(images(3)[:0])
    assert terms.distortion.shape == (0,)
    assert terms.rate_per_dimension.shape == (0, 3)


def test_an_empty_batch_is_not_trained_on():
    with pytest.raises(ValueError, match="A training batch must hold at least one observation"):
        small().training_step(images(3)[:0], 1)
