import copy
import functools
import math
import pickle
from collections import UserList
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import distributions as td
from torch import nn
from torch.utils.data import DataLoader

from lightning_vae import (
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    ConvDecoder,
    ConvEncoder,
    DiscretisedLogistic,
    ELBOTerms,
    Gaussian,
    LinearDecoder,
    LinearEncoder,
    MLPDecoder,
    MLPEncoder,
)
from lightning_vae.callbacks import CollapseDetector, KLAnnealing, Linear
from lightning_vae.datamodules import Digits, TensorLoader
from lightning_vae.noise import _POSTERIOR_SEED, uniform_by_index
from tests.image_vae import LEVELS, SHAPE, LaplaceEncoder, images, loader, rows, small, small_like, trainer
from tests.processes import in_two_processes

OPTIMAL = functools.partial(Gaussian, variance="optimal")


# ---- the formula


def test_terms_are_the_elbos():
    torch.manual_seed(0)
    vae = VAE((6,), latent_dim=2, likelihood=functools.partial(Gaussian, variance=0.3)).eval()
    x, index = torch.randn(9, 6), torch.arange(9)

    terms = vae.elbo_terms(x, index)

    posterior = vae.posterior
    assert isinstance(posterior, td.Normal)
    kl = 0.5 * (posterior.mean**2 + posterior.variance - 1 - posterior.variance.log())
    torch.testing.assert_close(terms.rate_per_dimension, kl)
    draws = torch.stack([posterior.sample() for _ in range(4000)])
    squared = torch.stack([(x - vae.decoder(z)).square().sum(1) for z in draws]).mean(0)
    expected = 3 * math.log(2 * math.pi * 0.3) + squared / 0.6
    with torch.no_grad():
        many = torch.stack([vae.elbo_terms(x).distortion for _ in range(4000)]).mean(0)
    torch.testing.assert_close(many, expected, rtol=0.02, atol=0.02)


def test_encode_decode_reconstruct_and_sample_in_the_datas_scale():
    vae = small()
    x = images(5)
    likelihood = vae.decode(vae.encode(x).mean)
    assert (likelihood.batch_shape, likelihood.event_shape) == ((5,), SHAPE)
    torch.testing.assert_close(vae.reconstruct(x), likelihood.mean * 16)
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x))
    assert vae.sample(7).shape == (7, *SHAPE)
    assert 0 <= vae.sample(7).min() <= vae.sample(7).max() <= 16
    torch.testing.assert_close(vae.encode(x).mean, small_like(vae)(x / 16.0))


@pytest.mark.parametrize(
    ("shape", "levels", "likelihood"),
    [((1, 4, 4), 256, Bernoulli), ((3, 4, 4), 256, DiscretisedLogistic), ((5,), None, Gaussian)],
)
def test_likelihood_goes_by_the_data(shape, levels, likelihood):
    assert type(VAE(shape, levels).likelihood) is likelihood


# ---- the loss


