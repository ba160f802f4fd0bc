"""Evaluate the loss of a module on copies, without training it."""

from __future__ import annotations

import copy
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import is_dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from ..base import several_processes
from ..control.tied_attributes import number_place
from ..reading.distribution_reader import is_compiled

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_MOST_BYTES = 2**28  # a copy of more than 256 MiB is no longer cheap
_MOST_STEPS = 32  # of the optimizers in one batch; some training steps go on until a loss has fallen


class LossProbe:
    """Evaluate the training loss and the validation of one batch on copies of a module, and leave the module as it is.

    Buffers, counters and metrics that a step changes are changed only on a copy. Nothing reaches the loggers. Each
    evaluation begins with the same random state of torch, numpy and Python, which is restored afterwards. It is aborted
    if a copy acts on the module itself or on the Trainer. Effects outside Lightning go unnoticed, such as draws from a
    generator in another file or a logger of the module's own.

    A copy has copies of the optimizers, whose steps move nothing. So under manual optimization all losses of a training
    step are evaluated at the same parameters, and a number changes only the losses that read it.

    Args:
        trainer: The Trainer that is about to run the batch.
        pl_module: The module.
        batch: The batch, as the step receives it.
        batch_idx: Its index.
        autocast: Whether the copies compute in the mixed precision of the training step; otherwise in full precision.

    Raises:
        NotPossible: When called, if the evaluation would be expensive or unsafe.
    """

    class NotPossible(Exception):  # noqa: N818 - an answer, not an error
        """The loss can't be evaluated without side effects or considerable cost."""

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, autocast: bool = True
    ) -> None:
        self._trainer = trainer
        self._in_full = not autocast and str(trainer.precision).endswith("mixed")
        self._pl_module = pl_module
        self.batch = batch
        self._batch_idx = batch_idx

    def noise(self, losses: Sequence[float], drift: float) -> float:
        """Return the largest difference between losses that rounding and a drift between evaluations can explain."""
        precision = "32" if self._in_full else str(self._trainer.precision)
        dtypes = {"64": torch.float64, "32": torch.float32, "16": torch.float16}
        dtype = torch.bfloat16 if "bf16" in precision else dtypes.get(precision[:2], torch.bfloat16)
        return 4 * torch.finfo(dtype).eps * max(map(abs, losses)) + 4 * abs(drift)

    def __call__(
        self, values: Mapping[tuple[str, ...], float], look_on: Callable[[LightningModule], object] | None = None
    ) -> float:
        """Return the loss of a copy under automatic optimization; see :meth:`losses`."""
        [loss] = self.losses(values, look_on)
        return loss

    def losses(
        self, values: Mapping[tuple[str, ...], float], look_on: Callable[[LightningModule], object] | None = None
    ) -> tuple[float, ...]:
        """Return the loss of a copy, or under manual optimization each loss that it passes to ``manual_backward``.

        Args:
            values: Numbers to write to the copy, by their paths.
            look_on: Called with the copy before its training step.
        """
        with self._trial():
            twin = self._copy(values)
            if look_on is not None:
                look_on(twin)
            losses = self._train(twin)
            if not losses:
                raise self.NotPossible("its training step passes no loss to `manual_backward`")
            return losses

    def validation(
        self,
        trained: Mapping[tuple[str, ...], float],
        validated: Mapping[tuple[str, ...], float],
        look_on: Callable[[LightningModule], object] | None = None,
    ) -> dict[str, float]:
        """Return the numbers that a copy logs or returns in a validation step, after a training step.

        Args:
            trained: Numbers to write to the copy before its training step, by their paths.
            validated: Numbers to write to it afterwards.
            look_on: Called with the copy before its validation.
        """
        with self._trial(), torch.enable_grad():  # which a training step may need
            twin = self._copy(trained)
            self._train(twin.train())
            self._write(twin, validated)
            if look_on is not None:
                look_on(twin)
            return self._validate(twin.eval())

    @contextmanager
    def _trial(self) -> Iterator[None]:
        try:
            if reason := self._obstacle():
                raise self.NotPossible(reason)
            with _random_state_put_back(self._pl_module.device), self._originals_at_rest(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the step itself will give them
                yield
        except self.NotPossible:
            raise
        except Exception as error:
            raise self.NotPossible(f"a step of a copy raised {error!r}") from error

    def _obstacle(self) -> str | None:
        trainer, pl_module = self._trainer, self._pl_module
        modules = list(pl_module.modules())
        if several_processes(trainer) or type(trainer.strategy).__name__ != "SingleDeviceStrategy":
            return "its processes might wait for each other"
        if pl_module.device.type not in ("cpu", "cuda"):
            return "the random state of its device is not known"
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            return "its training step fetches batches"
        if any(map(is_compiled, modules)):
            return "a copy would have to be compiled"
        if any(inspect.isroutine(hook) for module in modules for hook in _hooks(module)):
            return "it has hooks, which would see the copies too"
        tensors = [*pl_module.parameters(), *pl_module.buffers()]
        size = sum(tensor.nelement() * tensor.element_size() for tensor in tensors)
        if size > _MOST_BYTES and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            return "a copy of it would be large; `Trainer(fast_dev_run=True)` makes one"
        return None

    def _train(self, twin: LightningModule) -> tuple[float, ...]:
        optimization = _Optimization(self._trainer, self._pl_module, twin)
        twin.trainer = _Onlooker(self._trainer, twin, optimization)  # type: ignore[assignment]
        batch = copy.deepcopy(self.batch)
        twin.on_train_batch_start(batch, self._batch_idx)
        with nullcontext() if self._in_full else self._trainer.precision_plugin.train_step_context():
            output = twin.training_step(*_accepted(twin.training_step, batch, self._batch_idx))
        if not twin.automatic_optimization:
            return tuple(optimization.losses)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"it returned {type(loss).__name__}")
        return (float(loss.detach()),)

    @torch.no_grad()
    def _validate(self, twin: LightningModule) -> dict[str, float]:
        log = _Log()
        _divert_logs(twin, log.log, log.log_dict)
        batch = copy.deepcopy(self.batch)
        several = [0] if len(self._trainer.num_val_batches) > 1 else []
        with self._trainer.precision_plugin.val_step_context():
            twin.on_validation_start()
            twin.on_validation_epoch_start()
            twin.on_validation_batch_start(batch, self._batch_idx)
            output = twin.validation_step(*_accepted(twin.validation_step, batch, self._batch_idx, *several))
        log.log_dict(output if isinstance(output, Mapping) else {"loss": output})
        return log.numbers

    def _write(self, twin: LightningModule, values: Mapping[tuple[str, ...], float]) -> None:
        """Write to a copy. Restore a number that copies share with the module, as in a class used as a config."""
        for paths, value in values.items():
            original, copied = number_place(self._pl_module, paths), number_place(twin, paths)
            before = original.read()
            copied.write(value)
            if copied.overwritten() is not None:
                raise self.NotPossible("the number can't be set")
            if before is not None and original.read() != before:
                original.write(before)
                raise self.NotPossible("copies share the number with the module")

    def _copy(self, values: Mapping[tuple[str, ...], float]) -> LightningModule:
        trainer = self._trainer
        shared: list[Any] = [trainer, *trainer.callbacks, *trainer.loggers]  # type: ignore[attr-defined]
        originals = {id(module) for module in self._pl_module.modules()}
        for module in self._pl_module.modules():
            shared += [value for value in _flat(vars(module)) if isinstance(value, Dataset | DataLoader)]
            shared += [value for value in vars(module).values() if hasattr(value, "train_dataloader")]  # data modules
        memo = {id(each): each for each in shared if id(each) not in originals}
        for module in self._pl_module.modules():  # graphs of an earlier step can't be copied
            memo |= {id(each): each.detach().clone() for each in _results(vars(module))}
        twin = copy.deepcopy(self._pl_module, memo)
        if originals & {id(module) for module in twin.modules()}:
            raise self.NotPossible("a submodule can't be copied")
        if any(_acts_on(originals, value) for module in twin.modules() for value in _flat(vars(module))):
            raise self.NotPossible("it keeps a function that acts on the original module even in a copy")
        _divert_logs(twin, _nothing, _nothing)
        self._write(twin, values)
        return twin

    @contextmanager
    def _originals_at_rest(self) -> Iterator[None]:
        """Abort the evaluation if a copy calls a submodule of the original module, and drop gradients that it causes.

        A backward pass of a copy may reach an original parameter, through a function that the module keeps.
        """
        originals = {id(module) for module in self._pl_module.modules()}
        gradients = [(parameter, parameter.grad) for parameter in self._pl_module.parameters()]

        def refuse(module: nn.Module, _inputs: Any) -> None:
            if id(module) in originals:
                raise self.NotPossible("a copy acts on the module itself")

        handle = register_module_forward_pre_hook(refuse)
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            handle.remove()
            for parameter, gradient in gradients:
                parameter.grad = gradient


