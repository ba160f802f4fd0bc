"""The figures that compare models."""

import math
from functools import partial

import pytest
import torch
from matplotlib.colors import to_hex

from lightning_vae import VAE, CategoricalGroups, Columns, Condition, ConditionalNormal, LearnedNormal
from lightning_vae.evaluation.figures import CurvePoint, compare_latents, rate_distortion


def vae(latent_dim, shape=(6,), levels=None):
    torch.manual_seed(latent_dim)
    return VAE(shape=shape, levels=levels, latent_dim=latent_dim)


def batches(shape=(6,), rows=40, labelled=True):
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    x = x if len(shape) == 1 else x.mul(4).abs().clamp(max=16).to(torch.uint8)
    whole = {"x": x, "index": torch.arange(rows), "label": torch.arange(rows) % 4}
    return [{name: part[start : start + 16] for name, part in whole.items() if labelled or name != "label"}
            for start in range(0, rows, 16)]  # fmt: skip


def drawn(figure):
    """The points of each latent space, in the order in which they are drawn."""
    return [
        torch.cat([torch.tensor(each.get_offsets().data) for each in panel.axes[0].collections])
        for panel in figure.subfigs
    ]


def means(model, loader):
    with torch.no_grad():
        return torch.cat([model.eval().encode(batch["x"]).mean for batch in loader]).double()


def test_two_dimensions_are_shown_as_they_are_and_more_by_their_principal_components():
    plane, space, loader = vae(2), vae(5), batches()
    two, five = drawn(compare_latents({"plane": plane, "space": space}, loader))
    order = torch.arange(40).reshape(-1, 4).T.flatten()  # one colour after the other
    torch.testing.assert_close(two, means(plane, loader)[order])
    centred = means(space, loader) - means(space, loader).mean(dim=0)
    variances = torch.linalg.eigvalsh(centred.T @ centred / 40).flip(0)[:2]
    torch.testing.assert_close(five.square().mean(dim=0), variances)


def drawn_samples(model, seen, loader):
    """The latents that `compare_latents` decodes beside those of its reconstructions."""
    decoded, decode = [], model.decode
    model.decode = lambda z, *condition: decoded.append((z, *condition)) or decode(z, *condition)
    figure = compare_latents([model], loader, observations=seen)
    del model.decode
    return figure, decoded[-1]


def test_samples_come_from_the_models_own_prior():
    torch.manual_seed(0)
    model = VAE(shape=(6,), latent_dim=2, prior=LearnedNormal)
    with torch.no_grad():
        model.prior_module.loc.fill_(50.0)
    z = drawn_samples(model, 40, batches())[1][0]
    assert z.mean() == pytest.approx(50, abs=1)


def test_a_conditional_models_latents_are_those_of_its_conditions():
    torch.manual_seed(0)
    model = VAE(shape=(6,), latent_dim=2, condition=partial(Condition, classes=4), prior=ConditionalNormal)
    figure, (_, condition) = drawn_samples(model, 40, batches())
    assert condition.flatten().tolist() == [0, 1, 2, 3] * 2
    with torch.no_grad():
        means = torch.cat([model.encode(model.observe(batch)).mean for batch in batches()]).double()
    order = torch.arange(40).reshape(-1, 4).T.flatten()
    torch.testing.assert_close(drawn(figure)[0], means[order])


def test_missing_numbers_stay_missing():
    torch.manual_seed(0)
    model = VAE(shape=(2,), latent_dim=2, kinds=["numeric", "numeric"], likelihood=Columns)
    model.likelihood.set_scale([4000.0, 200.0], [800.0, 14.0])
    x = torch.tensor([4000.0, 200.0]) + torch.randn(40, 2) * torch.tensor([800.0, 14.0])
    whole = {"x": x, "mask": torch.rand(40, 2) > 0.4, "index": torch.arange(40)}
    loader = [{name: part[start : start + 3] for name, part in whole.items()} for start in range(0, 40, 3)]
    figure = compare_latents([model], loader, observations=20)
    with torch.no_grad():
        means = model.encode(model.observe(whole)).mean[:20].double()
    torch.testing.assert_close(drawn(figure)[0], means, rtol=1e-5, atol=1e-5)
    lines = [line.get_ydata() for line in figure.subfigs[0].axes[1].lines[:4]]
    assert [bool(math.isnan(y)) for line in lines for y in line] == (~whole["mask"][:4]).flatten().tolist()


