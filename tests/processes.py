"""Two processes of one group, for all tests that need them.

A fork server starts them: it has no threads whose locks a fork would copy, and imports torch and Lightning only once.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes

from lightning_vae.distributed import leave_processes

multiprocessing.set_forkserver_preload(["lightning.pytorch", "torch.distributed"])


def in_two_processes(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call ``function(rank, folder, *args)`` in two processes of one group, where a Trainer may train on two devices.

    Args:
        function: A module's own function, as the processes import it.
        folder: An empty folder, for the results too.
        *args: What else it takes.
    """
    start_processes(_member, (function, folder, args), nprocs=2, daemon=True, start_method="forkserver")


def _member(rank: int, function: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no further process
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)  # to fail and not to stand still
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    function(rank, folder, *args)
    leave_processes()
