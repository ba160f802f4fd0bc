"""Two processes against one: all their runs in one pair of processes, as each start costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_vae import VAE, Gaussian, mean_over_processes
from lightning_vae.callbacks import CollapseDetector, EnforcedFreeBits, KLAnnealing, Linear, TargetRate
from lightning_vae.datamodules import TensorLoader
from tests.doubles import quiet_trainer
from tests.processes import in_two_processes

LATENTS = 4
FLOORS = {
    f"{per} {average}": {"free_bits_per": per, "free_bits_average": average, "free_bits": floor}
    for average in ("batch", "sample")
    for per, floor in (("dimension", 0.3), (2, 1.0), ("whole", 1.2))
}
SHARES = {"equal": ((15, 15), (8, 8)), "uneven": ((30, 7), (8, 7))}  # of two batches: rows of rank 0, rows of rank 1

EPOCHS = 9
FITS: dict[str, tuple[Callable[[], list[Callback]], dict[str, Any]]] = {
    "annealed": (lambda: [KLAnnealing(Linear(fraction=0.5)), CollapseDetector(warmup=1)], {"free_bits": 0.3}),
    "at a target rate": (lambda: [TargetRate(1.5)], {}),
    "stopped early": (lambda: [EarlyStopping("val/loss/dataloader_idx_0", min_delta=0.2, patience=2)], {}),
    "stopped at a collapse": (lambda: [CollapseDetector(warmup=2, patience=1, on_alarm="stop")], {"beta": 30.0}),
}


def rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows whose second half lies farther out, so that no two shares have the same rates."""
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": x * torch.linspace(0.2, 2.0, count)[:, None], "index": torch.arange(count)}


def dealt(shares: tuple[tuple[int, int], ...], rank: int | None) -> list[dict[str, Tensor]]:
    """Batches of which each process has a share; all of it without a rank."""
    batches = [rows(sum(counts), seed) for seed, counts in enumerate(shares)]
    if rank is None:
        return batches
    cuts = [slice(0, first) if rank == 0 else slice(first, None) for first, _ in shares]
    return [{name: value[cut] for name, value in batch.items()} for batch, cut in zip(batches, cuts, strict=True)]


class Keyed(VAE):
    """Takes each observation's noise by its index in training too, and records the gradients of each step."""

    def __init__(self, lr: float = 0.0, **options: Any) -> None:
        torch.manual_seed(3)
        likelihood = partial(Gaussian, variance=0.5)
        super().__init__((3,), latent_dim=LATENTS, likelihood=likelihood, **options)
        with torch.no_grad():
            scales = torch.tensor([0.3, 1.0, 3.0, 6.0])[:, None]
            next(layer for layer in reversed(list(self.encoder.modules())) if isinstance(layer, nn.Linear)).weight[
                :LATENTS
            ] *= scales
        self.lr = lr
        self.gradients: list[Tensor] = []
        self.index: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.index = batch["index"]
        return super().training_step(batch, batch_idx)

    def elbo_terms(self, x: Tensor, index: Tensor | None = None) -> Any:
        return super().elbo_terms(x, self.index if index is None else index)

    def on_before_optimizer_step(self, _: Any) -> None:
        self.gradients.append(flat(parameter.grad for parameter in self.parameters()))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr) if self.lr else torch.optim.SGD(self.parameters(), 0.0)


class Sharded(Keyed):
    """Networks that FSDP shards."""

    def configure_model(self) -> None:
        for network in (self.encoder, self.decoder):
            fully_shard(network, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)

    def on_before_optimizer_step(self, _: Any) -> None:
        self.gradients.append(flat(parameter.grad.full_tensor() for parameter in self.parameters()))


