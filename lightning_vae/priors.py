"""Priors p(z) or p(z|c): modules that give a ``torch.distributions.Distribution`` over the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Size, Tensor, nn
from torch import distributions as td
from torch.autograd.function import FunctionCtx
from typing_extensions import override

from .checks import check_number, integer_from
from .networks import Shape
from .noise import component
from .posteriors import OneHotGroups, WideModule, groups_of

Variance = Literal["shared", "conditional"]
PseudoInputs = Literal["learned", "data", "both"]
Weights = Literal["uniform", "learned"]


class Prior(WideModule):
    """Base class of the priors.

    Args:
        latent_dim: Number of columns k of the latents.
        condition_dim: Number of columns of the condition; 0 for a model without one.

    Raises:
        ValueError: If an option is out of range.
    """

    is_joint = False
    """True if the dimensions are not independent: the rate is then one number an observation."""
    classes: int | None = None
    """Number of classes of each group of categories; ``None`` for continuous latents."""

    def __init__(self, latent_dim: int, condition_dim: int = 0) -> None:
        super().__init__()
        check_number("latent_dim", latent_dim, "an integer of at least 1", integer_from(1))
        check_number("condition_dim", condition_dim, "an integer of at least 0", integer_from(0))
        self.latent_dim, self.condition_dim = latent_dim, condition_dim

    @property
    def wants(self) -> int:
        """Number of observations that :meth:`start` still waits for."""
        return 0

    def connect(self, shape: Shape, encode: Callable[..., td.Distribution], columns: int = 0) -> None:
        """Give the prior the encoder, once, when the model is built.

        Args:
            shape: Shape of the encoder's input for one observation.
            encode: From encoder's inputs to q(z|x); in a conditional model from these and the conditions to q(z|x, c).
            columns: Number of columns in which a record holds a condition; 0 without.
        """

    def start(self, x: Tensor, condition: Tensor | None = None) -> None:
        """Set initial values from data, once, before the first step.

        Args:
            x: At least :attr:`wants` observations as the encoder sees them, the same ones in each process.
            condition: Their conditions as a record holds them, shape ``(n, columns)``; ``None`` without.
        """

    def forward(self, condition: Tensor | None = None) -> td.Distribution:
        """Return the prior.

        Args:
            condition: The condition c of each observation, shape ``(B, condition_dim)``.

        Returns:
            Batch shape ``(k,)``, or ``(B, k)`` given a condition; a joint distribution has event shape ``(k,)``.
        """
        raise NotImplementedError(f"`prior`: {type(self).__name__} has no `forward`. Use a class that has one.")


class StandardNormal(Prior):
    """N(0, I), of batch shape ``(k,)``.

    Args:
        latent_dim: Number of latent dimensions k.
        condition_dim: Number of columns of the condition, which it does not depend on.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, latent_dim: int, condition_dim: int = 0) -> None:
        super().__init__(latent_dim, condition_dim)
        self.register_buffer("_loc_and_scale", torch.tensor([[0.0], [1.0]]).repeat(1, latent_dim), persistent=False)
        self._normal: td.Normal | None = None

    @override
    def forward(self, condition: Tensor | None = None) -> td.Normal:
        numbers: Any = self._buffers["_loc_and_scale"]
        normal = self._normal
        # Made once: it is asked for in each step.
        if normal is None or normal.loc.dtype != numbers.dtype or normal.loc.device != numbers.device:
            loc, scale = numbers.unbind()
            normal = self._normal = td.Normal(loc, scale, validate_args=False)
        return normal


class UniformCategorical(Prior):
    """Equal probabilities of all classes, for groups of categories; batch shape ``(G,)`` and event shape ``(C,)``.

    Args:
        latent_dim: Number of columns of the latents, ``G * C``.
        condition_dim: Number of columns of the condition, which it does not depend on.
        classes: Number of classes C of each group.

    Raises:
        ValueError: If an option is out of range.
    """

    classes: int

    def __init__(self, latent_dim: int, condition_dim: int = 0, classes: int = 2) -> None:
        super().__init__(latent_dim, condition_dim)
        groups, self.classes = groups_of(latent_dim, classes), classes
        self.register_buffer("_logits", torch.zeros(groups, classes), persistent=False)

    @override
    def forward(self, condition: Tensor | None = None) -> td.OneHotCategorical:
        return OneHotGroups(self._buffers["_logits"])  # type: ignore[arg-type]


