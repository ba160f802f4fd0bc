"""Where a picture has a colour."""

import torch


def coloured(picture, colour, tolerance=30):
    """Where a picture has about this colour."""
    distance = (picture.float() - torch.tensor(colour).float().view(3, 1, 1)).abs().amax(0)
    return distance < tolerance
