"""Conditional models: the record's condition reaches the networks, the prior and the evaluation."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_vae import (
    VAE,
    Bernoulli,
    Condition,
    ConvDecoder,
    ConvEncoder,
    FullCovariance,
    Gaussian,
    LinearDecoder,
    LinearEncoder,
    evaluate,
)
from lightning_vae.datamodules import Digits, Table, TensorLoader
from tests.doubles import quiet_trainer

SPECTRUM, VARIANCE = torch.tensor([5, 3, 1.5, 0.8, 0.3, 0.1], dtype=torch.float64), 0.4
SLOPES = torch.tensor([[2, 0], [-1, 1], [0, 0.5], [1, -1], [0.5, 0], [0, 3]], dtype=torch.float64)
OF_C = torch.tensor([[1, 0.3], [0.3, 0.5]], dtype=torch.float64)


def exact_data(size=500):
    """Draw x and covariates c of an exact sample covariance: x is linear in c, and its residual has the spectrum."""
    directions = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0])
    residual = directions * SPECTRUM @ directions.T
    cross = SLOPES @ OF_C
    covariance = torch.cat([torch.cat([cross @ SLOPES.T + residual, cross], 1), torch.cat([cross.T, OF_C], 1)])
    rows = torch.from_numpy(np.random.default_rng(1).standard_normal((size, 8)))
    rows = rows - rows.mean(0)
    rows = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / size)).T
    x, c = (rows @ torch.linalg.cholesky(covariance).T).split([6, 2], dim=1)
    return x, c, directions


class Blind(nn.Module):
    """A network that does not see the condition."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, c):
        return self.network(inputs)


def optimum(beta):
    """The linear conditional VAE at its closed-form optimum."""
    x, c, directions = exact_data()
    vae = VAE(
        (6,), latent_dim=4, encoder=LinearEncoder, decoder=LinearDecoder, beta=beta,
        likelihood=partial(Gaussian, variance=VARIANCE), condition=partial(Condition, covariates=2),
    ).double()  # fmt: skip
    level = beta * VARIANCE
    weight = directions[:, :4] * (SPECTRUM[:4] - level).clamp(min=0).sqrt()
    width = (level / SPECTRUM[:4]).clamp(max=1)
    to_mean = width[:, None] * weight.T / level
    with torch.no_grad():
        vae.decoder.map.weight.copy_(torch.cat([weight, SLOPES], 1))
        vae.decoder.map.bias.zero_()
        vae.encoder.mean.weight.copy_(torch.cat([to_mean, -to_mean @ SLOPES], 1))
        vae.encoder.mean.bias.zero_()
        vae.encoder.log_variance.copy_(width.log())
    return vae, {"x": x, "condition": c, "index": torch.arange(len(x))}


@torch.no_grad()
def expected_loss(vae, batch, beta):
    """Compute the loss with the expectation over z in closed form, and the rate."""
    observations = vae.observe(batch)
    posterior = vae.encode(observations)
    error = (vae.decode(posterior.mean, observations.condition).mean - observations.x).square().sum(1).mean()
    weight = vae.decoder.map.weight[:, :4]
    error = error + (weight.square() * posterior.variance[0]).sum()
    rate = vae.elbo_terms(observations).rate.mean()
    distortion = 3 * np.log(2 * np.pi * VARIANCE) + error / (2 * VARIANCE)
    return float(distortion + beta * rate), float(rate)


@pytest.mark.parametrize(
    ("beta", "loss", "rate"), [(0.5, 6.59679, 4.66406), (1.0, 8.54253, 3.27777), (2.5, 11.90665, 1.55676)]
)
def test_the_linear_conditional_vae_reaches_its_closed_form(beta, loss, rate):
    vae, batch = optimum(beta)
    found = expected_loss(vae, batch, beta)
    assert found == pytest.approx((loss, rate), abs=6e-6)
    level = beta * VARIANCE
    assert found[1] == pytest.approx(float((SPECTRUM[:4] / level).log().clamp(min=0).sum() / 2), abs=1e-10)


