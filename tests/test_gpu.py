"""Nothing in a step between logging steps waits for the device: seen on a GPU, and as far as can be without one."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_vae import VAE, Bernoulli, Gaussian, MLPDecoder, MLPEncoder
from lightning_vae.callbacks import GECO, CollapseDetector, FreeBits, KLAnnealing, Linear, TargetRate
from lightning_vae.datamodules import Digits
from tests.doubles import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:FreeBits"),  # what is trained for a few steps is no model
    pytest.mark.filterwarnings("ignore:CollapseDetector"),
]
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
WAITING |= {"lift_fresh"}  # a number of Python's that becomes a tensor is copied to the device


class Copied(torch.Tensor):
    """What `cpu()` has given: reading it waits for nothing."""


class Looks(TorchDispatchMode):
    """Refuses what would wait for a GPU: values and shapes that Python is to know, but of what was copied before."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._overloadpacket.__name__
        by_mask = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        waits = (name in WAITING and not isinstance(args[0], Copied)) or by_mask
        assert not waits, f"{name} in {caller()}"
        return function(*args, **(kwargs or {}))


def caller() -> str:
    """Name the innermost file that is neither torch's nor this one."""
    frame: Any = sys._getframe(1)
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


class Watched(VAE):
    """Watches its steps but the first and those that log, each to the start of what follows it."""

    def __init__(self, **options: Any) -> None:
        narrow = {"encoder": partial(MLPEncoder, hidden=(8,)), "decoder": partial(MLPDecoder, hidden=(8,))}
        super().__init__(Digits.shape, Digits.levels, latent_dim=4, **narrow, **options)
        self.watched = 0
        self.weight = 1.0  # a number that the module does not log

    def watch(self, on: bool) -> None:
        raise NotImplementedError


class WatchedHere(Watched):
    looks: Looks | None = None

    def watch(self, on: bool) -> None:
        if self.looks is not None:
            self.looks.__exit__(None, None, None)
            self.looks = None
        if on:
            self.watched += 1
            self.looks = Looks()
            self.looks.__enter__()


class WatchedThere(Watched):
    def watch(self, on: bool) -> None:
        self.watched += on
        torch.cuda.set_sync_debug_mode("error" if on else "default")


class First(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        step = trainer.global_step  # the first looks at the data
        pl_module.watch(step > 0 and (step + 1) % trainer.log_every_n_steps != 0)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.watch(False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.watch(False)


STACKS = {
    "annealed": lambda: [KLAnnealing(Linear(fraction=0.5)), FreeBits(Linear(stop=0.2, steps=50))],
    "steered": lambda: [TargetRate(1.0)],
    "constrained": lambda: [GECO(squared_error=6.0)],
    "another's": lambda: [KLAnnealing(Linear(stop=2.0, steps=50), attribute="weight")],
}


@pytest.fixture(autouse=True)
def _mark_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell copies from what they were made of, where both are on the CPU."""
    copy = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copy(self).as_subclass(Copied))


def fit(folder: Path, vae: Watched, stack: str, **options: Any) -> None:
    # Steps enough for a block of 64 of the training sums, observations enough for one of the detector's amid an epoch.
    options = {"max_epochs": 4, "log_every_n_steps": 70, "gradient_clip_val": 1.0, **options}
    callbacks = [First(), *STACKS[stack](), CollapseDetector(observations=500)]
    trainer = quiet_trainer(folder, callbacks=callbacks, **options)
    try:
        trainer.fit(vae, datamodule=Digits(batch_size=30))  # 45 steps an epoch; a smaller last batch compiles anew
    finally:
        vae.watch(False)  # which would go on into the tests that follow
    assert vae.watched == 4 * 45 - 1 - 2


@pytest.mark.sampled(6)
@pytest.mark.parametrize("stack", list(STACKS))
@pytest.mark.parametrize("validation", [1.0, 0])
@pytest.mark.parametrize(
    "likelihood", [partial(Bernoulli, start_at_mean=True), Gaussian, partial(Gaussian, variance="optimal")]
)
def test_no_step_between_logging_steps_looks_at_a_tensor(
    stack: str, validation: float, likelihood: Any, tmp_path: Path
) -> None:
    fit(tmp_path, WatchedHere(likelihood=likelihood), stack, limit_val_batches=validation)


def test_the_watch_sees_what_would_wait(tmp_path: Path) -> None:
    class Waits(WatchedHere):
        def _loss(self, x: torch.Tensor) -> Any:
            bool(self.beta > 0)
            return super()._loss(x)

    with pytest.raises(AssertionError, match=r"_local_scalar_dense in .*vae\.py"):
        fit(tmp_path, Waits(), "annealed")


@needs_a_gpu
@pytest.mark.parametrize("stack", list(STACKS))
@pytest.mark.parametrize("compile_", [False, True, "reduce-overhead"])
def test_no_step_between_logging_steps_waits_for_the_gpu(stack: str, compile_: Any, tmp_path: Path) -> None:
    vae = WatchedThere(compile=compile_)
    try:
        fit(tmp_path, vae, stack, accelerator="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert vae.trainer.train_dataloader.tensors["x"].is_cuda
    assert vae.trainer.callback_metrics["train/loss"].isfinite()


@needs_a_gpu
def test_cuda_graphs_leave_what_is_kept_alone(tmp_path: Path) -> None:
    def loss(mode: Any) -> torch.Tensor:
        torch.manual_seed(0)
        vae = WatchedThere(compile=mode, likelihood=partial(Gaussian, variance=0.5))
        vae.watch = lambda on: None  # type: ignore[method-assign]
        trainer = quiet_trainer(tmp_path, max_epochs=4, accelerator="gpu", limit_val_batches=0)
        trainer.fit(vae, datamodule=Digits(batch_size=32))
        return trainer.callback_metrics["train/loss"]

    torch.testing.assert_close(loss("reduce-overhead"), loss(False), rtol=0.05, atol=0.0)
