"""Encoders and decoders, which know only shapes: no loss, no distribution, no Lightning.

Your own network needs only the same constructor, ``Encoder(shape, latent_dim, ...)`` or
``Decoder(latent_dim, shape, ...)``, and the same output: an encoder returns the pair (mean, log-variance), each
``(B, latent_dim)``, or both in one tensor of ``2 * latent_dim`` columns; a decoder returns the likelihood's parameter,
``(B, *shape)``. In a conditional model the constructors get ``condition_dim`` too, and the networks are called with
``(x, c)`` and ``(z, c)``. Under a posterior head the encoder gets ``outputs``, the number of columns to return.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, cat, nn, zeros

from .checks import check_number, integer_from

Shape = tuple[int, ...]
Activation = Literal["relu", "tanh"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class LinearEncoder(nn.Module):
    """Encode by a linear map, with one log-variance per latent dimension, shared by all observations.

    With :class:`LinearDecoder` and a Gaussian likelihood this is the linear VAE, whose optimum is known in closed form
    (Lucas et al., "Don't Blame the ELBO!", NeurIPS 2019).

    Args:
        shape: Shape of one observation.
        latent_dim: Number of latent dimensions.
        condition_dim: Size of the condition c, 0 without.
        outputs: Columns to return, for a posterior head; ``None`` for the mean and the log-variance.
    """

    def __init__(self, shape: Shape, latent_dim: int, condition_dim: int = 0, outputs: int | None = None) -> None:
        super().__init__()
        self.mean = nn.Linear(math.prod(shape) + condition_dim, outputs or latent_dim)
        self.log_variance = None if outputs else nn.Parameter(zeros(latent_dim))

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """Map ``(B, *shape)`` to the mean and the log-variance, each ``(B, latent_dim)``; or to the outputs."""
        features = x.flatten(1)
        mean: Tensor = self.mean(features if c is None else _joined(features, c))
        return mean if self.log_variance is None else (mean, self.log_variance.expand_as(mean))


class LinearDecoder(nn.Module):
    """Decode by a linear map.

    Args:
        latent_dim: Number of latent dimensions.
        shape: Shape of one observation.
        condition_dim: Size of the condition c, 0 without.
    """

    def __init__(self, latent_dim: int, shape: Shape, condition_dim: int = 0) -> None:
        super().__init__()
        self.map = nn.Linear(latent_dim + condition_dim, math.prod(shape))
        self.shape = tuple(shape)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, latent_dim)`` to ``(B, *shape)``."""
        output: Tensor = self.map(z if c is None else _joined(z, c)).unflatten(1, self.shape)
        return output