def test_at_the_optimum_all_importance_samples_have_one_weight_which_is_the_likelihood_given_c():
    vae, batch = optimum(1.0)
    result = evaluate(vae, [batch], importance_samples=3)
    x, c = batch["x"], batch["condition"]
    residual = x - c @ SLOPES.T
    model = vae.decoder.map.weight[:, :4] @ vae.decoder.map.weight[:, :4].T + VARIANCE * torch.eye(6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), model.detach())
    assert result.nll == pytest.approx(-float(exact.log_prob(residual).mean()), abs=1e-7)  # the variance is float32
    assert result.effective_sample_size == pytest.approx(3, abs=1e-9)
    assert result.implied_beta == pytest.approx(1, abs=0.1)
    assert result.condition_r2 == pytest.approx(0, abs=0.05)  # the encoder's mean is one of the residual


@torch.no_grad()
def trained_loss(vae, data, linear):
    """Compute the loss at beta 1 with the expectation over z in closed form."""
    observations = vae.observe(data)
    posterior = vae.encode(observations)
    error = (vae.decode(posterior.mean, observations.condition).mean - observations.x).square().sum(1).mean()
    error = error + (linear.map.weight[:, :4].square() * posterior.variance[0]).sum()
    rate = vae.elbo_terms(observations).rate.mean()
    return float(3 * np.log(2 * np.pi * VARIANCE) + error / (2 * VARIANCE) + rate)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("encoder", "decoder", "loss", "tolerance"),  # which tell the first two from each other
    [("sees", "sees", 8.54253, 0.02), ("blind", "sees", 8.59585, 0.02), ("sees", "blind", 12.10726, 0.08)],
)
def test_a_fit_reaches_the_minimum_of_its_wiring(tmp_path, encoder, decoder, loss, tolerance):
    torch.manual_seed(0)
    x, c, _ = exact_data(2000)
    networks = {
        "encoder": Blind(LinearEncoder((6,), 4)) if encoder == "blind" else LinearEncoder,
        "decoder": Blind(LinearDecoder(4, (6,))) if decoder == "blind" else LinearDecoder,
    }

    class Annealed(VAE):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4000, 1e-5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    likelihood, condition = partial(Gaussian, variance=VARIANCE), partial(Condition, covariates=2)
    vae = Annealed((6,), latent_dim=4, likelihood=likelihood, condition=condition, **networks)
    data = {"x": x.float(), "condition": c.float(), "index": torch.arange(len(x))}
    trainer = quiet_trainer(tmp_path, max_steps=4000)
    trainer.fit(vae, TensorLoader(data, 200, shuffle=True))
    vae = vae.double().eval()
    linear = vae.decoder.network if decoder == "blind" else vae.decoder
    found = trained_loss(vae, {**data, "x": x, "condition": c}, linear)
    assert -1e-4 <= found - loss <= tolerance


def test_classes_are_one_hot_or_embedded():
    columns = torch.tensor([[2.0, 0.5], [0.0, -1.0]])
    one_hot = Condition(classes=3, covariates=1)
    torch.testing.assert_close(one_hot(columns), torch.tensor([[0, 0, 1, 0.5], [1, 0, 0, -1.0]]))
    embedded = Condition(classes=3, covariates=1, embedding=2)
    torch.testing.assert_close(embedded(columns), torch.cat([embedded.codes[[2, 0]], columns[:, 1:]], 1))
    assert (one_hot.dim, one_hot.columns) == (4, 2)
    assert (embedded.dim, embedded.columns) == (3, 2)
    assert not list(one_hot.parameters())


def small(**options):
    torch.manual_seed(0)
    return VAE((1, 8, 8), 17, 3, **{"condition": partial(Condition, classes=10), **options})


