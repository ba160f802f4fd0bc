"""The page "Drop into your project": each row of its tables and each of its examples does what it says."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributions import Laplace, Normal
from torch.nn import functional as F  # noqa: N812

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
