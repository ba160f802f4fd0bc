import itertools
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_vae.datamodules import BatchLoader, TensorLoader
from lightning_vae.datamodules.loaders import batch_loader as batch_loader_module
from tests.datamodules.doubles import flat, indices, numbers
from tests.processes import in_two_processes


@pytest.fixture
def as_rank(monkeypatch):
    def use(rank: int, processes: int) -> None:
        monkeypatch.setattr(batch_loader_module, "rank_and_world_size", lambda: (rank, processes))

    return use


def test_every_epoch_is_another_permutation_and_depends_on_the_seed():
    loader = TensorLoader(numbers(30), batch_size=7, shuffle=True, seed=3)
    epochs = [flat(indices(loader)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert indices(TensorLoader(numbers(30), batch_size=7, shuffle=True, seed=3)) != indices(
        TensorLoader(numbers(30), batch_size=7, shuffle=True, seed=4)
    )


def test_an_epoch_draws_its_order_once(monkeypatch):
    drawn, order = [], TensorLoader._order
    monkeypatch.setattr(TensorLoader, "_order", lambda self, epoch: drawn.append(epoch) or order(self, epoch))
    assert len(list(TensorLoader(numbers(20), batch_size=2, shuffle=True))) == 10
    assert drawn == [0]


def test_the_order_ignores_the_global_generator_and_leaves_it_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = indices(TensorLoader(numbers(20), batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert indices(TensorLoader(numbers(20), batch_size=4, shuffle=True)) == first


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5, 8])
def test_a_loaded_state_continues_the_same_order(taken):
    def batches(loader: BatchLoader):
        while True:
            yield from loader

    whole = TensorLoader(numbers(14), batch_size=4, shuffle=True, seed=1)
    expected = indices(itertools.islice(batches(whole), 16))
    first = TensorLoader(numbers(14), batch_size=4, shuffle=True, seed=1)
    start = indices(itertools.islice(batches(first), taken))
    second = TensorLoader(numbers(14), batch_size=4, shuffle=True, seed=1)
    second.load_state_dict(first.state_dict())
    assert start + indices(itertools.islice(batches(second), 16 - taken)) == expected


def test_after_the_last_batch_the_state_names_the_next_epoch():
    loader = TensorLoader(numbers(5), batch_size=2, shuffle=True)
    states = [loader.state_dict() for _ in loader]
    assert states == [{"epoch": 0, "position": 2}, {"epoch": 0, "position": 4}, {"epoch": 1, "position": 0}]


def test_an_iterator_that_nobody_draws_from_changes_nothing():
    loader = TensorLoader(numbers(20), batch_size=4, shuffle=True)
    expected = indices(TensorLoader(numbers(20), batch_size=4, shuffle=True))
    iter(loader)
    iter(loader)
    assert indices(loader) == expected


@pytest.mark.parametrize(("batch_size", "place"), [(4, 8), (8, 8), (2, 8)])
def test_another_batch_size_continues_at_the_same_observation(batch_size, place):
    loader = TensorLoader(numbers(16), batch_size=4, shuffle=True)
    order = flat(indices(TensorLoader(numbers(16), batch_size=16, shuffle=True)))
    next(itertools.islice(loader, 1, None))
    other = TensorLoader(numbers(16), batch_size=batch_size, shuffle=True)
    other.load_state_dict(loader.state_dict())
    assert next(iter(other))["index"].tolist() == order[place : place + batch_size]


def test_partial_passes_walk_on_when_shuffled_and_start_again_when_not():
    shuffled = TensorLoader(numbers(12), batch_size=3, shuffle=True)
    seen = [indices(itertools.islice(shuffled, 2)) for _ in range(2)]
    assert sorted(flat(flat(seen))) == list(range(12))
    in_order = TensorLoader(numbers(12), batch_size=3)
    assert [indices(itertools.islice(in_order, 2)) for _ in range(2)] == [[[0, 1, 2], [3, 4, 5]]] * 2


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 12, 13, 14, 23, 24, 25])
def test_processes_share_every_global_batch(as_rank, size, processes):
    per_rank = []
    for rank in range(processes):
        as_rank(rank, processes)
        loader = TensorLoader(numbers(size), batch_size=4, shuffle=True, seed=2)
        per_rank.append(indices(loader))
        assert len(per_rank[-1]) == len(loader)
        assert loader.state_dict() == {"epoch": 1, "position": 0}
    assert len({len(batches) for batches in per_rank}) == 1
    assert Counter(flat(flat(per_rank))) == Counter(range(size))
    sizes = [[len(batch) for batch in batches] for batches in per_rank]
    assert all(1 <= length <= 5 and max(row) - min(row) <= 1 for row in zip(*sizes, strict=True) for length in row)
    as_rank(0, 1)
    alone = flat(indices(TensorLoader(numbers(size), batch_size=4 * processes, shuffle=True, seed=2)))
    first = flat(batches[0] for batches in per_rank)
    assert sorted(first) == sorted(alone[: len(first)])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [6, 8, 9, 10, 13, 14, 15])
