"""Reading the posterior q(z|x) of any LightningModule while it trains or validates."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch.utils.hooks import RemovableHandle

_TO_SCALE: dict[str, Callable[[Tensor], Tensor]] = {
    "log_variance": lambda second: (0.5 * second).exp(),
    "variance": torch.sqrt,
    "scale": lambda second: second,
    "log_scale": torch.exp,
}


def as_distribution(value: Any, second: str = "log_variance", chunk: int | None = None) -> Distribution:
    """Turn what a module calls its posterior into a distribution over ``(N, ...)`` latents.

    Args:
        value: A ``Distribution`` (``Independent`` is taken off), a tuple or list that holds exactly one, or a pair of
            tensors ``(mean, second)``; with ``chunk``, one tensor.
        second: What the pair's second tensor is: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: Axis along which one tensor is split into halves, the mean and the second parameter.

    Returns:
        The distribution; a ``Normal`` for a pair and for a tensor that was split.

    Raises:
        ValueError: If the value is none of these.

    Example::

        >>> as_distribution((torch.zeros(1, 2), torch.zeros(1, 2))).scale
        tensor([[1., 1.]])
        >>> as_distribution(torch.zeros(1, 4, 8, 8), chunk=1).mean.shape
        torch.Size([1, 2, 8, 8])
    """
    if chunk is not None:
        value = _halves(value, second, chunk)
    distributions = [item for item in value if isinstance(item, Distribution)] if _is_sequence(value) else []
    if len(distributions) == 1:
        [value] = distributions
    if isinstance(value, Distribution):
        return as_distribution(value.base_dist) if isinstance(value, Independent) else value
    if _is_pair(value):
        if not _fits(value[1], value[0]):
            raise _no_pair(value, second)
        return Normal(value[0], _TO_SCALE[second](value[1]), validate_args=False)
    if isinstance(value, Tensor):
        hint = f"If it holds the mean and then the {second} along an axis, split it there: `chunk=1`."
    elif distributions:
        hint = "Say which one is the posterior: `posterior='path:index'`."
    else:
        hint = f"Pick a part of it with `posterior='path:part'`, mean and {second} with `('path:part', 'path:part')`."
    raise ValueError(
        f"The posterior must be a torch.distributions.Distribution or a pair of tensors (mean, {second}), got "
        f"{_describe(value)}. {hint} Or compute it with `posterior=lambda pl_module, batch: ...`."
    )


def widened(value: Any) -> Any:
    """Return a tensor of half precision, or a pair, as float32: a small rate is a difference of larger numbers."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return [widened(each) for each in value] if _is_pair(value) else value


def read_prior(pl_module: LightningModule) -> Distribution:
    """Read the prior a module offers as its attribute ``prior``; N(0, I) where it offers no distribution."""
    prior = getattr(pl_module, "prior", None)
    return as_distribution(prior) if isinstance(prior, Distribution) else Normal(0.0, 1.0)


def same_shape(rates: Tensor, posterior: Distribution, prior: Distribution) -> Tensor:
    """Return rates that are one number for each latent of the posterior.

    Raises:
        ValueError: If they are not: the prior has broadcast them to another shape.
    """
    if rates.shape != posterior.batch_shape:
        raise ValueError(
            f"The module's `prior` of shape {tuple(prior.batch_shape)} does not fit its posterior of shape "
            f"{tuple(posterior.batch_shape)}: it must broadcast to it, axis by axis from the last."
        )
    return rates


def part_of_output(output: Any, path: str, option: str = "posterior") -> Any:
    """Return the part of an output that a path names behind its colon; all of it without one.

    Args:
        output: What was returned.
        path: The path, ``"encoder:0"``, say.
        option: Name of the option that it comes from, for the error.

    Raises:
        ValueError: If there is no such part.
    """
    part = path.partition(":")[2]
    for name in part.split(".") if part else ():
        try:
            output = _item(output, name)
        except (AttributeError, LookupError, TypeError):
            hint = " Halves of a tensor are for `chunk=`." if isinstance(output, Tensor) else ""
            raise ValueError(f"`{option}={path!r}`: {_describe(output)} has no {name!r}.{hint}") from None
    return output


