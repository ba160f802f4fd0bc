"""Numbers that are none."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def refuse_not_finite(module: nn.Module) -> None:
    """Raise if a parameter holds a value that is infinite or no number.

    Args:
        module: What has the parameters.

    Raises:
        FloatingPointError: If one does; it names the first.
    """
    named = dict(module.named_parameters())
    # One look at the device for all of them.
    finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
    if not all(finite):
        raise FloatingPointError(
            f"The parameter `{list(named)[finite.index(False)]}` holds values that are not finite numbers, so nothing "
            "is saved; the checkpoints saved before are as they were."
        )
