import pytest
import torch

from lightning_vae.datamodules import TensorLoader
from lightning_vae.datamodules.loaders.tensor_loader import place_on_device
from tests.datamodules.doubles import numbers


def test_unshuffled_batches_are_the_rows_in_order():
    batches = list(TensorLoader(numbers(5), batch_size=2))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [batch["x"].flatten().tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert [batch["label"].tolist() for batch in batches] == [[0, 1], [2, 0], [1]]
    assert batches[0]["index"].dtype == torch.int64


def test_rows_follow_the_index_when_shuffled():
    for batch in TensorLoader(numbers(50), batch_size=8, shuffle=True):
        torch.testing.assert_close(batch["x"].flatten(), batch["index"].float())
        torch.testing.assert_close(batch["label"], batch["index"] % 3)


def test_batches_are_copies():
    loader = TensorLoader(numbers(4), batch_size=2)
    next(iter(loader))["x"].zero_().sub_(1)
    assert loader.tensors["x"].min() == 0


@pytest.mark.parametrize(
    ("tensors", "batch_size", "message"),
    [
        ({}, 2, "of equal length"),
        ({"x": torch.zeros(3), "label": torch.zeros(2)}, 2, r"got lengths \{'x': 3, 'label': 2\}"),
        ({"x": torch.zeros(0)}, 2, "`size` must be at least 1, got 0"),
        ({"x": torch.zeros(3)}, 0, "`batch_size` must be at least 1, got 0"),
    ],
)
def test_errors(tensors, batch_size, message):
    with pytest.raises(ValueError, match=message):
        TensorLoader(tensors, batch_size)


class Sized:
    """A tensor of a size, which remembers where it was sent."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, "cpu"

    numel = element_size = lambda self: self.size

    def to(self, device: torch.device) -> "Sized":
        moved = Sized(self.size)
        moved.at = device.type
        return moved


@pytest.mark.parametrize(("device", "free", "at"), [("cuda", 800, "cuda"), ("cuda", 799, "cpu"), ("cpu", 800, "cpu")])
def test_a_set_lies_on_the_gpu_where_it_takes_a_quarter_of_what_is_free(monkeypatch, device, free, at):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10**9))
    tensors = {"x": Sized(10), "label": Sized(10)}  # 100 bytes each
    assert {tensor.at for tensor in place_on_device(tensors, torch.device(device)).values()} == {at}  # type: ignore[arg-type]


def test_batches_are_made_where_the_tensors_are():
    tensors = {"x": torch.zeros(6, 1, 2, 2, dtype=torch.uint8, device="meta")}
    batches = list(TensorLoader(tensors, 4, shuffle=True, flip=True))
    assert [(batch["x"].shape[0], batch["x"].dtype) for batch in batches] == [(4, torch.uint8), (2, torch.uint8)]
    assert {tensor.device.type for batch in batches for tensor in batch.values()} == {"meta"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_named(value):
    x = torch.zeros(5, 2)
    x[3, 1] = value
    with pytest.raises(ValueError, match="in 1 of 5 observations, first in number 3"):
        TensorLoader({"x": x}, 2)