def test_groups_of_categories_are_drawn_as_columns():
    torch.manual_seed(0)
    model = VAE(shape=(6,), latent_dim=8, posterior=partial(CategoricalGroups, classes=4))
    loader = batches()
    with torch.no_grad():
        means = torch.cat([model.encode(model.observe(batch)).mean for batch in loader]).flatten(1).double()
    found = drawn(compare_latents([model], loader))[0]
    variances = torch.linalg.eigvalsh((means - means.mean(0)).T @ (means - means.mean(0)) / 40).flip(0)[:2]
    torch.testing.assert_close(found.square().mean(dim=0), variances)


def test_spaces_share_a_scale_and_carry_their_names():
    figure = compare_latents({"plane": vae(2), "space": vae(5)}, batches())
    assert figure.subfigs[0].axes[0].get_xlim() == figure.subfigs[1].axes[0].get_xlim()
    assert [panel.get_suptitle() for panel in figure.subfigs] == ["plane", "space"]


def test_kinds_carry_their_names_where_there_is_room():
    labels = torch.arange(40) % 4
    figure = compare_latents([vae(2)], [(30 * torch.eye(6)[labels], labels)])
    assert [text.get_text() for text in figure.subfigs[0].axes[0].texts] == ["0", "1", "2", "3"]


def test_one_legend_says_which_colour_is_which_label():
    figure = compare_latents([vae(2), vae(5)], batches())
    (legend,) = figure.legends
    shown = {
        text.get_text(): dot.get_color() for text, dot in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert list(shown) == ["0", "1", "2", "3"]
    assert [to_hex(each.get_facecolor()[0]) for each in figure.subfigs[1].axes[0].collections] == list(shown.values())
    assert compare_latents([vae(2)], batches(labelled=False)).legends == []


def test_panels_line_up_under_captions_of_any_length():
    figure = compare_latents({"short": vae(2), "long [1, 2], " * 9: vae(2), "two\nlines": vae(2)}, batches())
    figure.draw_without_rendering()
    for row in range(3):
        heights = [panel.axes[row].get_window_extent().y0 for panel in figure.subfigs]
        assert heights == pytest.approx([heights[0]] * 3, abs=0.01)
    for panel in figure.subfigs:
        assert panel._suptitle.get_window_extent().y0 > panel.axes[0].get_window_extent().y1
        assert panel._suptitle.get_window_extent().y1 <= figure.bbox.y1


def test_images_their_reconstructions_and_samples():
    shape, model = (1, 8, 8), vae(2, (1, 8, 8), 17)
    figure = compare_latents([model], batches(shape))
    _, reconstructed, sampled = figure.subfigs[0].axes
    shown = torch.tensor(reconstructed.images[0].get_array().data)
    assert shown.shape == (2 * 9 - 1, 8 * 9 - 1)
    torch.testing.assert_close(shown[:8, :8], batches(shape)[0]["x"][0, 0] / 16)
    assert torch.tensor(sampled.images[0].get_array().data).shape == shown.shape
    again = compare_latents([model], batches(shape)).subfigs[0].axes[2]
    assert (again.images[0].get_array() == sampled.images[0].get_array()).all()


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 8, 8)])
def test_what_is_no_picture_is_drawn_as_lines_on_one_scale(shape):
    _, reconstructed, sampled = compare_latents([vae(2, shape)], [torch.rand(9, *shape)]).subfigs[0].axes
    assert len(reconstructed.lines) == 8
    assert len(sampled.lines) == 4
    assert sampled.get_ylim() == reconstructed.get_ylim()


