import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightning_vae.callbacks import EnforcedFreeBits
from lightning_vae.callbacks.probing.declared_kl import _Noise
from tests.callbacks.foreign_vae import PLACES, THRESHOLD, Foreign, fit, refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"reduction": "mean"},
        {"reduction": 2.0},
        {"second": "scale"},
        {"weight": "unused"},
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_wrong_declaration_is_refused_at_the_first_batch(
    tmp_path: Path, wrong: dict[str, Any], precision: Any
) -> None:
    model = Foreign(reduction=1.5)
    model.unused = 1.0  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    right: dict[str, Any] = {"posterior": "encoder", "weight": "weight", "reduction": 1.5}
    message = r"'encoder'.*scale must be positive" if "second" in wrong else r"rises by .* and the declared KL term by"
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, **{**right, **wrong}), precision=precision)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(  # the heads are linear, so their scales would be negative
    ("form", "second"),
    [*((form, "log_variance") for form in PLACES), *((form, "scale") for form in PLACES if form != "heads")],
)
@pytest.mark.parametrize(("right", "wrong"), [(0.7, 0.7 * 16), (0.7, 0.7 * 1.02), (1e-3, 1e-3 / 4)])
def test_a_wrong_number_as_the_weight_is_refused_and_a_right_one_is_silent(
    tmp_path: Path, caplog: Any, form: str, second: str, right: float, wrong: float
) -> None:
    torch.manual_seed(0)
    model = Foreign(form, second, weight=right)
    kind = {} if form == "normal" else {"second": second}
    with caplog.at_level("INFO"):
        fit(tmp_path, copy.deepcopy(model), EnforcedFreeBits(THRESHOLD, weight=right, **PLACES[form], **kind))
    assert "on trust" not in caplog.text
    with pytest.raises(MisconfigurationException, match=r"rises by .* as each log-variance falls"):
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, weight=wrong, **PLACES[form], **kind))


def test_a_factor_that_the_first_kl_is_too_small_to_show_is_refused(tmp_path: Path) -> None:
    model = Foreign(weight=0.0, reduction=16.0)
    with torch.no_grad():  # a posterior that is the prior but for rounding
        model.encoder.map.weight.mul_(1e-5)
        model.encoder.map.bias.zero_()
    floor = EnforcedFreeBits(THRESHOLD, posterior="encoder", weight="weight", reduction="sum")
    with pytest.raises(
        MisconfigurationException, match=r"rises by 96.* as each log-variance falls from 0 to -4, .* by 6\.03"
    ):
        fit(tmp_path, model, floor)


def test_a_weight_is_read_from_a_method_and_may_feed_a_second_kl(tmp_path: Path, caplog: Any) -> None:
    class TwoKls(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 3)

        def kl_weight(self) -> float:
            return float(self.weight)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.weight * self.other(batch).square().sum(1).mean() / 2  # type: ignore[no-any-return]

    for weight in ("weight", "kl_weight"):
        with caplog.at_level("INFO"):
            fit(tmp_path, TwoKls(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=weight))
        assert "on trust" not in caplog.text


def test_a_weight_that_the_module_sets_in_its_step_is_taken_on_trust(tmp_path: Path, caplog: Any) -> None:
    class Schedules(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.weight = 0.1 * self.global_step  # a trial on a copy can't give it another value
            return super().training_step(batch, batch_idx)

    with caplog.at_level("INFO"):
        fit(tmp_path, Schedules(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight="weight"))
    reasons = (
        "a KL term of 0 can't be told from rounding and noise; the module sets the weight itself in its training step"
    )
    assert f"`weight` and `reduction` on trust: they can't be tried ({reasons})" in caplog.text


def test_a_literal_of_zero_as_the_weight_is_taken_on_trust(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, Foreign(weight=0.0), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=0.0))
    assert "can't be tried (a KL term of 0 can't be told from rounding and noise)" in caplog.text