class LearnedNormal(Prior):
    """N(m, diag v) with learned mean and scale, which start at N(0, I); batch shape ``(k,)``.

    With linear networks it makes no model better, because they can absorb any mean and scale (Lucas et al., "Don't
    Blame the ELBO!", NeurIPS 2019). The scale of the latents is then arbitrary: compare the variance of the posterior
    means with the prior's when units are counted as active.

    Args:
        latent_dim: Number of latent dimensions k.
        condition_dim: Number of columns of the condition, which it does not depend on.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, latent_dim: int, condition_dim: int = 0) -> None:
        super().__init__(latent_dim, condition_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    @override
    def forward(self, condition: Tensor | None = None) -> td.Normal:
        return td.Normal(self.loc, self.log_scale.exp(), validate_args=False)


class ConditionalNormal(Prior):
    """N(m(c), diag v), whose mean depends on the condition; it starts at N(0, I), with batch shape ``(B, k)``.

    The encoder need not see the condition then: a shift of its means is free if the prior makes the same.

    Args:
        latent_dim: Number of latent dimensions k.
        condition_dim: Number of columns of the condition, at least 1.
        hidden: Widths of the hidden layers between the condition and the mean, each followed by a ReLU. None, the
            default, makes the mean linear.
        variance: ``"shared"``: one variance per dimension for all conditions; ``"conditional"``: it depends on the
            condition as the mean does.

    Raises:
        ValueError: If an option is out of range.

    References:
        Sohn, Lee and Yan, "Learning Structured Output Representation using Deep Conditional Generative Models", NeurIPS
        2015, equation 4.
    """

    def __init__(
        self, latent_dim: int, condition_dim: int = 0, hidden: Sequence[int] = (), variance: Variance = "shared"
    ) -> None:
        super().__init__(latent_dim, condition_dim)
        if not condition_dim:
            raise ValueError(
                "`condition_dim` must be at least 1 for a prior p(z|c), got 0. Give the model a condition, or use "
                "LearnedNormal."
            )
        check_number("hidden", hidden, "widths of at least 1", lambda widths: all(map(integer_from(1), widths)))
        _check_choice("variance", variance, Variance)
        outputs = latent_dim if variance == "shared" else 2 * latent_dim
        layers: list[nn.Module] = []
        for previous, current in pairwise([condition_dim, *hidden, outputs]):
            layers += [nn.Linear(previous, current), nn.ReLU()]
        last = layers[-2]
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(*layers[:-1])
        self.log_scale = nn.Parameter(torch.zeros(latent_dim)) if variance == "shared" else None

    @override
    def forward(self, condition: Tensor | None = None) -> td.Normal:
        if condition is None or condition.shape[1:] != (self.condition_dim,):
            got = "none" if condition is None else f"shape {tuple(condition.shape)}"
            raise ValueError(
                f"`prior` p(z|c) needs a condition of shape (B, {self.condition_dim}), got {got}. Pass `condition=`."
            )
        output = self.layers(condition.to(next(self.layers.parameters())))
        if self.log_scale is None:
            loc, log_scale = output.chunk(2, dim=1)
        else:
            loc, log_scale = output, self.log_scale.expand_as(output)
        return td.Normal(loc, log_scale.exp(), validate_args=False)


class MixturePrior(Prior):
    """A mixture of K diagonal Gaussians, all learned, with their weights; event shape ``(k,)``.

    It starts near N(0, I): equal weights, random means and equal scales whose variances add up to 1. The rate is
    estimated at the sample of the posterior, and has one part.

    Args:
        latent_dim: Number of latent dimensions k.
        condition_dim: Number of columns of the condition, which it does not depend on.
        components: Number of components K.

    Raises:
        ValueError: If an option is out of range.

    References:
        Dilokthanakul et al., "Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders", 2016;
        Tomczak and Welling, "VAE with a VampPrior", AISTATS 2018, section 4, for this plain form.
    """

    is_joint = True

    def __init__(self, latent_dim: int, condition_dim: int = 0, components: int = 10) -> None:
        super().__init__(latent_dim, condition_dim)
        check_number("components", components, "an integer of at least 1", integer_from(1))
        share = 0.5  # of the variance, between the components; one component has none
        self.loc = nn.Parameter(math.sqrt(share) * torch.randn(components, latent_dim) * (components > 1))
        start = math.log(1 - share) / 2 if components > 1 else 0.0
        self.log_scale = nn.Parameter(torch.full((components, latent_dim), start))
        self.logits = nn.Parameter(torch.zeros(components))

    @override
    def forward(self, condition: Tensor | None = None) -> Mixture:
        return mixture(td.Normal(self.loc, self.log_scale.exp(), validate_args=False), self.logits)


class VampPrior(Prior):
    r"""The mixture of the posteriors of K pseudo-inputs; event shape ``(k,)``.

    .. math::
        p(z) = \sum_{m=1}^{K} w_m \, q(z | u_m)

    The pseudo-inputs :math:`u_m` are what the encoder sees of an observation: an image or a vector in the networks'
    scale; of a table's row or of counts the likelihood's ``features``, where a missing number is 0. The encoder is the
    model's own. It encodes them in evaluation mode, also while training: dropout and batch statistics would make
    another prior of each step. The rate is estimated at the sample of the posterior, and has one part. With all
    observations as pseudo-inputs and equal weights, the rate is the mutual information of index and latents.

    In a conditional model each pseudo-input has a condition too, that of an observation, which stays. The components
    are then :math:`q(z | u_m, c_m)`, and p(z) does not depend on the condition of the observation at hand.

    Args:
        latent_dim: Number of latent dimensions k.
        condition_dim: Number of columns of the condition, which it does not depend on.
        components: Number of pseudo-inputs K.
        pseudo_inputs: ``"both"``: they start at observations and are learned; ``"learned"``: they start at random;
            ``"data"``: they are observations, and stay.
        weights: ``"uniform"``, or ``"learned"``.
        bounded: Keep learned pseudo-inputs in [0, 1], for networks that must not see other data. Values in [0, 1] are
            not changed.

    Attributes:
        inputs: The pseudo-inputs, shape ``(K, *shape)``, once the prior is connected.
        conditions: Their conditions as a record holds them, shape ``(K, columns)``; ``None`` without.

    Raises:
        ValueError: If an option is out of range.

    References:
        Tomczak and Welling, "VAE with a VampPrior", AISTATS 2018, equation 9.
    """

    is_joint = True
    inputs: Tensor | None
    conditions: Tensor | None
    _has_started: Tensor

    def __init__(
        self,
        latent_dim: int,
        condition_dim: int = 0,
        components: int = 500,
        pseudo_inputs: PseudoInputs = "both",
        weights: Weights = "uniform",
        bounded: bool = False,
    ) -> None:
        super().__init__(latent_dim, condition_dim)
        check_number("components", components, "an integer of at least 1", integer_from(1))
        _check_choice("pseudo_inputs", pseudo_inputs, PseudoInputs)
        _check_choice("weights", weights, Weights)
        self.components, self.pseudo_inputs, self.bounded = components, pseudo_inputs, bounded
        logits = torch.zeros(components)
        if weights == "learned":
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)
        self.register_parameter("inputs", None)
        self.register_buffer("conditions", None)
        self._waits = pseudo_inputs != "learned" or condition_dim > 0
        self.register_buffer("_has_started", torch.tensor(int(not self._waits)))
        self.register_load_state_dict_post_hook(_note_start)  # type: ignore[no-untyped-call]
        self._encode: Callable[..., td.Distribution] | None = None

    @property
    @override
    def wants(self) -> int:
        return self.components if self._waits else 0

    @override
    def connect(self, shape: Shape, encode: Callable[..., td.Distribution], columns: int = 0) -> None:
        # Not registered as a part: the encoder is the model's. A bound method stays that of the copy in a copied model.
        object.__setattr__(self, "_encode", encode)
        if self.inputs is None:
            size = (self.components, *shape)
            start = torch.rand(size) if self.bounded else torch.randn(size)
            self.inputs = nn.Parameter(start, requires_grad=self.pseudo_inputs != "data")
            self.conditions = torch.zeros(self.components, columns) if columns else None

    @override
    @torch.no_grad()
    def start(self, x: Tensor, condition: Tensor | None = None) -> None:
        if not self.wants:
            return
        inputs = self._connected()[1]
        if len(x) < self.components or x.shape[1:] != inputs.shape[1:]:
            raise ValueError(
                f"`prior` VampPrior starts its pseudo-inputs at {self.components} observations of shape "
                f"{tuple(inputs.shape[1:])}, got {len(x)} of shape {tuple(x.shape[1:])}. Set `components` to at most "
                "the number of observations."
            )
        if self.pseudo_inputs != "learned":
            inputs.copy_(x[: self.components])
        if self.conditions is not None:
            if condition is None or condition.shape != (len(x), self.conditions.shape[1]):
                given = None if condition is None else tuple(condition.shape)
                raise ValueError(
                    "`prior` VampPrior starts from observations with their conditions, of shape "
                    f"{(len(x), self.conditions.shape[1])}, got {given}."
                )
            self.conditions.copy_(condition[: self.components])
        self._has_started.fill_(1)
        self._waits = False

    @override
    def forward(self, condition: Tensor | None = None) -> Mixture:
        encode, inputs = self._connected()
        if self._waits and self.training:
            raise ValueError("`prior` VampPrior has no pseudo-inputs yet: call `start(x)` before the first step.")
        if self.bounded:
            inputs = _Bounded.apply(inputs)
        owner = getattr(encode, "__self__", encode)
        training = [each for each in owner.modules() if each.training] if isinstance(owner, nn.Module) else []
        for each in training:
            each.training = False
        try:
            posterior = encode(inputs) if self.conditions is None else encode(inputs, self.conditions)
        finally:
            for each in training:
                each.training = True
        return mixture(posterior, self.logits)

    def _connected(self) -> tuple[Callable[..., td.Distribution], Tensor]:
        if self._encode is None or self.inputs is None:
            raise ValueError("`prior` VampPrior has no encoder: call `connect(shape, encode)` first.")
        return self._encode, self.inputs


def _note_start(module: VampPrior, _keys: object) -> None:
    module._waits = not module._has_started


class _Bounded(torch.autograd.Function):
    """Clamp to [0, 1], with a gradient at and beyond the bounds too where it leads back."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        leads_out = ((values <= 0) & (gradient > 0)) | ((values >= 1) & (gradient < 0))
        return gradient.masked_fill(leads_out, 0.0)