@pytest.mark.parametrize("convolutions", [False, True])
def test_digits_given_their_label(tmp_path, convolutions):
    networks = {"encoder": ConvEncoder, "decoder": ConvDecoder} if convolutions else {}
    vae = small(**networks)
    data = Digits(batch_size=200)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(vae, data)
    [result] = trainer.test(vae, data, verbose=False)
    batch = next(iter(data.test_dataloader()))
    observations = vae.eval().observe(batch)
    assert torch.equal(observations.condition[:, 0].long(), batch["label"])
    own = vae.reconstruct(observations)
    torch.testing.assert_close(own, vae.reconstruct(observations, decoded_as=batch["label"]))
    assert not torch.allclose(own, vae.reconstruct(observations, decoded_as=3))
    samples = vae.sample(4, condition=[0, 1, 2, 3])
    assert samples.shape == (4, 1, 8, 8)
    terms = vae.elbo_terms(observations)
    other = vae.elbo_terms(vae.observe({**batch, "label": (batch["label"] + 1) % 10}))
    assert not torch.allclose(terms.distortion, other.distortion)
    assert result["test/elbo"] < 0


def test_a_checkpoint_restores_the_condition(tmp_path):
    vae = small(likelihood=Bernoulli)
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    trainer.fit(vae, Digits(batch_size=50))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = VAE.load_from_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(loaded.condition, Condition)
    assert loaded.condition.classes == 10
    torch.manual_seed(1)
    one = vae.sample(3, condition=2)
    torch.manual_seed(1)
    torch.testing.assert_close(loaded.sample(3, condition=2), one)


MISSING = {
    "no label": (
        lambda vae: vae.observe({"x": torch.zeros(2, 1, 8, 8)}),
        r"`condition` is one of 10 classes, but.*'x'",
    ),
    "another class": (
        lambda vae: vae.observe({"x": torch.zeros(2, 1, 8, 8), "label": torch.tensor([3, 10])}),
        r"must be a class from 0 to 9, got classes from 3 to 10. Set `classes` to at least 11",
    ),
    "fractions": (
        lambda vae: vae.observe({"x": torch.zeros(2, 1, 8, 8), "label": torch.tensor([0.5, 1])}),
        "must be a class for each of 2 observations, integers from 0 to 9, got torch.float32",
    ),
    "fractions in a column": (
        lambda vae: vae.sample(3, condition=torch.tensor([[2.0], [1.7], [3.0]])),
        r"must have a class in its first column, integers from 0 to 9, got numbers such as 1\.7",
    ),
    "no number in a column": (
        lambda vae: vae.sample(1, condition=torch.tensor([[float("nan")]])),
        "integers from 0 to 9, got numbers such as nan",
    ),
    "a class below 0": (
        lambda vae: vae.sample(3, condition=-1),
        r"got classes from -1 to -1\. Number the classes from 0",
    ),
    "another key": (
        lambda vae: vae.sample(3, condition={"lable": 1}),
        "must be a class from 0 to 9, or one for each observation, got a dict with 'lable'",
    ),
    "a key too many": (
        lambda vae: vae.sample(3, condition={"label": 1, "condition": [2.0]}),
        "must be a class from 0 to 9, or one for each observation, got a dict with 'label', 'condition'",
    ),
    "a sample of nothing": (lambda vae: vae.sample(2), r"conditional, so it needs `condition=`: a class from 0 to 9"),
    "data alone": (lambda vae: vae.encode(torch.zeros(2, 1, 8, 8)), "conditional, so it needs `condition=`"),
    "latents alone": (lambda vae: vae.decode(torch.zeros(2, 3)), "conditional, so it needs `condition=`"),
    "too many": (lambda vae: vae.sample(2, condition=[1, 2, 3]), "a class for each of 2 observations"),
    "terms of data alone": (lambda vae: vae.elbo_terms(torch.zeros(2, 1, 8, 8)), "data alone are not enough"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_condition_says_where_it_should_come_from(name):
    call, message = MISSING[name]
    with pytest.raises(ValueError, match=message):
        call(small())


def both(**options):
    condition = partial(Condition, classes=3, covariates=2)
    return VAE((5,), latent_dim=2, condition=condition, **options).eval()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"label": 2}, r"a dict with 'label', .*, and 'condition', .*, got a dict with 'label'\."),
        ({"condition": [1.0, 2.0]}, r"got a dict with 'condition'\."),
        ({"label": 2, "covariates": [1.0, 2.0]}, r"got a dict with 'label', 'covariates'\."),
        ({}, r"got a dict with no keys\."),
        ({"label": 2, "condition": None}, "must have 2 covariates for each observation.*got NoneType None"),
        ({"label": 2, "condition": "ab"}, "must have 2 covariates for each observation.*got str 'ab'"),
        (2, "must be a dict with 'label'"),
    ],
)
def test_a_condition_of_two_parts_needs_both(condition, message):
    with pytest.raises(ValueError, match=message):
        both().sample(3, condition=condition)


