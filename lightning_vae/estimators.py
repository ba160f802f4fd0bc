r"""Estimators for evaluation: pure functions of tensors, and streaming metrics made of them.

All are in nats, in float64, of a model with the standard normal prior p(z) and diagonal Gaussian posteriors unless said
otherwise. A metric gives the same result for any batch size and order and on any number of processes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

# Unlike a seed that data are drawn with: the same noise in data and samples would look like information.
_SEED = 0x5EED
_SATURATED = 0.9  # of log M
_AT_ONCE = 2**20  # pairs of observations
_FOLDS = 10

# ---- the likelihood


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    r"""Compute the importance-weighted lower bound of each observation's log-likelihood.

    .. math::
        L_K = \log \frac{1}{K} \sum_k w_k, \qquad
        \log w_k = \log p(x|z_k) + \log p(z_k) - \log q(z_k|x), \quad z_k \sim q(z|x)

    In expectation it rises with K towards :math:`\log p(x)`; at K = 1 it is the ELBO. Where the posterior is exact
    every weight is p(x), and so is the bound at any K.

    Args:
        log_weights: In nats, of shape ``(K, B)``.

    Returns:
        Nats, of shape ``(B,)``, float64.

    References:
        Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2015, equation 8.
    """
    return log_weights.double().logsumexp(dim=0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Compute how many of K samples carry the estimate, :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, from 1 to K.

    Below about 10 the bound is dominated by single samples, and still far from the log-likelihood.

    Args:
        log_weights: In nats, of shape ``(K, B)``.

    Returns:
        Of shape ``(B,)``, float64.
    """
    log_weights = log_weights.double()
    return (2 * log_weights.logsumexp(dim=0) - (2 * log_weights).logsumexp(dim=0)).exp()


# ---- the aggregate posterior, by its moments


class AggregateMoments:
    """First two moments of the aggregate posterior q(z) = E_x q(z|x), and what its covariance is made of.

    Attributes:
        mean: Of shape ``(k,)``.
        covariance_of_means: Covariance over the data of the posterior means, of shape ``(k, k)``. Its diagonal is what
            tells active units.
        posterior_variance: Mean over the data of the posterior variances, of shape ``(k,)``.
    """

    # No tuple or dataclass: of those a torchmetrics.Metric squeezes tensors of one element, as where k is 1.
    def __init__(self, mean: Tensor, covariance_of_means: Tensor, posterior_variance: Tensor) -> None:
        self.mean = mean
        self.covariance_of_means = covariance_of_means
        self.posterior_variance = posterior_variance

    @property
    def covariance(self) -> Tensor:
        """Covariance of q(z), of shape ``(k, k)``."""
        return self.covariance_of_means + self.posterior_variance.diag()

    @property
    def variance_of_means(self) -> Tensor:
        """Variance over the data of each dimension's posterior mean, of shape ``(k,)``."""
        return self.covariance_of_means.diagonal()

    def active(self, threshold: float = 0.01) -> Tensor:
        """Tell which dimensions are active (Burda et al. 2015), bool, of shape ``(k,)``."""
        return self.variance_of_means > threshold


def moment_marginal_kl(mean: Tensor, covariance: Tensor) -> Tensor:
    r"""Compute a lower bound of the marginal KL, :math:`KL(q(z) \| p(z))`, from the moments of q(z).

    .. math::
        KL(N(m, C) \,\|\, N(0, I)) = \tfrac12 \left( \operatorname{tr} C + m^T m - k - \log\det C \right)

    Among all q(z) with these moments the Gaussian is nearest to p(z). The bound is deterministic and has no cap.

    Args:
        mean: Mean m of q(z), of shape ``(k,)``.
        covariance: Covariance C of q(z), of shape ``(k, k)``.

    Returns:
        Nats, a scalar, float64.
    """
    mean, covariance = mean.double(), covariance.double()
    excess = covariance.diagonal().sum() + mean.square().sum() - len(mean)
    divergence: Tensor = 0.5 * (excess - torch.linalg.slogdet(covariance).logabsdet)
    return divergence.clamp(min=0)


