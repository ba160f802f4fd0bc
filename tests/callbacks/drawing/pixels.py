"""Find the pixels of a colour in a picture."""

import torch


def coloured(picture, colour, tolerance=30):
    """Return a mask of the pixels that are close to a colour."""
    distance = (picture.float() - torch.tensor(colour).float().view(3, 1, 1)).abs().amax(0)
    return distance < tolerance
