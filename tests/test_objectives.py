"""Terms and the multi-sample bound in a model that is fitted."""

from functools import partial

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributions import MultivariateNormal

from lightning_vae import DIP, MMD, VAE, Bernoulli, CategoricalGroups, FullCovariance, Gaussian, Term, TotalCorrelation
from lightning_vae.callbacks import GECO, FreeBits, KLAnnealing, Linear
from lightning_vae.datamodules import Digits, TensorLoader
from lightning_vae.terms import Step
from tests.doubles import optimal_linear_vae, quiet_trainer


class SquaredError(Term):
    """A term of one's own."""

    def forward(self, step: Step) -> Tensor:
        return (step.likelihood.mean - step.observations.scaled).square().flatten(1).sum(1).mean()


class LabelLoss(Term):
    """A term of one's own with parameters, which it draws."""

    def __init__(self, weight=1.0):
        super().__init__(weight)
        self.classifier = torch.nn.Linear(4, 10)

    def forward(self, step: Step) -> Tensor:
        return torch.nn.functional.cross_entropy(self.classifier(step.z), step.observations.label)


TERMS = {
    "labels": LabelLoss,
    "mmd": MMD,
    "tc": TotalCorrelation,
    "dip": DIP,
    "error": SquaredError,
}


def fit(folder, epochs=1, callbacks=(), **options):
    torch.manual_seed(0)
    vae = VAE((1, 8, 8), 17, 4, likelihood=Bernoulli, **options)
    trainer = quiet_trainer(folder, max_epochs=epochs, callbacks=list(callbacks), limit_train_batches=4)
    trainer.fit(vae, Digits(batch_size=100))
    return vae, trainer


@pytest.mark.parametrize("name", TERMS)
def test_at_weight_0_the_run_is_bit_for_bit_the_run_without_the_term(tmp_path, name):
    plain, one = fit(tmp_path)
    vae, other = fit(tmp_path, terms={name: partial(TERMS[name], weight=0.0)})
    others = {key: value for key, value in vae.named_parameters() if not key.startswith("terms.")}
    for parameter, same in zip(plain.parameters(), others.values(), strict=True):
        assert torch.equal(parameter, same)
    metrics = {
        key: value for key, value in other.callback_metrics.items() if "term_" not in key and "weight" not in key
    }
    assert metrics == one.callback_metrics
    assert other.callback_metrics[f"val/term_{name}"].isfinite()
    assert other.callback_metrics[f"train/term_{name}"].isfinite()


@pytest.mark.parametrize("name", TERMS)
def test_a_weight_changes_the_run_and_the_loss_is_that_of_the_sum(tmp_path, name):
    plain, _ = fit(tmp_path)
    vae, trainer = fit(tmp_path, terms={name: partial(TERMS[name], weight=0.5)})
    assert not all(map(torch.equal, plain.parameters(), vae.parameters()))
    found = trainer.callback_metrics
    expected = found["val/distortion"] + found["val/rate"] + 0.5 * found[f"val/term_{name}"]
    assert float(found["val/loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_a_weight_is_a_knob_that_is_annealed_logged_saved_and_resumed(tmp_path):
    schedule = KLAnnealing(Linear(steps=4, start=0.0), attribute="mmd_weight")
    vae, trainer = fit(tmp_path, callbacks=[schedule], terms={"mmd": partial(MMD, weight=8.0)})
    assert vae.knobs["mmd_weight"] == 8
    assert float(vae.mmd_weight) == 8
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    vae.mmd_weight = 3.0
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    loaded = VAE.load_from_checkpoint(tmp_path / "b.ckpt")
    assert isinstance(loaded.terms["mmd"], MMD)
    assert float(loaded.mmd_weight) == 3
    assert float(VAE.load_from_checkpoint(tmp_path / "a.ckpt").mmd_weight) == 8


def test_the_size_of_the_data_reaches_a_term(tmp_path):
    sizes = []

    class Sized(Term):
        def forward(self, step):
            sizes.append(step.data_size)
            return step.z.sum() * 0

    data = Digits(batch_size=100)
    fit(tmp_path, terms={"sized": Sized})
    data.setup("fit")
    assert set(sizes) == {data.train_dataloader().size, data.val_dataloader().size}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": {"mmd": partial(MMD, weight=-1.0)}}, "`weight` must be"),
        ({"terms": {"mmd": torch.nn.Linear(1, 1)}}, "`terms.mmd` must be a lightning_vae.Term"),
        ({"terms": {"beta 2": MMD}}, "`terms` must have names that are Python names"),
        ({"terms": [MMD]}, "`terms` must be a mapping from names to terms"),
        ({"terms": {3: MMD}}, "names that are Python names, such as 'mmd', got 3"),
        ({"terms": {"keys": MMD}}, "`terms` can't have the name 'keys', which the model itself uses"),
        ({"terms": {"capacity": MMD}}, "`terms` can't have the name 'capacity'"),
        ({"terms": {"capacity": MMD}, "capacity_weight": 1.0}, "`terms` can't have the name 'capacity'"),
        ({"terms": {"mmd": MMD}, "compile": True}, "`compile`"),
        ({"importance_samples": 0}, "`importance_samples` must be"),
        ({"importance_samples": 5, "free_bits": 2.0}, "no floor of the rate"),
        (
            {"importance_samples": 5, "posterior": partial(CategoricalGroups, classes=2)},
            "needs a posterior over real numbers, got `posterior` CategoricalGroups",
        ),
        (
            {"terms": {"tc": TotalCorrelation}, "posterior": partial(CategoricalGroups, classes=2)},
            "`TotalCorrelation` needs a density for each latent dimension.*got CategoricalGroups",
        ),
        ({"terms": {"tc": TotalCorrelation}, "posterior": FullCovariance}, "must be factorised, got FullCovariance"),
        (
            {"terms": {"dip": DIP}, "posterior": partial(CategoricalGroups, classes=2)},
            "`DIP` needs a Gaussian posterior, got `posterior` CategoricalGroups",
        ),
        ({"importance_samples": 5, "free_bits_per": "whole"}, "no floor of the rate, got `free_bits_per=whole`"),
        (
            {"importance_samples": 5, "free_bits_average": "sample"},
            "no floor .* got `free_bits_average=sample`",
        ),
        (
            {"capacity_weight": 5.0, "free_bits_per": "whole"},
            "`free_bits_per` must be left out .* with a `capacity_weight`",
        ),
        ({"capacity_weight": 5.0, "free_bits_per": 2}, "`free_bits_per` must be left out .* got 2"),
        (
            {"capacity_weight": 5.0, "free_bits_average": "sample"},
            "`free_bits_average` must be left out .* got 'sample'",
        ),
        ({"importance_samples": 5, "terms": {"mmd": MMD}}, "`terms`"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        VAE((6,), latent_dim=2, **options)


def test_a_last_batch_of_one_observation_has_no_terms(tmp_path):
    values = []

    class Counted(Term):
        def forward(self, step):
            values.append(float(len(step.z)))
            return step.z.new_tensor(values[-1])

    data = {"x": torch.randn(9, 3), "index": torch.arange(9)}
    vae = VAE((3,), latent_dim=2, likelihood=partial(Gaussian, variance=1.0), terms={"counted": Counted})
    [found] = quiet_trainer(tmp_path).validate(vae, TensorLoader(data, 4), verbose=False)
    assert found["val/term_counted"] == 4
    assert values == [4, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda step: step.z.sum(1), r"`terms.own` must be one number, got a tensor of shape"),
        (lambda step: 1.0, r"`terms.own` must be one number as a tensor, got float 1.0"),
        (lambda step: None, r"`terms.own` must be one number as a tensor, got NoneType None"),
    ],
)
def test_a_term_must_be_a_scalar(tmp_path, value, message):
    class Own(Term):
        def forward(self, step):
            return value(step)

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, terms={"own": Own})


