"""Random generators that depend on a key."""

import zlib

import torch


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator that depends on every part of a key.

    The key is hashed because torch's CPU generator uses only the low 32 bits of a seed: a seed and an epoch packed into
    one integer would lose one of the two.

    Args:
        key: The parts that distinguish this use of randomness, such as a seed, an epoch and a purpose.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
