"""The pure functions behind the pictures."""

from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lightning_vae.callbacks.drawing.canvas import Canvas
from lightning_vae.callbacks.drawing.curve_panels import curve_panels
from lightning_vae.callbacks.drawing.density_panels import density_panels
from lightning_vae.callbacks.drawing.draw_schedule import expected_passes, is_moment
from lightning_vae.callbacks.drawing.evenly_spaced_rows import evenly_spaced_rows
from lightning_vae.callbacks.drawing.gallery import _curves
from lightning_vae.callbacks.drawing.image_grid import image_grid
from lightning_vae.callbacks.drawing.images import as_images
from lightning_vae.callbacks.drawing.png import png
from lightning_vae.callbacks.drawing.scatter_panels import _coloured, scatter_panels
from lightning_vae.callbacks.drawing.traversals import expanded, interpolations, traversals
from lightning_vae.callbacks.reading.batch_fields import LABELS, OBSERVATIONS, batch_part
from lightning_vae.callbacks.reading.posterior_summary import PosteriorSummary


def coloured(picture, colour, tolerance=30):
    """Where a picture has about this colour."""
    distance = (picture.float() - torch.tensor(colour).float().view(3, 1, 1)).abs().amax(0)
    return distance < tolerance


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 1, 8, 8), (5, 1, 8, 8)),
        ((5, 3, 9, 13), (5, 3, 9, 13)),
        ((5, 9, 13, 3), (5, 3, 9, 13)),
        ((5, 4, 8, 8), (5, 3, 8, 8)),
        ((5, 2, 8, 8), (5, 1, 8, 8)),
        ((5, 11, 8, 8), (5, 1, 8, 8)),
        ((5, 8, 8), (5, 1, 8, 8)),
        ((5, 1, 6, 8, 9), (5, 1, 8, 9)),
        ((5, 6, 3, 8, 9), (5, 3, 8, 9)),
        ((5, 6, 8, 9, 3), (5, 3, 8, 9)),
        ((5, 30, 5), None),
        ((5, 300), None),
        ((5, 1, 300), None),
        ((5, 7, 30), None),
        ((5, 1, 1, 300), None),
        ((5, 3, 3, 300), None),
    ],
)
def test_what_is_an_image(shape, expected):
    images = as_images(torch.rand(shape))
    assert (images if images is None else tuple(images.shape)) == expected


def test_a_grid_keeps_pixels_rows_and_columns():
    images = torch.zeros(2, 3, 1, 16, 16)
    images[1, 2, 0, 4, 7] = 1.0
    images[0, 1] = 2.0
    images[0, 2] = float("nan")
    grid = image_grid(images)
    assert grid.shape == (3, 2 * 34, 3 * 34)
    assert grid.dtype == torch.uint8
    assert (grid[:, 34 + 1 + 8 : 34 + 1 + 10, 68 + 1 + 14 : 68 + 1 + 16] == 255).all()
    assert (grid[:, 34 + 1 + 10 : 67, 68 + 1 : 101] == 0).all()
    assert (grid[:, :34, 34:68] == 255).all()
    assert (grid[:, 1:33, 69:101] == 0).all()
    labelled = image_grid(images, ["first", "second"])
    assert labelled[:, :, -102:].equal(grid)
    assert (labelled[:, :34, :-102] < 120).any()


@pytest.mark.parametrize(
    ("size", "cell"),
    [((8, 8), (34, 34)), ((28, 28), (30, 30)), ((7, 31), (16, 64)), ((4, 90), (6, 92)), ((300, 200), (98, 66))],
)
def test_images_are_brought_to_a_size_one_can_see(size, cell):
    assert image_grid(torch.rand(1, 1, 3, *size)).shape[1:] == cell


def test_a_label_has_room_beside_a_flat_image():
    images = torch.zeros(2, 1, 1, 4, 90)
    assert image_grid(images).shape[1] == 2 * 6
    assert image_grid(images, ["input", "output"]).shape[1] == 2 * 13


def test_curves_lie_where_their_values_are():
    curves = torch.tensor([[[0.0] * 40, [1.0] * 40], [[0.5] * 40, [0.5] * 40]])
    red, blue = (255, 0, 0), (0, 0, 255)
    picture = curve_panels(curves, [red, blue], 0.0, 1.0, columns=2)
    rows = {name: coloured(picture, each, 90).nonzero()[:, 0] for name, each in (("red", red), ("blue", blue))}
    assert rows["red"].float().mean() > rows["blue"].float().mean() + 20
    assert not coloured(picture[:, :, 128:], red, 90).any()  # drawn over
    assert coloured(picture[:, :, 128:], blue, 90).nonzero()[:, 0].float().mean() == pytest.approx(53, abs=3)


