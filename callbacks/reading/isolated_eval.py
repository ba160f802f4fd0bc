"""An extra forward pass of a module that leaves no trace in its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


_IS_EXTRA: ContextVar[bool] = ContextVar("_IS_EXTRA", default=False)


def is_extra_pass() -> bool:
    """Return whether an extra forward pass is under way, which the hooks of callbacks must not count."""
    return _IS_EXTRA.get()


@contextmanager
def isolated(pl_module: LightningModule, keeps_graph: bool = False) -> Iterator[None]:
    """Run a module in its own mode, without gradients unless the graph is kept, in its Trainer's precision.

    The module works on copies of its buffers, so that the statistics of a batch normalisation do not move. Afterwards
    the random state is restored.
    """
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    own = [(module._buffers, dict(module._buffers)) for module in pl_module.modules()]
    copies = {buffer: buffer.clone() for _, buffers in own for buffer in buffers.values() if buffer is not None}
    with torch.random.fork_rng(devices), torch.set_grad_enabled(keeps_graph), _precision(pl_module):
        for buffers, before in own:
            buffers.update({name: None if each is None else copies[each] for name, each in before.items()})
        token = _IS_EXTRA.set(True)
        try:
            yield
        finally:
            _IS_EXTRA.reset(token)
            for buffers, before in own:
                buffers.update(before)


@contextmanager
def isolated_eval(pl_module: LightningModule) -> Iterator[None]:
    """Run a module like :func:`isolated`, but in eval mode, and with the same random numbers each time."""
    modes = {module: module.training for module in pl_module.modules()}
    with isolated(pl_module):
        torch.default_generator.manual_seed(0)
        if pl_module.device.type == "cuda":
            with torch.cuda.device(pl_module.device):
                torch.cuda.manual_seed(0)
        pl_module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _precision(pl_module: LightningModule) -> AbstractContextManager[None]:
    try:
        trainer = pl_module.trainer
    except RuntimeError:  # a plain loop has none
        return nullcontext()
    return trainer.precision_plugin.forward_context()