def test_a_counterfactual_keeps_the_part_that_is_not_given():
    vae, covariates = both(), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    vae.condition.set_scale(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5]))
    seen = vae.observe({"x": torch.randn(2, 5), "label": torch.tensor([0, 1]), "condition": covariates})
    for part, whole in [
        ({"label": 2}, {"label": 2, "condition": covariates}),
        ({"condition": [4.0, 5.0]}, {"label": torch.tensor([0, 1]), "condition": [4.0, 5.0]}),
    ]:
        torch.testing.assert_close(vae.reconstruct(seen, decoded_as=part), vae.reconstruct(seen, decoded_as=whole))
        assert not torch.equal(vae.reconstruct(seen, decoded_as=part), vae.reconstruct(seen))
    with pytest.raises(ValueError, match="got a dict with 'lable'"):
        vae.reconstruct(seen, decoded_as={"lable": 2})


def test_an_unconditional_model_refuses_a_condition():
    vae = VAE((1, 8, 8), 17, 3)
    with pytest.raises(ValueError, match="the model has none"):
        vae.sample(2, condition=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`condition` needs `classes`"),
        ({"classes": 1}, "`classes` must be an integer of at least 2"),
        ({"classes": True}, "`classes` must be"),
        ({"covariates": -1}, "`covariates` must be"),
        ({"covariates": 2, "embedding": 3}, "needs `classes`"),
        ({"classes": 3, "embedding": 0}, "`embedding` must be"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        Condition(**options)


class Plain(nn.Module):
    """A network of one's own for a model without a condition."""

    def __init__(self, *sizes):
        super().__init__()

    def forward(self, x):
        return x


class Sized(Plain):
    """It takes the size of the condition, but not the condition."""

    def __init__(self, shape, latent_dim, condition_dim=0):
        super().__init__()


class Conditional(Plain):
    """A network of one's own for a model with a condition."""

    def forward(self, x, c):
        return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": Plain},
            r"`encoder`: the constructor of Plain must take `condition_dim`, the size of the model's condition c, .*"
            r"called with \(1, 8, 8\), 3, condition_dim=10",
        ),
        (
            {"decoder": Plain},
            "`decoder`: the constructor of Plain must take `condition_dim`",
        ),
        (
            {"encoder": Plain, "posterior": FullCovariance},
            "must take `condition_dim`, .*; `outputs`, the number of columns that the encoder must return",
        ),
        (
            {"encoder": Plain, "posterior": FullCovariance, "condition": None},
            "the constructor of Plain must take `outputs`, the number of columns",
        ),
        (
            {"encoder": Sized},
            r"`encoder`: Sized is called with \(x, c\), where c is that of the model's `condition`, but its "
            r"`forward` takes \(x\)\.",
        ),
        ({"decoder": Plain()}, r"`decoder`: Plain is called with \(z, c\), .* takes \(x\)\."),
        (
            {"encoder": Conditional(), "condition": None},
            r"`encoder`: Conditional is called with \(x\) in a model without a `condition`, but .* takes \(x, c",
        ),
    ],
)
def test_a_network_of_ones_own_must_fit_the_condition_and_the_posterior(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_part_of_a_batch_keeps_its_condition():
    vae = small()
    batch = {"x": torch.randint(0, 17, (5, 1, 8, 8)), "label": torch.arange(5), "mask": torch.ones(5, 1, 8, 8).bool()}
    part = vae.observe(batch)[1:3]
    assert part.condition.tolist() == [[1], [2]]
    assert part.mask.shape == (2, 1, 8, 8)


def test_covariates_are_standardised_by_numbers_that_the_checkpoint_holds(tmp_path):
    condition = Condition(classes=2, covariates=2)
    condition.set_scale(torch.tensor([4000.0, -1.0]), torch.tensor([500.0, 2.0]))
    expected = torch.tensor([[0, 1, -2.0, 0.5]])
    torch.testing.assert_close(condition(torch.tensor([[1, 3000.0, 0.0]])), expected)
    other = Condition(classes=2, covariates=2)
    other.load_state_dict(condition.state_dict())
    torch.testing.assert_close(other(torch.tensor([[1, 3000.0, 0.0]])), expected)
    for loc, scale in ((torch.zeros(1), torch.ones(2)), (torch.zeros(2), torch.tensor([1.0, 0.0]))):
        with pytest.raises(ValueError, match="`loc` and `scale` must be finite numbers for 2 covariates"):
            condition.set_scale(loc, scale)


@pytest.mark.parametrize("has_trainer", [False, True])
def test_a_condition_that_the_model_does_not_read_is_warned_of_once(tmp_path, has_trainer):
    x, c, _ = exact_data()
    data = {"x": x.float(), "condition": c.float(), "index": torch.arange(len(x))}
    vae = VAE((6,), latent_dim=2, likelihood=partial(Gaussian, variance=1.0))

    def train():
        if has_trainer:
            quiet_trainer(tmp_path, max_epochs=2).fit(vae, TensorLoader(data, 100), TensorLoader(data, 100))
        for batch_idx in range(0 if has_trainer else 3):
            vae.training_step(data, batch_idx)

    with pytest.warns(UserWarning, match=r"hold a 'condition', but the model has none.*covariates=2\)`") as warnings:
        train()
    assert sum("but the model has none" in str(each.message) for each in warnings) == 1


def test_a_table_gives_the_condition_its_scale(tmp_path):
    rows = [f"{200 + 7 * n},{4000 + 50 * n},{'ab'[n % 2]}" for n in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["length,mass,kind", *rows]))
    data = Table(tmp_path / "t.csv", condition=["mass", "kind"], batch_size=10)
    data.setup("fit")
    numbers = data._splits["train"]["condition"].double()
    vae = VAE(data.shape, latent_dim=1, kinds=data.kinds, condition=partial(Condition, covariates=2))
    quiet_trainer(tmp_path, max_epochs=1).fit(vae, Table(tmp_path / "t.csv", condition=["mass", "kind"], batch_size=10))
    torch.testing.assert_close(vae.condition.loc.double(), numbers.mean(0))
    torch.testing.assert_close(vae.condition.scale.double(), numbers.std(0, correction=0))
    assert vae.sample(2, condition=torch.tensor([4100.0, 1])).shape == (2, 1)