def test_a_histogram_stands_where_the_means_are():
    mean = torch.stack([torch.full((100,), -2.0), torch.full((100,), 2.0)], dim=1)
    picture = density_panels(mean, None, ["a", "b"], columns=2)
    where = coloured(picture[:, 34:], (190, 210, 235), 12)
    columns = where.nonzero()[:, 1].float()
    assert columns[columns < 112].mean() == pytest.approx(5 + 102 * 0.25, abs=4)
    assert columns[columns >= 112].mean() == pytest.approx(112 + 5 + 102 * 0.75, abs=4)


def test_the_aggregate_posterior_is_the_mean_of_the_posteriors():
    blue = (31, 119, 180)
    same = density_panels(torch.zeros(50, 1), torch.ones(50, 1), ["z0"])  # equal to the prior, which is drawn over it
    other = density_panels(torch.full((50, 1), 2.0), torch.full((50, 1), 0.5), ["z0"])
    assert coloured(other[:, 20:], blue, 40).sum() > 5 * coloured(same[:, 20:], blue, 40).sum()


def test_dots_have_their_labels_colours_and_places():
    points = torch.tensor([[[1.5, 1.5], [-1.5, -1.5]]])
    picture = scatter_panels(points, [("z0", "z1")], ["0", "1"])
    panel = picture[:, 20:-20]
    first, second = (coloured(panel, each).nonzero().float().mean(0) for each in ((31, 119, 180), (255, 127, 14)))
    assert first[0] < second[0]  # up
    assert first[1] > second[1]  # right
    assert coloured(picture[:, :20], (255, 127, 14), 60).any()  # the legend


def test_a_legend_is_whole():
    names = [f"a long name {number}" for number in range(5)]
    picture = scatter_panels(torch.full((1, 5, 2), 9.0), [("z0", "z1")], names)  # the dots lie in a corner
    assert picture.shape[1:] == (5 * 14 - 14 + 20 + 168 + 18, 168)
    for line, colour in enumerate([(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)]):
        assert coloured(picture[:, 14 * line : 14 * line + 18], colour, 60).any()


def test_a_range_of_labels_has_its_ends_for_a_legend():
    labels = [f"{number / 7:g}" for number in range(50)] + ["nan"]
    colours, legend = _coloured(labels, 51)
    assert legend == [("0 to", (68, 1, 84)), ("7", tuple(colours[49].tolist()))]
    assert len(colours.unique(dim=0)) > 40


def test_a_sequence_of_vectors_is_drawn_entry_by_entry():
    courses = torch.stack([torch.zeros(100), torch.ones(100)], dim=1)[None, None]  # (1, 1, 100, 2)
    assert _curves(courses)[0, 0].tolist() == [0.0] * 100 + [1.0] * 100
    assert _curves(courses.mT).equal(_curves(courses))
    assert _curves(torch.arange(3.0)[None, None]).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize(
    "labels", [None, ["cat", "dog"] * 10, [str(n) for n in range(20)], [f"{n / 7}" for n in range(20)] , ["x"] * 20]
)  # fmt: skip
def test_any_labels(labels):
    if labels and len(set(labels)) == 20:
        labels = [*labels, *[f"{n}.5" for n in range(20)]]
    points = torch.randn(2, len(labels) if labels else 20, 2)
    assert scatter_panels(points, [("a", "b"), ("c", "d")], labels).float().std() > 5


def test_dots_outside_are_left_out():
    canvas = Canvas(10, 10)
    canvas.dots(torch.tensor([[-50.0, 5.0], [5.0, 90.0], [float("nan"), 5.0]]), torch.zeros(3, 3))
    assert (canvas.image() == 255).all()


@pytest.mark.parametrize("grey", [True, False])
def test_a_png_is_the_picture(grey):
    picture = torch.randint(0, 256, (1 if grey else 3, 7, 5), dtype=torch.uint8).expand(3, -1, -1)
    image = Image.open(BytesIO(png(picture)))
    assert image.mode == ("L" if grey else "RGB")
    pixels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).view(7, 5, 3)
    assert pixels.permute(2, 0, 1).equal(picture)


@pytest.mark.parametrize(
    ("total", "times", "expected"),
    [
        (120, 10, [1, 14, 27, 40, 54, 67, 80, 94, 107, 120]),
        (4, 10, [1, 2, 3, 4]),
        (10, 10, list(range(1, 11))),
        (11, 3, [1, 6, 11]),
        (9, 1, [9]),
        (None, 10, [1, 2, 4, 8, 16, 32, 64, 128]),
    ],
)
def test_which_passes_are_drawn(total, times, expected):
    assert [number for number in range(1, (total or 200) + 1) if is_moment(number, total, times)] == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),
        ({"max_epochs": -1}, None),
        ({"max_epochs": -1, "max_steps": 100}, 10),
        ({"max_steps": 30}, 3),
        ({"max_steps": 30, "accumulate_grad_batches": 2}, 6),
        ({"check_val_every_n_epoch": 2}, 3),
        ({"val_check_batch": 5}, 12),
        ({"val_check_batch": 15, "check_val_every_n_epoch": None}, 4),
        ({"num_training_batches": float("inf"), "val_check_batch": 15}, None),
        ({"num_training_batches": 0}, None),
        ({"val_check_batch": None}, None),
    ],
)
def test_how_many_passes_there_will_be(options, expected):
    trainer = {
        "num_training_batches": 10,
        "val_check_batch": 10,
        "max_epochs": 6,
        "max_steps": -1,
        "accumulate_grad_batches": 1,
        "check_val_every_n_epoch": 1,
    }
    assert expected_passes(SimpleNamespace(**{**trainer, **options})) == expected


