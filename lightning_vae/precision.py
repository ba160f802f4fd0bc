"""What keeps a likelihood's own numbers in float32 where a module is cast to half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap what ``nn.Module._apply`` applies to each tensor: moves as ``fn`` does, but not to half precision."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        if applied.dtype in (torch.bfloat16, torch.float16) and applied.dtype != tensor.dtype:
            return tensor.to(applied.device)
        return applied

    return apply