class _Optimization:
    """Copies of the optimizers and learning rate schedulers for a copy of a module, and the losses of its step."""

    def __init__(self, trainer: Trainer, original: LightningModule, twin: LightningModule) -> None:
        self._trainer = trainer
        self._original = original
        self._twin = twin
        self._steps_left = _MOST_STEPS
        self.losses: list[float] = []

    @cached_property
    def _copies(self) -> tuple[list[Any], list[Any]]:
        parameters = zip(self._original.parameters(), self._twin.parameters(), strict=True)
        memo: dict[int, Any] = {id(one): other for one, other in parameters}
        copies: Any = copy.deepcopy((self._trainer.optimizers, self._trainer.lr_scheduler_configs), memo)
        for optimizer in copies[0]:
            optimizer.step = self._step
            optimizer.optimizer = optimizer  # this and the next, as in Lightning's wrapper of an optimizer
            optimizer.toggle_model = partial(self._toggle_model, optimizer)
        return copies  # type: ignore[no-any-return]

    @property
    def optimizers(self) -> list[Any]:
        return self._copies[0]

    _lightning_optimizers = optimizers

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        return self._copies[1]

    def backward(self, loss: Tensor, _optimizer: Any = None, *args: Any, **kwargs: Any) -> None:
        self.losses.append(float(loss.detach()))
        if loss.requires_grad:  # a trial in validation has no gradients
            self._twin.backward(loss, *args, **kwargs)

    def _step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        if not self._steps_left:
            raise LossProbe.NotPossible(f"its optimizers take more than {_MOST_STEPS} steps in a batch")
        self._steps_left -= 1
        return closure() if closure is not None else None

    @contextmanager
    def _toggle_model(self, optimizer: Any, sync_grad: bool = True) -> Iterator[None]:  # noqa: ARG002
        self._twin.toggle_optimizer(optimizer)
        yield
        self._twin.untoggle_optimizer(optimizer)