class Foreign(LightningModule):
    """Somebody else's module; with ``own_floor`` its loss has the global floor, written out."""

    def __init__(self, own_floor: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder, self.own_floor = nn.Linear(3, 2 * LATENTS), nn.Linear(LATENTS, 3), own_floor
        self.gradients: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_variance = self.encoder(batch["x"]).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * torch.sin(batch["index"] + 0.5)[:, None]
        kl = 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance)
        if self.own_floor is not None:
            kl = kl * (mean_over_processes(kl.detach()) > self.own_floor)
        loss: Tensor = (self.decoder(z) - batch["x"]).square().sum(1).mean() + 0.7 * kl.sum(1).mean()
        return loss

    on_before_optimizer_step = Keyed.on_before_optimizer_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def scenarios(root: Path, rank: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run everything, in one process without a rank, else in one of two."""
    processes = 1 if rank is None else 2
    run = partial(
        quiet_trainer,
        root,
        devices=processes,
        strategy="auto" if rank is None else "ddp",
        use_distributed_sampler=False,
    )

    for name, shares in SHARES.items():
        batches: Any = DataLoader(dealt(shares, rank), batch_size=None)  # type: ignore[arg-type]
        for variant, floor in FLOORS.items():
            vae = Keyed(**floor)
            trainer = run(max_epochs=1)
            trainer.fit(vae, batches)
            yield f"{name} {variant}", {"gradients": vae.gradients, "metrics": metrics(trainer)}
        if rank is not None:
            vae = Sharded(**FLOORS["dimension batch"])
            fsdp = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            trainer = run(max_epochs=1, strategy=fsdp)
            trainer.fit(vae, batches)
            yield f"{name} sharded", {"gradients": vae.gradients, "metrics": metrics(trainer)}
        vae = Keyed(**FLOORS["dimension batch"])
        trainer = run(max_epochs=1, accumulate_grad_batches=2)
        trainer.fit(vae, batches)
        yield f"{name} accumulated", {"gradients": vae.gradients, "metrics": metrics(trainer)}
        for enforced in (True, False):
            foreign = Foreign(None if enforced else 0.3)
            floors: list[Callback] = [EnforcedFreeBits(0.3, "encoder", 0.7, chunk=1)] if enforced else []
            run(max_epochs=1, callbacks=floors).fit(foreign, batches)
            yield f"{name} {'enforced' if enforced else 'written'}", {"gradients": foreign.gradients}

    for name, (make, options) in FITS.items():
        vae = Keyed(lr=0.01, **options)
        # In float64, as rounding decides on which side of its floor a rate is that sits at it.
        trainer = run(max_epochs=EPOCHS, callbacks=make(), precision="64-true")
        training = TensorLoader(rows(71, 5), 12 // processes, shuffle=True)
        validation = [TensorLoader(rows(count), 12 // processes) for count in (29, 1)]
        trainer.fit(vae, training, validation)
        result = {"parameters": flat(vae.parameters()), "metrics": metrics(trainer), "epoch": trainer.current_epoch}
        yield name, result

    if rank is not None:
        for name, start in (("whole", None), ("resumed", root / "step=8.ckpt")):
            torch.manual_seed(3)
            vae = VAE((3,), latent_dim=LATENTS, free_bits=0.3)
            saves = ModelCheckpoint(root, "{step}", every_n_train_steps=8, save_top_k=-1)
            trainer = run(max_epochs=2, callbacks=[saves], enable_checkpointing=True)
            loaders = TensorLoader(rows(71, 5), 6, shuffle=True), TensorLoader(rows(29), 6)
            trainer.fit(vae, *loaders, ckpt_path=start)
            yield name, {"parameters": flat(vae.parameters()), "metrics": metrics(trainer)}


def metrics(trainer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def one_of_two(rank: int, root: Path) -> None:
    torch.save(dict(scenarios(root, rank)), root / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What one process finds, and what each of two."""
    root = tmp_path_factory.mktemp("processes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_two_processes(one_of_two, root)
        return [dict(scenarios(root)), *(torch.load(root / f"{rank}.pt") for rank in range(2))]


def assert_gradients(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("variant", [*FLOORS, "accumulated", "sharded"])
def test_the_floor_has_the_gradient_of_the_global_batch(results: Any, shares: str, variant: str) -> None:
    one = results[0][f"{shares} {'dimension batch' if variant == 'sharded' else variant}"]
    for rank in (each[f"{shares} {variant}"] for each in results[1:]):
        assert_gradients(rank["gradients"], one["gradients"])
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-6)  # train/floored_rate and train/loss too


def test_an_enforced_floor_is_under_the_global_batch(results: Any) -> None:
    one, *two = results
    for rank in two:
        assert_gradients(rank["equal enforced"]["gradients"], one["equal enforced"]["gradients"])
        # The module weights uneven shares alike, so that two processes differ from one, with a floor and without.
        for shares in SHARES:
            assert_gradients(rank[f"{shares} enforced"]["gradients"], rank[f"{shares} written"]["gradients"])


@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist")  # by Lightning, in any group
def test_a_trainer_of_one_process_evaluates_alone_whatever_group_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a fit in several processes, of which one goes on to test."""
    exchanges: list[Any] = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **_: exchanges.append(args))
        vae = Keyed()
        quiet_trainer(tmp_path, devices=1).test(vae, DataLoader(rows(8)["x"], batch_size=4))  # type: ignore[arg-type]
        assert vae.observe(rows(3)["x"]).index.tolist() == [0, 1, 2]
    finally:
        monkeypatch.undo()
        torch.distributed.destroy_process_group()
    assert not exchanges


@pytest.mark.parametrize("name", FITS)
def test_a_fit_ends_the_same_in_two_processes(results: Any, name: str) -> None:
    """At half the batch each, over uneven last batches, and with a validation set smaller than the processes."""
    one, *two = (each[name] for each in results)
    for rank in two:
        assert rank["epoch"] == one["epoch"]
        torch.testing.assert_close(rank["parameters"], one["parameters"], rtol=0, atol=1e-7)
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    assert (one["epoch"] < EPOCHS) == name.startswith("stopped")


def test_a_resumed_run_of_two_processes_is_the_whole_one(results: Any) -> None:
    """With each process's own noise, saved amid the second epoch, after uneven shares."""
    for rank in results[1:]:
        assert torch.equal(rank["resumed"]["parameters"], rank["whole"]["parameters"])
        assert rank["resumed"]["metrics"] == rank["whole"]["metrics"]
