from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lightning_vae.callbacks import KLAnnealing, Linear
from lightning_vae.callbacks.probing.effective_beta import recognise_distortion, recognise_rate
from tests.doubles import RecordingVAE, loader, quiet_trainer


class Heads(nn.Module):
    """An encoder that says its posterior in one of the usual ways."""

    def __init__(self, elements: int, latents: int, form: str) -> None:
        super().__init__()
        self.form, self.latents = form, latents
        self.both = nn.Linear(elements, 2 * latents)

    def forward(self, x: Tensor) -> Any:
        both = self.both(x.flatten(1))
        mean, second = both.chunk(2, -1)
        if self.form == "chunk":
            return both
        if self.form in ("scale", "variance"):
            return mean, F.softplus(second)
        if self.form == "normal":
            return Normal(mean, second.exp()), x
        if self.form == "independent":
            return Independent(Normal(mean, second.exp()), 1)
        if self.form == "dict":
            return {"mu": mean, "log_var": second}
        return mean, second

    def distribution(self, output: Any) -> Normal:
        if self.form == "chunk":
            output = output.chunk(2, -1)
        if self.form == "normal":
            return output[0]  # type: ignore[no-any-return]
        if self.form == "independent":
            return output.base_dist  # type: ignore[no-any-return]
        mean, second = output.values() if self.form == "dict" else output
        scale = {"scale": second, "variance": second.clamp(min=0).sqrt(), "log_scale": second.exp()}
        return Normal(mean, scale.get(self.form, (0.5 * second).exp()))


RECONSTRUCTIONS: dict[str, Any] = {
    "mean": lambda out, x: F.mse_loss(out, x),
    "sum": lambda out, x: F.mse_loss(out, x, reduction="sum") / len(x),
    "half": lambda out, x: 0.5 * (out - x).square().flatten(1).sum(1).mean(),
    "all": lambda out, x: F.mse_loss(out, x, reduction="sum"),
    "bce": lambda out, x: F.binary_cross_entropy_with_logits(out, x, reduction="sum") / len(x),
    "bce_mean": lambda out, x: F.binary_cross_entropy_with_logits(out, x),
    "bce_of_sigmoid": lambda out, x: F.binary_cross_entropy(out.sigmoid(), x, reduction="sum") / len(x),
    "sigmoid_mean": lambda out, x: F.mse_loss(out.sigmoid(), x),
    "l1": lambda out, x: F.l1_loss(out, x),
}
RATES: dict[str, Any] = {
    "sum": lambda kl: kl.sum(1).mean(),
    "mean": lambda kl: kl.mean(),
    "all": lambda kl: kl.sum(),
    "twice": lambda kl: 2 * kl.sum(1).mean(),
    "tenth": lambda kl: 0.1 * kl.sum(1).mean(),
    "share": lambda kl: kl.sum(1).mean() / 20,
    "of the rows and latents": lambda kl: 3 * kl.sum(),
}