def test_loss_is_distortion_plus_beta_times_the_floored_rate(tmp_path):
    losses = []

    class Recorder(VAE):
        def training_step(self, batch, batch_idx):
            torch.manual_seed(batch_idx)
            loss = super().training_step(batch, batch_idx)
            torch.manual_seed(batch_idx)
            terms = self.elbo_terms(batch["x"])
            floored = terms.rate_per_dimension.mean(0).clamp(min=0.3).sum()
            losses.append((loss.item(), (terms.distortion.mean() + 2.5 * floored).item()))
            return loss

    trainer(tmp_path).fit(Recorder(SHAPE, LEVELS, latent_dim=3, beta=2.5, free_bits=0.3), loader())
    for loss, expected in losses:
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("average", ["batch", "sample"])
def test_validation_loss_is_at_the_target_knobs(tmp_path, average):
    vae = small(beta=3.0, free_bits=0.4, free_bits_average=average)
    run = trainer(tmp_path)

    class Mover(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.beta = 0.01
            pl_module.free_bits = 7.0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.beta = 3.0
            pl_module.free_bits = 0.4

    run.callbacks.append(Mover())
    run.fit(vae, loader(), loader())
    metrics = run.callback_metrics

    with torch.no_grad():
        terms = vae.eval().elbo_terms(images(), torch.arange(70))
    rates = terms.rate_per_dimension
    floored = (rates.mean(0) if average == "batch" else rates).clamp(min=0.4).sum(-1).mean()
    assert metrics["val/rate"] == pytest.approx(terms.rate.mean().item(), rel=1e-5)
    assert metrics["val/floored_rate"] == pytest.approx(floored.item(), rel=1e-5)
    assert metrics["val/loss"] == pytest.approx((terms.distortion.mean() + 3 * floored).item(), rel=1e-5)
    assert metrics["val/elbo"] == pytest.approx(terms.elbo.mean().item(), rel=1e-5)
    assert (vae.beta.item(), vae.free_bits.item()) == pytest.approx((3.0, 0.4))  # after fit


def test_validation_floors_the_mean_over_the_whole_set(tmp_path):
    vae = small().eval()
    with torch.no_grad():
        vae.encoder.layers[-1].weight.mul_(10)  # rates that differ from image to image
        rates = vae.elbo_terms(images(), torch.arange(70)).rate_per_dimension
    vae.free_bits = rates.mean(0).median()
    measured = trainer(tmp_path).validate(vae, loader(batch_size=7), verbose=False)[0]["val/floored_rate"]
    by_batch = torch.stack([part.mean(0).clamp(min=vae.free_bits).sum() for part in rates.split(7)]).mean()
    assert measured == pytest.approx(rates.mean(0).clamp(min=vae.free_bits).sum().item(), rel=1e-5)
    assert by_batch > measured * 1.01


def test_at_beta_one_validation_loss_is_minus_the_elbo(tmp_path):
    run = trainer(tmp_path)
    run.fit(small(), loader(), loader())
    assert run.callback_metrics["val/loss"] == pytest.approx(-run.callback_metrics["val/elbo"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1}, "`beta` must be a finite number of at least 0, got -1"),
        ({"beta": math.nan}, "`beta`"),
        ({"free_bits": -0.1}, "`free_bits`"),
        ({"latent_dim": 0}, "`latent_dim`"),
        ({"shape": ()}, "`shape`"),
        ({"latent_dim": True}, "`latent_dim`"),
        ({"latent_dim": 2.0}, "`latent_dim` must be an integer of at least 1, got 2.0"),
        ({"levels": 1}, "`levels`"),
        ({"levels": 17.5}, "`levels` must be an integer of at least 2, or None for real-valued data, got 17.5"),
        ({"levels": math.nan}, "`levels`"),
        ({"levels": "17"}, "`levels` must be an integer of at least 2, .* got '17'"),
        ({"free_bits_per": 2}, "must divide"),
        ({"free_bits_per": "unit"}, "`free_bits_per` must be"),
        ({"free_bits_average": "mean"}, "`free_bits_average`"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("variance", ["learned", "optimal"])
def test_beta_with_an_adaptive_scale_warns(variance):
    with pytest.warns(UserWarning, match="the two form a feedback loop"):
        VAE((4,), beta=10, likelihood=functools.partial(Gaussian, variance=variance))
    VAE((4,), beta=10, likelihood=functools.partial(Gaussian, variance=0.1))
    VAE((4,), beta=1, likelihood=functools.partial(Gaussian, variance=variance))


# ---- what is logged


def test_keys(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    run = trainer(tmp_path, logger=logger, log_every_n_steps=1)
    vae = small()
    run.fit(vae, loader(), loader())
    run.test(vae, loader(), verbose=False)
    terms = ("elbo", "rate", "distortion", "loss", "floored_rate")
    keys = set(rows(tmp_path / "run" / "version_0")[0])
    knobs = {"knobs/beta", "knobs/free_bits"}
    assert keys == {"epoch", "step"} | knobs | {
        f"{split}/{term}" for split in ("train", "val", "test") for term in terms
    }


def test_nothing_is_logged_between_logging_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(VAE, "log_dict", lambda self, *args, **kwargs: calls.append(self.trainer.global_step))
    trainer(tmp_path, max_epochs=1, logger=True, log_every_n_steps=4).fit(small(), loader(160))  # 10 batches
    assert calls == [3, 3, 7, 7]  # in the fourth and eighth step


# ---- evaluation


def evaluate(tmp_path, vae, **options):
    run = trainer(tmp_path)
    return run.validate(vae, loader(**options), verbose=False)[0]


def test_validation_does_not_depend_on_the_batch_size_the_order_or_the_random_state(tmp_path):
    vae = small(free_bits=0.2)
    reference = evaluate(tmp_path, vae, batch_size=70)
    torch.manual_seed(7)
    for batch_size, shuffle in ((1, False), (16, False), (33, True)):
        other = evaluate(tmp_path, vae, batch_size=batch_size, shuffle=shuffle)
        assert other == pytest.approx(reference, rel=1e-5)
    state = torch.get_rng_state()
    evaluate(tmp_path, vae)
    assert torch.equal(torch.get_rng_state(), state)


def test_foreign_batches_are_numbered_in_order(tmp_path):
    vae = small()
    reference = evaluate(tmp_path, vae)
    data = torch.utils.data.TensorDataset(images(), torch.arange(70))
    foreign = torch.utils.data.DataLoader(data, batch_size=9)
    assert trainer(tmp_path).validate(vae, foreign, verbose=False)[0] == pytest.approx(reference, rel=1e-5)
    tensors = torch.utils.data.DataLoader(images(), batch_size=9)  # type: ignore[arg-type]
    assert trainer(tmp_path).validate(vae, tensors, verbose=False)[0] == pytest.approx(reference, rel=1e-5)


def test_predict_returns_means_and_whose_they_are(tmp_path):
    vae = small(likelihood=functools.partial(Gaussian, variance=0.1))
    batches = trainer(tmp_path).predict(vae, loader(shuffle=False))
    assert batches is not None
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.arange(70))
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), torch.arange(70) % 3)
    torch.testing.assert_close(torch.cat([batch["mean"] for batch in batches]), vae.encode(images()).mean)


