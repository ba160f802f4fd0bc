"""`VAE(compile=...)` compiles within a fit, once, and changes nothing else."""

import copy
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch import distributions as td
from torch._dynamo.utils import counters

from lightning_vae import (
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    DiscretisedLogistic,
    Gaussian,
    MLPDecoder,
    MLPEncoder,
)
from lightning_vae.callbacks import GECO, CollapseDetector, FreeBits, KLAnnealing, Linear, TargetRate
from lightning_vae.datamodules import Digits
from tests.checkpoints.test_exact_resume import assert_identical
from tests.doubles import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:FreeBits"),  # what is trained for a few steps is no model
    pytest.mark.filterwarnings("ignore:CollapseDetector"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),  # torch's own, as it compiles
]
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")


class LaplaceEncoder(MLPEncoder):
    def forward(self, x: Tensor) -> td.Distribution:
        mean, log_variance = super().forward(x)
        return td.Laplace(mean, (0.5 * log_variance).exp(), validate_args=False)


class BreakingEncoder(MLPEncoder):
    def forward(self, x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return super().forward(x)


class CountingEncoder(MLPEncoder):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1  # a number, so that each call is another graph
        mean, log_variance = super().forward(x)
        return mean * self.calls, log_variance


class Watch(Callback):
    """Counts the graphs after each step, and looks at the posterior that callbacks get."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])
        assert pl_module.posterior.mean.shape == (len(batch["x"]), 4)
        assert float(outputs["loss"]) == float(outputs["loss"])


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the graphs, and run them as they are: what inductor makes of them takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture(autouse=True)
def count_from_zero() -> None:
    torch._dynamo.reset()
    counters.clear()


def small(**options: Any) -> VAE:
    narrow = {"encoder": partial(MLPEncoder, hidden=(8,)), "decoder": partial(MLPDecoder, hidden=(8,))}
    return VAE(Digits.shape, Digits.levels, latent_dim=4, **{**narrow, "compile": True, **options})


def fit(
    folder: Path, vae: VAE, *more: Callback, batch_size: int = 450, ckpt: Path | None = None, **options: Any
) -> Any:
    watch = Watch()
    knobs = [KLAnnealing(Linear(fraction=0.9)), FreeBits(Linear(stop=0.2, steps=5))]
    if any(isinstance(each, TargetRate | GECO) for each in more):
        knobs = []
    trainer = quiet_trainer(
        folder, callbacks=[*knobs, CollapseDetector(), watch, *more], max_epochs=2, log_every_n_steps=2, **options
    )
    trainer.fit(vae, datamodule=Digits(batch_size), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return watch


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"likelihood": partial(Bernoulli, start_at_mean=True)},
        {"likelihood": ContinuousBernoulli},
        {"likelihood": Gaussian},
        {"likelihood": partial(Gaussian, variance="optimal")},
        {"likelihood": DiscretisedLogistic},
        {"encoder": LaplaceEncoder},
        {"free_bits_average": "sample", "free_bits_per": "whole"},
    ],
    ids=lambda options: str(list(options.values())),
)
def test_a_fit_makes_one_graph_whatever_knobs_do(options: dict[str, Any], tmp_path: Path) -> None:
    vae = small(**options)
    watch = fit(tmp_path, vae)
    assert watch.graphs == [1] * 6
    assert not vae.likelihood.starts
    assert vae.trainer.callback_metrics["val/loss"].isfinite()


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("controller", [TargetRate(1.0), GECO(squared_error=6.0)], ids=["rate", "error"])
def test_a_controller_and_a_smaller_last_batch_make_one_more_at_most(tmp_path: Path, controller: Callback) -> None:
    watch = fit(tmp_path, small(), controller, batch_size=400)
    assert watch.graphs[0] == 1
    assert watch.graphs[-1] <= 2


@pytest.mark.usefixtures("traced_only")
def test_the_graphs_of_one_model_do_not_count_for_another(tmp_path: Path) -> None:
    x = torch.zeros(2, *Digits.shape, dtype=torch.uint8)
    for _ in range(10):  # more than torch compiles of one function
        small().training_step(x, 0)
    assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (BreakingEncoder, r"(?s)torch can't make one graph.*graph_break"),
        (CountingEncoder, "needs a new graph each time"),
    ],
)
def test_what_is_no_graph_is_an_error(encoder: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        fit(tmp_path, small(encoder=encoder), batch_size=100)


def test_without_a_compiler_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    without = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with without, pytest.raises(RuntimeError, match=r"No working C\+\+ compiler(?s:.*)install g\+\+"):
        small().training_step(torch.zeros(2, *Digits.shape, dtype=torch.uint8), 0)


def test_the_option_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`compile` must be one of True, False, 'reduce-overhead'.*, got 'fast'"):
        small(compile="fast")


@pytest.mark.usefixtures("traced_only")
def test_a_compiled_model_is_copied_pickled_and_saved_as_any_other(tmp_path: Path) -> None:
    vae = small()
    watch = fit(tmp_path, vae)
    vae.trainer.save_checkpoint(tmp_path / "vae.ckpt")
    loaded = VAE.load_from_checkpoint(tmp_path / "vae.ckpt")
    assert loaded.hparams["compile"] is True
    assert vae.state_dict().keys() == small(compile=False).state_dict().keys()
    x, index = torch.randint(17, (5, *Digits.shape)), torch.arange(5)
    others = (loaded, copy.deepcopy(vae), pickle.loads(pickle.dumps(vae)))
    expected = vae.eval().elbo_terms(x, index).elbo
    for other in others:
        torch.testing.assert_close(other.eval().elbo_terms(x, index).elbo, expected)
        other.train().training_step(x, 1)
    assert counters["stats"]["unique_graphs"] == watch.graphs[-1] + 3  # each compiles its own


@pytest.mark.exhaustive
@needs_a_compiler
def test_compiled_a_run_computes_the_same_and_resumes_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(folder: str, ckpt: Path | None = None, **options: Any) -> VAE:
        torch.manual_seed(0 if ckpt is None else 1)
        saves = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        vae = small(likelihood=Gaussian, **options)
        fit(tmp_path, vae, saves, ckpt=ckpt, enable_checkpointing=True)
        return vae

    whole = run("whole")
    assert counters["stats"]["unique_graphs"] == 1
    for step in (1, 4):
        assert_identical(run(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt").state_dict(), whole.state_dict())
    with torch._inductor.config.patch(fallback_random=True):  # the numbers that an uncompiled run draws
        same_noise = run("same noise")
    eager = run("eager", compile=False)
    torch.testing.assert_close(same_noise.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)
