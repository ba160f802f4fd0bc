"""Reading the posterior q(z|x) of any LightningModule while it trains or validates."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

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


def as_distribution(value: Any, second: str = "log_variance") -> Distribution:
    """Turn what a module calls its posterior into a distribution over ``(N, ...)`` latents.

    Args:
        value: A ``Distribution`` (``Independent`` is taken off) or a pair of tensors ``(mean, second)``.
        second: What the pair's second tensor is: ``"log_variance"``, ``"variance"``, ``"scale"`` or ``"log_scale"``.

    Returns:
        The distribution; a ``Normal`` for a pair.

    Raises:
        ValueError: If the value is neither.

    Example::

        >>> as_distribution((torch.zeros(1, 2), torch.zeros(1, 2))).scale
        tensor([[1., 1.]])
    """
    if isinstance(value, Distribution):
        return as_distribution(value.base_dist) if isinstance(value, Independent) else value
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(item, Tensor) for item in value):
        return Normal(value[0], _TO_SCALE[second](value[1]), validate_args=False)
    raise ValueError(
        f"The posterior must be a torch.distributions.Distribution or a pair of tensors (mean, {second}), got "
        f"{_describe(value)}. Pick a part of it with `posterior='path:part'`, mean and {second} with "
        f"`posterior=('path:part', 'path:part')`, or compute it with `posterior=lambda pl_module, batch: ...`."
    )


def read_prior(pl_module: LightningModule) -> Distribution:
    """Read the prior a module offers as its attribute ``prior``; N(0, I) where it offers no distribution."""
    prior = getattr(pl_module, "prior", None)
    return as_distribution(prior) if isinstance(prior, Distribution) else Normal(0.0, 1.0)


class PosteriorReader:
    """Reads the posterior of the batch that a LightningModule has just processed, without a forward pass of its own.

    Args:
        posterior: Where the posterior is.

            - ``None``: the module's own attribute ``posterior``.
            - A path: the output of that submodule (``"encoder"``, ``"model.encoder"``), or a part of it after a
              colon: an index (``"encoder:0"``), a field or a key (``"encoder:embedding"``).
            - A pair of paths: the mean and the second parameter (``("fc_mu", "fc_var")``, ``("model:2", "model:3")``).
            - A callable ``(pl_module, batch) -> q(z|x)``.
        second: What stands beside the mean where the posterior is a pair of tensors: ``"log_variance"``,
            ``"variance"``, ``"scale"`` or ``"log_scale"``.

    Raises:
        ValueError: If an option is none of these.
    """

    def __init__(
        self,
        posterior: str | tuple[str, str] | Callable[[LightningModule, Any], Any] | None = None,
        second: str = "log_variance",
    ) -> None:
        paths = [posterior] if isinstance(posterior, str) else posterior if isinstance(posterior, tuple | list) else []
        is_paths = len(paths) in (1, 2) and all(isinstance(path, str) for path in paths)
        if not (posterior is None or callable(posterior) or is_paths):
            raise ValueError(
                "`posterior` must be None, a submodule's path, a pair of paths or a callable `(pl_module, batch) -> "
                f"q(z|x)`, got {posterior!r}."
            )
        if second not in _TO_SCALE:
            raise ValueError(f"`second` must be one of {', '.join(map(repr, _TO_SCALE))}, got {second!r}.")
        self.posterior = posterior
        self.second = second
        self._paths = list(paths)
        self._outputs: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []

    def attach(self, pl_module: LightningModule) -> None:
        """Watch the submodules that the paths name, until :meth:`detach`.

        Raises:
            ValueError: If a path leads nowhere.
        """
        self.detach()
        modules = [_submodule(pl_module, path) for path in self._paths]
        self._handles = [
            module.register_forward_hook(partial(self._keep, path))
            for path, module in zip(self._paths, modules, strict=True)
        ]

    def read(self, pl_module: LightningModule, batch: Any) -> Distribution:
        """Return the posterior of the batch just processed.

        Raises:
            ValueError: If the module did not produce one, or produced something else.
        """
        if callable(self.posterior):
            return as_distribution(self.posterior(pl_module, batch), self.second)
        if self.posterior is None:
            return as_distribution(self._own_posterior(pl_module), self.second)
        return as_distribution(self._watched_posterior(), self.second)

    def detach(self) -> None:
        """Remove every hook and forget what they kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._outputs = {}

    def _keep(self, path: str, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs[path] = _part(output, path)

    def _own_posterior(self, pl_module: LightningModule) -> Any:
        if not hasattr(pl_module, "posterior"):
            raise ValueError(
                f"`posterior=None` reads `{type(pl_module).__name__}.posterior`, which does not exist. Name the "
                f"submodule that outputs the posterior, one of {_names(pl_module)}, or pass a callable "
                "`(pl_module, batch) -> q(z|x)`."
            )
        return pl_module.posterior

    def _watched_posterior(self) -> Any:
        silent = [path for path in self._paths if path not in self._outputs]
        if silent:
            raise ValueError(
                f"`posterior`: {silent[0]!r} was not called in this step, so that there is no output to read. Name a "
                "submodule that is called as a whole (a step may call only a module's methods, the LightningModule's "
                "too), or pass a callable `(pl_module, batch) -> q(z|x)`."
            )
        outputs = [self._outputs.pop(path) for path in self._paths]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


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


def _names(pl_module: LightningModule) -> str:
    names = [name for name, _ in pl_module.named_modules() if name]
    return ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")


def _part(output: Any, path: str) -> Any:
    """Return the part of a submodule's output that a path names behind its colon; all of it without one."""
    part = path.partition(":")[2]
    if not part:
        return output
    try:
        if isinstance(output, Mapping):
            return output[part]
        if isinstance(output, Tensor):  # an index would pick an observation
            raise TypeError
        return output[int(part)] if part.lstrip("-").isdigit() else getattr(output, part)
    except (AttributeError, LookupError, TypeError):
        hint = " Split it: `posterior=lambda pl_module, batch: ...`." if isinstance(output, Tensor) else ""
        raise ValueError(
            f"`posterior={path!r}`: the output is {_describe(output)}, which has no {part!r}.{hint}"
        ) from None


def _describe(value: Any) -> str:
    """Say in a few words what a value is made of."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(map(_describe, value))})"
    return f"a {type(value).__name__}"
