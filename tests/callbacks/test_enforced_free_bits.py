import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributions import Independent, Laplace, Normal, OneHotCategorical, kl_divergence
from torch.utils.checkpoint import checkpoint

from lightning_vae import free_bits
from lightning_vae.callbacks import EnforcedFreeBits, FreeBits, KLAnnealing, Linear
from lightning_vae.callbacks.enforced_free_bits import shortfall
from lightning_vae.callbacks.reading.kl_rates import kl_per_dimension
from tests.callbacks.foreign_vae import LATENTS, PLACES, THRESHOLD, TO_SCALE, Encoder, Foreign, fit, refused
from tests.doubles import RecordingVAE, loader, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:FreeBits. .* floors hold their dimension")


def assert_twins(root: Path, floor: EnforcedFreeBits, options: dict[str, Any], *others: Any, **run: Any) -> Foreign:
    """Compare the gradients of each batch with those of a module whose loss has the one line."""
    torch.manual_seed(0)
    model = Foreign(**options)
    twin = Foreign(**options, own_floor={"per": floor.per, "average": floor.average})
    twin.load_state_dict(model.state_dict())
    bare = copy.deepcopy(model)
    theirs = [FreeBits(floor.schedule), *copy.deepcopy(others)]
    bares = copy.deepcopy(others)
    fit(root, twin, *theirs, **run)
    fit(root, bare, *bares, **run)
    fit(root, model, *others, floor, **run)
    tolerance = 1e-12 if run.get("precision") == "64-true" else 1e-5
    assert relative_error(model.gradients, twin.gradients) <= tolerance
    assert relative_error([list(model.parameters())], [list(twin.parameters())]) <= tolerance
    assert relative_error(bare.gradients, twin.gradients) > 1e-2, "there was no floor to enforce"
    return model


