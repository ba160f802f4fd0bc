import torch

from lightning_vae.datamodules.loaders.seeding import seeded_generator


def test_generators_look_at_every_part_of_the_key():
    keys: list[tuple[int | str, ...]] = [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, "order"), (0, "flip")]
    assert len({torch.rand((), generator=seeded_generator(*key)).item() for key in keys}) == len(keys)