class DistributionReader:
    """Reads the posteriors of the batch that a LightningModule has just processed, without a forward pass of its own.

    A forward hook keeps the outputs of the submodules that are named, from :meth:`listen` at a step's start to
    :meth:`read` (or :meth:`forget`) at its end, so that nothing of other steps piles up. A submodule that is called
    several times in a step (once for each view, say) gives as many posteriors. What activation checkpointing computes
    again in the backward pass does not count, except under ``torch.compile``.

    Args:
        posterior: Where the posterior is.

            - ``None``: the module's own attribute ``posterior``.
            - A path: the output of that submodule (``"encoder"``, ``"model.encoder"``), or a part of it after a colon:
              indices, keys and fields with dots between them (``"encoder:0"``, ``"vae:latent_dist.mean"``).
            - A pair of paths: the mean and the second parameter (``("fc_mu", "fc_var")``, ``("model:2", "model:3")``).
            - A callable ``(pl_module, batch) -> q(z|x)``. It runs the module in the mode that it is in: in training,
              what counts its batches, such as batch normalisation, counts these too.

            A path leads to one posterior a call. The attribute and the callable may also give a list or tuple of
            several: all its entries are then distributions, or pairs of tensors.
        second: What stands beside the mean where the posterior is a pair of tensors: ``"log_variance"``,
            ``"variance"``, ``"scale"`` or ``"log_scale"``.
        chunk: Where the posterior is one tensor: the axis along which it is split into halves, the mean and the second
            parameter. 1 for ``(N, 2k)`` and ``(N, 2k, H, W)``, -1 for ``(N, T, 2k)`` and ``(N, k, 2)``.

    Raises:
        ValueError: If an option is none of these.
    """

    def __init__(
        self,
        posterior: str | tuple[str, str] | Callable[[LightningModule, Any], Any] | None = None,
        second: str = "log_variance",
        chunk: int | None = None,
    ) -> None:
        paths = [posterior] if isinstance(posterior, str) else posterior if _is_sequence(posterior) else []
        is_paths = len(paths) in (1, 2) and all(isinstance(path, str) for path in paths)
        if not (posterior is None or callable(posterior) or is_paths):
            raise ValueError(
                "`posterior` must be None, a submodule's path, a pair of paths or a callable `(pl_module, batch) -> "
                f"q(z|x)`, got {posterior!r}."
            )
        if second not in _TO_SCALE:
            raise ValueError(f"`second` must be one of {', '.join(map(repr, _TO_SCALE))}, got {second!r}.")
        if chunk == 0 or not isinstance(chunk, int | None):
            raise ValueError(
                "`chunk` must be the axis that holds the mean and then the second parameter: 1, 2, ... or -1, -2, ... "
                f"from the end (axis 0 is the observations), got {chunk!r}."
            )
        if chunk is not None and len(paths) == 2:
            raise ValueError(f"`chunk` splits one tensor; with the pair `posterior={posterior!r}` leave it out.")
        self.posterior = posterior
        self.second = second
        self.chunk = chunk
        self.paths = list(paths)
        self._outputs: dict[str, list[Any]] | None = None  # of this step's calls by path; None between the steps
        self._handles: list[RemovableHandle] = []
        self._has_heard = False

    def listen(self, pl_module: LightningModule) -> None:
        """Keep what the named submodules output from now on: a step begins.

        The first time it puts hooks on them, which stay until :meth:`detach`.

        Raises:
            ValueError: If a path leads nowhere.
        """
        if not self.paths:
            return
        if not self._handles:
            modules = {path: _submodule(pl_module, path) for path in self.paths}
            self._handles = [
                module.register_forward_hook(partial(self._keep, path)) for path, module in modules.items()
            ]
        self._outputs = {path: [] for path in self.paths}

    def forget(self) -> None:
        """Keep nothing until the next :meth:`listen`: a step has ended."""
        self._outputs = None

    def read(self, pl_module: LightningModule, batch: Any) -> list[Distribution]:
        """Return the posteriors of the batch just processed, in the order of the calls, and forget them.

        They are of float32 where the module gives tensors of half precision. A step that skips its batch, once others
        have not, has none.

        Raises:
            ValueError: If the module did not produce one, or produced something else.
        """
        if self.paths:
            values = self._watched(pl_module)
        else:
            value = self._call(pl_module, batch) if callable(self.posterior) else _own_posterior(pl_module)
            values = list(value) if _is_several(value) else [value]
        return [as_distribution(widened(value), self.second, self.chunk) for value in values]

    def unhook(self) -> None:
        """Remove every hook until the next :meth:`listen`; a module that is saved as an object would take it along.

        A step that has begun, and has not called yet, keeps its hooks.
        """
        if self._outputs is not None and not all(self._outputs.values()):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def detach(self) -> None:
        """Remove every hook and forget what they kept."""
        self.forget()
        self.unhook()

    def _call(self, pl_module: LightningModule, batch: Any) -> Any:
        assert callable(self.posterior)
        # Training must not notice that it is watched.
        with torch.random.fork_rng([pl_module.device] if pl_module.device.type == "cuda" else []):
            return self.posterior(pl_module, batch)

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
                f"{calls[1]} times, so that their outputs are no pairs. Pass a callable `(pl_module, batch) -> q(z|x)`."
            )
        parts = [[part_of_output(output, path) for output in outputs[path]] for path in self.paths]
        if len(parts) == 2:
            return list(zip(*parts, strict=True))
        for value in parts[0]:
            if _is_pair(value) and value[0].shape != value[1].shape:  # `(z, kl)`, or a recurrent network's state
                raise _no_pair(value, self.second)
        return parts[0]