def test_half_precision_rounds_neither_classes_nor_the_scale(tmp_path):
    seen = []

    class Watched(Condition):
        def forward(self, columns):
            seen.append((columns, super().forward(columns)))
            return seen[-1][1]

    vae = VAE((4,), latent_dim=2, condition=partial(Watched, classes=1000, covariates=1))
    vae.condition.set_scale(torch.tensor([4001.0]), torch.tensor([3.0]))
    data = {"x": torch.randn(4, 4), "label": torch.tensor([300, 301, 998, 999]), "index": torch.arange(4)}
    data["condition"] = torch.tensor([[4000.0], [4016.0], [4032.0], [3984.0]])  # Lightning rounds the batch itself
    trainer = quiet_trainer(tmp_path, max_epochs=1, precision="bf16-true")
    with pytest.warns(UserWarning, match="rounded to about 3 digits. With `precision='bf16-mixed'`") as warned:
        trainer.fit(vae, TensorLoader(data, 4), TensorLoader(data, 4))
    assert {str(each.message).split(" came")[0] for each in warned} >= {"The data", "The covariates in `condition`"}
    for columns, c in seen:
        assert columns[:, 0].tolist() == [300, 301, 998, 999]
        assert c[:, :1000].argmax(1).tolist() == [300, 301, 998, 999]
        torch.testing.assert_close(c[:, 1000], torch.tensor([-1 / 3, 5.0, 31 / 3, -17 / 3]))
