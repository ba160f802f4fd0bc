"""A table's row: kinds out of order, so that a column in the wrong place shows."""

from functools import partial

import pytest
import torch
from scipy.stats import bernoulli, nbinom, norm

from lightning_vae import VAE, Columns
from lightning_vae.callbacks import GECO
from lightning_vae.checkpoints.class_paths import build, describe
from lightning_vae.datamodules import TensorLoader
from tests.doubles import quiet_trainer

KINDS = [3, "numeric", "count", "binary", "numeric", 2, 3]
LOC = [9.0, 2007.0, 9.0, 9.0, -4.0, 9.0, 9.0]  # those of other kinds are ignored
SCALE = [9.0, 0.5, 9.0, 9.0, 200.0, 9.0, 9.0]
ROWS = torch.tensor(
    [[0, 2006.0, 5, 1, 130.0, 1, 2], [2, 2008.5, 0, 0, -210.0, 0, 1], [1, 2007.0, 17, 1, -4.0, 1, 0]],
    dtype=torch.float64,
)
NAN = torch.nan


def columns(scaled=True):
    torch.manual_seed(0)
    likelihood = Columns((7,), kinds=KINDS).double()
    if scaled:
        likelihood.set_scale(LOC, SCALE)
    with torch.no_grad():
        likelihood.log_variance.copy_(torch.tensor([-1.0, 0.5]))
        likelihood.log_inverse_dispersion.fill_(0.7)
    return likelihood, torch.randn(3, 12).double()


def by_column(likelihood, output):
    """The decoder's output for each column: columns of a kind are side by side, in the order of first appearance."""
    first, last, numeric, count, binary, pair = output.split([3, 3, 2, 1, 1, 2], dim=1)
    assert numeric.shape[1] == 2
    return [first, numeric[:, 0], count[:, 0], binary[:, 0], numeric[:, 1], pair, last]


def test_a_row_is_its_columns_in_the_tables_own_units():
    likelihood, output = columns()
    assert likelihood.output_shape == (12,)
    each = by_column(likelihood, output)
    numbers = likelihood(output).base_dist.log_prob(ROWS)  # type: ignore[attr-defined]
    theta, rate = torch.tensor(0.7).double().exp(), each[2].exp()
    spread = likelihood.log_variance.detach().mul(0.5).exp()
    expected = {
        1: norm.logpdf(ROWS[:, 1], 2007 + 0.5 * each[1], 0.5 * spread[0]),
        2: nbinom.logpmf(ROWS[:, 2], theta, theta / (theta + rate)),
        3: bernoulli.logpmf(ROWS[:, 3], each[3].sigmoid()),
        4: norm.logpdf(ROWS[:, 4], -4 + 200 * each[4], 200 * spread[1]),
    }
    for column, reference in expected.items():
        torch.testing.assert_close(numbers[:, column].detach(), torch.from_numpy(reference))
    for column in (0, 5, 6):
        logits = each[column].log_softmax(1)
        reference = logits.gather(1, ROWS[:, column].long()[:, None])[:, 0]
        torch.testing.assert_close(numbers[:, column].detach(), reference)
    torch.testing.assert_close(likelihood(output).log_prob(ROWS), numbers.sum(1))


def test_mean_and_samples_are_in_the_tables_own_units():
    likelihood, output = columns()
    each = by_column(likelihood, output)
    mean = likelihood(output).mean
    expected = {
        0: each[0].argmax(1).double(),  # a class number has no mean: its most probable class
        1: 2007 + 0.5 * each[1],
        2: each[2].exp(),
        3: each[3].sigmoid(),
        4: -4 + 200 * each[4],
        5: each[5].argmax(1).double(),
        6: each[6].argmax(1).double(),
    }
    torch.testing.assert_close(mean, torch.stack([expected[column] for column in range(7)], dim=1))
    draws = likelihood(output).sample(torch.Size((20_000,)))
    assert draws.shape == (20_000, 3, 7)
    likelihood.check_values(draws.flatten(0, 1))  # each of its column's kind
    for column, tolerance in ((1, 0.02), (3, 0.02), (4, 10)):
        torch.testing.assert_close(draws[..., column].mean(0), expected[column], rtol=0, atol=tolerance)
    for column, size in ((0, 3), (5, 2), (6, 3)):
        frequency = torch.stack([(draws[..., column] == number).double().mean(0) for number in range(size)], dim=1)
        torch.testing.assert_close(frequency, each[column].softmax(1), rtol=0, atol=0.02)
    spread = draws[..., [1, 4]].std(0) / torch.tensor([0.5, 200.0])
    torch.testing.assert_close(spread, torch.tensor([-0.5, 0.25]).exp().double().expand(3, 2), rtol=0.03, atol=0)


