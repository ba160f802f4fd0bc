"""The command line's entry point."""

from __future__ import annotations

import os
import sys

import torch
from lightning.pytorch.cli import ArgsType

from .cli.vae_cli import run


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments in place of the process's own, for use from Python.
    """
    if not torch.cuda.is_available():
        # With Lightning's settings torch searches the disk for NVIDIA's library at each step of Adam, in vain.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # Lightning redraws its bar at each step, which takes a small model longer than the step.
    os.environ.setdefault("TQDM_MINITERS", "20")
    sys.path.insert(0, os.getcwd())  # a config may name classes that lie where the command is run
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["sweep"]:
        from .sweep.command import sweep  # imports what only a sweep needs

        sweep(given[1:])
    else:
        run(args)