# ---- precision


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true", "64-true"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_training_in_half_precision_computes_the_terms_in_float32(tmp_path, precision, shape):
    seen = []

    class Recorder(VAE):
        def elbo_terms(self, x, index=None):
            terms = super().elbo_terms(x, index)
            assert isinstance(self.posterior, td.Normal)
            seen.append({terms.distortion.dtype, terms.rate_per_dimension.dtype, self.posterior.loc.dtype})
            return terms

    torch.manual_seed(0)
    vae = Recorder(shape, 256, latent_dim=3, encoder=ConvEncoder, decoder=ConvDecoder, beta=1.0)
    data = TensorLoader({"x": images(64, shape, 256)}, batch_size=16, shuffle=True, seed=0)
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    run = trainer(tmp_path, precision=precision, max_epochs=1)
    run.fit(vae, data, data)
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert seen
    assert all(dtypes == {expected} for dtypes in seen)
    assert vae.beta.dtype == torch.float32
    assert run.callback_metrics["val/loss"].isfinite()
    assert all((a.float() != b.float()).any() for a, b in zip(before, vae.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("likelihood", [Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian, OPTIMAL])
def test_evaluation_in_half_precision_is_finite(tmp_path, precision, likelihood):
    data = TensorLoader({"x": images(2000, (1, 8, 8), 256)}, batch_size=500)
    run = trainer(tmp_path, precision=precision)
    for encoder in (MLPEncoder, LaplaceEncoder):
        vae = VAE((1, 8, 8), 256, latent_dim=32, encoder=encoder, likelihood=likelihood)
        assert all(math.isfinite(value) for value in run.validate(vae, data, verbose=False)[0].values())
        assert run.predict(vae, data)[0]["mean"].dtype == torch.float32  # type: ignore[index]


def test_a_cast_outside_of_lightning_is_followed():
    vae = small()
    vae.bfloat16()
    assert vae.encode(images(3)).mean.dtype == torch.float32
    nn.Sequential(vae).to(torch.float64)
    assert vae.elbo_terms(images(3)).distortion.dtype == torch.float64


# ---- what a network of one's own may get wrong, and what a pass may hold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": lambda k, shape: nn.Linear(k, 16)}, r"`decoder` must give shape \(5, 1, 4, 4\), got \(5, 16\)"),
        (
            {"decoder": lambda k, shape: nn.Sequential(nn.Linear(k, 16), nn.Unflatten(1, (4, 4)))},
            r"`decoder` must give shape \(5, 1, 4, 4\), got \(5, 4, 4\)",
        ),
    ],
)
def test_networks_of_another_shape_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options).elbo_terms(images(5))


@pytest.mark.filterwarnings("ignore:CollapseDetector")  # nothing was trained
def test_an_empty_batch_counts_for_nothing(tmp_path):
    vae = small()
    batches = [{"x": images(9), "index": torch.arange(9)}, {"x": images(0), "index": torch.arange(0)}]
    whole, empty = (torch.utils.data.DataLoader(part, batch_size=None) for part in (batches[:1], batches))  # type: ignore[arg-type]
    runs = [
        trainer(tmp_path, callbacks=[CollapseDetector()]).validate(vae, data, verbose=False) for data in (whole, empty)
    ]
    assert runs[0] == runs[1]
    predicted = trainer(tmp_path).predict(vae, empty)
    assert [tuple(batch["mean"].shape) for batch in predicted or []] == [(9, 3), (0, 3)]