@pytest.mark.parametrize(("rows", "batches"), [([8, 8, 4], 3), ([100], 1), ([2] * 50, 50), ([10], float("inf"))])
def test_observations_come_from_everywhere(rows, batches):
    chosen = [
        (number, row) for number, count in enumerate(rows) for row in evenly_spaced_rows(10, count, number, batches)
    ]
    assert len(set(chosen)) == len(chosen) == 10
    places = [sum(rows[:number]) + row for number, row in chosen]
    assert places == sorted(places)
    assert places[-1] >= 0.85 * sum(rows)
    assert all(row < rows[number] for number, row in chosen)


def test_few_observations_are_taken_once():
    assert evenly_spaced_rows(10, 3, 0, 1) == [0, 1, 2]
    assert evenly_spaced_rows(10, 0, 0, 1) == []


def test_interpolations_are_straight():
    latents = torch.randn(5, 2, 3)
    paths = interpolations(latents, 3, 4)
    assert paths.shape == (2, 4, 2, 3)
    assert paths[:, 0].equal(latents[:2])
    assert paths[:, -1].equal(latents[2:4])
    assert torch.allclose(paths[:, 1], latents[:2] * 2 / 3 + latents[2:4] / 3)
    assert interpolations(latents[:1], 3, 4).shape[0] == 0


def test_a_prior_with_axes_of_its_own():
    mixture = MixtureSameFamily(Categorical(torch.ones(2)), Independent(Normal(torch.zeros(2, 3), 2.0), 1))
    assert expanded(mixture, (7, 3)).sample().shape == (7, 3)
    assert expanded(Normal(0.0, 1.0), (7, 2, 3)).sample().shape == (7, 2, 3)
    assert traversals(torch.ones(3), [1], mixture, 3)[0].tolist() == [[1, -5, 1], [1, 0, 1], [1, 5, 1]]


def test_traversals_move_one_dimension_in_units_of_the_prior():
    prior = Normal(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0]))
    latent = torch.tensor([5.0, 6.0, 7.0])
    moved = traversals(latent, [1, 0], prior, 3)
    assert moved[0].tolist() == [[5, -4, 7], [5, 1, 7], [5, 6, 7]]
    assert moved[1].tolist() == [[-2.5, 6, 7], [0, 6, 7], [2.5, 6, 7]]


def test_dimensions_come_in_order_of_rate():
    mean = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 0.9, 0.0, 0.6])
    codes = PosteriorSummary.of(Normal(mean, torch.tensor([1.0, 0.5, 0.2, 0.8])), Normal(0.0, 1.0))
    assert codes.order == [2, 1, 3, 0]  # dimension 2 has the most rate, and no information
    assert codes.active == [1, 3, 0]
    rate = 0.5 * (mean[:, 1] ** 2 + 0.25 - 1 - torch.tensor(0.25).log()).mean()
    assert codes.title(1) == f"z1  {float(rate):.2f} nats"
    alone = PosteriorSummary.of(mean, Normal(0.0, 1.0))
    assert (alone.order, alone.active, alone.title(1)) == ([1, 3, 0, 2], [1, 3, 0], "z1")
    joined = PosteriorSummary.joined([codes.first(2), codes])
    assert joined.mean.shape == joined.scale.shape == joined.rates.shape == (502, 4)
    assert PosteriorSummary.joined([alone, alone]).rates is None


@pytest.mark.parametrize(
    ("batch", "where", "expected"),
    [
        (7, None, (7, None)),
        ((7, 8), None, (7, 8)),
        ([7], None, (7, None)),
        ({"image": 7, "target": 8}, None, (7, 8)),
        ({"other": 7}, None, (None, None)),
        ({"other": 7}, "other", (7, 7)),
        ((5, 6, 7), 2, (7, 7)),
        ((5, 6, 7), sum, (18, 18)),
    ],
)
def test_parts_of_a_batch(batch, where, expected):
    parts = batch_part(batch, where, OBSERVATIONS, 0), batch_part(batch, where, LABELS, 1)
    assert parts == expected


def test_a_part_that_is_not_there():
    with pytest.raises(ValueError, match="A batch has no 'y'; it is or has 'x', 'z'"):
        batch_part({"x": 1, "z": 2}, "y", LABELS, 1)
