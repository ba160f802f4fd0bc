"""Variational autoencoders in PyTorch Lightning that train well and show when they don't."""

from typing import TYPE_CHECKING

from .version import __version__ as __version__
from .version import check_versions

check_versions()

if TYPE_CHECKING:
    from .balancing import kl_balance as kl_balance
    from .balancing import world_model_kl as world_model_kl
    from .checkpoints.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from .checkpoints.flush_loggers import FlushLoggers as FlushLoggers
    from .checkpoints.last_checkpoint import LastCheckpoint as LastCheckpoint
    from .conditions import Condition as Condition
    from .distributed import mean_over_processes as mean_over_processes
    from .evaluation.figures import compare_latents as compare_latents
    from .evaluation.measure import evaluate as evaluate
    from .evaluation.record import Evaluation as Evaluation
    from .evaluation.scores import score as score
    from .likelihoods import Bernoulli as Bernoulli
    from .likelihoods import Categorical as Categorical
    from .likelihoods import Columns as Columns
    from .likelihoods import ContinuousBernoulli as ContinuousBernoulli
    from .likelihoods import DiscretisedLogistic as DiscretisedLogistic
    from .likelihoods import DiscretisedLogisticMixture as DiscretisedLogisticMixture
    from .likelihoods import Gaussian as Gaussian
    from .likelihoods import Laplace as Laplace
    from .likelihoods import Likelihood as Likelihood
    from .likelihoods import NegativeBinomial as NegativeBinomial
    from .likelihoods import Poisson as Poisson
    from .likelihoods import StudentT as StudentT
    from .multi_sample import MultiSampleBound as MultiSampleBound
    from .multi_sample import multi_sample_bound as multi_sample_bound
    from .networks import ConvDecoder as ConvDecoder
    from .networks import ConvEncoder as ConvEncoder
    from .networks import LinearDecoder as LinearDecoder
    from .networks import LinearEncoder as LinearEncoder
    from .networks import MLPDecoder as MLPDecoder
    from .networks import MLPEncoder as MLPEncoder
    from .objective import ELBOTerms as ELBOTerms
    from .objective import elbo as elbo
    from .objective import free_bits as free_bits
    from .objective import group_rates as group_rates
    from .objective import kl_per_dimension as kl_per_dimension
    from .objective import rate_parts as rate_parts
    from .objective import weighted_loss as weighted_loss
    from .observations import Observations as Observations
    from .posteriors import BatchNormMeans as BatchNormMeans
    from .posteriors import CategoricalGroups as CategoricalGroups
    from .posteriors import DiagonalGaussian as DiagonalGaussian
    from .posteriors import FullCovariance as FullCovariance
    from .posteriors import PosteriorHead as PosteriorHead
    from .priors import ConditionalNormal as ConditionalNormal
    from .priors import LearnedNormal as LearnedNormal
    from .priors import MixturePrior as MixturePrior
    from .priors import Prior as Prior
    from .priors import StandardNormal as StandardNormal
    from .priors import UniformCategorical as UniformCategorical
    from .priors import VampPrior as VampPrior
    from .terms import DIP as DIP
    from .terms import MMD as MMD
    from .terms import Step as Step
    from .terms import Term as Term
    from .terms import TotalCorrelation as TotalCorrelation
    from .vae import VAE as VAE

_MODULES = {
    "balancing": ("kl_balance", "world_model_kl"),
    "checkpoints.checkpoint_io": ("AtomicCheckpointIO",),
    "evaluation.figures": ("compare_latents",),
    "evaluation.measure": ("evaluate",),
    "evaluation.record": ("Evaluation",),
    "evaluation.scores": ("score",),
    "checkpoints.flush_loggers": ("FlushLoggers",),
    "checkpoints.last_checkpoint": ("LastCheckpoint",),
    "multi_sample": ("MultiSampleBound", "multi_sample_bound"),
    "likelihoods": (
        "Bernoulli",
        "Categorical",
        "Columns",
        "ContinuousBernoulli",
        "DiscretisedLogistic",
        "DiscretisedLogisticMixture",
        "Gaussian",
        "Laplace",
        "Likelihood",
        "NegativeBinomial",
        "Poisson",
        "StudentT",
    ),
    "networks": ("ConvDecoder", "ConvEncoder", "LinearDecoder", "LinearEncoder", "MLPDecoder", "MLPEncoder"),
    "objective": ("ELBOTerms", "elbo", "free_bits", "group_rates", "kl_per_dimension", "rate_parts", "weighted_loss"),
    "observations": ("Observations",),
    "conditions": ("Condition",),
    "posteriors": ("BatchNormMeans", "CategoricalGroups", "DiagonalGaussian", "FullCovariance", "PosteriorHead"),
    "priors": (
        "ConditionalNormal",
        "LearnedNormal",
        "MixturePrior",
        "Prior",
        "StandardNormal",
        "UniformCategorical",
        "VampPrior",
    ),
    "distributed": ("mean_over_processes",),
    "terms": ("DIP", "MMD", "Step", "Term", "TotalCorrelation"),
    "vae": ("VAE",),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Importing `lightning_vae.callbacks` runs this file and must stay light, so the VAE is imported on first use.
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    if replaced := import_module(f"{__name__}.replaced_names").advice(f"{__name__}.{name}"):
        raise ImportError(replaced)  # `from lightning_vae import ...` would hide the message of an AttributeError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