class MLPEncoder(nn.Module):
    """Encode by fully connected layers.

    Args:
        shape: Shape of one observation.
        latent_dim: Number of latent dimensions.
        hidden: Widths of the hidden layers, in order.
        activation: What follows each hidden layer, ``"relu"`` or ``"tanh"``.
        condition_dim: Size of the condition c, 0 without.
        outputs: Columns to return, for a posterior head; ``None`` for the mean and the log-variance.

    Raises:
        ValueError: On another activation, or a width below 1.
    """

    def __init__(
        self,
        shape: Shape,
        latent_dim: int,
        hidden: Sequence[int] = (400,),
        activation: Activation = "relu",
        condition_dim: int = 0,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = _mlp([math.prod(shape) + condition_dim, *hidden, outputs or 2 * latent_dim], activation)
        self.is_split = outputs is None

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        """Map ``(B, *shape)`` to the mean and the log-variance, each ``(B, latent_dim)``; or to the outputs."""
        features = x.flatten(1)
        output: Tensor = self.layers(features if c is None else _joined(features, c))
        return output.chunk(2, dim=1) if self.is_split else output


class MLPDecoder(nn.Module):
    """Decode by fully connected layers.

    Args:
        latent_dim: Number of latent dimensions.
        shape: Shape of one observation.
        hidden: Widths of the hidden layers, in order.
        activation: What follows each hidden layer, ``"relu"`` or ``"tanh"``.
        condition_dim: Size of the condition c, 0 without.

    Raises:
        ValueError: On another activation, or a width below 1.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Shape,
        hidden: Sequence[int] = (400,),
        activation: Activation = "relu",
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        self.layers = _mlp([latent_dim + condition_dim, *hidden, math.prod(shape)], activation)
        self.shape = tuple(shape)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, latent_dim)`` to ``(B, *shape)``."""
        output: Tensor = self.layers(z if c is None else _joined(z, c)).unflatten(1, self.shape)
        return output


class ConvEncoder(nn.Module):
    """Encode images of any size by stride-2 convolutions and one fully connected layer.

    Args:
        shape: Channels, height and width of one image.
        latent_dim: Number of latent dimensions.
        channels: Channels of each convolution; each halves height and width, rounding up.
        hidden: Width of the fully connected layer.
        condition_dim: Size of the condition c, 0 without. It joins the features of the last convolution.
        outputs: Columns to return, for a posterior head; ``None`` for the mean and the log-variance.

    Raises:
        ValueError: If the observations are not images, or a width is below 1.
    """

    def __init__(
        self,
        shape: Shape,
        latent_dim: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        condition_dim: int = 0,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        sizes = _conv_sizes(shape, channels, hidden)
        layers: list[nn.Module] = []
        for previous, current in pairwise([shape[0], *channels]):
            layers += [nn.Conv2d(previous, current, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        features = channels[-1] * math.prod(sizes[-1]) + condition_dim
        last = nn.Linear(hidden, outputs or 2 * latent_dim)
        self.layers = _Layers(*layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), last)
        self.is_split = outputs is None

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        """Map ``(B, *shape)`` to the mean and the log-variance, each ``(B, latent_dim)``; or to the outputs."""
        output: Tensor = self.layers(x, c)
        return output.chunk(2, dim=1) if self.is_split else output


class _Layers(nn.Sequential):
    """Layers in turn; the condition joins what has been flattened."""

    # As further channels of the image it would outweigh the image in the first layer.
    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x)
            if c is not None and isinstance(layer, nn.Flatten):
                x = _joined(x, c)
        return x


class ConvDecoder(nn.Module):
    """Decode to images of any size: the mirror image of :class:`ConvEncoder`.

    Args:
        latent_dim: Number of latent dimensions.
        shape: Channels, height and width of one image.
        channels: Channels of each transposed convolution, in :class:`ConvEncoder`'s order: they are used from last to
            first.
        hidden: Width of the fully connected layer.
        condition_dim: Size of the condition c, 0 without.

    Raises:
        ValueError: If the observations are not images, or a width is below 1.
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Shape,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        sizes = _conv_sizes(shape, channels, hidden)
        layers: list[nn.Module] = [
            nn.Linear(latent_dim + condition_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, channels[-1] * math.prod(sizes[-1])),
            nn.ReLU(),
            nn.Unflatten(1, (channels[-1], *sizes[-1])),
        ]
        widths = [shape[0], *channels]
        for stage in range(len(channels), 0, -1):
            (height, width), (small_height, small_width) = sizes[stage - 1], sizes[stage]
            # The output size of a stride-2 transposed convolution may be odd or even; this picks the encoder's.
            padding = (height - 2 * small_height + 1, width - 2 * small_width + 1)
            layers += [
                nn.ConvTranspose2d(
                    widths[stage], widths[stage - 1], kernel_size=3, stride=2, padding=1, output_padding=padding
                ),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, latent_dim)`` to ``(B, *shape)``."""
        output: Tensor = self.layers(z if c is None else _joined(z, c))
        return output


def _joined(features: Tensor, c: Tensor) -> Tensor:
    """Append the condition to features along their second axis."""
    return cat([features, c.to(features)], dim=1)


def _mlp(widths: Sequence[int], activation: str) -> nn.Sequential:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"`activation` must be 'relu' or 'tanh', got {activation!r}.")
    _check_widths("hidden", widths[1:-1])
    layers: list[nn.Module] = []
    for previous, current in pairwise(widths):
        layers += [nn.Linear(previous, current), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def _check_widths(name: str, widths: Sequence[int]) -> None:
    check_number(name, list(widths), "at least 1", lambda numbers: all(map(integer_from(1), numbers)))


def _conv_sizes(shape: Shape, channels: Sequence[int], hidden: int) -> list[tuple[int, int]]:
    """Return the height and width before the first convolution and after each one."""
    if len(shape) != 3:
        raise ValueError(
            f"A convolutional network needs images of shape (channels, height, width), got {tuple(shape)}; "
            "use MLPEncoder and MLPDecoder for vectors."
        )
    if not channels:
        raise ValueError("`channels` must list the channels of at least one convolution, got none.")
    _check_widths("channels", channels)
    _check_widths("hidden", [hidden])
    sizes = [(shape[1], shape[2])]
    for _ in channels:
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes
