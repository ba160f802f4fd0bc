"""Numbers that are none."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def parameter_not_finite(module: nn.Module) -> str | None:
    """Look for a parameter that holds a value that is infinite or no number.

    Args:
        module: What has the parameters; of those that are sharded, this process's part is looked at.

    Returns:
        The name of the first.
    """
    named = {name: _own_part(parameter) for name, parameter in module.named_parameters()}
    if not named:
        return None
    device = next(iter(named.values())).device  # one look at it for all of them
    if torch.stack([part.sum().to(device) for part in named.values()]).isfinite().all():
        return None
    # A sum may overflow where no value is infinite.
    return next((name for name, part in named.items() if not part.isfinite().all()), None)


def _own_part(parameter: Tensor) -> Tensor:
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part
