"""Read a distribution, q(z|x) or p(z), of any LightningModule during training or validation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .distributions import (
    Second,
    as_distribution,
    check_form,
    describe,
    is_pair,
    is_sequence,
    is_several,
    pair_error,
    widened,
)
from .isolated_eval import is_extra_pass, isolated
from .module_call import part_of_output

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from torch.utils.hooks import RemovableHandle


_SYMBOLS = {"posterior": "q(z|x)", "prior": "p(z)", "z": "z"}


class Call(NamedTuple):
    """One call of a watched submodule.

    Attributes:
        output: What it returned.
        inputs: Its arguments and keyword arguments.
    """

    output: Any
    inputs: tuple[Any, ...]


class DistributionReader:
    """Read the posteriors of the batch that a LightningModule has just processed, without a forward pass of its own.

    A forward hook keeps the outputs of the named submodules, from :meth:`listen` at the start of a step to :meth:`read`
    (or :meth:`forget`) at its end. A submodule that is called several times in a step, for example once for each view,
    gives as many posteriors. Calls that are not the batch's do not count: those whose inputs are the module's own
    parameters or buffers, or in training are computed from them, such as the pseudo-inputs of a VampPrior; those made
    within a submodule named ``prior`` or by a prior's ``log_prob`` (see :meth:`of_others`); and, where calls differ in
    their number of observations, those that don't have the batch's. Nor do outputs that activation checkpointing
    recomputes in the backward pass, except under
    ``torch.compile``.

    Args:
        posterior: Where the posterior is.

            - ``None``: the module's own attribute ``posterior``.
            - A path: the output of that submodule (``"encoder"``, ``"model.encoder"``), or a part of it after a colon:
              indices, keys and fields with dots between them (``"encoder:0"``, ``"vae:latent_dist.mean"``).
              Where there is no submodule of that name, the module's attribute, as it is at the end of the step; it
              must exist when fitting starts.
            - A pair of paths: the mean and the second parameter (``("fc_mu", "fc_var")``, ``("model:2", "model:3")``).
            - A callable ``(pl_module, batch) -> q(z|x)``. It is called without gradients, in the module's mode, and
              before the optimizer's step: see :meth:`capture`. It moves neither buffers, such as the statistics of a
              batch normalisation, nor the random state.

            A path gives one posterior per call. The attribute and the callable may also give several, as a list or
            tuple of distributions or of pairs of tensors.
        second: Meaning of the second parameter if the posterior is a pair of tensors: ``"log_variance"``,
            ``"variance"``, ``"scale"`` or ``"log_scale"``, or a function that turns it into the scale.
        chunk: If the posterior is one tensor, the axis along which it is split into halves, the mean and the second
            parameter. 1 for ``(N, 2k)`` and ``(N, 2k, H, W)``, -1 for ``(N, T, 2k)`` and ``(N, k, 2)``.
        option: Name of the option that says where, for errors.
        keeps_graph: Whether a callable is called with gradients.

    Raises:
        ValueError: If an option is none of these.
    """

    def __init__(
        self,
        posterior: str | Sequence[str] | Callable[[LightningModule, Any], Any] | None = None,
        second: Second = "log_variance",
        chunk: int | None = None,
        option: str = "posterior",
        keeps_graph: bool = False,
    ) -> None:
        paths = [posterior] if isinstance(posterior, str) else posterior if is_sequence(posterior) else []
        is_paths = len(paths) in (1, 2) and all(isinstance(path, str) for path in paths)
        if not (posterior is None or callable(posterior) or is_paths):
            raise ValueError(
                f"`{option}` must be None, a submodule's path, a pair of paths or a callable `(pl_module, batch) -> "
                f"{_SYMBOLS.get(option, 'value')}`, got {posterior!r}."
            )
        check_form(second, chunk)
        if chunk is not None and len(paths) == 2:
            raise ValueError(f"`chunk` splits one tensor; with the pair `{option}={posterior!r}` leave it out.")
        self.posterior = list(paths) if is_sequence(posterior) and not isinstance(posterior, tuple) else posterior
        self.second = second
        self.chunk = chunk
        self.option = option
        self._keeps_graph = keeps_graph
        self.paths = list(paths)
        self._outputs: dict[str, list[Call]] | None = None  # this step's calls, by path; None between steps
        self._attributes: set[str] = set()  # the paths that lead to no submodule
        self._within_prior = 0  # depth of calls
        self._latest: list[list[Tensor]] = []  # inputs of the calls just read, if there were several
        self._asked: list[list[Tensor]] | None = None  # of an extra pass, while they are wanted
        self._is_asked = True  # whether extra passes of :meth:`of_others` call the submodules at all
        self._batch: Any = None  # of this step, for a callable
        self._captured: list[Any] | None = None  # a callable's values of this step
        self._has_checked = False
        self._handles: list[RemovableHandle] = []
        self._has_heard = False

    def __getstate__(self) -> dict[str, Any]:
        # A module that is copied within a step may hold the callback that reads it. The graphs of the outputs can't be
        # copied, and the hooks stay with the module.
        idle: dict[str, Any] = dict.fromkeys(("_outputs", "_batch", "_captured"))
        idle |= {"_handles": [], "_latest": [], "_within_prior": 0}
        return {**vars(self), **idle}

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
        if not (self._handles or self._attributes):
            modules = {path: _watchable(pl_module, path, self.option, self.paths) for path in self.paths}
            self._attributes = {path for path, module in modules.items() if module is None}
            self._handles = [
                module.register_forward_hook(_Hook(self._keep, path), with_kwargs=True)
                for path, module in modules.items()
                if module is not None
            ]
            for prior in _priors(pl_module, self.paths) if self.option != "prior" else ():
                self._handles += [
                    prior.register_forward_pre_hook(_Hook(self._enter_prior)),
                    prior.register_forward_hook(_Hook(self._leave_prior), always_call=True),
                ]
        self._outputs, self._within_prior = {path: [] for path in self.paths}, 0

    def forget(self) -> None:
        """Keep nothing until the next :meth:`listen`, at the end of a step."""
        self._outputs = self._batch = self._captured = None
        self._latest = []

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
        return self.read_with_samples(pl_module, batch)[0]

    def read_with_samples(
        self, pl_module: LightningModule, batch: Any
    ) -> tuple[list[Distribution], list[Tensor | None]]:
        """Return the same as :meth:`read`, and the sample beside each distribution in an output ``(Normal, z)``."""
        values = self.values(pl_module, batch)
        check, self._has_checked = not self._has_checked, self._has_checked or bool(values)
        try:
            read = [as_distribution(widened(value), self.second, self.chunk, check, self.option) for value in values]
        except ValueError as error:
            raise ValueError(f"`{self.option}={self.key!r}`: {error}") from None
        return read, [_sample_beside(value, each) for value, each in zip(values, read, strict=True)]

    def values(self, pl_module: LightningModule, batch: Any) -> list[Any]:
        """Return the same as :meth:`read` as the module made it, before it is converted.

        Raises:
            ValueError: If the module did not produce one.
        """
        if self.paths:
            return self._watched(pl_module, batch)
        if callable(self.posterior):
            values = self._called(pl_module, batch) if self._captured is None else self._captured
            self._batch = self._captured = None
            return values
        return _separate(_own_posterior(pl_module))

    def of_others(self, prior_calls: Callable[[], object]) -> list[int]:
        """Return the numbers of the calls just read that are made by the prior: calls with equal inputs.

        Args:
            prior_calls: Evaluates the prior in an extra pass, in which it may call the submodules itself.
        """
        latest, self._latest = self._latest, []
        if not latest or not self._is_asked:
            return []
        self._asked = []
        try:
            prior_calls()
        finally:
            asked, self._asked = self._asked, None
        self._is_asked = bool(asked)
        return [n for n, inputs in enumerate(latest) if any(_are_equal(inputs, other) for other in asked)]

    def unhook(self) -> None:
        """Remove every hook until the next :meth:`listen`; a module saved as an object would otherwise contain them.

        If a step has begun and has not called the submodules yet, the hooks stay.
        """
        if self._outputs is not None and not all(self._outputs[path] for path in {*self.paths} - self._attributes):
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self._attributes = [], set()

    def detach(self) -> None:
        """Remove every hook and forget the outputs."""
        self.forget()
        self.unhook()
        self._has_checked, self._is_asked = False, True

    def _called(self, pl_module: LightningModule, batch: Any) -> list[Any]:
        assert callable(self.posterior)
        with isolated(pl_module, self._keeps_graph):
            return _separate(self.posterior(pl_module, batch))

    def _keep(self, path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._asked is not None and path == self.paths[0]:
            self._asked.append(list(_tensors((args, kwargs))))
        if self._within_prior or self._outputs is None or is_extra_pass():
            return
        if torch.compiler.is_compiling() or not _in_backward():
            self._outputs[path].append(Call(output, (args, kwargs)))

    def _enter_prior(self, *_: Any) -> None:
        self._within_prior += 1

    def _leave_prior(self, *_: Any) -> None:
        self._within_prior -= 1

    def _watched(self, pl_module: LightningModule, batch: Any) -> list[Any]:
        if self._has_heard and self._outputs is not None and not (any(self._outputs.values()) or self._attributes):
            return []
        outputs, self._outputs = self._outputs or {}, None
        for path in self._attributes:
            outputs[path] = [Call(_attribute(pl_module, path), ())]
        for path in self.paths:
            if not outputs.get(path):
                raise ValueError(_silent(pl_module, path, self.option))
        self._has_heard = True
        if self.option != "prior":
            outputs = {path: _of_batch(calls, pl_module, batch) for path, calls in outputs.items()}
        first = outputs[self.paths[0]]
        self._latest = [[each.detach() for each in _tensors(call.inputs)] for call in first if len(first) > 1]
        kept = [[call.output for call in outputs[path]] for path in self.paths]
        counts = [len(calls) for calls in kept]
        if len(set(counts)) > 1:
            raise ValueError(
                f"`{self.option}`: {self.paths[0]!r} was called {counts[0]} times in this step and {self.paths[1]!r} "
                f"{counts[1]} times, so their outputs don't pair up. Pass a callable `(pl_module, batch) -> "
                f"{_SYMBOLS.get(self.option, 'value')}`."
            )
        parts = [
            [part_of_output(output, path, self.option) for output in calls]
            for calls, path in zip(kept, self.paths, strict=True)
        ]
        if len(parts) == 2:
            return list(zip(*parts, strict=True))
        for value in parts[0]:
            if is_pair(value) and value[0].shape != value[1].shape:  # `(z, kl)`, or a recurrent network's state
                raise pair_error(value, self.second, self.option)
        return parts[0]


class _Hook(partial):  # type: ignore[type-arg]
    """A forward hook. In a copied or pickled module it does nothing, and needs nothing of this package."""

    def __reduce__(self) -> Any:
        return partial, (nullcontext().__exit__,)  # which takes any arguments and returns None


def _sample_beside(value: Any, distribution: Distribution) -> Tensor | None:
    """Return the one tensor beside a distribution that may be its sample, by its shape."""
    if not is_sequence(value) or not any(isinstance(each, Distribution) for each in value):
        return None
    shape = distribution.batch_shape + distribution.event_shape
    samples = [each for each in value if isinstance(each, Tensor) and each.shape == shape]
    return samples[0] if len(samples) == 1 else None


def _separate(value: Any) -> list[Any]:
    """Return the distributions of a value that holds one or several."""
    return list(value) if is_several(value) else [value]


def _own_posterior(pl_module: LightningModule) -> Any:
    own = getattr(pl_module, "posterior", None)
    if not hasattr(pl_module, "posterior") or callable(own):
        reason = f"is {describe(own)}" if callable(own) else "does not exist"
        raise ValueError(
            f"`posterior=None` reads `{type(pl_module).__name__}.posterior`, which {reason}. Name the submodule that "
            f"outputs the posterior, one of {names(pl_module)}, or pass a callable `(pl_module, batch) -> q(z|x)`."
        )
    return own


def _in_backward() -> bool:
    """Return whether this is the backward pass, where activation checkpointing calls modules a second time."""
    return torch._C._current_graph_task_id() != -1


def _of_batch(calls: list[Call], pl_module: LightningModule, batch: Any) -> list[Call]:
    """Leave out the calls whose inputs are not the batch's."""
    if len(calls) == 1:
        return calls
    own = {each.data_ptr() for each in (*pl_module.parameters(), *pl_module.buffers()) if each.numel()}
    calls = [call for call in calls if not _are_all_own(call.inputs, own)] or calls
    # Data have no gradient; inputs that are computed from parameters have one.
    calls = [call for call in calls if not any(each.requires_grad for each in _tensors(call.inputs))] or calls
    rows = next((len(each) for each in _tensors(batch) if each.ndim), None)
    of_batch = [call for call in calls if any(len(each) == rows for each in _tensors(call.inputs) if each.ndim)]
    return of_batch or calls


