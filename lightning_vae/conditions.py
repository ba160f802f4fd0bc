"""The condition c of p(x|c): from what a batch holds beside its data to the input of the networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .checks import check_number, integer_from
from .observations import check_finite, has_values, index_and_label_of, warn_of_rounding
from .posteriors import WideModule


class Condition(WideModule):
    """Condition on a class, on a vector of covariates, or on both.

    The encoder, the decoder and a conditional prior get it as one vector c. A class is the label in a batch; it is
    one-hot, or has a learned vector. The covariates are in a batch under the key ``"condition"``. :meth:`set_scale`
    standardises them, which ``Table`` calls with the moments of its training split.

    A subclass may turn them into c in another way: it overrides :meth:`forward` and sets ``dim``.

    Args:
        classes: Number of classes; ``None`` without classes.
        covariates: Number of covariates; 0 without.
        embedding: Size of the learned vector of a class; ``None`` for one-hot.

    Attributes:
        dim: Size of c.
        columns: Numbers that the record of a step holds for each observation: the class, if any, then the covariates.

    Raises:
        ValueError: If an option is out of range, or there is nothing to condition on.

    References:
        Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models",
        NeurIPS 2015.

    Example::

        >>> Condition(classes=3)(torch.tensor([[2.0]]))
        tensor([[0., 0., 1.]])
    """

    codes: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, classes: int | None = None, covariates: int = 0, embedding: int | None = None) -> None:
        super().__init__()
        if classes is not None:
            check_number("classes", classes, "an integer of at least 2, or None", integer_from(2))
        check_number("covariates", covariates, "an integer of at least 0", integer_from(0))
        if classes is None and not covariates:
            raise ValueError(
                "`condition` needs `classes`, the number of classes, or `covariates`, or both; got neither."
            )
        if embedding is not None:
            check_number("embedding", embedding, "an integer of at least 1, or None for one-hot", integer_from(1))
            if classes is None:
                raise ValueError(f"`embedding` is the size of a class's vector and needs `classes`, got {embedding}.")
        self.classes, self.covariates = classes, covariates
        if embedding is not None:
            self.codes = nn.Parameter(torch.randn(classes or 0, embedding))
        else:
            self.register_buffer("codes", torch.eye(classes or 0), persistent=False)
        self.register_buffer("loc", torch.zeros(covariates))
        self.register_buffer("scale", torch.ones(covariates))
        self.dim = (self.codes.shape[1] if classes else 0) + covariates
        self.columns = int(classes is not None) + covariates

    @torch.no_grad()
    def set_scale(self, loc: Tensor, scale: Tensor) -> None:
        """Set the mean and the scale by which covariates are standardised. They are saved with the model.

        Args:
            loc: Mean of each covariate, shape ``(covariates,)``.
            scale: Scale of each covariate, shape ``(covariates,)``.

        Raises:
            ValueError: If they have another shape, are not finite, or a scale is not positive.
        """
        shapes = (tuple(loc.shape), tuple(scale.shape))
        if shapes != ((self.covariates,),) * 2 or not (loc + scale).isfinite().all() or not (scale > 0).all():
            raise ValueError(
                f"`loc` and `scale` must be finite numbers for {self.covariates} covariates, the scales positive, got "
                f"{loc.tolist()} and {scale.tolist()}."
            )
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def forward(self, columns: Tensor) -> Tensor:
        """Map the record's columns, shape ``(B, columns)``, to c, shape ``(B, dim)``."""
        if not self.covariates:
            return self.codes[columns[:, 0].long()]
        numbers = (columns[:, -self.covariates :] - self.loc) / self.scale
        if self.classes is None:
            return numbers
        codes = self.codes[columns[:, 0].long()]
        return torch.cat([codes, numbers.to(codes)], dim=1)

    def of_batch(self, batch: Any, size: int, check: bool = True) -> Tensor:
        """Read the columns of a batch.

        Args:
            batch: The batch.
            size: Number of its observations B.
            check: Check the numbers too, which waits for the device.

        Returns:
            Shape ``(B, columns)``.

        Raises:
            ValueError: If the batch lacks something, or holds it in another form.
        """
        label = index_and_label_of(batch, size)[1] if self.classes else None
        covariates = batch.get("condition") if self.covariates and isinstance(batch, Mapping) else None
        held = "a batch holds " + (", ".join(map(repr, batch)) if isinstance(batch, Mapping) else "no keys")
        if self.classes and label is None:
            raise ValueError(
                f"`condition` is one of {self.classes} classes, but {held} and no label for each observation. Give it "
                "under the key 'label', or as the second item of a sequence."
            )
        if self.covariates and covariates is None:
            raise ValueError(
                f"`condition` has {self.covariates} covariates, but {held}. Give them under the key 'condition', a "
                f"tensor of shape {(size, self.covariates)}."
            )
        return self.columns_of(label, covariates, size, check)

    def columns_of(self, label: Any, covariates: Any, size: int, check: bool = True) -> Tensor:
        """Join classes and covariates of ``size`` observations to the columns of a record.

        Args:
            label: Classes, integers of shape ``(size,)``, or one for all.
            covariates: Numbers of shape ``(size, covariates)``, or one row for all.
            size: Number of observations.
            check: Check the numbers too, which waits for the device.

        Raises:
            ValueError: If they have another shape or type, or a class does not exist.
        """
        parts = []
        if self.classes:
            classes = _classes(label)
            if classes is None or classes.shape not in ((size,), (1,), ()):
                raise ValueError(
                    f"`condition` must be a class for each of {size} observations, integers from 0 to "
                    f"{self.classes - 1}, got {_given(label)}."
                )
            if check and has_values(classes):
                low, high = torch.stack(classes.aminmax()).tolist()
                if not 0 <= low <= high < self.classes:
                    remedy = f"Set `classes` to at least {high + 1}, or number" if low >= 0 else "Number"
                    raise ValueError(
                        f"`condition` must be a class from 0 to {self.classes - 1}, got classes from {low} to {high}. "
                        f"{remedy} the classes from 0."
                    )
            parts.append(classes.float().expand(size)[:, None])  # half precision would round class numbers
        if self.covariates:
            numbers = _numbers(covariates)
            if numbers is None or numbers.shape not in (
                (size, self.covariates),
                (1, self.covariates),
                (self.covariates,),
            ):
                raise ValueError(
                    f"`condition` must have {self.covariates} covariates for each observation, shape "
                    f"{(size, self.covariates)}, got {_given(covariates)}."
                )
            if check and has_values(numbers):
                warn_of_rounding("The covariates in `condition`", numbers)
                check_finite("The covariates in `condition`", numbers)
            numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
            parts.append(numbers.expand(size, self.covariates))
        device = parts[-1].device
        return torch.cat([part.to(device) for part in parts], dim=1) if len(parts) > 1 else parts[0]

    def read(self, value: Any, size: int, own: Tensor | None = None) -> Tensor:
        """Read a condition that a caller gives, for ``size`` observations.

        Args:
            value: A class or classes; covariates; or for both a mapping with the keys ``"label"`` and ``"condition"``.
                Or the columns of a record, shape ``(size, columns)``.
            size: Number of observations.
            own: The columns of the observations' records, for the part that a mapping leaves out.

        Returns:
            Shape ``(size, columns)``.

        Raises:
            ValueError: If it is missing, or does not fit.
        """
        if value is None:
            raise ValueError(
                f"The model is conditional, so it needs `condition=`: {self.wanted}. An observation's own is in "
                "`vae.observe(batch).condition`."
            )
        if isinstance(value, Mapping):
            parts = {} if own is None else {"label": own[:, 0].long(), "condition": own[:, -self.covariates :]}
            names = {"label"} if self.classes else set()
            names |= {"condition"} if self.covariates else set()
            parts = {name: part for name, part in parts.items() if name in names} | dict(value)
            if set(parts) != names:
                keys = ", ".join(map(repr, value)) or "no keys"
                raise ValueError(f"`condition` must be {self.wanted}, got a dict with {keys}.")
            return self.columns_of(parts.get("label"), parts.get("condition"), size)
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == self.columns and self.classes:
            if has_values(classes := value[:, 0].double()) and not bool((classes.round() == classes).all()):
                raise ValueError(
                    f"`condition` must have a class in its first column, integers from 0 to {self.classes - 1}, got "
                    f"numbers such as {float(classes[classes.round() != classes][0]):g}."
                )
            return self.columns_of(value[:, 0].long(), value[:, 1:], size)
        if self.classes and self.covariates:
            raise ValueError(f"`condition` must be {self.wanted}, got {_given(value)}.")
        return self.columns_of(value, value, size)

    @property
    def wanted(self) -> str:
        """The forms that :meth:`read` takes, for errors."""
        classes = f"a class from 0 to {(self.classes or 0) - 1}, or one for each observation"
        covariates = f"{self.covariates} covariates, or a row of them for each observation"
        if self.classes and self.covariates:
            return f"a dict with 'label', {classes}, and 'condition', {covariates}"
        return classes if self.classes else covariates


def warn_of_unread_condition(batch: Any) -> None:
    """Warn of a condition in a batch that a model without a condition does not read."""
    if isinstance(batch, Mapping) and "condition" in batch:
        numbers = batch["condition"]
        size = numbers.shape[-1] if isinstance(numbers, Tensor) and numbers.ndim > 1 else 1
        rank_zero_warn(
            "The batches hold a 'condition', but the model has none, so it is not used. Construct the model with "
            f"`condition=partial(Condition, covariates={size})`, or leave the condition out of the data."
        )


def _classes(label: Any) -> Tensor | None:
    """Return classes as int64; ``None`` for what holds no integers."""
    try:
        classes = torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError):
        return None
    is_integer = not (classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool)
    return classes.long() if is_integer else None


def _numbers(covariates: Any) -> Tensor | None:
    """Return covariates as a tensor; ``None`` for what holds no numbers."""
    try:
        return covariates if isinstance(covariates, Tensor) else torch.as_tensor(covariates, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None


def _given(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} {value!r}" if shape is None else f"{value.dtype} of shape {tuple(shape)}"
