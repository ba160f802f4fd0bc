"""The likelihood of a table's row, whose columns are of different kinds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..checks import check_number, integer_from
from ..networks import Shape
from .base import Likelihood, check_integers
from .categorical import Classes
from .counts import negative_binomial
from .gaussian import Gaussian

_KINDS = ("numeric", "binary", "count")


class Columns(Likelihood):
    """Independent columns of a table's row, each of a kind of its own.

    - ``"numeric"``: a real number. Gaussian, with a learned variance for each column; the decoder gives the mean.
    - ``"binary"``: 0 or 1. Bernoulli; the decoder gives the logit.
    - ``"count"``: 0, 1, 2 and so on. Negative binomial, with a learned dispersion for each column; the decoder gives
      the logarithm of the mean.
    - an integer n: a class from 0 to n - 1. Categorical; the decoder gives n logits.

    A row holds one number for each column, in the table's own units, and so do its density, its mean and its samples.
    The decoder works in standardised units: ``loc`` and ``scale`` convert between them. They are buffers, so a
    checkpoint holds them. The mean of a column of classes is its most probable class.

    Args:
        shape: Shape of one row, ``(columns,)``.
        levels: Must be ``None``: the columns have levels of their own.
        kinds: The kind of each column, as above.

    Attributes:
        loc: What is subtracted from each numeric column, shape ``(columns,)``; 0 until :meth:`set_scale`.
        scale: What it is then divided by; 1 until :meth:`set_scale`.

    Raises:
        ValueError: If the shape is no row, the kinds do not fit it, or there are levels.

    References:
        Nazabal et al., "Handling Incomplete Heterogeneous Data using VAEs", Pattern Recognition 2020.
    """

    loc: Tensor
    scale: Tensor
    _order: Tensor
    _place: Tensor

    takes_mask = True

    min_log_variance = Gaussian.min_log_variance

    def __init__(self, shape: Shape, levels: int | None = None, kinds: Sequence[str | int] = ()) -> None:
        super().__init__(shape, levels)
        if levels is not None:
            raise ValueError(f"`levels` must be None for the Columns likelihood, got {levels!r}. Use `kinds`.")
        if len(self.shape) != 1:
            raise ValueError(f"`shape` must be that of a table's row, (columns,), got {self.shape}.")
        (columns,) = self.shape
        check_number(
            "kinds",
            kinds,
            f"the kind of each of the {columns} columns, 'numeric', 'binary', 'count' or a number of classes from 2",
            lambda each: len(each) == columns and all(kind in _KINDS or integer_from(2)(kind) for kind in each),
        )
        self.kinds = tuple(kind if isinstance(kind, str) else int(kind) for kind in kinds)
        # Columns of a kind are evaluated together: `order` puts them side by side, and `place` puts them back.
        self._groups = {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}
        order = torch.tensor([i for kind in self._groups for i, each in enumerate(self.kinds) if each == kind])
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_place", order.argsort(), persistent=False)
        self.register_buffer("loc", torch.zeros(columns))
        self.register_buffer("scale", torch.ones(columns))
        self._widths = [count * (kind if isinstance(kind, int) else 1) for kind, count in self._groups.items()]
        self.output_shape = self.features_shape = (sum(self._widths),)
        if "numeric" in self._groups:
            self.learns_scale = self.learns_each_scale = True
            # A tenth of the data's variance, as standardised, is about what training leaves.
            self.log_variance = nn.Parameter(torch.full((self._groups["numeric"],), math.log(Gaussian.start_share)))
        if "count" in self._groups:
            self.log_inverse_dispersion = nn.Parameter(torch.zeros(self._groups["count"]))

    def set_scale(self, loc: Sequence[float] | Tensor, scale: Sequence[float] | Tensor) -> None:
        """Set the means and standard deviations of the numeric columns in the training split.

        Args:
            loc: One number for each column; those of columns that are not numeric are ignored.
            scale: Likewise, above 0 for numeric columns.

        Raises:
            ValueError: If there is not one number for each column, or one does not fit.
        """
        loc, scale = self._numbers("loc", loc, -math.inf), self._numbers("scale", scale, 0.0)
        numeric = torch.tensor([kind == "numeric" for kind in self.kinds], device=loc.device)
        self.loc.copy_(loc.where(numeric, 0))
        self.scale.copy_(scale.where(numeric, 1))

    def _numbers(self, name: str, given: Sequence[float] | Tensor, low: float) -> Tensor:
        """Return one number for each column, after checking those of the numeric columns."""
        numbers = torch.as_tensor(given, dtype=self.loc.dtype, device=self.loc.device)
        fits = (numbers > low) & (numbers < math.inf)
        if numbers.shape != self.shape or not all(fits[i] for i, kind in enumerate(self.kinds) if kind == "numeric"):
            kind = "a positive number" if low == 0 else "a finite number"
            raise ValueError(f"`{name}` must hold {kind} for each of the {len(self.kinds)} columns, got {given!r}.")
        return numbers

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoder's input, shape ``(B, *features_shape)``.

        Numeric columns are standardised, counts are ``log(1 + x)``, classes are one-hot. The entries of missing values
        are 0.

        Args:
            x: Rows in the table's own units, shape ``(B, columns)``. Missing values may be anything, also NaN.
            mask: True where a value is there, shape ``(B, columns)``; ``None`` if none is missing.
        """
        values = self._split(x if mask is None else x.where(mask, 0))
        there = values if mask is None else self._split(mask)
        parts = []
        for (kind, value, loc, scale), here in zip(self._by_kind(values), there, strict=True):
            if isinstance(kind, int):
                part = (value[..., None] == torch.arange(kind, device=x.device)).to(x.dtype)
            elif kind == "numeric":
                part = ((value - loc) / scale)[..., None]
            else:
                part = (value if kind == "binary" else value.log1p())[..., None]
            parts.append((part if mask is None else part.where(here[..., None], 0)).flatten(-2))
        return torch.cat(parts, dim=-1)

    def forward(self, output: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> td.Distribution:  # noqa: ARG002
        """Return the distribution over rows with these parameters of the columns."""
        parts: list[td.Distribution] = []
        for kind, part, loc, scale in self._by_kind(output.split(self._widths, dim=-1)):
            if isinstance(kind, int):
                parts.append(Classes(part.unflatten(-1, (-1, kind))))
            elif kind == "numeric":
                spread = (0.5 * self.log_variance.clamp(min=self.min_log_variance)).exp()
                parts.append(_Standardised(td.Normal(part, spread.expand_as(part), validate_args=False), loc, scale))
            elif kind == "binary":
                parts.append(td.Bernoulli(logits=part, validate_args=False))
            else:
                parts.append(negative_binomial(part, self.log_inverse_dispersion))
        return self._independent(_Row(parts, self._order, self._place))

    def check_values(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Refuse values that do not fit their column's kind."""
        for column, kind in enumerate(self.kinds):
            if kind == "numeric":
                continue
            values = x[:, column] if mask is None else x[:, column][mask[:, column]]
            top = kind - 1 if isinstance(kind, int) else {"binary": 1.0, "count": math.inf}[kind]
            check_integers(f"`kinds`: column {column} is {kind!r} and", values, top)

    def error_unit(self) -> Tensor:
        """Return the scale of each column, shape ``(columns,)``, if all are numeric."""
        if others := [str(kind) for kind in self._groups if kind != "numeric"]:
            raise ValueError(
                f"`squared_error` can't be the constraint for a table with columns of kind {', '.join(others)}, whose "
                "numbers have no common unit. Constrain the `distortion`."
            )
        return self.scale

    def _split(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Split what holds one number for each column by the kinds."""
        parts: tuple[Tensor, ...] = columns[..., self._order].split(list(self._groups.values()), dim=-1)
        return parts

    def _by_kind(self, parts: Sequence[Tensor]) -> Iterator[tuple[str | int, Tensor, Tensor, Tensor]]:
        """Return for each kind: the kind, its part, and loc and scale of its columns."""
        return zip(self._groups, parts, self._split(self.loc), self._split(self.scale), strict=True)


class _Standardised(td.Distribution):
    """A Gaussian in standardised units, over values in their own: ``x = loc + scale * standardised``."""

    def __init__(self, standard: td.Normal, loc: Tensor, scale: Tensor) -> None:
        self.standard, self.loc, self.scale = standard, loc, scale
        super().__init__(standard.batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale * self.standard.mean

    @property
    def variance(self) -> Tensor:
        return self.scale.square() * self.standard.variance

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.standard.log_prob((value - self.loc) / self.scale)
        return log_prob - self.scale.log()

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn: Tensor = self.standard.sample(torch.Size(sample_shape))
        return self.loc + self.scale * drawn


class _Row(td.Distribution):
    """The columns of a row, one batch entry for each: parts by kind, which ``place`` puts in the columns' order."""

    def __init__(self, parts: Sequence[td.Distribution], order: Tensor, place: Tensor) -> None:
        self.parts, self.order, self.place = parts, order, place
        super().__init__(torch.Size((*parts[0].batch_shape[:-1], len(order))), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._joined([part.mode if isinstance(part, Classes) else part.mean for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        values = value[..., self.order].split([part.batch_shape[-1] for part in self.parts], dim=-1)
        return self._joined([part.log_prob(each) for part, each in zip(self.parts, values, strict=True)])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._joined([part.sample(torch.Size(sample_shape)) for part in self.parts])

    def _joined(self, columns: list[Tensor]) -> Tensor:
        joined: Tensor = torch.cat(columns, dim=-1)[..., self.place]
        return joined