class Mixture(td.MixtureSameFamily):
    """A mixture over whole vectors, whose density needs less time and memory if its components are diagonal Gaussians.

    Torch computes the distance of each sample to each component in each dimension. Two matrix products give the same,
    in float64, because squares cancel.
    """

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        base = getattr(self.component_distribution, "base_dist", None)
        if not isinstance(base, td.Normal) or value.device.type == "mps":  # which has no float64
            log_prob: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
            return log_prob
        loc, log_scale, z = base.loc.double(), base.scale.double().log(), value.double().unsqueeze(-2)
        precision = (-2 * log_scale).exp()
        factors = torch.cat([-0.5 * precision, precision * loc], dim=-1)
        distances = (torch.cat([z.square(), z], dim=-1) @ factors.mT).squeeze(-2)
        constants = (0.5 * precision * loc.square() + log_scale).sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
        each = distances - constants + self.mixture_distribution.logits
        return each.logsumexp(-1).to(value.dtype)

    @override
    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if self.batch_shape:
            drawn: Tensor = super().sample(Size(sample_shape))  # type: ignore[no-untyped-call]
        else:  # one draw of the chosen component instead of one of each
            drawn = component(self, self.mixture_distribution.sample(Size(sample_shape))).sample()
        return drawn


def mixture(components: td.Distribution, logits: Tensor) -> Mixture:
    """Return a mixture over whole vectors.

    Args:
        components: Distributions of batch shape ``(K, k)``, or ``(K,)`` and event shape ``(k,)``.
        logits: Logits of their weights, shape ``(K,)``.
    """
    if not components.event_shape:
        components = td.Independent(components, 1, validate_args=False)
    return Mixture(td.Categorical(logits=logits, validate_args=False), components, validate_args=False)


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")
