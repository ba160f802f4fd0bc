"""Whether observations are images, and how they are shown."""

from __future__ import annotations

from torch import Tensor

_SMALLEST = 4  # pixels: what is narrower than that on a side is a vector in disguise
_NARROWEST = 8  # pixels without an axis of channels: what is narrower is a sequence of vectors
_CHANNELS = (1, 3, 4)


def as_images(values: Tensor) -> Tensor | None:
    """Return observations as grey or colour images, or ``None`` where they are none.

    Images are ``(N, C, H, W)``, ``(N, H, W, C)`` with one, three or four channels, or ``(N, H, W)`` of at least
    8 pixels a side; of a volume or a clip, ``(N, C, D, H, W)``, ``(N, D, C, H, W)`` or ``(N, D, H, W, C)``, it is the
    middle slice. A fourth channel is left out, and any other number of channels is averaged to grey.

    Args:
        values: Observations, the first axis of which counts them.

    Returns:
        Images of shape ``(N, 1, H, W)`` or ``(N, 3, H, W)``; ``None`` for vectors.
    """
    if values.ndim == 5:
        slices_first = values.shape[1] not in _CHANNELS and not {values.shape[2], values.shape[4]}.isdisjoint(_CHANNELS)
        axis = 1 if slices_first else 2
        values = values.select(axis, values.shape[axis] // 2)
    if values.ndim == 3:
        if min(values.shape[1:]) < _NARROWEST:
            return None
        values = values.unsqueeze(1)
    if values.ndim != 4:
        return None
    if values.shape[-1] in _CHANNELS and values.shape[1] not in _CHANNELS:
        values = values.movedim(-1, 1)
    if min(values.shape[2:]) < _SMALLEST:
        return None
    channels = values.shape[1]
    if channels == 4:
        return values[:, :3]
    return values if channels in (1, 3) else values.mean(1, keepdim=True)