def _are_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))


def _are_all_own(inputs: Any, own: set[int]) -> bool:
    given = [each for each in _tensors(inputs) if each.is_floating_point() and each.numel()]
    return bool(given) and all(each.data_ptr() in own for each in given)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping) or is_sequence(value):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _priors(pl_module: LightningModule, paths: Sequence[str]) -> list[nn.Module]:
    """Return the submodules named ``prior`` or ``prior_module``, but for those that the paths lead to or through."""
    watched = [path.partition(":")[0] for path in paths]
    return [
        module
        for name, module in pl_module.named_modules()
        if name.rpartition(".")[2] in ("prior", "prior_module")
        and not any(f"{path}.".startswith(f"{name}.") for path in watched)
    ]


def _watchable(pl_module: LightningModule, path: str, option: str, paths: Sequence[str] = ()) -> nn.Module | None:
    """Return the submodule that a path leads to; ``None`` for another attribute, which is read when a step ends.

    ``paths`` are all that the option names, for the error.

    Raises:
        ValueError: If the path leads nowhere.
    """
    name = path.partition(":")[0]
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        if _attribute(pl_module, name, missing=pl_module) is not pl_module:
            return None
        known = [each for each, _ in pl_module.named_modules(remove_duplicate=False) if each]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"`{option}`: {type(pl_module).__name__} has no submodule {name!r}. "
            + (f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It has {names(pl_module)}.")
            + f" For an attribute that a step sets first, write `{option}={_as_callable(paths or [path])}`."
        ) from None