def relative_error(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest over all tensors, each as a whole."""
    assert len(actual) == len(expected)
    pairs = [pair for ours, theirs in zip(actual, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    return max(float(((one - other).norm() / other.norm().clamp(min=1e-30)).detach()) for one, other in pairs)


# ---- equal gradients


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize(
    ("form", "second"),  # linear heads output logarithms
    [(form, second) for form in PLACES for second in TO_SCALE if form != "heads" or second.startswith("log")],
)
def test_any_form_of_the_posterior(tmp_path: Path, form: str, second: Any, precision: Any) -> None:
    floor = EnforcedFreeBits(THRESHOLD, weight="weight", second=second, **PLACES[form])
    assert_twins(tmp_path, floor, {"form": form, "second": second}, precision=precision)


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(("per", "threshold"), [("dimension", THRESHOLD), ("whole", 40.0)])
@pytest.mark.parametrize("form", list(PLACES))
def test_under_bfloat16_what_is_missed_of_the_gradient_is_its_rounding(
    tmp_path: Path, caplog: Any, form: str, per: Any, threshold: float, size: float
) -> None:
    caplog.set_level("INFO")
    torch.manual_seed(0)
    model = Foreign(form)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter *= size  # the nearer the rate is to 0, the more of it is rounding
    twin = Foreign(form, own_floor={"per": per, "average": "batch"})
    twin.load_state_dict(model.state_dict())
    floor = EnforcedFreeBits(threshold, weight="weight", per=per, **PLACES[form])
    for each, callbacks in ((model, [floor]), (twin, [FreeBits(threshold)])):
        fit(tmp_path, each, *callbacks, precision="bf16-mixed", max_steps=1)
    found, expected = (torch.cat([part.flatten() for part in each.gradients[0]]) for each in (model, twin))
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert "EnforcedFreeBits: bfloat16 rounds the module's own KL" in caplog.text


@pytest.mark.parametrize("form", ["pair", "map"])
@pytest.mark.parametrize("average", ["batch", "sample"])
@pytest.mark.parametrize(("per", "threshold"), [("dimension", 0.4), (2, 0.6), ("whole", 40.0)])
def test_each_variant(tmp_path: Path, per: Any, threshold: float, average: Any, form: str) -> None:
    floor = EnforcedFreeBits(threshold, weight="weight", per=per, average=average, **PLACES[form])
    assert_twins(tmp_path, floor, {"form": form})


@pytest.mark.parametrize("weight", ["weight", 0.7])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batch_sum", 1 / 28])
def test_each_reduction(tmp_path: Path, reduction: Any, weight: Any) -> None:
    floor = EnforcedFreeBits(THRESHOLD, weight=weight, reduction=reduction, **PLACES["pair"])
    # An untouched weight of 20 / 28 or so makes a difference too, and a batch of 3 rows the last of each epoch.
    assert_twins(tmp_path, floor, {"reduction": reduction}, rows=19, precision="64-true")


@pytest.mark.parametrize("weight", [torch.tensor(0.7), torch.tensor([0.7]), nn.Parameter(torch.tensor(0.7))])
def test_a_weight_that_is_a_tensor(tmp_path: Path, weight: Tensor) -> None:
    model = assert_twins(tmp_path, EnforcedFreeBits(THRESHOLD, "encoder", "weight"), {"weight": weight})
    assert (model.weight != 0.7).all() == isinstance(weight, nn.Parameter), "a learned one is learned"


@pytest.mark.parametrize("first", [True, False])
def test_an_annealed_weight_and_a_scheduled_threshold_in_either_order(tmp_path: Path, first: bool) -> None:
    model, twin = Foreign(), Foreign(own_floor={})
    twin.load_state_dict(model.state_dict())
    schedule = Linear(start=0.2, stop=0.8, steps=6)
    callbacks = [KLAnnealing(Linear(steps=7), "weight"), EnforcedFreeBits(schedule, "encoder", "weight")]
    fit(tmp_path, model, *(callbacks if first else callbacks[::-1]))
    fit(tmp_path, twin, KLAnnealing(Linear(steps=7), "weight"), FreeBits(schedule))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


def test_a_weight_that_the_module_computes(tmp_path: Path) -> None:
    class Computing(Foreign):
        weight = property(lambda self: 0.1 * (1 + self.global_step), lambda self, value: None)

    torch.manual_seed(0)
    model, twin = Computing(), Computing(own_floor={})
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"))
    fit(tmp_path, twin, FreeBits(THRESHOLD))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.02}])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_accumulation_with_a_ragged_end_and_clipping(tmp_path: Path, clip: dict[str, Any], algorithm: str) -> None:
    floor = EnforcedFreeBits(THRESHOLD, "encoder", "weight")
    clip = {**clip, "gradient_clip_algorithm": algorithm} if clip else {}
    assert_twins(tmp_path, floor, {}, accumulate_grad_batches=4, **clip)


def test_accumulation_that_changes_between_epochs(tmp_path: Path) -> None:
    floor = EnforcedFreeBits(THRESHOLD, "encoder", "weight")
    assert_twins(tmp_path, floor, {}, GradientAccumulationScheduler({0: 1, 1: 3}))


def test_a_mean_that_the_reconstruction_uses_too_keeps_that_gradient(tmp_path: Path) -> None:
    assert_twins(tmp_path, EnforcedFreeBits(THRESHOLD, "encoder", "weight"), {"skip": True})


def test_a_module_with_a_backward_and_a_prior_of_its_own(tmp_path: Path) -> None:
    class Own(Foreign):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.prior_mean = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.0]))

        @property
        def prior(self) -> Any:
            return Independent(Normal(self.prior_mean, torch.full_like(self.prior_mean, 1.5)), 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            mean, scale = self.encode(batch)
            reconstruction = (self.decoder(mean + scale * torch.randn_like(scale)) - batch).square().sum(1).mean()
            kl = kl_divergence(Normal(mean, scale), self.prior.base_dist)
            floored = self.own_floor is not None
            loss: Tensor = reconstruction + (free_bits(kl, self.free_bits) if floored else kl.sum(1).mean())
            return loss

        def backward(self, loss: Tensor) -> None:
            (3 * loss).backward()

    torch.manual_seed(0)
    model, twin = Own(), Own(own_floor={})
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", 1.0))
    fit(tmp_path, twin, FreeBits(THRESHOLD))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


def test_two_posteriors_may_each_have_a_floor(tmp_path: Path) -> None:
    class Two(Foreign):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.style = Encoder()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            mean, log_variance = self.style(batch)
            kl = 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance)
            rate = kl.sum(1).mean() if self.own_floor is None else free_bits(kl, self.free_bits)
            return super().training_step(batch, batch_idx) + 0.3 * rate

    torch.manual_seed(0)
    model, twin = Two(), Two(own_floor={})
    twin.load_state_dict(model.state_dict())
    floors = [
        EnforcedFreeBits(THRESHOLD, "encoder", "weight", name="content"),
        EnforcedFreeBits(THRESHOLD, "style", 0.3, name="style"),
    ]
    fit(tmp_path, model, *floors)
    fit(tmp_path, twin, FreeBits(THRESHOLD))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


def test_an_optimizer_that_computes_the_loss_several_times_in_a_step(tmp_path: Path) -> None:
    class Quasi(Foreign):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), 0.01, max_iter=3)

    torch.manual_seed(0)
    model, twin = Quasi(), Quasi(own_floor={})
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"), precision="64-true")
    fit(tmp_path, twin, FreeBits(THRESHOLD), precision="64-true")
    assert relative_error(model.gradients, twin.gradients) < 1e-9


class Checkpointed(Foreign):
    """Runs its encoder again in the backward pass, alone or with more that hides part of its output."""

    reentrant = False
    more = False

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        if self.more:
            return checkpoint(super().encode, x, use_reentrant=self.reentrant)
        mean, second = checkpoint(self.encoder, x, use_reentrant=self.reentrant)
        return mean, (second / 2).exp()


@pytest.mark.parametrize(("reentrant", "more"), [(False, False), (False, True), (True, False)])
def test_activation_checkpointing_is_exact(tmp_path: Path, reentrant: bool, more: bool) -> None:
    torch.manual_seed(0)
    model, twin = Checkpointed(), Foreign(own_floor={})
    model.reentrant, model.more = reentrant, more
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"))
    fit(tmp_path, twin, FreeBits(THRESHOLD))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


def test_a_threshold_of_zero_changes_no_bit(tmp_path: Path) -> None:
    model = Foreign()
    for parameter in model.encoder.parameters():  # rates that round to 0, and are at a floor of 0
        parameter.data[:LATENTS] *= 1e-4
        parameter.data[LATENTS:] = 0.0
    bare = copy.deepcopy(model)
    fit(tmp_path, bare)
    fit(tmp_path, model, EnforcedFreeBits(0.0, "encoder", "weight"))
    assert relative_error(model.gradients, bare.gradients) == 0


def test_calls_without_a_gradient_and_validation_have_no_part(tmp_path: Path) -> None:
    class Showing(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.encoder(batch)
            loss = super().training_step(batch, batch_idx)
            self.encoder(batch)
            return loss

    class Twice(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.encoder(batch)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    model, twin = Twice(), Foreign(own_floor={})
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"), validate=True, val_check_interval=2)
    fit(tmp_path, twin, FreeBits(THRESHOLD), validate=True, val_check_interval=2)
    assert relative_error(model.gradients, twin.gradients) < 1e-5
    with pytest.raises(MisconfigurationException, match="called once in a step with a gradient, got 2"):
        fit(tmp_path, Showing(), EnforcedFreeBits(THRESHOLD, "encoder", "weight"))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_is_skipped(tmp_path: Path) -> None:
    class Skipping(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    torch.manual_seed(0)
    model, twin = Skipping(), Skipping(own_floor={})
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"))
    fit(tmp_path, twin, FreeBits(THRESHOLD))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


def test_a_step_without_the_posterior_has_no_floor(tmp_path: Path) -> None:
    class Alternates(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx % 2 == 0:
                return super().training_step(batch, batch_idx)
            return self.decoder(torch.ones(1, LATENTS)).square().mean()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, twin = Alternates(), Alternates(own_floor={})
    twin.load_state_dict(model.state_dict())
    options = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"), **options)
    fit(tmp_path, twin, FreeBits(THRESHOLD))
    assert relative_error(model.gradients, twin.gradients) < 1e-5


def test_a_floor_under_each_observation_is_not_averaged_over_processes(tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in {"several_processes": lambda _: True, "mean_over_processes": None}.items():
        monkeypatch.setattr(f"lightning_vae.callbacks.enforced_free_bits.{name}", value)
    fit(tmp_path, Foreign(), EnforcedFreeBits(THRESHOLD, "encoder", "weight", average="sample"))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        fit(tmp_path, Foreign(), EnforcedFreeBits(THRESHOLD, "encoder", "weight"))


def test_a_resumed_run_goes_on_under_the_same_floor(tmp_path: Path) -> None:
    """The second half of a run, resumed from the end of the first, has the gradients of the whole run."""

    class Seeded(Foreign):
        def on_train_epoch_start(self) -> None:
            torch.manual_seed(self.current_epoch)

    torch.manual_seed(0)
    model = Seeded()
    half = copy.deepcopy(model)

    def floor() -> EnforcedFreeBits:
        return EnforcedFreeBits(Linear(start=0.1, stop=0.6, steps=5), "encoder", "weight")

    fit(tmp_path, model, floor())
    fit(tmp_path, half, floor(), max_epochs=1).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Seeded()
    trainer = quiet_trainer(tmp_path, callbacks=[floor()], max_epochs=2)
    trainer.fit(resumed, loader(20, batch_size=4), ckpt_path=tmp_path / "half.ckpt")
    assert relative_error(resumed.gradients, model.gradients[5:]) == 0


def test_the_rates_of_a_posterior_that_is_all_but_a_point() -> None:
    """As a loss that is written in log-variances has them; torch's own formula gives an infinite KL there."""
    log_variance = torch.tensor([-120.0, -1.0, 0.0, 1.0], requires_grad=True)
    rates = kl_per_dimension(Normal(torch.full((4,), 2.0), (log_variance / 2).exp()), Normal(0.0, 1.0))
    expected = 0.5 * (log_variance.exp() + 4 - 1 - log_variance)
    torch.testing.assert_close(rates, expected)
    gradients = [torch.autograd.grad(each.sum(), log_variance)[0] for each in (rates, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("per", "average"), [("dimension", "batch"), ("whole", "sample"), (2, "sample")])
def test_rate_plus_shortfall_is_the_floored_rate_also_at_the_floor(per: Any, average: Any) -> None:
    kl = torch.tensor([[0.1, 0.5, 0.0, 0.25], [0.9, 0.5, 0.0, 0.75], [0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    for threshold in (0.5, 1.0, 1.5, 2.0):
        ours = kl.sum(1).mean() + shortfall(kl, threshold, per, average)
        theirs = free_bits(kl, threshold, per, average)
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(each, kl)[0] for each in (ours, theirs)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("per", ["dimension", "whole"])
def test_the_shares_of_two_processes_have_the_shortfall_of_the_whole_batch(per: Any) -> None:
    torch.manual_seed(0)
    kl = torch.rand(6, 4).mul(0.8).requires_grad_()
    threshold = 0.4 if per == "dimension" else 2.0
    whole = shortfall(kl, threshold, per, "batch")
    shares = [shortfall(share, threshold, per, "batch", kl.detach().mean(0)) for share in kl.split(3)]
    for share in shares:
        torch.testing.assert_close(share, whole)
    of_shares, of_whole = (torch.autograd.grad(each, kl)[0] for each in (sum(shares) / 2, whole))
    torch.testing.assert_close(of_shares, of_whole)
    assert whole > 0


@pytest.mark.parametrize("form", list(PLACES))
def test_the_rates_of_a_posterior_in_half_precision_are_computed_in_full(tmp_path: Path, form: str) -> None:
    class Watching(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            assert floor._rates is not None
            assert floor._rates.dtype == torch.float32

    floor = EnforcedFreeBits(THRESHOLD, weight="weight", **PLACES[form])
    fit(tmp_path, Foreign(form), floor, Watching(), precision="bf16-mixed", max_steps=1)


# ---- what it logs, and leaves behind


@pytest.mark.parametrize(("per", "average"), [("dimension", "batch"), (2, "sample")])
def test_it_logs_what_free_bits_logs(tmp_path: Path, per: Any, average: Any) -> None:
    curves = []
    torch.manual_seed(0)
    model, twin = Foreign(), Foreign(own_floor={"per": per, "average": average})
    twin.load_state_dict(model.state_dict())
    twin.free_bits_per, twin.free_bits_average = per, average
    schedule = Linear(start=0.2, stop=0.8, steps=6)
    for each, floor in (
        (model, EnforcedFreeBits(schedule, "encoder", "weight", per=per, average=average)),
        (twin, FreeBits(schedule, posterior="encoder")),
    ):
        logger = CSVLogger(tmp_path)
        fit(tmp_path, each, floor, logger=logger, log_every_n_steps=1)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            curves.append([{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)])
    assert curves[0] == curves[1]
    assert {"knobs/free_bits", "latent/at_floor"} < set(curves[0][0])
    assert len({row["latent/at_floor"] for row in curves[0]}) > 1


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    floor = EnforcedFreeBits(Linear(start=0.1, stop=0.6, steps=5), "encoder", "weight")
    model = fit(tmp_path, Foreign(), floor)
    assert not model.encoder._forward_hooks
    assert floor._reader.posteriors[""]._outputs is None
    assert floor._rates is None
    assert pickle.loads(pickle.dumps(floor)).state_dict() == floor.state_dict()
    assert floor.state_key == "EnforcedFreeBits{'name': 'free_bits'}"
    # The same callback and Trainer again.
    trainer = quiet_trainer(tmp_path, callbacks=[floor], max_epochs=1)
    trainer.fit(model, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader())
    assert not model.encoder._forward_hooks


@pytest.mark.parametrize("clears", [True, False])
def test_the_hooks_are_removed_after_an_exception(tmp_path: Path, clears: bool) -> None:
    class Failing(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                assert self.encoder._forward_hooks
                if clears:
                    self.trainer.callbacks.clear()  # type: ignore[attr-defined]
                raise RuntimeError("diverged")
            return loss

    model = Failing()
    with pytest.raises(RuntimeError, match="diverged"):
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"))
    assert not model.encoder._forward_hooks


def test_no_graph_outlives_its_step(tmp_path: Path) -> None:
    class Watching(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            assert floor._rates is not None
            assert not floor._rates.requires_grad

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert floor._reader.posteriors[""]._outputs is None
            assert floor._rates is None

        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            assert floor._reader.posteriors[""]._outputs is None

    floor = EnforcedFreeBits(THRESHOLD, "encoder", "weight")
    fit(tmp_path, Foreign(), floor, Watching(), validate=True)


# ---- what it refuses


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    model = Foreign()
    model.automatic_optimization = False
    refused(tmp_path, model, "Foreign optimizes manually")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_lower_precision_is_refused(tmp_path: Path, precision: Any) -> None:
    message = rf"`precision` must be '32-true', '64-true' or 'bf16-mixed', got '{precision}'"
    refused(tmp_path, Foreign(), message, precision=precision)


def test_a_sharded_strategy_is_refused(tmp_path: Path) -> None:
    class Sharded(type(quiet_trainer(tmp_path).strategy)):  # type: ignore[misc]
        pass

    strategy = Sharded(device=torch.device("cpu"))
    options = {"strategy": strategy, "accelerator": "auto", "devices": "auto"}
    refused(tmp_path, Foreign(), "`strategy` must be a single device or DDP, got Sharded", **options)


@pytest.mark.parametrize("way", ["model", "part", "in place"])
def test_compiled_code_is_refused(tmp_path: Path, way: str) -> None:
    model: Any = Foreign()
    if way == "model":
        model = torch.compile(model, backend="eager")
    elif way == "part":
        model.encoder = torch.compile(model.encoder, backend="eager")
    else:
        model.encoder.compile(backend="eager")
    refused(tmp_path, model, "Code compiled by `torch.compile`")


def test_a_second_call_is_refused(tmp_path: Path) -> None:
    class Views(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + super().training_step(-batch, batch_idx)

    refused(tmp_path, Views(), "`posterior='encoder'` must be called once in a step with a gradient, got 2")


def test_checkpointing_that_hides_the_posterior_is_refused(tmp_path: Path) -> None:
    model = Checkpointed()
    model.reentrant = model.more = True
    refused(tmp_path, model, "`posterior='encoder'` must have a gradient for its mean and for its second parameter")


def test_a_posterior_that_is_detached_is_refused(tmp_path: Path) -> None:
    model = Foreign()
    model.encoder.requires_grad_(False)
    refused(tmp_path, model, "`posterior='encoder'` must be called once in a step with a gradient, got 0")


def test_a_posterior_that_is_no_normal_is_refused(tmp_path: Path) -> None:
    class Heavy(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head()

        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            posterior = self.head(*super().encode(x))
            return posterior.loc, posterior.scale

    class Head(nn.Module):
        def forward(self, mean: Tensor, scale: Tensor) -> Laplace:
            return Laplace(mean, scale)

    refused(tmp_path, Heavy(), "The posterior must be a diagonal Normal, got Laplace", floor={"posterior": "head"})


def test_categories_are_refused_and_sent_to_their_own_floor(tmp_path: Path) -> None:
    class Classes(nn.Module):
        def forward(self, logits: Tensor) -> OneHotCategorical:
            return OneHotCategorical(logits=logits.unflatten(1, (4, 2)))

    class Coded(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.codes = Classes()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) - self.codes(self.encoder.map(batch)).entropy().mean()  # type: ignore[no-any-return]

    message = (
        "The posterior must be a diagonal Normal, got OneHotCategorical. `world_model_kl` floors the KL of categor"
    )
    refused(tmp_path, Coded(), message, floor={"posterior": "codes"})


def test_a_prior_that_is_no_normal_is_refused(tmp_path: Path) -> None:
    model = Foreign()
    model.prior = Laplace(0.0, 1.0)  # type: ignore[assignment]
    refused(tmp_path, model, "The prior must be a diagonal Normal, .* got Laplace")


# ---- a prior that is elsewhere, and learns


class PriorNet(nn.Module):
    """Outputs mean and log-variance of p(z|c), at widths that leave some rates below the floor."""

    def __init__(self, dropout: float = 0.0, is_hidden: bool = False) -> None:
        super().__init__()
        self.map, self.dropout, self.is_hidden = nn.Linear(2, 2 * LATENTS), nn.Dropout(dropout), is_hidden
        with torch.no_grad():
            self.map.weight.mul_(0.3)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_hidden:
            with torch.no_grad():
                mean, log_variance = self.map(condition).chunk(2, dim=1)
        else:
            mean, log_variance = self.dropout(self.map(condition)).chunk(2, dim=1)
        return mean, log_variance


class Conditional(Foreign):
    """Its prior p(z|c) is a network's output, for the negative of each observation as its condition."""

    def __init__(self, own_floor: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(own_floor=own_floor)
        self.prior_net = PriorNet(**options)
        self.shows = not options
        self.loc, self.log_variance = nn.Identity(), nn.Identity()

    def prior_of(self, batch: Tensor) -> Normal:
        mean, log_variance = self.prior_net(-batch)
        return Normal(self.loc(mean), (self.log_variance(log_variance) / 2).exp())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.shows:
            with torch.no_grad():
                self.prior_of(2 * batch)
        mean, scale = self.encode(batch)
        self.p = self.prior_of(batch)
        kl = kl_divergence(Normal(mean, scale), self.p)
        rate = kl.sum(1).mean() if self.own_floor is None else free_bits(kl, self.free_bits, **self.own_floor)
        reconstruction = (self.decoder(mean + scale * torch.randn_like(scale)) - batch).square().sum(1).mean()
        return reconstruction + self.weight * rate  # type: ignore[no-any-return]


def assert_equal_gradients(model: Foreign, twin: Foreign) -> None:
    assert len(model.gradients) == len(twin.gradients)
    for ours, theirs in zip(model.gradients, twin.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


PRIORS: dict[str, Any] = {
    "a path": "prior_net",
    "a pair of paths": ("loc", "log_variance"),
    "what the step keeps": lambda module, batch: module.p,
    "computed once more": lambda module, batch: module.prior_of(batch),
}


@pytest.mark.parametrize("run", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "accumulated"])
@pytest.mark.parametrize("variant", [{}, {"per": "whole", "average": "sample"}], ids=["dimension", "whole"])
@pytest.mark.parametrize("prior", PRIORS)
def test_a_learned_conditional_prior_has_the_gradients_of_a_floor_in_the_loss(
    tmp_path: Path, caplog: Any, prior: str, variant: dict[str, Any], run: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, threshold = Conditional(), 3.0 if variant else 0.8
    twin = Conditional(own_floor=variant)
    twin.load_state_dict(model.state_dict())
    bare = copy.deepcopy(model)
    floor = EnforcedFreeBits(threshold, "encoder", "weight", prior=PRIORS[prior], **variant)
    with caplog.at_level("INFO"):
        fit(tmp_path, model, floor, precision="64-true", **run)
    assert "on trust" not in caplog.text
    assert "is assumed" not in caplog.text
    fit(tmp_path, twin, FreeBits(threshold), precision="64-true", **run)
    fit(tmp_path, bare, precision="64-true", **run)
    assert_equal_gradients(model, twin)
    place = next(place for place, (name, _) in enumerate(model.named_parameters()) if name == "prior_net.map.weight")
    assert (bare.gradients[0][place] - twin.gradients[0][place]).norm() > 0.01, "the floor has no effect on the prior"
    assert not any(module._forward_hooks for module in model.modules())


def test_a_fixed_prior_and_one_that_is_frozen(tmp_path: Path) -> None:
    class Wide(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            mean, scale = self.encode(batch)
            kl = kl_divergence(Normal(mean, scale), Normal(torch.ones(LATENTS).to(mean), 1.5))
            rate = kl.sum(1).mean() if self.own_floor is None else free_bits(kl, self.free_bits)
            return (self.decoder(mean + scale) - batch).square().sum(1).mean() + self.weight * rate  # type: ignore[no-any-return]

    torch.manual_seed(0)
    wide, frozen = Wide(), Conditional()
    frozen.prior_net.requires_grad_(False)
    frozen.shows = False
    fixed = Normal(torch.ones(LATENTS).double(), 1.5)
    for model, prior in ((wide, fixed), (frozen, "prior_net")):
        twin = copy.deepcopy(model)
        twin.own_floor, twin.free_bits = {}, 0.0
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight", prior=prior), precision="64-true")
        fit(tmp_path, twin, FreeBits(THRESHOLD), precision="64-true")
        assert_equal_gradients(model, twin)


def test_a_prior_that_is_left_out_is_not_silent(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, Conditional(), EnforcedFreeBits(THRESHOLD, "encoder", "weight"))
    assert "can't be tried (a narrow posterior agrees, which shows nothing of the prior. The loss of " in caplog.text
    assert "for a weight of 1, and the declared KL term by" in caplog.text
    assert "`posterior` or `prior`" in caplog.text


@pytest.mark.parametrize(
    ("options", "prior", "message"),
    [
        ({"dropout": 0.5}, PRIORS["computed once more"], "The callable `prior` draws random numbers, as dropout does"),
        ({"is_hidden": True}, "prior_net", "`prior='prior_net'` has parameters to train, and its output has no grad"),
        ({}, lambda module, batch: Laplace(0.0, 1.0), "The prior must be a diagonal Normal, .* got Laplace"),
    ],
)
def test_a_prior_that_can_not_be_exact_is_refused(tmp_path: Path, options: Any, prior: Any, message: str) -> None:
    refused(tmp_path, Conditional(**options), message, floor={"prior": prior})


def test_a_dropout_in_the_prior_is_exact_by_its_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, twin = Conditional(dropout=0.5), Conditional(own_floor={}, dropout=0.5)
    twin.load_state_dict(model.state_dict())
    fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight", prior="prior_net"), precision="64-true")
    fit(tmp_path, twin, FreeBits(THRESHOLD), precision="64-true")
    assert_equal_gradients(model, twin)


def test_a_prior_that_has_to_be_called_is_not_guessed(tmp_path: Path) -> None:
    model = Foreign()
    model.prior = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"`Foreign.prior` is a submodule.*`prior='prior'` for its output"):
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, "encoder", "weight"))


def test_the_assumed_prior_is_said_once(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, Foreign(), EnforcedFreeBits(THRESHOLD, "encoder", "weight"))
    said = [record.message for record in caplog.records if "is assumed" in record.message]
    assert len(said) == 1
    assert said[0].startswith("EnforcedFreeBits(free_bits): Foreign has no `prior`, so the prior N(0, I) is assumed")


def test_a_module_with_a_floor_of_its_own_is_sent_to_free_bits(tmp_path: Path) -> None:
    floor = EnforcedFreeBits(0.5, "encoder", "beta")
    with pytest.raises(MisconfigurationException, match=r"RecordingVAE has its own `free_bits`.*Use `FreeBits`"):
        fit(tmp_path, RecordingVAE(), floor)


def test_two_floors_under_one_posterior_are_refused(tmp_path: Path) -> None:
    floors = [EnforcedFreeBits(0.5, "encoder", "weight", name=name) for name in ("one", "other")]
    with pytest.raises(MisconfigurationException, match=r"Two callbacks floor the rate of `posterior='encoder'`"):
        fit(tmp_path, Foreign(), *floors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "wieght"}, r"the weight's path leads nowhere.*has no 'wieght'. Did you mean 'weight'"),
        ({"weight": "decoder"}, "`weight='decoder'` must lead to a number or a tensor of one element, got Sequential"),
        ({"weight": "encode"}, "`weight='encode'` is a method that can't be called without arguments"),
        ({"posterior": "encodr"}, "has no submodule 'encodr'. Did you mean 'encoder'"),
        ({"prior": "decodr"}, "`prior`: Foreign has no submodule 'decodr'. Did you mean 'decoder'"),
        ({"posterior": "decoder"}, "must be a torch.distributions.Distribution or a pair of tensors"),
        ({"per": 3}, "`per` as a number of dimensions must divide the number of latent dimensions, got 3 for 4"),
        ({"threshold": Linear(steps=3)}, "Give it a `stop`"),
    ],
)
def test_what_shows_when_fitting_starts(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    class Starts(Callback):
        def on_train_start(self, *_: Any) -> None:
            assert "Did you mean" not in message, "a path that leads nowhere shows earlier"

    model = Foreign()
    floor = EnforcedFreeBits(**{"threshold": 0.5, "posterior": "encoder", "weight": 0.7, **options})
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model, floor, Starts())
    assert not model.encoder._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "`threshold` must be at least 0 nats and finite, or a schedule, got -0.1"),
        ({"posterior": lambda pl_module, batch: None}, "`posterior` must be a submodule's path or a pair of them"),
        ({"posterior": None}, "`posterior` must be a submodule's path or a pair of them"),
        ({"posterior": {"a": "encoder"}}, "`posterior` must be a submodule's path or a pair of them"),
        (
            {"prior": {"a": "prior"}},
            "`prior` must be that of the one `posterior='encoder'`, .*one EnforcedFreeBits each",
        ),
        ({"prior": 3}, "`prior` must be None, a submodule's path, a pair of paths or a callable"),
        ({"weight": None}, "`weight` must be a path, or the number in the loss, got None"),
        ({"reduction": 0.0}, "`reduction` must be 'sum', 'mean', 'batch_sum' or a number of times 'sum', got 0.0"),
        ({"reduction": "batchmean"}, "`reduction` must be 'sum', 'mean', 'batch_sum' or a number .*, got 'batchmean'"),
        ({"per": 0}, "`per` must be 'dimension', 'whole' or a number of dimensions, got 0"),
        ({"average": "mean"}, "`average` must be 'batch' or 'sample', got 'mean'"),
        ({"second": "std"}, "`second` must be one of"),
        ({"chunk": 0}, "`chunk` must be the axis"),
    ],
)
def test_an_option_out_of_its_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnforcedFreeBits(**{"threshold": 0.5, "posterior": "encoder", "weight": 1.0, **options})