def test_every_column_is_normalised():
    likelihood, output = columns()
    grid = torch.arange(3000).double()
    rows = grid[:, None].expand(-1, 7)
    for row in output:
        mass = likelihood(row.expand(3000, -1)).base_dist.log_prob(rows).exp()  # type: ignore[attr-defined]
        for column, kind in enumerate(KINDS):
            if kind == "numeric":
                wide = torch.linspace(-60, 60, 20_001).double()
                value = (LOC[column] + SCALE[column] * wide)[:, None].expand(-1, 7)
                density = likelihood(row[None]).base_dist.log_prob(value).exp()[:, column]  # type: ignore[attr-defined]
                total = torch.trapezoid(density, value[:, column])
            else:
                total = mass[: 2 if kind == "binary" else None, column].sum()
            assert total.item() == pytest.approx(1, abs=1e-6)


def test_other_units_change_the_density_by_the_logarithm_of_their_size():
    likelihood, output = columns()
    standard, _ = columns(scaled=False)
    rows = ROWS.clone()
    rows[:, 1], rows[:, 4] = (rows[:, 1] - 2007) / 0.5, (rows[:, 4] + 4) / 200
    shift = torch.tensor(0.5 * 200).double().log()
    torch.testing.assert_close(likelihood(output).log_prob(ROWS), standard(output).log_prob(rows) - shift)


def test_far_from_zero_the_numbers_keep_their_precision():
    """A year in float32, whose mean would be rounded in the table's own units."""
    likelihood = Columns((1,), kinds=["numeric"])
    likelihood.set_scale([1e6], [1.0])
    output = torch.tensor([[0.1]])
    expected = norm.logpdf(0.25, 0.1, 0.1**0.5)
    value = torch.tensor([[1e6 + 0.25]])
    assert likelihood(output).log_prob(value).item() == pytest.approx(expected, abs=1e-6)


def test_missing_values_count_nothing():
    likelihood, output = columns()
    output.requires_grad_()
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [1, 0, 1, 0, 0, 1, 0], [0] * 7]).bool()
    numbers = likelihood(output).base_dist.log_prob(ROWS)  # type: ignore[attr-defined]
    log_prob = likelihood(output).log_prob(ROWS.where(mask, NAN), mask)
    torch.testing.assert_close(log_prob, (numbers * mask).sum(1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    each = by_column(likelihood, gradient)
    for column in range(7):
        seen = each[column].view(3, -1).abs().sum(1) > 0
        assert torch.equal(seen, mask[:, column])


def test_the_encoder_sees_standardised_numbers_and_classes_one_by_one():
    likelihood, _ = columns()
    assert likelihood.features_shape == (12,)
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 1, -2, 0.67, 6, 1, 0, 1],
            [0, 0, 1, 0, 1, 0, 3, -1.03, 1, 0, 1, 0],
            [0, 1, 0, 1, 0, 0, 0, 0, 18, 1, 0, 1],
        ]
    ).double()
    expected[:, 8] = expected[:, 8].log()
    features = likelihood.features(ROWS)
    torch.testing.assert_close(features, expected)
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 1]).bool().expand(3, 7)
    missing = likelihood.features(ROWS.where(mask, NAN), mask)
    there = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0]).bool()
    torch.testing.assert_close(missing, expected.where(there, 0))


def test_the_scale_goes_with_the_weights():
    likelihood, output = columns()
    other = build("likelihood", describe(partial(Columns, kinds=KINDS)), (7,), None).double()
    other.load_state_dict(likelihood.state_dict())
    assert torch.equal(other(output).log_prob(ROWS), likelihood(output).log_prob(ROWS))
    assert likelihood.loc.tolist() == [0, 2007, 0, 0, -4, 0, 0]
    assert likelihood.scale.tolist() == [1, 0.5, 1, 1, 200, 1, 1]
    assert (likelihood.to(torch.bfloat16).loc == other.loc).all()


@pytest.mark.parametrize(
    ("loc", "scale", "name"),
    [
        ([0.0] * 6, [1.0] * 7, "loc"),
        ([0.0, NAN, 0, 0, 0, 0, 0], [1.0] * 7, "loc"),
        ([0.0] * 7, [1.0] * 4 + [0.0] * 3, "scale"),
        ([0.0] * 7, [1.0] * 4 + [torch.inf] * 3, "scale"),
    ],
)
def test_a_scale_that_does_not_fit_is_refused_whole(loc, scale, name):
    likelihood, _ = columns()
    with pytest.raises(ValueError, match=f"`{name}` must hold a .* number for each of the 7 columns, got"):
        likelihood.set_scale(loc, scale)
    assert likelihood.loc[1] == 2007
    likelihood.set_scale([NAN, 1.0, NAN, NAN, 1.0, NAN, NAN], [0, 1.0, 0, 0, 1.0, 0, 0])  # other kinds have none