def _as_callable(paths: Sequence[str]) -> str:
    """Return the code of a callable that reads what paths lead to."""
    places = []
    for path in paths:
        name, _, part = path.partition(":")
        parts = (f"[{each}]" if each.lstrip("-").isdigit() else f".{each}" for each in part.split(".") if each)
        places.append(f"pl_module.{name}{''.join(parts)}")
    return f"lambda pl_module, batch: {places[0] if len(places) == 1 else '(' + ', '.join(places) + ')'}"


def _attribute(pl_module: LightningModule, path: str, missing: Any = None) -> Any:
    try:
        return reduce(getattr, path.partition(":")[0].split("."), pl_module)
    except AttributeError:
        return missing


def _silent(pl_module: LightningModule, path: str, option: str) -> str:
    """Return the error message for a hook that has not fired: likely reasons and a remedy."""
    if hasattr(_watchable(pl_module, path, option), "training_step"):
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
        f"`{option}`: {path!r} was not called in this step, so there is no output to read. {why} Name a "
        f"submodule whose output is the {option}, one of {names(pl_module)}, or pass a callable "
        f"`(pl_module, batch) -> {_SYMBOLS.get(option, 'value')}`."
    )


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module, or one of its methods, has been compiled."""
    # The names are those of a LightningModule, of `torch.compile(module)` and of `module.compile()`.
    return any(getattr(module, name, None) for name in ("_compiler_ctx", "_orig_mod", "_compiled_call_impl"))


def names(pl_module: LightningModule) -> str:
    """Return the paths of the submodules, for an error."""
    paths = sorted((name for name, _ in pl_module.named_modules() if name), key=lambda name: name.count("."))
    return ", ".join(map(repr, paths[:20])) + (", ..." if len(paths) > 20 else "")