def test_the_last_size_is_that_of_the_smallest_last_share(as_rank, size, processes):
    loader = TensorLoader(numbers(size), batch_size=4, shuffle=True)
    shares = []
    for rank in range(processes):
        as_rank(rank, processes)
        shares.append(len(indices(TensorLoader(numbers(size), batch_size=4, shuffle=True))[-1]))
    assert loader.last_size == min(shares)


def test_more_processes_than_observations(as_rank):
    as_rank(2, 3)
    batches = list(TensorLoader(numbers(2), batch_size=4))
    assert [len(batch["x"]) for batch in batches] == [0]
    with pytest.raises(ValueError, match="2 observations can't be trained on by 3 processes"):
        list(TensorLoader(numbers(2), batch_size=4, shuffle=True))


def _write_indices(rank: int, folder: Path) -> None:
    loader = TensorLoader(numbers(13), batch_size=3, shuffle=True)
    (folder / f"{rank}.txt").write_text(repr(indices(loader)))


def test_two_real_processes_split_the_set(tmp_path):
    in_two_processes(_write_indices, tmp_path)
    first, second = (eval((tmp_path / f"{rank}.txt").read_text()) for rank in (0, 1))
    assert [len(batch) for batch in first] == [3, 4]
    assert [len(batch) for batch in second] == [3, 3]
    assert sorted(flat(first + second)) == list(range(13))


def test_flips_depend_on_epoch_and_index_only():
    images = {"x": torch.arange(40 * 3, dtype=torch.uint8).view(40, 1, 1, 3)}

    def flipped(batch_size: int) -> list[dict[int, bool]]:
        loader = TensorLoader(images, batch_size, shuffle=True, flip=True)
        epochs: list[dict[int, bool]] = []
        for _ in range(2):
            epochs.append({})
            for batch in loader:
                rows = batch["x"].flatten(1)
                original = images["x"][batch["index"]].flatten(1)
                for index, row, before in zip(batch["index"].tolist(), rows, original, strict=True):
                    assert torch.equal(row, before) or torch.equal(row, before.flip(0))
                    epochs[-1][index] = not torch.equal(row, before)
        return epochs

    first, second = flipped(7)
    assert [first, second] == flipped(40)
    assert first != second
    assert 10 <= sum(first.values()) <= 30


class Recorder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch):
        self.seen.append(batch["index"].tolist())
        return self.weight * batch["x"].sum()

    def validation_step(self, batch):
        assert "index" in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(folder: Path, ckpt_path: Path | None = None, limit: float | int = 1.0, **checkpoint) -> list[list[int]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=10,
        logger=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **checkpoint)],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=limit,
        limit_val_batches=2,
    )
    recorder = Recorder()
    loader = TensorLoader(numbers(14), batch_size=4, shuffle=True)
    trainer.fit(recorder, loader, TensorLoader(numbers(5), batch_size=2), ckpt_path=ckpt_path, weights_only=True)
    return recorder.seen


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty",  # the run resumes into its own folder
)
@pytest.mark.parametrize(
    ("checkpoint", "step", "limit"),
    [
        ({"every_n_train_steps": 1}, 5, 1.0),
        ({"every_n_train_steps": 1}, 4, 1.0),
        ({"every_n_train_steps": 1}, 8, 1.0),
        ({"save_on_train_epoch_end": True}, 4, 1.0),
        ({"save_on_train_epoch_end": True}, 8, 1.0),
        ({"save_on_train_epoch_end": False}, 8, 1.0),
        ({"save_on_train_epoch_end": True}, 6, 3),
        ({"every_n_train_steps": 1}, 5, 3),
    ],
)
def test_a_resumed_fit_sees_the_batches_an_uninterrupted_one_sees(tmp_path, checkpoint, step, limit):
    whole = train(tmp_path, limit=limit, **checkpoint)
    assert len(whole) == 10
    resumed = train(tmp_path, tmp_path / f"step={step}.ckpt", limit=limit, **checkpoint)
    assert resumed == whole[step:]