def test_several_loaders_are_measured_one_by_one(tmp_path):
    vae = small()
    one, two = loader(40), loader(70)
    run = trainer(tmp_path)
    run.validate(vae, [one, two], verbose=False)
    assert len(run.callback_metrics) == 10
    for number, data in enumerate((one, two)):
        alone = trainer(tmp_path).validate(vae, data, verbose=False)[0]
        measured = {name: run.callback_metrics[f"{name}/dataloader_idx_{number}"].item() for name in alone}
        assert measured == pytest.approx(alone, rel=1e-6)


def test_looking_at_the_terms_does_not_move_an_optimal_variance():
    vae = small(likelihood=OPTIMAL)
    before = vae.likelihood.log_variance.clone()
    vae.train().elbo_terms(images(5), torch.arange(5))
    assert torch.equal(vae.likelihood.log_variance, before)
    vae.elbo_terms(images(5))
    assert not torch.equal(vae.likelihood.log_variance, before)


def test_binarisation_and_posterior_have_noise_of_their_own():
    for seed in range(4):
        vae = small(likelihood=functools.partial(Bernoulli, seed=seed))
        vae.elbo_terms(images(50), torch.arange(50))
        posterior = vae.posterior
        assert isinstance(posterior, td.Normal)
        pixels = uniform_by_index(torch.arange(50), 3, seed)
        latents = uniform_by_index(torch.arange(50), 3, _POSTERIOR_SEED)
        assert not torch.isclose(pixels, latents).any()


def test_a_module_can_be_copied_after_a_fit(tmp_path):
    vae = small()
    trainer(tmp_path).fit(vae, loader())
    copy.deepcopy(vae)


# ---- several processes


class Sharer(VAE):
    """Leaves behind what it measured and its weights, for the process that started it."""

    def __init__(self, folder):
        super().__init__(SHAPE, LEVELS, latent_dim=3, free_bits=0.2)
        self.folder = folder
        self.seeds = []

    def training_step(self, batch, batch_idx):
        self.seeds.append(torch.initial_seed())
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        weights = [parameter.detach() for parameter in self.parameters()]
        torch.save(
            {"metrics": metrics, "weights": weights, "seeds": self.seeds}, self.folder / f"{self.global_rank}.pt"
        )


def share(rank, folder):
    run = trainer(folder, devices=2, strategy="ddp", max_epochs=1, num_sanity_val_steps=0)
    run.fit(Sharer(folder), loader(64, batch_size=8), loader(71, batch_size=8))


def test_two_processes_validate_as_one(tmp_path):
    in_two_processes(share, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["metrics"] == pytest.approx(other["metrics"])
    assert len({*one["seeds"], *other["seeds"]}) == 2 * 4, "noise of its own for each process and batch"

    vae = small(free_bits=0.2)
    for parameter, weight in zip(vae.parameters(), one["weights"], strict=True):
        parameter.data.copy_(weight)
    alone = trainer(tmp_path).validate(vae, loader(71), verbose=False)[0]
    assert {name: one["metrics"][name] for name in alone} == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "64-true"])
def test_the_fused_optimizer_is_clipped_in_every_precision(precision, tmp_path):
    """Lightning refuses to clip for fused optimizers under mixed precision, as they may unscale by themselves."""
    vae = small()
    gradients = []
    vae.on_before_zero_grad = lambda _: gradients.append(
        torch.cat([each.grad.flatten() for each in vae.parameters() if each.grad is not None] or [torch.zeros(1)])
    )
    trainer(tmp_path, precision=precision, gradient_clip_val=0.5, max_epochs=1).fit(vae, loader())
    assert len(gradients) == 5
    assert all(float(each.norm()) == pytest.approx(0.5, rel=1e-2) for each in gradients[1:])


def test_an_override_of_encode_or_decode_changes_what_is_seen_and_not_what_is_trained(tmp_path):
    class Own(VAE):
        def encode(self, x):
            return td.Normal(torch.zeros(len(x), 3), torch.ones(len(x), 3))

        def decode(self, z):
            return td.Normal(torch.full((len(z), *SHAPE), 0.5), 1.0)

    losses, vaes = [], []
    for kind in (VAE, Own):
        torch.manual_seed(0)
        vaes.append(kind(SHAPE, LEVELS, latent_dim=3))
        run = trainer(tmp_path, max_epochs=1)
        run.fit(vaes[-1], loader(), loader())
        losses.append(run.callback_metrics["val/loss"])
    assert losses[0] == losses[1]
    assert (vaes[1].reconstruct(images(2)) == 8).all()


