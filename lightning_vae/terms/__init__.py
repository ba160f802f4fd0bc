"""Terms: named additions to a VAE's loss, each with a weight, and the pure functions behind them.

The classes are ``lightning_vae.MMD`` and so on; this is the reference of the functions.
"""

from .base import Step as Step
from .base import Term as Term
from .dip import DIP as DIP
from .dip import dip_penalty as dip_penalty
from .mmd import MMD as MMD
from .mmd import inverse_multiquadric as inverse_multiquadric
from .mmd import rbf as rbf
from .mmd import squared_mmd as squared_mmd
from .total_correlation import Decomposition as Decomposition
from .total_correlation import TotalCorrelation as TotalCorrelation
from .total_correlation import decompose as decompose
from .total_correlation import minibatch_weights as minibatch_weights
from .total_correlation import pairwise_log_densities as pairwise_log_densities

# The classes have their public name in lightning_vae.
__all__ = [
    "Decomposition",
    "decompose",
    "dip_penalty",
    "inverse_multiquadric",
    "minibatch_weights",
    "pairwise_log_densities",
    "rbf",
    "squared_mmd",
]
