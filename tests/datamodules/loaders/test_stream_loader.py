import torch
from torch.utils.data import Dataset

from lightning_vae.datamodules import StreamLoader, TensorLoader


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((1, 2, 2), index), "index": torch.tensor(index)}


def test_streaming_yields_what_memory_yields():
    tensors = {"x": torch.arange(23).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)}
    state = torch.get_rng_state()
    streamed = StreamLoader(Rows(), batch_size=5, shuffle=True, flip=True, seed=4)
    in_memory = TensorLoader(tensors, batch_size=5, shuffle=True, flip=True, seed=4)
    for _ in range(2):
        for left, right in zip(streamed, in_memory, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)
            assert streamed.state_dict() == in_memory.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
