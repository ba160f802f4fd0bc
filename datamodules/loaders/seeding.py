"""Turn a key into a random generator."""

import zlib

import torch


def seeded_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator that depends on every part of a key.

    The parts are hashed: torch's CPU generator looks at the low 32 bits of a seed only, so packing a seed and an epoch
    into one integer would lose one of them.

    Args:
        key: Whatever tells this use of randomness from others, such as a seed, an epoch and a purpose.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