class _Onlooker:
    """A read-only view of the Trainer, or of its strategy, without the parts that a copy must not touch."""

    _BARRED = ("optimizer", "lr_scheduler", "fit_loop", "save_checkpoint", "backward")

    def __init__(self, of: Any, twin: LightningModule, optimization: _Optimization) -> None:
        self._of = of
        self._twin = twin
        self._optimization = optimization

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._of)  # some modules check the type

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizers", "_lightning_optimizers", "lr_scheduler_configs", "backward"):
            return getattr(self._optimization, name)
        if any(barred in name for barred in self._BARRED):
            raise LossProbe.NotPossible(f"it uses `{name}` of the Trainer")
        if name in ("lightning_module", "model"):
            return self._twin
        value = getattr(self._of, name)
        if name == "strategy":
            return _Onlooker(value, self._twin, self._optimization)
        if name == "callbacks":
            return list(value)
        if name == "loggers":
            return [_Nothing() for _ in value]
        return _Nothing() if name == "logger" and value is not None else value


class _Nothing:
    """A logger that accepts every call and does nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self


class _Log:
    """The numbers that a copy logs."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        with suppress(Exception):  # not a single number
            if isinstance(value, Metric):
                value = value.compute() if value.update_called else None
            self.numbers[name] = float(value)

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in dictionary.items():
            self.log(name, value)


def _divert_logs(twin: LightningModule, log: Callable[..., None], log_dict: Callable[..., None]) -> None:
    for module in twin.modules():
        if hasattr(module, "log_dict"):
            module.log, module.log_dict = log, log_dict  # type: ignore[assignment]


def _accepted(step: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Return as many of the arguments as a function accepts, as Lightning does."""
    try:
        inspect.signature(step).bind(*arguments)
    except TypeError:
        return arguments[:1]
    return arguments


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def _acts_on(originals: set[int], value: Any) -> bool:
    """Return whether a value is a function bound to the original module: compiled, or with it in its closure."""
    if not inspect.isfunction(value):
        return False
    cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    return hasattr(value, "_torchdynamo_orig_callable") or any(id(content) in originals for content in cells)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _flat(values: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the values, and the contents of any containers among them."""
    for name, value in values.items():
        if name in ("_modules", "_parameters", "_buffers"):
            continue
        yield value
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple | set):
            yield from value


def _results(value: Any, depth: int = 5) -> Iterator[Tensor]:
    """Yield the results of computations with a graph in containers, distributions and dataclasses."""
    if isinstance(value, Tensor) and not value.is_leaf:
        yield value
    if isinstance(value, Distribution) or is_dataclass(value):
        value = getattr(value, "__dict__", {})
    if isinstance(value, Mapping):
        value = list(value.values())
    for each in value if depth and isinstance(value, list | tuple | set) else ():
        yield from _results(each, depth - 1)


@contextmanager
def _random_state_put_back(device: torch.device) -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")  # if it is not imported, nothing draws from it
    python, array = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(array)


def _nothing(*_: Any, **__: Any) -> None:
    pass
