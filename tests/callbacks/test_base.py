from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_vae.callbacks import Callback, KLAnnealing, Linear
from lightning_vae.callbacks.base import averages_of, mean_over_processes, sum_over_processes
from tests.doubles import ForeignModule, RecordingVAE, loader, quiet_trainer

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def module_of(package: str) -> Any:
    """A module of either Lightning, with nothing but a parameter."""

    class Plain(import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    return Plain()


class Watch(Callback):
    """Record what the base says at the end of each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, bool]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append((self.step(trainer), self.accumulates(trainer), self.logs_now(trainer)))


def watched(package: str, **options: Any) -> list[tuple[int, bool, bool]]:
    watch = Watch()
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    trainer = import_module(package).Trainer(callbacks=[watch], enable_model_summary=False, **quiet, **options)
    trainer.fit(module_of(package), loader())
    return watch.seen


# ---- each of Lightning's private names, in both packages: one of these fails where Lightning moves it


@pytest.mark.parametrize("package", PACKAGES)
def test_batches_that_stepped(package: str) -> None:
    assert [step for step, _, _ in watched(package, max_epochs=1)] == [0, 1, 2, 3, 4, 5]
    accumulated = watched(package, max_epochs=1, accumulate_grad_batches=2)
    assert [step for step, _, _ in accumulated] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("package", PACKAGES)
def test_should_accumulate(package: str) -> None:
    seen = watched(package, max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=2)
    assert [accumulates for _, accumulates, _ in seen] == [True, False] * 3
    assert [logs for _, _, logs in seen] == [False, False, False, True, False, False]


@pytest.mark.parametrize("package", PACKAGES)
def test_generate_state_key(package: str) -> None:
    theirs = import_module(package).Callback
    assert hasattr(theirs, "_generate_state_key"), f"{package} has moved `Callback._generate_state_key`"
    assert theirs._generate_state_key(Watch(), name="a") == Watch().keyed_by(name="a") == "Watch{'name': 'a'}"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_combined_loader_and_its_places(tmp_path: Path) -> None:
    """A schedule asks how long the run is, which makes the loaders before Lightning has read their places."""

    class Placed(torch.utils.data.DataLoader[Any]):
        loaded: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"place": 3}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loaded = state

    def data() -> Placed:
        return Placed(list(torch.zeros(12, 2)), batch_size=2)  # type: ignore[arg-type]

    annealing = lambda: KLAnnealing(Linear(fraction=0.5), probe=False)  # noqa: E731
    save = ModelCheckpoint(tmp_path, "amid", every_n_train_steps=3, save_top_k=1, monitor=None)
    first = quiet_trainer(tmp_path, callbacks=[annealing(), save], max_epochs=1, enable_checkpointing=True)
    first.fit(ForeignModule(), data())
    trainer = quiet_trainer(tmp_path, callbacks=[annealing()], max_epochs=1)
    trainer.fit(ForeignModule(), resumed := data(), ckpt_path=save.best_model_path)
    assert resumed.loaded == {"place": 3}


# ---- one process


def test_of_one_process_a_sum_is_the_tensor_itself(tmp_path: Path) -> None:
    trainer, rows = quiet_trainer(tmp_path), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert sum_over_processes(trainer, rows) is rows
    assert mean_over_processes(trainer, rows).tolist() == [2.0, 4.0]


def test_the_buffers_of_a_module_hold_the_target_from_the_start_of_the_fit(tmp_path: Path) -> None:
    seen = []

    class AtStart(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(pl_module.beta))

    callbacks = [AtStart(), KLAnnealing(Linear(stop=2.0, steps=3))]
    quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(RecordingVAE(), loader())
    assert seen == [2.0]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_average_of_the_weights(package: str, tmp_path: Path) -> None:
    found = import_module(f"{package}.callbacks")
    if not hasattr(found, "WeightAveraging"):
        pytest.skip("weight averaging begins with Lightning 2.6")
    averaging = found.WeightAveraging()
    trainer = import_module(package).Trainer(
        callbacks=[averaging], max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    assert averages_of(trainer) == []
    model = module_of(package)
    trainer.fit(model, loader())
    [average] = averages_of(trainer)
    assert type(average) is type(model)
