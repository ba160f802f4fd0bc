"""The command line's entry point."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from lightning.pytorch.cli import ArgsType

from .cli.vae_cli import run


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments in place of the process's own, for use from Python.
    """
    if not torch.cuda.is_available():
        # With Lightning's settings torch searches the disk for NVIDIA's library, in vain, at each step of Adam.
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # Lightning redraws its bar at each step, which takes longer than a step of a small model.
    os.environ.setdefault("TQDM_MINITERS", "20")
    sys.path.insert(0, os.getcwd())  # a config may name classes in the current directory
    given = sys.argv[1:] if args is None else args
    command, rest = (given[0], given[1:]) if isinstance(given, Sequence) and given else (None, [])
    if command == "sweep":
        from .sweep.command import sweep  # imported here because only a sweep needs it

        sweep(rest)
    elif command == "auroc":
        from .cli.auroc import auroc

        auroc(rest)
    else:
        run(args)