def test_names_of_kinds_that_lie_on_each_other_and_of_many_are_left_to_their_colours():
    x = torch.randn(40, 6)
    one_place = compare_latents([vae(2)], [(x.repeat(2, 1), torch.arange(80) // 40)]).subfigs[0]
    assert [text.get_text() for text in one_place.axes[0].texts] == []
    many = compare_latents([vae(2)], [(x, torch.arange(40))])
    assert many.subfigs[0].axes[-1].get_ylabel() == "label"
    assert many.legends == []


def test_a_long_name_is_wrapped():
    figure = compare_latents({"word " * 20: vae(2)}, batches())
    assert max(map(len, figure.subfigs[0].get_suptitle().splitlines())) <= 36


def test_labels_come_from_mappings_and_from_pairs():
    pairs = [(batch["x"], batch["label"]) for batch in batches()]
    one, other = (compare_latents([vae(2)], each).subfigs[0].axes[0] for each in (pairs, batches()))
    assert len(one.collections) == len(other.collections) == 4


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_any_space_can_be_drawn(latent_dim, labelled, projection):
    (points,) = drawn(compare_latents([vae(latent_dim)], batches(labelled=labelled), 30, projection))
    assert points.shape == (30, 2)
    assert points.isfinite().all()


@pytest.mark.parametrize(
    ("models", "loader", "projection", "message"),
    [
        ([], batches(), "pca", "`models` must hold"),
        ([vae(2)], [], "pca", "`loader` must hold at least 2"),
        ([vae(2)], [torch.zeros(1, 6)], "pca", "`loader` must hold at least 2"),
        ({"good": vae(2), "bad": vae(2, (5,))}, batches(), "pca", "'bad' does not accept these data"),
        ([vae(2)], batches(), "umap", "`projection` must be 'pca' or 'tsne'"),
    ],
)
def test_what_can_not_be_compared_is_an_error(models, loader, projection, message):
    with pytest.raises(ValueError, match=message):
        compare_latents(models, loader, projection=projection)


def test_another_model_is_refused_by_its_name():
    with pytest.raises(TypeError, match=r"'theirs' must be a lightning_vae.VAE, got Linear"):
        compare_latents({"ours": vae(2), "theirs": torch.nn.Linear(6, 2)}, batches())


def test_a_comparison_leaves_the_models_as_they_were():
    model = vae(2).train()
    state = torch.get_rng_state()
    compare_latents([model], batches())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_the_rate_distortion_figure_shows_points_bound_and_betas():
    points = [CurvePoint(2.0, 5.0, 0.1, 0.2, "β 1"), CurvePoint(1.0, 7.0, note="β 4")]
    axes = rate_distortion({"linear": points}, bound=([0.0, 3.0], [9.0, 4.0])).axes[0]
    shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert ([0.0, 3.0], [9.0, 4.0]) in shown
    assert ([1.0, 2.0], [7.0, 5.0]) in shown
    assert [text.get_text() for text in axes.texts] == ["β 4", "β 1"]
    assert "nats" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()
    assert math.isfinite(axes.get_ylim()[0])


def test_points_of_one_seed_have_no_bars():
    several, one = [CurvePoint(2.0, 5.0, 0.1, 0.2), CurvePoint(1.0, 7.0)], [CurvePoint(3.0, 4.0), CurvePoint(1.0, 8.0)]
    figure = rate_distortion({"several": several, "one": one})
    barred, plain = figure.axes[0].containers
    drawn = [torch.tensor(each) for bars in barred.lines[2] for each in bars.get_segments() if len(each)]
    assert sorted(float(each.diff(dim=0).norm()) for each in drawn) == pytest.approx([0.2, 0.4])
    assert (plain.has_xerr, plain.has_yerr) == (False, False)


def test_long_names_take_no_width_from_the_rate_distortion_figure():
    points = [CurvePoint(2.0, 5.0), CurvePoint(1.0, 7.0)]
    short = rate_distortion({"a": points, "b": points})
    long = rate_distortion({f"{'/folder' * 30}/version_{number}/best.ckpt": points for number in range(2)})
    for figure in (short, long):
        figure.draw_without_rendering()
        assert figure.legends[0].get_window_extent().y1 < figure.axes[0].get_window_extent().y0
        assert figure.legends[0].get_window_extent().width < figure.bbox.width
    widths = [figure.axes[0].get_window_extent().width for figure in (short, long)]
    assert widths[1] == pytest.approx(widths[0])
    assert long.legends[0].get_texts()[1].get_text().replace("\n", "").endswith("/version_1/best.ckpt")
