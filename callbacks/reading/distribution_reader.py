"""Read the posterior q(z|x) of any LightningModule during training or validation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributions import Distribution

from .distributions import as_distribution, check_form, describe, is_pair, is_sequence, is_several, pair_error, widened
from .isolated_eval import isolated
from .module_call import part_of_output

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch.utils.hooks import RemovableHandle


class DistributionReader:
    """Read the posteriors of the batch that a LightningModule has just processed, without a forward pass of its own.

    A forward hook keeps the outputs of the named submodules, from :meth:`listen` at the start of a step to :meth:`read`
    (or :meth:`forget`) at its end. A submodule that is called several times in a step, for example once for each view,
    gives as many posteriors. Outputs that activation checkpointing recomputes in the backward pass do not count, except
    under ``torch.compile``.

    Args:
        posterior: Where the posterior is.

            - ``None``: the module's own attribute ``posterior``.
            - A path: the output of that submodule (``"encoder"``, ``"model.encoder"``), or a part of it after a colon:
              indices, keys and fields with dots between them (``"encoder:0"``, ``"vae:latent_dist.mean"``).
            - A pair of paths: the mean and the second parameter (``("fc_mu", "fc_var")``, ``("model:2", "model:3")``).
            - A callable ``(pl_module, batch) -> q(z|x)``. It is called without gradients, in the module's mode, and
              before the optimizer's step: see :meth:`capture`. It moves neither buffers, such as the statistics of a
              batch normalisation, nor the random state.

            A path gives one posterior per call. The attribute and the callable may also give several, as a list or
            tuple of distributions or of pairs of tensors.
        second: Meaning of the second parameter if the posterior is a pair of tensors: ``"log_variance"``,
            ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: If the posterior is one tensor, the axis along which it is split into halves, the mean and the second
            parameter. 1 for ``(N, 2k)`` and ``(N, 2k, H, W)``, -1 for ``(N, T, 2k)`` and ``(N, k, 2)``.

    Raises:
        ValueError: If an option is none of these.
    """

    def __init__(
        self,
        posterior: str | Sequence[str] | Callable[[LightningModule, Any], Any] | None = None,
        second: str = "log_variance",
        chunk: int | None = None,
    ) -> None:
        paths = [posterior] if isinstance(posterior, str) else posterior if is_sequence(posterior) else []
        is_paths = len(paths) in (1, 2) and all(isinstance(path, str) for path in paths)
        if not (posterior is None or callable(posterior) or is_paths):
            raise ValueError(
                "`posterior` must be None, a submodule's path, a pair of paths or a callable `(pl_module, batch) -> "
                f"q(z|x)`, got {posterior!r}."
            )
        check_form(second, chunk)
        if chunk is not None and len(paths) == 2:
            raise ValueError(f"`chunk` splits one tensor; with the pair `posterior={posterior!r}` leave it out.")
        self.posterior = list(paths) if is_sequence(posterior) and not isinstance(posterior, tuple) else posterior
        self.second = second
        self.chunk = chunk
        self.paths = list(paths)
        self._outputs: dict[str, list[Any]] | None = None  # of this step's calls, by path; None between steps
        self._batch: Any = None  # of this step, for a callable
        self._captured: list[Any] | None = None  # a callable's values of this step
        self._has_checked = False
        self._handles: list[RemovableHandle] = []
        self._has_heard = False

    def __getstate__(self) -> dict[str, Any]:
        # A module that is copied within a step may hold the callback that reads it. The graphs of the outputs can't be
        # copied, and the hooks stay with the module.
        return {**vars(self), "_outputs": None, "_batch": None, "_captured": None, "_handles": []}

    @property
    def key(self) -> Any:
        """The posterior's place for a callback's ``state_key``, the same in each process."""
        if callable(self.posterior):
            function = getattr(self.posterior, "func", self.posterior)  # of a `functools.partial`
            return getattr(function, "__qualname__", type(function).__qualname__)
        return self.posterior

    def listen(self, pl_module: LightningModule, batch: Any = None) -> None:
        """Keep the outputs of the named submodules from now on, at the start of a step.

        The first call registers hooks on them, which stay until :meth:`detach`.

        Args:
            pl_module: The module.
            batch: The step's batch, for :meth:`capture`.

        Raises:
            ValueError: If a path leads nowhere.
        """
        self._batch = batch if callable(self.posterior) else None
        if not self.paths:
            return
        if not self._handles:
            modules = {path: _submodule(pl_module, path) for path in self.paths}
            self._handles = [module.register_forward_hook(_Hook(self._keep, path)) for path, module in modules.items()]
        self._outputs = {path: [] for path in self.paths}

    def forget(self) -> None:
        """Keep nothing until the next :meth:`listen`, at the end of a step."""
        self._outputs = self._batch = self._captured = None

    def capture(self, pl_module: LightningModule) -> None:
        """Call a callable now, with the batch that the step began with, so that :meth:`read` returns its values.

        Meant for ``on_before_optimizer_step``, the last moment at which the module has the weights of the step. Only
        the first of several calls in a step counts.
        """
        if callable(self.posterior) and self._captured is None and self._batch is not None:
            self._captured = self._called(pl_module, self._batch)

    def read(self, pl_module: LightningModule, batch: Any) -> list[Distribution]:
        """Return the posteriors of the batch just processed, in the order of the calls, and forget them.

        Tensors in half precision become float32. After a step with posteriors, a later step may have none, if it skips
        its batch.

        Raises:
            ValueError: If the module did not produce one, or produced something else; in the first step, also if a
                scale or a variance is not positive.
        """
        if self.paths:
            values = self._watched(pl_module)
        elif callable(self.posterior):
            values = self._called(pl_module, batch) if self._captured is None else self._captured
            self._batch = self._captured = None
        else:
            values = _separate(_own_posterior(pl_module))
        check, self._has_checked = not self._has_checked, self._has_checked or bool(values)
        try:
            return [as_distribution(widened(value), self.second, self.chunk, check) for value in values]
        except ValueError as error:
            raise ValueError(f"`posterior={self.key!r}`: {error}") from None

    def unhook(self) -> None:
        """Remove every hook until the next :meth:`listen`; a module saved as an object would otherwise contain them.

        If a step has begun and has not called the submodules yet, the hooks stay.
        """
        if self._outputs is not None and not all(self._outputs.values()):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def detach(self) -> None:
        """Remove every hook and forget the outputs."""
        self.forget()
        self.unhook()
        self._has_checked = False

    def _called(self, pl_module: LightningModule, batch: Any) -> list[Any]:
        assert callable(self.posterior)
        with isolated(pl_module):
            return _separate(self.posterior(pl_module, batch))

    def _keep(self, path: str, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if self._outputs is not None and (torch.compiler.is_compiling() or not _in_backward()):
            self._outputs[path].append(output)

    def _watched(self, pl_module: LightningModule) -> list[Any]:
        if self._has_heard and self._outputs is not None and not any(self._outputs.values()):
            return []
        outputs, self._outputs = self._outputs or {}, None
        for path in self.paths:
            if not outputs.get(path):
                raise ValueError(_silent(pl_module, path))
        self._has_heard = True
        calls = [len(outputs[path]) for path in self.paths]
        if len(set(calls)) > 1:
            raise ValueError(
                f"`posterior`: {self.paths[0]!r} was called {calls[0]} times in this step and {self.paths[1]!r} "
                f"{calls[1]} times, so their outputs don't pair up. Pass a callable `(pl_module, batch) -> q(z|x)`."
            )
        parts = [[part_of_output(output, path) for output in outputs[path]] for path in self.paths]
        if len(parts) == 2:
            return list(zip(*parts, strict=True))
        for value in parts[0]:
            if is_pair(value) and value[0].shape != value[1].shape:  # `(z, kl)`, or a recurrent network's state
                raise pair_error(value, self.second)
        return parts[0]


class _Hook(partial):  # type: ignore[type-arg]
    """A forward hook. In a copied or pickled module it does nothing, and needs nothing of this package."""

    def __reduce__(self) -> Any:
        return partial, (nullcontext().__exit__,)  # which takes any arguments and returns None


def _separate(value: Any) -> list[Any]:
    return list(value) if is_several(value) else [value]


def _own_posterior(pl_module: LightningModule) -> Any:
    own = getattr(pl_module, "posterior", None)
    if not hasattr(pl_module, "posterior") or callable(own):
        reason = f"is {describe(own)}" if callable(own) else "does not exist"
        raise ValueError(
            f"`posterior=None` reads `{type(pl_module).__name__}.posterior`, which {reason}. Name the submodule that "
            f"outputs the posterior, one of {_names(pl_module)}, or pass a callable `(pl_module, batch) -> q(z|x)`."
        )
    return own


def _in_backward() -> bool:
    """Return whether this is the backward pass, where activation checkpointing calls modules a second time."""
    return torch._C._current_graph_task_id() != -1


def _submodule(pl_module: LightningModule, path: str) -> torch.nn.Module:
    name = path.partition(":")[0]
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in pl_module.named_modules(remove_duplicate=False) if known]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        raise ValueError(
            f"`posterior`: {type(pl_module).__name__} has no submodule {name!r}. "
            + (f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It has {_names(pl_module)}.")
        ) from None


def _silent(pl_module: LightningModule, path: str) -> str:
    """Return the error message for a hook that has not fired: likely reasons and a remedy."""
    if hasattr(_submodule(pl_module, path), "training_step"):
        why = (
            "It is a LightningModule: Lightning calls its `training_step` and `validation_step`, which often do not "
            "call the module's own `forward`. Then a hook on it never fires."
        )
    else:
        why = "A hook fires when a module is called as a whole, `encoder(x)`; not at `encoder.forward(x)`."
    if any(is_compiled(module) for module in pl_module.modules()):
        why += (
            " A module that was compiled before the hook was registered runs without it: call "
            "`torch.compiler.reset()` before you fit again."
        )
    return (
        f"`posterior`: {path!r} was not called in this step, so there is no output to read. {why} Name a "
        f"submodule whose output is the posterior, one of {_names(pl_module)}, or pass a callable "
        "`(pl_module, batch) -> q(z|x)`."
    )


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether a module, or one of its methods, has been compiled."""
    # The names are those of a LightningModule, of `torch.compile(module)` and of `module.compile()`.
    return any(getattr(module, name, None) for name in ("_compiler_ctx", "_orig_mod", "_compiled_call_impl"))


def _names(pl_module: LightningModule) -> str:
    names = sorted((name for name, _ in pl_module.named_modules() if name), key=lambda name: name.count("."))
    return ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
