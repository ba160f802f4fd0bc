"""A training step made into one graph by ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Literal, get_args

import torch

CompileMode = bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_MODES = (True, False, *get_args(get_args(CompileMode)[1]))


def check_mode(mode: CompileMode) -> None:
    """Raise a ValueError unless an option is a mode of compilation."""
    if not (isinstance(mode, bool) or mode in _MODES):
        raise ValueError(f"`compile` must be one of {', '.join(map(repr, _MODES))}, got {mode!r}.")


def compiled(method: Callable[..., Any], mode: CompileMode) -> Callable[..., Any]:
    """Compile a method of one object as a whole: where that can't be done there is an error, and nothing runs without.

    Args:
        method: A bound method.
        mode: ``True``, or one of torch's modes.

    Returns:
        What to call in its place. It raises a RuntimeError where there is no C++ compiler, where torch would need
        several graphs or can't compile what is done, or where it has compiled eight graphs already.
    """
    assert isinstance(method, MethodType)
    code, globals_, closure = method.__func__.__code__, method.__func__.__globals__, method.__func__.__closure__
    # What torch has compiled, and its limit, go by code object: each object gets its own.
    function = FunctionType(code.replace(), globals_, closure=closure)
    graph = torch.compile(function, fullgraph=True, mode=mode if isinstance(mode, str) else None)

    def run(*args: Any) -> Any:
        try:
            return graph(method.__self__, *args)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "`compile`: the training step needs a new graph each time, and torch gives up. Its warning above names "
                "the number or shape that changes: keep numbers in tensors, or leave `compile` out."
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"`compile`: torch can't make one graph of the training step. {error}\nMend that (for a C++ compiler "
                "that is missing, install g++), or leave `compile` out."
            ) from error

    return run
