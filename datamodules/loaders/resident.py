"""Keep a data set where it is used."""

from collections.abc import Mapping

import torch
from torch import Tensor

FREE_SHARE = 0.25  # of the memory that is free as a loader is made: the optimizer and the activations come later


def resident(tensors: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """Return a set as it lies on a GPU, if it takes at most a quarter of the memory that is free there.

    Args:
        tensors: Tensors by name.
        device: What will work on them. Anything but a GPU of NVIDIA or AMD gets them as they are.
    """
    if device.type != "cuda":
        return tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return {name: tensor.to(device) for name, tensor in tensors.items()}