class Foreign(pl.LightningModule):
    def __init__(
        self, shape: Any = (6,), latents: int = 4, form: str = "pair", distortion: str = "mean", rate: str = "sum",
        weight: float = 0.5, reads: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        elements = int(torch.Size(shape).numel())
        self.shape, self.distortion, self.rate, self.reads = shape, distortion, rate, reads
        self.encoder, self.decoder = Heads(elements, latents, form), nn.Linear(latents, elements)
        self.kl_weight = weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        posterior = self.encoder.distribution(self.encoder(x))
        out = self.decoder(posterior.rsample()).reshape(x.shape)
        weight = {"": self.kl_weight, "not": 1.0, "squared": self.kl_weight**2}[self.reads]
        rate = RATES[self.rate](kl_divergence(posterior, Normal(0.0, 1.0)))
        return RECONSTRUCTIONS[self.distortion](out, x) + weight * rate  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts of KLAnnealing that are no warnings."""
    said: list[str] = []
    monkeypatch.setattr("lightning_vae.callbacks.kl_annealing.rank_zero_info", said.append)
    return said


def fit(
    path: Path, model: Any, rows: int = 10, attribute: str = "kl_weight", batches: int = 2, others: Any = ()
) -> None:
    pl.seed_everything(0)
    data = DataLoader(TensorDataset(torch.rand(batches * rows, *model.shape)), batch_size=rows)
    annealing = KLAnnealing(Linear(steps=min(2, batches)), attribute)
    quiet_trainer(path, callbacks=[annealing, *others], max_epochs=1).fit(model, data)


def told(say: list[str]) -> str:
    (text,) = say
    return " ".join(text.split())


@pytest.mark.parametrize("form", ["pair", "scale", "variance", "log_scale", "chunk", "normal", "independent", "dict"])
def test_the_kl_is_found_however_the_posterior_is_said(tmp_path: Path, say: list[str], form: str) -> None:
    fit(tmp_path, Foreign(form=form))
    assert "nats per observation, summed over the latents, mean over the batch" in told(say)
    assert "`kl_weight` = 0.5 is an effective beta of 1.5" in told(say), "6 elements: 0.5 * 6 / 2"


@pytest.mark.parametrize(
    ("distortion", "rate", "beta"),
    [
        ("mean", "sum", 0.5 * 6 / 2),
        ("mean", "mean", 0.5 * 6 / 2 / 4),
        ("sum", "sum", 0.5 / 2),
        ("half", "sum", 0.5),
        ("half", "mean", 0.5 / 4),
        ("all", "all", 0.5 / 2),
        ("all", "sum", 0.5 / 2 / 10),
        ("bce", "sum", 0.5),
        ("bce_mean", "sum", 0.5 * 6),
        ("bce_of_sigmoid", "all", 0.5 * 10),
        ("sigmoid_mean", "sum", 0.5 * 6 / 2),
        ("l1", "sum", 0.5 * 6),
    ],
)
def test_effective_beta_of_each_reduction(
    tmp_path: Path, say: list[str], distortion: str, rate: str, beta: float
) -> None:
    fit(tmp_path, Foreign(distortion=distortion, rate=rate))
    assert f"`kl_weight` = 0.5 is an effective beta of {beta:.4g}." in told(say)


@pytest.mark.parametrize(
    ("shape", "latents", "rate", "weight", "beta"),
    [
        ((3, 64, 64), 16, "sum", 0.00025, "1.536"),  # PyTorch-VAE's vae.yaml: 0.00025 * 12288 / 2
        ((3, 32, 32), 256, "mean", 0.1, "0.6"),  # lightning-bolts' default
        ((3, 64, 64), 25, "mean", 0.0316, "7.766"),  # disent's BetaVae with its mean reduction: 15.5 against the sum
    ],
)
def test_what_weights_of_other_projects_come_to(
    tmp_path: Path, say: list[str], shape: Any, latents: int, rate: str, weight: float, beta: str
) -> None:
    fit(tmp_path, Foreign(shape, latents, rate=rate, weight=weight))
    assert f"is an effective beta of {beta}." in told(say)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reads": "not"}, "whatever `kl_weight` is. In this batch the loss doesn't read the number"),
        ({"reads": "squared"}, "grows with the square of `kl_weight`"),
        ({"rate": "twice"}, "Is the weight applied twice, or does the KL lack its factor of 1/2?"),
    ],
)
def test_a_weight_that_is_ignored_or_applied_twice(
    tmp_path: Path, say: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=r"KLAnnealing\(kl_weight\)") as caught:
        fit(tmp_path, Foreign(**options))
    assert message in " ".join(" ".join(str(each.message) for each in caught).split())
    assert not say


def test_a_warm_up_of_its_own_is_named_where_the_weight_is_ignored(tmp_path: Path) -> None:
    model = Foreign(reads="not")
    model.n_epochs_kl_warmup = 400  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"n_epochs_kl_warmup=400"):
        fit(tmp_path, model)


@pytest.mark.parametrize(("rate", "factor"), [("tenth", 0.1), ("share", 0.05), ("of the rows and latents", 30.0)])
@pytest.mark.parametrize("form", ["pair", "normal", "chunk"])
def test_a_slope_that_is_a_multiple_of_the_kl_is_said(
    tmp_path: Path, say: list[str], form: str, rate: str, factor: float
) -> None:
    fit(tmp_path, Foreign(form=form, rate=rate, distortion="half"))
    assert f"its slope is {factor:.3g} times the KL (" in told(say)
    beta = float(told(say).split("an effective beta of ")[1].rstrip("."))
    assert beta == pytest.approx(0.5 * factor, rel=1e-3)


def test_terms_that_are_not_recognised_leave_the_slope(tmp_path: Path, say: list[str]) -> None:
    class Other(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch[0].square().mean() * (1 + 3 * self.kl_weight) + 0 * self.decoder.bias.sum()  # type: ignore[no-any-return]

    fit(tmp_path, Other())
    text = told(say)
    zero, slope = (float(text.split(before)[1].split()[0]) for before in ("first batch is ", " + "))
    assert slope == pytest.approx(3 * zero, rel=1e-4)
    assert "beta of" not in text


def test_our_own_module_knows_its_beta(tmp_path: Path, say: list[str]) -> None:
    quiet_trainer(tmp_path, callbacks=[KLAnnealing(Linear(steps=2))], max_epochs=1).fit(RecordingVAE(), loader())
    assert not say


def test_what_is_not_measured_is_said(tmp_path: Path, say: list[str]) -> None:
    data = DataLoader(TensorDataset(torch.rand(20, 6)), batch_size=10)
    by_setter = KLAnnealing(Linear(stop=1.0, steps=2), setter=lambda to, value: setattr(to, "kl_weight", value))
    quiet_trainer(tmp_path, callbacks=[by_setter], max_epochs=2).fit(Foreign(), data)
    assert len(say) == 1
    assert "the effect on the loss can't be measured (a setter may have side effects)" in say[0]


def test_two_weights_that_are_multiplied_are_told_apart(tmp_path: Path, say: list[str]) -> None:
    class Product(Foreign):
        beta = 0.5

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weight, self.kl_weight = self.kl_weight, self.kl_weight * self.beta
            loss = super().training_step(batch, batch_idx)
            self.kl_weight = weight
            return loss

    callbacks = [KLAnnealing(Linear(steps=2), attribute) for attribute in ("kl_weight", "beta")]
    data = DataLoader(TensorDataset(torch.rand(20, 6)), batch_size=10)
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(Product(distortion="half"), data)
    slopes = [float(" ".join(text.split()).split(" + ")[1].split()[0]) for text in say]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)


def test_only_the_start_of_a_run_is_reported(tmp_path: Path, say: list[str]) -> None:
    model, annealing = Foreign(), KLAnnealing(Linear(steps=2), "kl_weight")
    data = DataLoader(TensorDataset(torch.rand(20, 6)), batch_size=10)
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=2)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert len(say) == 1
    annealing = KLAnnealing(Linear(steps=2), "kl_weight")
    trainer = quiet_trainer(tmp_path, callbacks=[annealing], max_epochs=3)
    trainer.fit(Foreign(), data, ckpt_path=tmp_path / "a.ckpt")
    assert len(say) == 1
    silent = KLAnnealing(Linear(steps=2), "kl_weight", probe=False)
    quiet_trainer(tmp_path, callbacks=[silent], max_epochs=2).fit(Foreign(), data)
    assert len(say) == 1


def test_a_deep_network_is_not_searched_through() -> None:
    outputs = {str(index): torch.randn(5, 3) for index in range(20)}
    assert recognise_rate(outputs, 1.0, rows=5) is None
    assert recognise_distortion(outputs, 1.0, [torch.rand(5, 7)]) is None


def test_a_wrong_number_is_recognised_as_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(200):
        outputs: Any = {name: torch.randn(16, 4, generator=generator) for name in "abcd"}
        slope = 5 * float(torch.rand((), generator=generator))
        found += recognise_rate(outputs, slope, rows=16) is not None
    assert found <= 4


class Tiny(Foreign):
    """A loss beside which the KL drowns in rounding."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 1e6


class LateKL(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight, self.kl_weight = self.kl_weight, self.kl_weight * min(1.0, self.trainer.global_step)
        loss = super().training_step(batch, batch_idx)
        self.kl_weight = weight
        return loss


class Twice(Foreign):
    """Minus twice the ELBO, a common way to write it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 2 * super().training_step(batch, batch_idx)


class Capacity(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.kl_weight - 0.3) ** 4


def test_a_weight_whose_effect_drowns_is_not_called_ignored(tmp_path: Path, say: list[str]) -> None:
    fit(tmp_path, Tiny(weight=1e-3, distortion="half"))
    assert "1e+06" in told(say)
    assert "beta of" not in told(say)


def test_a_weight_that_is_0_at_first_is_said_to_be_so_in_this_batch(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"In this batch the\s+loss") as caught:
        fit(tmp_path, LateKL())
    text = " ".join(" ".join(str(each.message) for each in caught).split())
    assert "or multiplies it by 0" in text


@pytest.mark.parametrize("distortion", ["half", "bce"])
def test_twice_the_whole_elbo_is_no_mistake(tmp_path: Path, say: list[str], distortion: str) -> None:
    fit(tmp_path, Twice(distortion=distortion))
    assert "an effective beta of 0.5" in told(say)
    assert "applied twice" not in told(say)


def test_a_loss_that_is_not_linear_gets_no_formula(tmp_path: Path, say: list[str]) -> None:
    with pytest.warns(UserWarning, match="it is not linear in it") as caught:
        fit(tmp_path, Capacity(weight=2.0))
    assert not any(" + " in str(each.message) for each in caught)
    assert not [line for line in say if "first batch" in line]


class Lazy(Foreign):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lazy = nn.LazyLinear(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.lazy(batch[0]).sum()


class ReadsItsOptimizer(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.optimizers().param_groups[0]["lr"] == 1e-3  # type: ignore[union-attr]
        return super().training_step(batch, batch_idx)


class SkipsTheFirst(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if batch_idx else None


class NeedsAnother(Foreign):
    """Reads what a callback sets, after the first batch was evaluated."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.factor  # type: ignore[no-any-return, operator]


class SetsFactor(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.factor = 1.0


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize(
    ("model", "ordinal"),
    [(Lazy, "second"), (SkipsTheFirst, "second"), (NeedsAnother, "second"), (ReadsItsOptimizer, "first")],
)
def test_where_the_first_batch_is_too_early_the_second_is_measured(
    tmp_path: Path, say: list[str], model: Any, ordinal: str
) -> None:
    fit(tmp_path, model(distortion="half"), others=[SetsFactor()])
    assert told(say).startswith(f"KLAnnealing(kl_weight): the loss of the {ordinal} batch is ")
    assert "an effective beta of 0.5" in told(say)


@pytest.mark.parametrize("batches", [1, 4])
def test_what_neither_batch_allows_is_said_once(tmp_path: Path, say: list[str], batches: int) -> None:
    steps: list[int] = []

    class Lacks(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            steps.append(batch_idx)
            assert isinstance(self.trainer.fit_loop, object)  # barred on a copy
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Lacks(), batches=batches)
    assert steps == [0, 0, 1, 1, 2, 3][: 2 * batches], "a copy's and the module's own, until it is said"
    assert "the effect on the loss can't be measured (it uses `fit_loop` of the Trainer)" in told(say)


class Says(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, _x: Tensor) -> Any:
        return self.value


class LearnedPrior(Foreign):
    """Has a submodule with a Gaussian that is not one of each observation."""

    def __init__(self) -> None:
        super().__init__()
        cycle: list[Any] = []
        cycle.append(cycle)
        self.learned_prior, self.cycle = Says(Normal(torch.zeros(4), torch.ones(4))), Says(cycle)
        self.sparse = Says(torch.eye(10).to_sparse())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for each in (self.learned_prior, self.cycle, self.sparse):
            each(batch[0])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("model", "start"), [(Lazy, "the loss of the second"), (LearnedPrior, "the loss of")])
def test_a_report_never_ends_a_fit(tmp_path: Path, say: list[str], model: Any, start: str) -> None:
    fit(tmp_path, model())
    assert [text.startswith(f"KLAnnealing(kl_weight): {start}") for text in say] == [True]


def test_whatever_goes_wrong_in_a_report_is_no_error(
    tmp_path: Path, say: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_vae.callbacks.probing.effective_beta.recognise_rate", lambda *_: 1 / 0)
    fit(tmp_path, Foreign())
    assert [f"{ZeroDivisionError('division by zero')}" in text for text in say] == [True]


def test_an_element_of_a_list_is_named_with_it(tmp_path: Path) -> None:
    assert KLAnnealing(Linear(steps=2), "kl_weights.0").name == "kl_weights.0"
    assert KLAnnealing(Linear(steps=2), "model.beta").name == "beta"
