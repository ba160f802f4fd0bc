"""Which positions of latents are real, and which are padding."""

from __future__ import annotations

from torch import Tensor


def mask_like(mask: Tensor, latents: Tensor) -> Tensor:
    """Give a mask of observations' positions the shape of their latents.

    Args:
        mask: True, or not 0, where a position is real: of the latents' shape, or of that of some of their axes after
            the first, in their order: ``(N, T)`` for latents ``(N, T, C)`` and ``(N, C, T)``.
        latents: Latents of shape ``(N, ...)``.

    Raises:
        ValueError: If the mask fits no axes of the latents, or several.
    """
    shape = latents.shape
    mask = mask.to(latents.device).bool()
    if mask.ndim == len(shape) and all(a in (1, b) for a, b in zip(mask.shape, shape, strict=True)):
        return mask.expand(shape)
    places = range(1, len(shape) - mask.ndim + 2) if mask.shape[:1] == shape[:1] else ()
    fits = [first for first in places if mask.shape[1:] == shape[first : first + mask.ndim - 1]]
    if len(fits) != 1:
        raise ValueError(
            f"`mask` must have the shape of the latents, {tuple(shape)}, or that of the observations and of the axes "
            f"of their positions, got {tuple(mask.shape)}"
            + (", which fits several axes. Give it the shape of the latents." if fits else ".")
        )
    before, after = fits[0] - 1, len(shape) - fits[0] - mask.ndim + 1
    return mask.reshape(mask.shape[:1] + (1,) * before + mask.shape[1:] + (1,) * after).expand(shape)