@pytest.mark.parametrize(
    "kinds",
    [(), ["numeric"], ["numeric"] * 3, ["numeric", 1], ["numeric", True], ["numeric", "text"], "ab", [2, 2.5], None],
)
def test_kinds_that_do_not_fit_are_refused(kinds):
    with pytest.raises(ValueError, match="`kinds` must be the kind of each of the 2 columns, 'numeric', 'binary', "):
        Columns((2,), kinds=kinds)


def test_what_is_no_row_is_refused():
    with pytest.raises(ValueError, match=r"`shape` must be that of a table's row, \(columns,\), got \(1, 2\)"):
        Columns((1, 2), kinds=["numeric"] * 2)
    with pytest.raises(ValueError, match=r"`levels` must be None for the Columns likelihood, got 5. Use `kinds`"):
        Columns((2,), 5, kinds=["numeric"] * 2)


@pytest.mark.parametrize(
    ("column", "value", "needed"),
    [
        (0, 3.0, "column 0 is 3 and needs integers from 0 to 2"),
        (0, 0.5, "column 0 is 3 and needs integers from 0 to 2"),
        (2, -1.0, "column 2 is 'count' and needs counts"),
        (3, 2.0, "column 3 is 'binary' and needs integers from 0 to 1"),
    ],
)
def test_values_of_another_kind_are_refused(column, value, needed):
    vae = VAE((7,), None, 2, likelihood=partial(Columns, kinds=KINDS))
    rows = ROWS.clone()
    vae.elbo_terms(rows)
    rows[1, column] = value
    with pytest.raises(ValueError, match=f"`kinds`: {needed}.*, but a batch holds {value:g}. Fix the data."):
        vae.elbo_terms(rows)
    likelihood, _ = columns()
    likelihood.check_values(rows, rows == ROWS)  # a missing value may be anything


@pytest.mark.parametrize("kinds", [["numeric"] * 2, ["binary"] * 2, ["count"] * 2, [2, 2], ["binary", 4]])
def test_every_parameter_of_any_table_is_trained(kinds):
    """A parameter without a gradient would end a run over several processes."""
    vae = VAE((2,), None, 2, likelihood=partial(Columns, kinds=kinds))
    vae.elbo_terms(torch.tensor([[0.0, 1.0], [1.0, 1.0]])).elbo.sum().backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())
    assert vae.likelihood.learns_each_scale == ("numeric" in kinds)


def constrained(tmp_path, kinds, data, callback):
    torch.manual_seed(0)
    vae = VAE(shape=(len(kinds),), latent_dim=2, likelihood=Columns, kinds=kinds)
    vae.likelihood.set_scale(data.mean(0), data.std(0, correction=0))
    loader = TensorLoader({"x": data}, batch_size=10)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=1)
    trainer.fit(vae, loader, loader)
    return vae, trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:.*learns a scale for each number")
def test_a_constraint_on_the_squared_error_is_in_standardised_units(tmp_path):
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    found = [
        float(constrained(tmp_path, ["numeric"] * 2, data * unit, GECO(squared_error=1.0))[1]["val/squared_error"])
        for unit in (1.0, torch.tensor([1024.0, 1 / 64]))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert 1.0 < found[0] < 4.0


@pytest.mark.filterwarnings("ignore:.*learns a scale for each number")
def test_a_row_of_other_kinds_has_no_squared_error(tmp_path):
    data = torch.tensor([[0.5, 1.0, 2.0], [2.5, 0.0, 0.0]]).repeat(10, 1)
    message = r"GECO\(beta\): `squared_error` can't be .* kind binary, 3, .* Constrain the `distortion`"
    with pytest.raises(ValueError, match=message):
        constrained(tmp_path, ["numeric", "binary", 3], data, GECO(squared_error=1.0))
    assert "val/distortion" in constrained(tmp_path, ["numeric", "binary", 3], data, GECO(distortion=1.0))[1]


def test_a_weight_that_may_fall_below_one_is_warned_of(tmp_path):
    data = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for options in ({"squared_error": 1.0}, {"distortion": 1.0, "min_beta": 0.5}):
        with pytest.warns(UserWarning, match=r"GECO\(beta\): `beta` may fall to 0\.\d+ .* `min_beta` to at least 1"):
            constrained(tmp_path, ["numeric"] * 2, data, GECO(**options))
    constrained(tmp_path, ["numeric"] * 2, data, GECO(squared_error=1.0, min_beta=1.0))  # a warning would be an error