def _own_posterior(pl_module: LightningModule) -> Any:
    own = getattr(pl_module, "posterior", None)
    if not hasattr(pl_module, "posterior") or callable(own):
        reason = f"is {_describe(own)}" if callable(own) else "does not exist"
        raise ValueError(
            f"`posterior=None` reads `{type(pl_module).__name__}.posterior`, which {reason}. Name the submodule that "
            f"outputs the posterior, one of {_names(pl_module)}, or pass a callable `(pl_module, batch) -> q(z|x)`."
        )
    return own


def _is_pair(value: Any) -> TypeGuard[tuple[Tensor, Tensor] | list[Tensor]]:
    return _is_sequence(value) and len(value) == 2 and all(isinstance(item, Tensor) for item in value)


def _no_pair(value: Any, second: str) -> ValueError:
    return ValueError(
        f"The posterior's mean and {second} must have one shape, got {_describe(value)}, which may be something else. "
        "Name the right parts with `posterior=('path:part', 'path:part')`."
    )


def _fits(second: Tensor, mean: Tensor) -> bool:
    """Whether a second parameter is one number for each of the means; all observations may share one."""
    shared = second.shape == mean.shape[1:] or (second.shape[1:] == mean.shape[1:] and len(second) == 1)
    return mean.ndim > 0 and (second.shape == mean.shape or shared or second.ndim == 0)


def _in_backward() -> bool:
    """Whether this is the backward pass, where activation checkpointing calls modules a second time."""
    return torch._C._current_graph_task_id() != -1


def _is_sequence(value: Any) -> TypeGuard[tuple[Any, ...] | list[Any]]:
    return isinstance(value, tuple | list)


def _is_several(value: Any) -> TypeGuard[tuple[Any, ...] | list[Any]]:
    """Whether a value is several posteriors: a distribution beside something else is one, and so is a pair."""
    return (
        _is_sequence(value) and len(value) > 0 and all(isinstance(item, Distribution | tuple | list) for item in value)
    )


def _halves(value: Any, second: str, axis: int) -> tuple[Tensor, ...]:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`chunk={axis}` splits one tensor into mean and {second}, got {_describe(value)}. Name the tensor with "
            "`posterior='path:part'`, or leave `chunk` out."
        )
    if axis not in (*range(1, value.ndim), *range(1 - value.ndim, 0)):
        raise ValueError(
            f"`chunk={axis}` must be an axis behind the first, which is the observations, got {_describe(value)}."
        )
    size = value.shape[axis]
    if size == 0 or size % 2:
        raise ValueError(
            f"`chunk={axis}` must be an axis of even size, to hold the mean and as much {second}, got "
            f"{_describe(value)}."
        )
    # (N, k, 2) is (N, k) twice, not (N, k, 1).
    return value.unbind(axis) if size == 2 and value.ndim > 2 else value.chunk(2, axis)


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
    """Say why a hook may not have fired, and what to do."""
    if hasattr(_submodule(pl_module, path), "training_step"):
        why = (
            "It is a LightningModule: Lightning calls its `training_step` and `validation_step`, which often never "
            "call a module's own `forward`, so that a hook on it never fires."
        )
    else:
        why = "A hook fires where a module is called as a whole, `encoder(x)`; not at `encoder.forward(x)`."
    if any(is_compiled(module) for module in pl_module.modules()):
        why += (
            " And what was compiled before the hook was there runs without it: call `torch.compiler.reset()` before "
            "you fit again."
        )
    return (
        f"`posterior`: {path!r} was not called in this step, so that there is no output to read. {why} Name a "
        f"submodule whose output is the posterior, one of {_names(pl_module)}, or pass a callable "
        "`(pl_module, batch) -> q(z|x)`."
    )


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module, or one of its methods, runs as ``torch.compile`` made it."""
    # The names are those of a LightningModule, of `torch.compile(module)` and of `module.compile()`.
    return any(getattr(module, name, None) for name in ("_compiler_ctx", "_orig_mod", "_compiled_call_impl"))


def _names(pl_module: LightningModule) -> str:
    names = sorted((name for name, _ in pl_module.named_modules() if name), key=lambda name: name.count("."))
    return ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")


def _item(value: Any, name: str) -> Any:
    """Return what a name stands for in a value: a key, an index or a field."""
    if isinstance(value, Tensor):  # an index would pick an observation, a field would be a method
        raise TypeError
    if isinstance(value, Mapping) and name in value:
        return value[name]
    return value[int(name)] if name.lstrip("-").isdigit() else getattr(value, name)


def _describe(value: Any) -> str:
    """Say in a few words what a value is made of."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(_describe, value))})"
    fields = [name for name in getattr(value, "__dict__", ()) if not name.startswith("_")]
    if fields and not isinstance(value, Distribution | torch.nn.Module):
        return f"a {type(value).__name__} with the fields {', '.join(map(repr, fields))}"
    return f"a {type(value).__name__}"
