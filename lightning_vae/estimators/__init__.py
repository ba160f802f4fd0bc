"""Estimators for evaluation: pure functions of tensors, and streaming metrics built on them.

All are in nats and in float64, for a model with the standard normal prior p(z) and diagonal Gaussian posteriors unless
stated otherwise. A metric gives the same result for any batch size, order and number of processes.
"""

from ..callbacks.metrics.aggregate_posterior import AggregateMoments as AggregateMoments
from ..callbacks.metrics.aggregate_posterior import AggregatePosterior as AggregatePosterior
from ..callbacks.metrics.aggregate_posterior import aggregate_moments as aggregate_moments
from ..callbacks.metrics.observation_subset import ObservationSubset as ObservationSubset
from ..callbacks.metrics.rate_decomposition import cross_fitted_marginal_kl as cross_fitted_marginal_kl
from ..callbacks.metrics.rate_decomposition import is_saturated as is_saturated
from ..callbacks.metrics.running_moments import Averages as Averages
from ..callbacks.metrics.running_moments import RunningMoments as RunningMoments
from .closed_forms import gaussian_total_correlation as gaussian_total_correlation
from .closed_forms import shannon_distortion as shannon_distortion
from .ex_post import ExPostDensity as ExPostDensity
from .importance import ImportanceWeightedLikelihood as ImportanceWeightedLikelihood
from .importance import LogLikelihood as LogLikelihood
from .importance import effective_sample_size as effective_sample_size
from .importance import importance_weighted_bound as importance_weighted_bound
from .mixture import MixtureEstimates as MixtureEstimates
from .mixture import categorical_estimates as categorical_estimates
from .mixture import mixture_estimates as mixture_estimates
from .outliers import auroc as auroc
from .probes import linear_probe_r2 as linear_probe_r2