def test_a_subclass_may_take_a_hook_for_itself(tmp_path):
    """Noise of its own and exact resume need `super`; the curves do not."""

    class Silent(VAE):
        def on_train_batch_start(self, batch, batch_idx):
            pass

    loop = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    loop.fit(Silent(shape=SHAPE, levels=LEVELS, latent_dim=3), loader())
    assert loop.logged_metrics["train/loss"].isfinite()


# ---- checkpoints of earlier versions


def test_a_checkpoint_of_an_earlier_version_loads():
    """It was saved at the end of a run of ``configs/digits.yaml`` by version 0.1.0."""
    path = Path(__file__).parent / "fixtures" / "digits_of_0.1.0.ckpt"
    vae, saved = VAE.load_from_checkpoint(path, map_location="cpu"), torch.load(path, weights_only=True)
    assert all(torch.equal(vae.state_dict()[name], weight) for name, weight in saved["state_dict"].items())
    assert vae.beta.item() == 1.0
    digits = Digits()
    digits.setup("test")
    x = next(iter(digits.test_dataloader()))["x"]
    with torch.no_grad():
        error = (vae.eval().reconstruct(x) - x).square().mean() / x.float().var()
    assert error < 0.25, "of the variance"


# ---- the same check at every door


@pytest.mark.parametrize("z", [torch.zeros(3), torch.zeros(5, 2), torch.zeros(5, 2, 3), torch.zeros(5, 4), [[0.0] * 3]])
def test_latents_of_another_shape_are_refused(z):
    with pytest.raises(ValueError, match=r"`z` must have shape \(B, 3\), got"):
        small().decode(z)


def test_latents_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="The latents `z` must be finite"):
        small().decode(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="The latents `z` must be integers or floating-point numbers"):
        small().decode(torch.zeros(2, 3, dtype=torch.complex64))


@pytest.mark.parametrize("n", [-1, 2.0, "3", None, True])
def test_a_number_of_samples_that_is_none_is_refused(n):
    with pytest.raises(ValueError, match="`n` must be an integer of at least 0, got"):
        small().sample(n)


@pytest.mark.parametrize("shape", [(6,), (1, 5, 5)])
@pytest.mark.parametrize("networks", ["linear", "mlp", "conv"])
def test_no_observations_are_encoded_and_decoded_to_none(shape, networks):
    if networks == "conv" and len(shape) == 1:
        pytest.skip("convolutions need images")
    encoder, decoder = {
        "linear": (LinearEncoder, LinearDecoder), "mlp": (MLPEncoder, MLPDecoder), "conv": (ConvEncoder, ConvDecoder)
    }[networks]  # fmt: skip
    vae = VAE(shape, latent_dim=2, encoder=encoder, decoder=decoder)
    assert vae.sample(0).shape == vae.reconstruct(torch.zeros(0, *shape)).shape == (0, *shape)


@pytest.mark.parametrize("wrong", ["a mean", "a column", "summed rates"])
def test_terms_of_a_subclass_are_one_row_for_each_observation(wrong):
    class Own(VAE):
        def elbo_terms(self, x, index=None):
            distortion, rates = super().elbo_terms(x, index)
            if wrong == "summed rates":
                return ELBOTerms(distortion, rates.sum(1))
            return ELBOTerms(distortion.mean() if wrong == "a mean" else distortion[:, None], rates)

    for step in ("training_step", "validation_step"):
        with pytest.raises(
            ValueError, match=r"`elbo_terms` must return a distortion of shape \(5,\) and rates of shape"
        ):
            getattr(Own(SHAPE, LEVELS, latent_dim=3), step)(images(5), 0)


def test_any_sequence_is_a_shape(tmp_path):
    """Case `sequences_of_hydra`."""
    vae = VAE(UserList([1, 4, 4]), LEVELS, latent_dim=3)
    assert vae.shape == vae.hparams["shape"] == SHAPE
    run = trainer(tmp_path, max_epochs=1)
    run.fit(vae, loader())
    run.save_checkpoint(tmp_path / "vae.ckpt")
    assert VAE.load_from_checkpoint(tmp_path / "vae.ckpt", weights_only=True).shape == SHAPE