def cross_fitted_marginal_kl(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Estimate a lower bound of the marginal KL by moments that were not fitted to what they are tried on.

    .. math::
        KL(q \| p) \ge E_{z \sim q} [\log r(z) - \log p(z)]

    for any density r, here the Gaussian with the moments of nine tenths of the observations, tried on the last tenth;
    the mean over the ten. :func:`moment_marginal_kl` of the moments of M observations is too large by about
    :math:`k (k + 3) / 4 M`, whole nats where k is 64 and M some hundreds; this is too small by about as much.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``.
        variance: Their variances, of shape ``(M, k)``.

    Returns:
        Nats, at least 0, a scalar, float64.
    """
    mean, variance = mean.double(), variance.double()
    place = torch.arange(len(mean), device=mean.device)
    total = mean.new_zeros(())
    for fold in range(min(_FOLDS, len(mean))):
        tried = place % _FOLDS == fold
        fitted, other = (aggregate_moments(mean[part], variance[part]) for part in (~tried, tried))
        shift = other.mean - fitted.mean
        second = other.covariance + shift.outer(shift)
        log_r = -0.5 * (torch.linalg.slogdet(fitted.covariance).logabsdet
                        + torch.linalg.solve(fitted.covariance, second).diagonal().sum())  # fmt: skip
        log_p = -0.5 * (other.covariance.diagonal().sum() + other.mean.square().sum())
        total += (log_r - log_p) * tried.sum()
    return (total / len(mean)).clamp(min=0)


def gaussian_total_correlation(covariance: Tensor) -> Tensor:
    r"""Compute the total correlation of a Gaussian, :math:`-\tfrac12 \log\det` of its correlation matrix.

    Args:
        covariance: Of shape ``(k, k)``.

    Returns:
        Nats, a scalar, float64.
    """
    covariance = covariance.double()
    correlation: Tensor = 0.5 * (covariance.diagonal().log().sum() - torch.linalg.slogdet(covariance).logabsdet)
    return correlation.clamp(min=0)


# ---- the aggregate posterior, as a mixture


class MixtureEstimates(NamedTuple):
    """What M posteriors say about the information in z and the shape of q(z), in nats.

    Attributes:
        lower: Estimate of the mutual information of x and z that is a lower bound on average and at most log M.
        upper_leave_one_out: Upper bound on average, without the sample's own component in the mixture. Far too large
            where posteriors hardly overlap.
        upper_moments: Upper bound: the rate less what the moments of q(z) say of the marginal KL at least. No cap.
        rate: Mean KL of those posteriors to the prior.
        marginal_kl: KL(q(z) || p(z)), the rate less the lower estimate. Where that is saturated, the lower bound by the
            moments of q(z).
        total_correlation: KL(q(z) || prod_j q(z_j)). Where the mutual information is saturated, that of the Gaussian
            with the moments of q(z).
        observations: Number of posteriors M.
    """

    lower: Tensor
    upper_leave_one_out: Tensor
    upper_moments: Tensor
    rate: Tensor
    marginal_kl: Tensor
    total_correlation: Tensor
    observations: int

    @property
    def upper(self) -> Tensor:
        """The tighter upper bound; near the cap that by the moments, as equal observations cap the other one too."""
        capped = is_saturated(float(self.upper_leave_one_out), self.observations)
        return self.upper_moments if capped else torch.minimum(self.upper_leave_one_out, self.upper_moments)

    @property
    def saturated(self) -> bool:
        """Whether the lower bound is so near to its cap, log M, that it says "at least" and no more."""
        return is_saturated(float(self.lower), self.observations)


def is_saturated(information: float, observations: int) -> bool:
    """Tell whether a mutual information estimated from M observations exceeds 90 % of its cap, log M."""
    return information > _SATURATED * math.log(observations)


def mixture_estimates(mean: Tensor, variance: Tensor, seed: int = _SEED) -> MixtureEstimates:
    r"""Estimate mutual information, marginal KL and total correlation from M diagonal Gaussian posteriors.

    With one sample :math:`z_n \sim q(z|x_n)` of each:

    .. math::
        I_{lower} &= \frac1M \sum_n \left[ \log q(z_n|x_n) - \log \frac1M \sum_m q(z_n|x_m) \right] \\
        I_{upper} &= \frac1M \sum_n \left[ \log q(z_n|x_n) - \log \frac1{M-1} \sum_{m \ne n} q(z_n|x_m) \right] \\
        I_{moments} &= \text{rate} - \text{cross-fitted } KL(N(m, C) \| p) \\
        TC &= \frac1M \sum_n \left[ \log \frac1M \sum_m q(z_n|x_m)
              - \sum_j \log \frac1M \sum_m q(z_{nj}|x_m) \right]

    The same sample stands in every term, so that the lower bound is 0 where all posteriors are equal. What chance does
    to ``log q(z_n|x_n) - log p(z_n)``, whose mean is known, the rate, is taken out of each estimate by regression:
    where q(z) is the prior this leaves no noise.

    Args:
        mean: Means of the posteriors, of shape ``(M, k)``, M at least 2.
        variance: Their variances, of shape ``(M, k)``.
        seed: Seed of the samples, which are drawn on the CPU.

    Raises:
        ValueError: If there are fewer than two posteriors, or the shapes differ.

    References:
        Hoffman and Johnson, "ELBO surgery", 2016; Poole et al., "On Variational Bounds of Mutual Information", ICML
        2019, for the two sample bounds; Chen et al., "Isolating Sources of Disentanglement", NeurIPS 2018, for the
        total correlation, here over all pairs of the M observations instead of a minibatch.

    Example::

        >>> estimates = mixture_estimates(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1))
        >>> estimates.lower, estimates.saturated  # log 2
        (tensor(0.6931, dtype=torch.float64), True)
    """
    if mean.ndim != 2 or mean.shape != variance.shape or len(mean) < 2:
        raise ValueError(
            f"`mean` and `variance` must both have shape (M, k) with M at least 2, got {tuple(mean.shape)} and "
            f"{tuple(variance.shape)}."
        )
    mean, variance = mean.double(), variance.double()
    number = len(mean)
    rates = (0.5 * (variance + mean.square() - 1 - variance.log())).sum(dim=1)
    noise = torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(mean.device)
    sample = mean + variance.sqrt() * noise

    # log q(z_n|x_m) without its constant, which every term has, as products of matrices: (z - m)^2 / v is the sum of
    # z^2 / v, -2 z m / v and m^2 / v, of which nothing is lost in double precision near the origin.
    shifted, centre = sample - mean.mean(dim=0), mean - mean.mean(dim=0)
    factors = torch.cat([1 / variance, -2 * centre / variance], dim=1).T
    constants = (centre.square() / variance + variance.log()).sum(dim=1)
    own_density = -0.5 * (noise.square() + variance.log()).sum(dim=1)
    mixture, others = torch.empty_like(own_density), torch.empty_like(own_density)
    for chunk in torch.arange(number, device=mean.device).split(max(1, _AT_ONCE // number)):
        joint = -0.5 * (torch.cat([shifted[chunk].square(), shifted[chunk]], dim=1) @ factors + constants)
        own = torch.arange(len(chunk), device=mean.device), chunk
        joint[own] = own_density[chunk]
        mixture[chunk] = joint.logsumexp(dim=1) - math.log(number)
        joint[own] = -torch.inf
        others[chunk] = joint.logsumexp(dim=1) - math.log(number - 1)
    control = own_density + 0.5 * sample.square().sum(dim=1) - rates
    lower = _controlled(own_density - mixture, control)
    rate = rates.mean()

    by_moments = cross_fitted_marginal_kl(mean, variance)
    saturated = is_saturated(float(lower), number)
    if saturated:
        total_correlation = gaussian_total_correlation(aggregate_moments(mean, variance).covariance)
    else:
        total_correlation = _controlled(mixture - _log_marginals(sample, mean, variance), control)
    return MixtureEstimates(
        lower=lower,
        upper_leave_one_out=_controlled(own_density - others, control),
        upper_moments=rate - by_moments,
        rate=rate,
        marginal_kl=by_moments if saturated else rate - lower,
        total_correlation=total_correlation,
        observations=number,
    )


def _log_marginals(sample: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Compute the sum over j of log q(z_nj), q the mixture of all posteriors, without its constant, of shape (M,)."""
    number, k = mean.shape
    total = torch.zeros_like(sample[:, 0])
    for chunk in torch.arange(number, device=mean.device).split(max(1, _AT_ONCE // number)):
        for j in range(k):
            each = -0.5 * ((sample[chunk, j, None] - mean[:, j]).square() / variance[:, j] + variance[:, j].log())
            total[chunk] += each.logsumexp(dim=1) - math.log(number)
    return total


def _controlled(terms: Tensor, control: Tensor) -> Tensor:
    """Average terms, less what a control variate of mean zero explains of them; each of shape ``(M,)``."""
    power = control.square().sum()
    centred = terms - terms.mean()
    slope = (centred @ control) / power if power > 0 else power
    return (terms - slope * control).mean()


def aggregate_moments(mean: Tensor, variance: Tensor) -> AggregateMoments:
    """Compute the moments of the aggregate posterior.

    Args:
        mean: Means of the posteriors, of shape ``(N, k)``.
        variance: Their variances, of shape ``(N, k)``.
    """
    return _unpacked(_moments(mean, variance))


# ---- streaming


class Averages(NamedTuple):
    """Averages of several quantities over observations.

    Attributes:
        count: Number of observations, a scalar.
        mean: Of shape ``(columns,)``, a scalar for one column.
        standard_error: Of each mean, from the spread over the observations, of the same shape.
    """

    count: Tensor  # type: ignore[assignment]  # hides a method of tuples, which nobody needs
    mean: Tensor
    standard_error: Tensor


class RunningMoments(Metric):
    """Averages several quantities over observations, with the standard error of each average.

    As input to ``forward`` and ``update`` the metric accepts ``values`` of shape ``(N, columns)``, one row an
    observation; N may be 0. As output of ``forward`` and ``compute`` it returns
    :class:`Averages`.

    Args:
        columns: Number of quantities.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``columns`` is not positive, or values of another shape arrive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, columns: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if columns < 1:
            raise ValueError(f"`columns` must be at least 1, got {columns}.")
        self.columns = columns
        empty = torch.zeros(3, columns, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=_merge_columns)

    def update(self, values: Tensor) -> None:
        """Add the rows of a batch."""
        if values.ndim != 2 or values.shape[1] != self.columns:
            raise ValueError(f"`values` must have shape (N, {self.columns}), got {tuple(values.shape)}.")
        self.state = _merge_columns(torch.stack([self.state, _columns(values.detach())]))

    def compute(self) -> Averages:
        """Return the averages."""
        return Averages(self.state[0, 0], self.state[1].clone(), _standard_error(self.state))


class LogLikelihood(NamedTuple):
    """An estimate of the mean log-likelihood, in nats per observation.

    Attributes:
        value: Mean of the importance-weighted bounds.
        standard_error: Of that mean, from the spread over the observations.
        effective_sample_size: Mean over the observations, from 1 to K.
    """

    value: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


class ImportanceWeightedLikelihood(Metric):
    """Estimates the mean log-likelihood of the data by importance sampling; see :func:`importance_weighted_bound`.

    As input to ``forward`` and ``update`` the metric accepts ``log_weights`` of shape ``(K, B)``.
    As output of ``forward`` and ``compute`` it returns a :class:`LogLikelihood`.

    Args:
        kwargs: Options of :class:`torchmetrics.Metric`.

    Example::

        >>> metric = ImportanceWeightedLikelihood()
        >>> metric.update(torch.tensor([[-1.0, -3.0], [-1.0, -3.0]]))
        >>> metric.compute().value, metric.compute().effective_sample_size
        (tensor(-2., dtype=torch.float64), tensor(2., dtype=torch.float64))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    state: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("state", torch.zeros(3, 2, dtype=torch.float64), dist_reduce_fx=_merge_columns)

    def update(self, log_weights: Tensor) -> None:
        """Add the log-weights of a batch."""
        log_weights = log_weights.detach()
        rows = torch.stack([importance_weighted_bound(log_weights), effective_sample_size(log_weights)], dim=1)
        self.state = _merge_columns(torch.stack([self.state, _columns(rows)]))

    def compute(self) -> LogLikelihood:
        """Return the estimate with its error and effective sample size."""
        value, size = self.state[1]
        return LogLikelihood(value, _standard_error(self.state)[0], size)


class AggregatePosterior(Metric):
    """Collects the moments of the aggregate posterior over a stream of batches.

    As input to ``forward`` and ``update`` the metric accepts ``mean`` and ``variance`` of the posteriors, of shape
    ``(N, dim)``; N may be 0. As output of ``forward`` and ``compute`` it returns :class:`AggregateMoments`.

    Args:
        dim: Number of latent dimensions.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``dim`` is not positive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}.")
        empty = torch.zeros(dim + 3, dim, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=merge_aggregates)

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Add the posteriors of a batch."""
        self.state = merge_aggregates(torch.stack([self.state, _moments(mean.detach(), variance.detach())]))

    def compute(self) -> AggregateMoments:
        """Return the moments."""
        return _unpacked(self.state)


class ObservationSubset(Metric):
    """Keeps the rows of a fixed random subset of the observations, chosen by their indices alone.

    So neither the batches nor their order nor the number of processes decides what is kept, an observation that is seen
    twice counts once, and data that are sorted by class still give all classes.

    As input to ``forward`` and ``update`` the metric accepts ``rows`` of shape ``(N, columns)`` and ``keys`` of shape
    ``(N,)``, distinct for distinct observations: those with the smallest are kept. As output of ``forward`` and
    ``compute`` it returns the kept rows in the order of their keys, of shape ``(M, columns)``, M at most ``size``.

    Args:
        columns: Length of a row.
        size: Number of rows kept.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``columns`` or ``size`` is not positive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    state: Tensor

    def __init__(self, columns: int, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("columns", columns), ("size", size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.size = size
        empty = torch.full((size, 1 + columns), math.inf, dtype=torch.float64)
        self.add_state("state", empty, dist_reduce_fx=partial(smallest_keys, number=size))

    def update(self, rows: Tensor, keys: Tensor) -> None:
        """Add the rows of a batch."""
        kept = keys < self.state[-1, 0]  # after the first batches few are, and none need be copied
        if not kept.any():
            return
        rows, keys = rows[kept], keys[kept]
        added = torch.cat([keys.double().unsqueeze(1), rows.detach().double()], dim=1)
        self.state = smallest_keys(torch.cat([self.state, added]), self.size)

    def compute(self) -> Tensor:
        """Return the rows kept."""
        return self.state[self.state[:, 0].isfinite(), 1:]


def smallest_keys(rows: Tensor, number: int) -> Tensor:
    """Keep the rows with the smallest distinct keys, in their order.

    Args:
        rows: Rows that start with their key, of shape ``(N, columns)`` or, from several processes,
            ``(processes, N, columns)``. An infinite key marks an empty row.
        number: Number of rows to keep.

    Returns:
        The rows, of shape ``(number, columns)``.
    """
    rows = rows.flatten(end_dim=-2)
    keys, order = rows[:, 0].sort(stable=True)
    repeated = torch.zeros_like(keys, dtype=torch.bool)
    repeated[1:] = keys[1:] == keys[:-1]
    keys, kept = keys.masked_fill(repeated, math.inf).sort(stable=True)
    return torch.cat([keys[:number, None], rows[order[kept[:number]], 1:]], dim=1)


def merge_aggregates(states: Tensor) -> Tensor:
    r"""Merge counts, means, mean variances and co-deviations of several sets of posteriors.

    .. math:: S = \sum_i S_i + \sum_i n_i (m_i - m)(m_i - m)^T

    Args:
        states: Of each set, of shape ``(sets, 3 + k, k)``: count, mean, mean variance, and the sum S of products of
            deviations of the means. Empty sets are fine.

    Returns:
        The same of the union, of shape ``(3 + k, k)``.

    References:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    counts, means, variances = states[:, 0], states[:, 1], states[:, 2]
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count.clamp(min=1)
    variance = (counts * variances).sum(dim=0) / count.clamp(min=1)
    shift = means - mean
    products = states[:, 3:].sum(dim=0) + (counts * shift).T @ shift
    return torch.cat([torch.stack([count, mean, variance]), products])


def _moments(mean: Tensor, variance: Tensor) -> Tensor:
    mean, variance = mean.double(), variance.double()
    number = max(len(mean), 1)
    centre = mean.sum(dim=0) / number
    products = (mean - centre).T @ (mean - centre)
    count = torch.full_like(centre, len(mean))
    return torch.cat([torch.stack([count, centre, variance.sum(dim=0) / number]), products])


def _unpacked(state: Tensor) -> AggregateMoments:
    count, mean, variance = state[:3]
    return AggregateMoments(mean, state[3:] / count.clamp(min=1), variance)


def _columns(values: Tensor) -> Tensor:
    """Summarise values of shape ``(N, columns)`` as count, mean and sum of squared deviations."""
    values = values.double()
    mean = values.sum(dim=0) / max(len(values), 1)
    return torch.stack([torch.full_like(mean, len(values)), mean, (values - mean).square().sum(dim=0)])


def _standard_error(state: Tensor) -> Tensor:
    count, _, deviations = state.unbind()
    return (deviations / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()


def _merge_columns(states: Tensor) -> Tensor:
    """Merge counts, means and sums of squared deviations of several sets, of shape ``(sets, 3, columns)``."""
    counts, means, deviations = states.unbind(dim=1)
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count.clamp(min=1)
    return torch.stack([count, mean, (deviations + counts * (means - mean).square()).sum(dim=0)])