def test_a_loss_that_changes_between_evaluations_is_taken_on_trust(tmp_path: Path, caplog: Any) -> None:
    class Drifts(Foreign):
        calls = itertools.count()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + next(self.calls)

    with caplog.at_level("INFO"):
        fit(tmp_path, Drifts(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight="weight"))
    assert "can't be told from rounding and noise" in caplog.text


class Clamps(Foreign):
    """Clamps its log-variance, or otherwise changes it."""

    change = staticmethod(lambda second: second.clamp(min=-8))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, second = self.encoder(x)
        return mean, (self.change(second) / 2).exp()


@pytest.mark.parametrize("weight", [0.7, "weight"])
def test_a_declaration_is_tried_within_the_clamp_of_a_log_variance(tmp_path: Path, caplog: Any, weight: Any) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, Clamps(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=weight))
    assert "on trust" not in caplog.text
    wrong = EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=weight, reduction=1.01)
    with pytest.raises(MisconfigurationException, match=r"rises by .* as each log-variance falls from 0 to -4"):
        fit(tmp_path, Clamps(), wrong)


def test_the_own_prior_of_a_module_and_calls_that_only_show_are_known_to_the_trial(tmp_path: Path, caplog: Any) -> None:
    class Shows(Clamps):
        prior = Normal(0.5, 1.5)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self.encoder(batch)
            mean, scale = self.encode(batch)
            kl = kl_divergence(Normal(mean, scale), self.prior).sum(1).mean()
            return (self.decoder(mean + scale * torch.randn_like(scale)) - batch).square().sum(1).mean() + 0.7 * kl  # type: ignore[no-any-return]

    with caplog.at_level("INFO"):
        fit(tmp_path, Shows(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=0.7))
    assert "on trust" not in caplog.text


@pytest.mark.parametrize("change", [lambda second: second.clamp(min=-3), lambda second: 5 * (second / 5).tanh()])
def test_a_log_variance_that_the_module_changes_is_taken_on_trust(tmp_path: Path, caplog: Any, change: Any) -> None:
    model = Clamps()
    model.change = change  # type: ignore[method-assign]
    with caplog.at_level("INFO"):
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=0.7))
    assert "`weight` and `reduction` on trust: they can't be tried (the loss does not follow the KL" in caplog.text
    assert "falls from 0 to -4, which the module may clamp or change; the loss" in caplog.text


class Kept:
    """A posterior that keeps its variance beside the logarithm, so that a trial can't change both."""

    def __init__(self, mean: Tensor, log_variance: Tensor) -> None:
        self.mean, self.log_variance, self.variance = mean, log_variance, log_variance.exp()