def test_the_multi_sample_bound_is_trained_and_validated(tmp_path):
    vae, trainer = fit(tmp_path, importance_samples=5)
    found = trainer.callback_metrics
    assert found["val/loss"] < -found["val/elbo"]  # a tighter bound
    assert found["train/loss"] < found["train/distortion"] + found["train/rate"]
    again = trainer.validate(vae, Digits(batch_size=37), verbose=False)[0]
    assert again["val/loss"] == pytest.approx(float(found["val/loss"]), rel=1e-5)  # the noise is fixed


def test_at_the_optimum_of_the_linear_vae_the_bound_is_the_likelihood_for_any_number_of_samples(tmp_path):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([3, 2, 1, 1])
    x = x - x.mean(0)
    vae = optimal_linear_vae(x, 2, 0.5).eval()
    vae.importance_samples = 7
    weight = vae.decoder.map.weight
    exact = MultivariateNormal(torch.zeros(4).double(), weight @ weight.T + 0.5 * torch.eye(4).double()).log_prob(x)
    # Closer than the variance that the optimum of the linear VAE leaves in the discarded directions.
    torch.testing.assert_close(vae._bound(vae.observe(x)), exact, rtol=1e-6, atol=0)


def test_the_weight_of_a_multi_sample_bound_can_be_annealed(tmp_path):
    plain, _ = fit(tmp_path, importance_samples=3)
    vae, _ = fit(tmp_path, importance_samples=3, callbacks=[KLAnnealing(Linear(steps=2))])
    assert not all(map(torch.equal, plain.parameters(), vae.parameters()))


def test_a_multi_sample_bound_has_no_floor_to_move(tmp_path):
    with pytest.raises(MisconfigurationException, match="does not read `free_bits`"):
        fit(tmp_path, importance_samples=3, callbacks=[FreeBits(0.5)])


def test_a_multi_sample_bound_has_no_error_to_constrain(tmp_path):
    with pytest.raises(ValueError, match="trains on a multi-sample bound"):
        fit(tmp_path, importance_samples=3, callbacks=[GECO(squared_error=3.0)])


def test_terms_see_fresh_noise_in_training_and_a_condition(tmp_path):
    seen = []

    class Seen(Term):
        def forward(self, step):
            seen.append(step)
            return step.z.sum() * 0

    data = {"x": torch.randn(20, 3), "index": torch.arange(20)}
    vae = VAE((3,), latent_dim=2, likelihood=partial(Gaussian, variance=1.0), terms={"seen": Seen})
    quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(vae, TensorLoader(data, 20))
    assert not torch.equal(seen[0].z, seen[1].z)
    assert seen[0].observations.is_training
    assert seen[0].observations.index.tolist() == list(range(20))
