import pytest
import torch

from lightning_vae.callbacks.drawing.panels import (
    DENSITY_GRID,
    _label_colours,
    curve_panels,
    density_panels,
    scatter_panels,
)
from tests.callbacks.drawing.pixels import coloured


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


def test_the_priors_curve_is_the_given_density():
    dark = (40, 40, 40)
    spike = 0.4 * torch.exp(-0.5 * ((DENSITY_GRID + 2) / 0.5) ** 2)[:, None]
    standard, own = (density_panels(torch.full((9, 1), 9.0), None, ["z0"], prior) for prior in (None, spike))
    below = slice(40, 90)  # within the panel, above its foot
    where = [coloured(each[:, below], dark, 60).nonzero()[:, 1].float() for each in (standard, own)]
    assert where[0].mean() == pytest.approx(5 + 102 * 0.5, abs=3)
    assert where[1].mean() == pytest.approx(5 + 102 * 0.25, abs=3)


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
    colours, legend = _label_colours(labels, 51)
    assert legend == [("0 to", (68, 1, 84)), ("7", tuple(colours[49].tolist()))]
    assert len(colours.unique(dim=0)) > 40


@pytest.mark.parametrize(
    "labels", [None, ["cat", "dog"] * 10, [str(n) for n in range(20)], [f"{n / 7}" for n in range(20)] , ["x"] * 20]
)  # fmt: skip
def test_any_labels(labels):
    if labels and len(set(labels)) == 20:
        labels = [*labels, *[f"{n}.5" for n in range(20)]]
    points = torch.randn(2, len(labels) if labels else 20, 2)
    assert scatter_panels(points, [("a", "b"), ("c", "d")], labels).float().std() > 5