def test_an_encoder_loaded_alone_trains_as_loaded_into_the_encoder(tmp_path):
    data = DataLoader(0.02 * torch.randn(100, 12, generator=torch.Generator().manual_seed(0)) + 0.5, 50)
    donor = VAE((12,), latent_dim=4)
    state = {name: value for name, value in donor.state_dict().items() if name.startswith("encoder")}
    whole, part = copy.deepcopy(donor), copy.deepcopy(donor)
    whole.load_state_dict(state, strict=False)
    part.encoder.load_state_dict(donor.encoder.state_dict())
    for vae in (whole, part):
        torch.manual_seed(0)
        trainer(tmp_path, max_epochs=1).fit(vae, data)
    assert torch.equal(whole.likelihood.log_variance, part.likelihood.log_variance)
    assert whole.likelihood.log_variance < -1


# ---- copies


def copies(vae, folder):
    torch.save(vae, folder / "vae.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # a whole module is more than weights
        whole = torch.load(folder / "vae.pt", weights_only=False)
    return [copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)), whole]


def check_independent(vae, twin):
    """A copy computes the same, and training it leaves the original alone."""
    posterior, x, index = vae.posterior, images(5), torch.arange(5)
    mode = vae.training
    with torch.no_grad():
        expected = copy.deepcopy(vae).eval().elbo_terms(x, index).elbo
        torch.testing.assert_close(twin.eval().elbo_terms(x, index).elbo, expected)
    before = [each.clone() for each in (*vae.parameters(), vae.beta)]
    with torch.inference_mode(False), torch.enable_grad():  # a validation's hooks run without
        optimizer = twin.configure_optimizers()
        twin.train().training_step(x, 0).backward()
        optimizer.step()
    twin.beta = 7.0
    assert all(map(torch.equal, before, (*vae.parameters(), vae.beta)))
    assert vae.posterior is posterior
    assert vae.training == mode


@pytest.mark.parametrize("options", [{}, {"beta": 4.0, "likelihood": OPTIMAL}, {"free_bits": 0.5}])
@pytest.mark.filterwarnings("ignore:`beta` is 4 with a likelihood")
def test_a_module_can_be_copied_after_a_step_of_a_plain_loop(tmp_path, options):
    """Case `no_deepcopy_after_a_step`."""
    vae = small(**options)
    vae.training_step(images(5), 0).backward()
    assert vae.posterior is not None
    for twin in copies(vae, tmp_path):
        assert twin.posterior is None
        check_independent(vae, twin)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_module_can_be_copied_in_any_hook(tmp_path, averaged):
    seen = set()

    def copied(hook):
        def run(self, trainer, pl_module, *args, **kwargs):
            if hook not in seen:
                seen.add(hook)
                for twin in copies(pl_module, tmp_path):
                    check_independent(pl_module, twin)

        return run

    hooks = [
        "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward",
        "on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
        "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end", "on_train_end",
    ]  # fmt: skip
    copier = type("Copier", (pl.Callback,), {hook: copied(hook) for hook in hooks})()
    callbacks = [copier, KLAnnealing(Linear(steps=5)), CollapseDetector()]
    callbacks += [EMAWeightAveraging(decay=0.9)] if averaged else []
    trainer(tmp_path, callbacks=callbacks, num_sanity_val_steps=0).fit(small(), loader(), loader())
    assert seen == set(hooks)


# ---- export


@pytest.mark.parametrize("make", [small, lambda: VAE((6,), latent_dim=2), lambda: VAE((3, 8, 8), 256, latent_dim=2,
    encoder=ConvEncoder, decoder=ConvDecoder)], ids=["mlp", "vectors", "conv"])  # fmt: skip
def test_the_model_and_its_networks_are_exported_for_any_batch(make):
    """Case `no_forward`."""
    vae = make().eval()
    x = torch.randint(0, vae.levels or 2, (4, *vae.shape))
    x = x if vae.levels else x.float()
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(vae, (x,), dynamic_shapes=batch).module()
    more = torch.cat([x, x, x])[:7]
    with torch.no_grad():
        torch.testing.assert_close(exported(more), vae.reconstruct(more))
        torch.testing.assert_close(vae(more), vae.reconstruct(more))
        scaled, z = vae.observe(x).scaled, torch.randn(4, 2 if vae.latent_dim == 2 else 3)
        for network, given in ((vae.encoder, scaled), (vae.decoder, z)):
            module = torch.export.export(network, (given,), dynamic_shapes=batch).module()
            other = torch.cat([given, given])[:7]
            torch.testing.assert_close(module(other), network(other))
