"""A training loss compiled to one graph by ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Literal, get_args

import torch

CompileMode = bool | Literal["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_MODES = (True, False, *get_args(get_args(CompileMode)[1]))


class CompiledMethod:
    """A method of one object, compiled to one graph at the first call. A copy compiles its own graph.

    Args:
        mode: ``True``, or one of torch's modes; ``False`` for an object that is never called.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: CompileMode) -> None:
        if not (isinstance(mode, bool) or mode in _MODES):
            raise ValueError(f"`compile` must be one of {', '.join(map(repr, _MODES))}, got {mode!r}.")
        self.mode = mode
        self._graph: Callable[..., Any] | None = None

    def __call__(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call the method.

        Args:
            method: The same bound method each time.
            *args: Its arguments.

        Raises:
            RuntimeError: If there is no C++ compiler, torch can't make one graph of the method, or the method needs
                more than eight graphs. Nothing runs uncompiled.
        """
        if self._graph is None:
            self._graph = self._compile(method)
        try:
            return self._graph(method.__self__, *args)  # type: ignore[attr-defined]
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "`compile`: the training step needs a new graph each time, and torch gives up. Its warning above names "
                "the number or shape that changes. Keep numbers in tensors, or remove `compile`."
            ) from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"`compile`: torch can't make one graph of the training step. {error}\nFix that (install g++ if the "
                "C++ compiler is missing), or remove `compile`."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"mode": self.mode, "_graph": None}

    def _compile(self, method: Callable[..., Any]) -> Callable[..., Any]:
        assert isinstance(method, MethodType)
        code, globals_, closure = method.__func__.__code__, method.__func__.__globals__, method.__func__.__closure__
        # torch stores its graphs, and limits their number, per code object. Each instance gets its own code object.
        function = FunctionType(code.replace(), globals_, closure=closure)
        return torch.compile(function, fullgraph=True, mode=self.mode if isinstance(self.mode, str) else None)
