"""The page "Drop into your project": each row of its tables and each of its examples does what it says."""

import re
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Laplace, Normal, kl_divergence
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_vae.callbacks import CollapseDetector, KLAnnealing, Linear
from tests.doubles import loader, quiet_trainer

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "drop_in.md").read_text()
PROJECTS = ("scvi-tools", "disent", "lightning-uq-box")
PROJECTS += ("A probabilistic U-Net", "SysVI", "hvae-backbone", "diffusers")


def section(title: str) -> str:
    return re.search(rf"^##+ {title}\n(.*?)(?=^##+ |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]


def table(title: str) -> dict[str, list[str]]:
    """The rows of a section's table by their first cell; of the others, the first code in backticks."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first: [re.search("`(.*?)`", cell)[1] for cell in cells if "`" in cell] for first, *cells in rows}  # type: ignore[index]


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@dataclass
class Config:
    beta: float = 1.0


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kl_scale = self.__weight = 1.0

    def update(self, value: float) -> None:
        self.__weight = value

    def weight(self) -> float:
        return self.__weight


class Weighted(LightningModule):
    """Keeps a weight of 1 in each of the ways of the page; its loss reads the one that it is told to."""

    def __init__(self, expression: str) -> None:
        super().__init__()
        self.save_hyperparameters({"beta": 1.0})
        self.register_buffer("beta_buffer", torch.tensor(1.0))
        self.layer, self.loss_fn = nn.Linear(2, 1), Loss()
        self.beta, self.params, self.cfg = 1.0, {"kld_weight": 1.0}, Config()
        self._base, self._settable, self._lowest, self._highest = 1.0, 1.0, 0.0, 1.0
        self.loss_weights = torch.ones(2)
        self.expression = expression
        self.used: dict[bool, list[float]] = {True: [], False: []}

    @property
    def settable(self) -> float:
        return self._settable

    @settable.setter
    def settable(self, value: float) -> None:
        self._settable = value

    @property
    def computed(self) -> float:
        return self._base

    @property
    def lowest(self) -> float:
        return self._lowest

    @lowest.setter
    def lowest(self, value: float) -> None:
        if value > self._highest:
            raise ValueError("lowest > highest")
        self._lowest = value

    @property
    def highest(self) -> float:
        return self._highest

    @highest.setter
    def highest(self, value: float) -> None:
        if value < self._lowest:
            raise ValueError("highest < lowest")
        self._highest = value

    @property
    def between(self) -> float:
        return (self.lowest + self.highest) / 2

    def weight_at(self, step: int) -> float:
        return 1.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        weight = float(eval(self.expression, {"self": self, "step": batch_idx}))
        self.used[self.training].append(weight)
        loss: Tensor = 1 + self.layer(batch).square().mean() * weight
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


WEIGHTS = table("How your project keeps its weight")


@pytest.mark.parametrize(("expression", "option"), WEIGHTS.values(), ids=WEIGHTS)
def test_each_way_to_keep_a_weight(expression, option, tmp_path):
    module = Weighted(expression)
    name, code = option.split("=", 1)
    tells_no_target = name == "setter" or "(step)" in expression
    schedule = Linear(stop=1.0 if tells_no_target else None, steps=8)
    annealing = KLAnnealing(schedule, **{name: eval(code)})
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[annealing], num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    assert module.used == {True: [min(1.0, step / 8) for step in range(12)], False: [1.0] * 12}


class Shapes(nn.Module):
    """An encoder that puts a mean and a log-variance out in some way."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, mean: Tensor, log_variance: Tensor) -> Any:
        return self.shape(mean, log_variance)


class Encodes(LightningModule):
    """Trains nothing; its step calls the encoder as often as it is told to."""

    def __init__(self, shape: Any, calls: int) -> None:
        super().__init__()
        self.fc_mu, self.fc_var, self.encoder = nn.Linear(2, 3), nn.Linear(2, 3), Shapes(shape)
        self.calls = calls

    def encode(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc_mu.forward(batch), self.fc_var.forward(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.encode(batch)[0].mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        for _ in range(self.calls):
            self.encoder(self.fc_mu(batch), self.fc_var(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


POSTERIORS = table("How your project keeps its posterior")
SHAPES = [
    [lambda m, v: Normal(m, (0.5 * v).exp()), lambda m, v: (Normal(m, (0.5 * v).exp()), m)],
    [lambda m, v: (m, v)],
    [lambda m, v: (m, v.exp())],
    [lambda m, v: (m, (0.5 * v).exp())],
    [lambda m, v: (m, 0.5 * v)],
    [lambda m, v: [m, m, m, v]],
    [lambda m, v: SimpleNamespace(mean=m, logvar=v), lambda m, v: {"mu": m, "log_std": 0.5 * v, "z": m}],
    [
        lambda m, v: SimpleNamespace(embedding=m, log_covariance=v),
        lambda m, v: {"embedding": m, "log_covariance": v},
    ],
    [lambda m, v: SimpleNamespace(latent=(m, v))],
    [lambda m, v: None],
    [lambda m, v: torch.cat([m, v], dim=1)],
    [lambda m, v: torch.stack([m, v], dim=-1), lambda m, v: torch.cat([m[:, None], v[:, None]], dim=-1)],
    [lambda m, v: (m, v)],
    [lambda m, v: (m[:, :, None, None], v[:, :, None, None])],
    [lambda m, v: (m[:, None], v[:, None])],
    [lambda m, v: (m, (0.5 * v).exp().expm1().log())],
    [lambda m, v: Laplace(m, (0.5 * v).exp())],
    [lambda m, v: None],
]
CASES = [
    pytest.param(row, code, shape, id=f"{row}, {i}")
    for (row, [code, *_]), shapes in zip(POSTERIORS.items(), SHAPES, strict=True)
    for i, shape in enumerate(shapes)
]


@pytest.mark.parametrize(("row", "code", "shape"), CASES)
def test_each_way_to_keep_a_posterior(row, code, shape, tmp_path):
    torch.manual_seed(0)
    module = Encodes(shape, calls=0 if "nothing" in row else 2 if "several" in row else 1)
    detector = CollapseDetector(**eval(f"dict({code})"))
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[detector], num_sanity_val_steps=0).fit(module, loader(), loader())
    mean, log_variance = module.encode(torch.stack(list(loader().dataset)))  # type: ignore[call-overload]
    rates = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
    measured = detector.state_dict()
    torch.testing.assert_close(measured["variances"][0], mean.var(0, correction=0))
    if "not Gaussian" in row:
        assert len(measured["rates"]) == 0
    else:
        torch.testing.assert_close(measured["rates"][0], rates)


class Density:
    def log_prob(self, z: Tensor) -> Tensor:
        return Normal(0.0, 2.0).log_prob(z).sum(1)


def gaussian(parameters: Tensor) -> Normal:
    mean, log_variance = parameters.chunk(2, dim=-1)
    return Normal(mean, (0.5 * log_variance).exp())


class Drawing(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        posterior = gaussian(super().forward(x))
        return posterior, posterior.rsample()


class Plain(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).chunk(2, dim=-1)


class Priors(LightningModule):
    """Computes the rate under each prior of the page in a validation step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.top, self.prior_net = Drawing(2, 6), Drawing(2, 6), Plain(2, 6)
        self.prior_mean, self.prior_log_variance, self.vamp_prior = nn.Identity(), nn.Identity(), Density()
        self.rates: list[Tensor] = []

    def prior_of(self, batch: Tensor) -> Normal:
        return gaussian(torch.cat(self.prior_net(batch), dim=-1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.encoder(batch)[0].mean.mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        (q, z), (top, _) = self.encoder(batch), self.top(batch)
        mean, log_variance = self.prior_net(batch)
        p = Normal(self.prior_mean(mean), (0.5 * self.prior_log_variance(log_variance)).exp())
        density = (q.log_prob(z) - Normal(0.0, 2.0).log_prob(z)).sum(1)
        conditional, standard, fixed = (
            kl_divergence(q, each).sum(1) for each in (p, Normal(0.0, 1.0), Normal(0.5, 2.0))
        )
        hierarchy = conditional + kl_divergence(top, Normal(0.0, 1.0)).sum(1)
        rates = [fixed, conditional, conditional, conditional, fixed, standard, density, hierarchy]
        self.rates.append(torch.stack(rates))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


PRIORS = table("How your project keeps its prior")


@pytest.mark.parametrize("row", PRIORS)
def test_each_way_to_keep_a_prior(row: str, tmp_path: Path) -> None:
    module, place = Priors(), list(PRIORS).index(row)
    code = PRIORS[row][0] if PRIORS[row] else ""
    if not code:
        module.prior = Normal(0.5, 2.0)  # type: ignore[assignment]
    detector = CollapseDetector(**{"posterior": "encoder", **eval(f"dict({code})")})
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[detector], num_sanity_val_steps=0).fit(module, loader(), loader())
    assert detector.report is not None
    assert detector.report.rate == pytest.approx(float(torch.cat(module.rates, dim=1).mean(1)[place]), rel=1e-5)
    assert detector.report.is_estimate == ("log_prob" in row)
    assert (detector.report.rate_per_dimension is None or len(detector.report.rate_per_dimension) == 1) == (
        "whole" in row or "log_prob" in row
    )


class Unusual(LightningModule):
    """Has latents of a kind that the page has a row for: one output of its encoder for each batch."""

    def __init__(self, outputs: list[Any], named: str = "prior_net") -> None:
        super().__init__()
        self.layer, self.outputs = nn.Linear(2, 1), outputs
        self.top, self.encoder = Given(), Given()
        self.add_module(named, Given())
        self.named = named

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        top, bottom = self.outputs[batch_idx]
        self.logits = bottom
        self.top(top)
        self.encoder(bottom)
        self.get_submodule(self.named)(Normal(torch.full((4, 3), 0.5), 1.0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


class Given(nn.Module):
    def forward(self, value: Any) -> Any:
        return value


def normals(*shape: int, scale: float = 1.0) -> list[Any]:
    """The same posterior twice, for two groups."""
    torch.manual_seed(0)
    return [Normal(torch.randn(4, *shape), scale)] * 2


OTHERS = table("Other latents")
# A module with its outputs in three batches, and the numbers of dimensions and observations that are measured.
UNUSUAL: list[tuple[Any, tuple[int, int]]] = [
    (Unusual([normals(3)] * 3, named="prior"), (3, 12)),
    (Unusual([normals(3)] * 3), (3, 12)),
    (Unusual([[(torch.randn(4, 3), -torch.ones(4, 3))] * 2] * 3), (3, 12)),
    (Unusual([normals(3, 32, 32)] * 3), (3, 12)),
    (Unusual([normals(length, 3) for length in (5, 4, 6)]), (3, 12)),
    (Unusual([[normals(2)[0], normals(3)[0]]] * 3), (5, 12)),
    (Unusual([[None, torch.randn(4, 3, 5)]] * 3), (3, 12)),
    (Unusual([[None, Normal(9 * torch.randn(4, 3), 1e-3)] for _ in range(3)]), (3, 12)),
]


@pytest.mark.parametrize("row", OTHERS)
def test_other_latents_and_what_is_said_without_the_option(row: str, tmp_path: Path, caplog: Any) -> None:
    cells = next(line for line in section("Other latents").splitlines() if line.startswith(f"| {row} |")).split(" | ")
    message = cells[2].strip("`| ")
    module, expected = UNUSUAL[list(OTHERS).index(row)]
    code = cells[1].strip("`") if cells[1].startswith("`") else ""
    lengths = [output[1].mean.shape[1] for output in module.outputs] if "mask" in code else [1] * 3
    batches = [{"mask": torch.ones(4, length)} for length in lengths]

    def fit(options: str) -> Any:
        detector = CollapseDetector(**{"posterior": "encoder", "warmup": 0, "patience": 1, **eval(f"dict({options})")})
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[detector], num_sanity_val_steps=0)
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
        return detector.report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if code:
            report = fit(code)
            assert (len(report.variance), report.count) == expected
        caplog.clear()
        without = "second='scale'" if "raw" in row else ""
        if "hierarchy" in row:
            without = "posterior=lambda module, batch: list(module.outputs[0])"
        with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fit(without)
                said = caplog.text + "".join(str(each.message) for each in caught)
            except ValueError as error:
                said = str(error)
    assert " ".join(message.split()) in " ".join(said.split())


@pytest.mark.filterwarnings("ignore:FreeBits")
def test_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE
    for project in PROJECTS:  # benchmarks/other_projects.py runs theirs
        text = text.replace(section(project), "")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    namespace: dict[str, Any] = {"quiet": quiet}
    for block in blocks("python", text):
        exec(block.replace("Trainer(", "Trainer(**quiet, "), namespace)
    assert namespace["trainer"].lightning_module.kl_weight == 1.0
    adversarial = namespace["adversarial"]
    assert adversarial.lightning_module.kl_weight == 1e-6
    assert adversarial.global_step == 8 + 16, "two epochs of a step in each batch, two of 2"
    assert adversarial.lightning_module.free_bits == 0.001
    assert adversarial.callback_metrics["latent/rate"] > 0
    assert namespace["beta"] == pytest.approx(1.536)
    assert namespace["report"].count == 40


def test_the_line_of_free_bits_by_hand():
    from lightning_vae import free_bits

    [line] = re.findall(r"is `(kl\..*?)`", section("Free bits"))
    kl = torch.rand(5, 3)
    torch.testing.assert_close(eval(line, {"kl": kl, "floor": 0.5}), free_bits(kl, 0.5))


def test_examples_of_the_projects_are_code():
    for project in PROJECTS:
        [block] = blocks("python", section(project))
        compile(block, project, "exec")


def bernoulli(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy(y.sigmoid(), x.sigmoid(), **options)


@pytest.mark.parametrize(
    ("row", "loss", "nats"),
    [
        (0, lambda x, y: F.mse_loss(y, x), lambda x, y: -Normal(y, 1.0).log_prob(x)),
        (1, lambda x, y: (y - x).square().sum(1).mean(), lambda x, y: -Normal(y, 1.0).log_prob(x)),
        (2, lambda x, y: 0.5 * (y - x).square().sum(1).mean(), lambda x, y: -Normal(y, 1.0).log_prob(x)),
        (3, bernoulli, lambda x, y: bernoulli(x, y, reduction="none")),
        (
            4,
            lambda x, y: bernoulli(x, y, reduction="none").sum(1).mean(),
            lambda x, y: bernoulli(x, y, reduction="none"),
        ),
        (5, lambda x, y: F.l1_loss(y, x), lambda x, y: -Laplace(y, 1.0).log_prob(x)),
        (6, lambda x, y: F.mse_loss(y, x), lambda x, y: -Normal(y, 1.0).log_prob(x)),
    ],
)
def test_what_a_weight_means(row, loss, nats):
    rows = [line.split("|") for line in section("What your weight means").splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    formula = rows[row][3].strip(" `")
    x, y, z = torch.randn(3, 7, 12, dtype=torch.float64)
    d_loss = loss(x, y) - loss(x, z)
    d_nats = (nats(x, y) - nats(x, z)).sum(1).mean()
    k = 4
    of_kl = 1 / k if "both mean" in rows[row][1] else 1.0
    assert eval(formula, {"w": 0.3, "D": 12, "k": k}) == pytest.approx(float(0.3 * of_kl * d_nats / d_loss))


class Empty(LightningModule):
    pass


@pytest.mark.parametrize("language", ["yaml", "bash"])
def test_the_command_line_takes_them(language, tmp_path):
    pytest.importorskip("jsonargparse", reason="the base install has no command line")
    from lightning.pytorch.cli import LightningCLI

    [block] = blocks(language, section("A LightningCLI of your own"))
    (tmp_path / "config.yaml").write_text(block)
    arguments = ["--config", str(tmp_path / "config.yaml")]
    if language == "bash":
        _script, _fit, *arguments = shlex.split(block.replace("\\\n", ""))
    with patch.object(sys, "argv", ["your_script.py", *arguments]):
        cli = LightningCLI(Empty, run=False, save_config_callback=None, seed_everything_default=False)
    annealing = next(each for each in cli.trainer.callbacks if isinstance(each, KLAnnealing))
    assert annealing.attribute == "model.kl_weight"
    assert annealing.schedule == Linear(fraction=0.3)


def test_the_guide_to_latents_runs():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "latents.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert len(blocks) == 4
    assert scope["report"].count == 100