def test_a_posterior_that_keeps_its_variance_is_not_taken_for_an_estimate(tmp_path: Path, caplog: Any) -> None:
    class Keeps(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.posterior_of = KeptHead()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            q = self.posterior_of(*self.encoder(batch))
            z = q.mean + q.variance.sqrt() * torch.randn_like(q.mean)
            kl = 0.5 * (q.mean**2 + q.variance - 1 - q.log_variance).sum(1).mean()
            return (self.decoder(z) - batch).square().sum(1).mean() + self.weight * kl  # type: ignore[no-any-return]

    class KeptHead(nn.Module):
        def forward(self, mean: Tensor, log_variance: Tensor) -> Kept:
            return Kept(mean, log_variance)

    place = ("posterior_of:mean", "posterior_of:log_variance")
    with caplog.at_level("INFO"):
        fit(tmp_path, Keeps(), EnforcedFreeBits(THRESHOLD, posterior=place, weight=0.7))
    assert "on trust" not in caplog.text
    with pytest.raises(MisconfigurationException, match=r"rises by .* as each log-variance falls from -20 to -28"):
        fit(tmp_path, Keeps(), EnforcedFreeBits(THRESHOLD, posterior=place, weight=0.71))


@pytest.mark.parametrize("second", ["log_variance", "scale"])
def test_a_kl_that_is_estimated_from_a_sample_is_refused(tmp_path: Path, second: str) -> None:
    class Samples(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            posterior = Normal(*self.encode(batch))
            z = posterior.rsample()
            kl = posterior.log_prob(z) - Normal(0.0, 1.0).log_prob(z)
            return (self.decoder(z) - batch).square().sum(1).mean() + self.weight * kl.sum(1).mean()  # type: ignore[no-any-return]

    refused(
        tmp_path, Samples("normal", second), "The KL in the loss is an estimate from a sample", floor=PLACES["normal"]
    )


SAMPLES = {
    "randn": lambda mean, scale: mean + scale * torch.randn(scale.shape),
    "normal_": lambda mean, scale: mean + scale * torch.empty_like(scale).normal_(),
    "normal": lambda mean, scale: mean + scale * torch.normal(0.0, 1.0, size=scale.shape),
    "normal of tensors": lambda mean, scale: mean + scale * torch.normal(mean=torch.zeros_like(scale), std=1.0),
    "rsample": lambda mean, scale: Normal(mean, scale).rsample(),
    # Noise that can't be replaced does not matter if it is scaled to nothing.
    "numpy": lambda mean, scale: mean + scale * torch.as_tensor(np.random.randn(*scale.shape)).to(scale),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_declaration_is_tried_however_the_posterior_is_sampled(tmp_path: Path, caplog: Any, sample: str) -> None:
    class Draws(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            mean, scale = self.encode(batch)
            kl = (0.5 * (scale**2 + mean**2 - 1) - scale.log()).sum(1).mean()
            reconstruction = self.decoder(SAMPLES[sample](mean, scale))  # type: ignore[no-untyped-call]
            return (reconstruction - batch).square().sum(1).mean() + self.weight * kl  # type: ignore[no-any-return]

    torch.manual_seed(0)
    np.random.seed(0)
    with caplog.at_level("INFO"):
        fit(tmp_path, Draws(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=0.7))
    assert "on trust" not in caplog.text
    range_of = "from -20 to -28" if sample == "numpy" else "from 0 to -4"
    with pytest.raises(MisconfigurationException, match=rf"rises by .* as each log-variance falls {range_of}"):
        fit(tmp_path, Draws(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=0.71))


def test_gaussian_noise_is_replaced_and_nothing_else() -> None:
    mean = torch.tensor([1.0, 2.0], requires_grad=True)
    with _Noise(2.0):
        assert torch.randn(2, requires_grad=True).tolist() == torch.randn_like(mean).tolist() == [2.0, 2.0]
        assert torch.normal(mean, torch.tensor([1.0, 3.0])).tolist() == [3.0, 8.0]
        assert torch.normal(3.0, 0.5, size=(2,)).tolist() == torch.empty(2).normal_(3.0, std=0.5).tolist() == [4.0, 4.0]
        assert torch.rand(1) < 1
    assert torch.randn(100).std() > 0.5


def test_rounding_of_a_large_loss_is_no_contradiction(tmp_path: Path, caplog: Any) -> None:
    class Large(Foreign):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 3e5

    for seed in range(5):
        torch.manual_seed(seed)
        with caplog.at_level("INFO"):
            fit(tmp_path, Large(), EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=0.7), max_steps=1)
    assert "on trust" not in caplog.text


def test_a_small_kl_is_tried_in_full_precision(tmp_path: Path) -> None:
    floor = EnforcedFreeBits(THRESHOLD, posterior="encoder", weight=1.02e-2)
    with pytest.raises(MisconfigurationException, match="rises by"):
        fit(tmp_path, Foreign(weight=1e-2), floor, precision="bf16-mixed")


def test_a_weight_that_the_loss_ignores_is_refused_also_if_the_log_variance_can_not_be_followed(tmp_path: Path) -> None:
    model: Any = Clamps()
    model.change, model.unused = lambda second: 5 * (second / 5).tanh(), 1.0
    with pytest.raises(MisconfigurationException, match=r"rises by 0 for a weight of 1, and the declared KL term by"):
        fit(tmp_path, model, EnforcedFreeBits(THRESHOLD, posterior="encoder", weight="unused"))
