"""Callbacks for any LightningModule that trains a variational autoencoder."""

from .active_units import ActiveUnits as ActiveUnits
from .active_units import active_units as active_units
from .attribute import Attribute as Attribute
from .base import Callback as Callback
from .collapse import Diagnosis as Diagnosis
from .collapse import diagnose as diagnose
from .collapse_detector import CollapseDetector as CollapseDetector
from .dashboard import Dashboard as Dashboard
from .enforced_free_bits import EnforcedFreeBits as EnforcedFreeBits
from .free_bits import FreeBits as FreeBits
from .kl_annealing import KLAnnealing as KLAnnealing
from .latent_space import LatentSpace as LatentSpace
from .mutual_information import MutualInformation as MutualInformation
from .mutual_information import mutual_information as mutual_information
from .pictures import Pictures as Pictures
from .posterior import PosteriorReader as PosteriorReader
from .scheduled_knob import ScheduledKnob as ScheduledKnob
from .schedules import Constant as Constant
from .schedules import Cosine as Cosine
from .schedules import Cyclical as Cyclical
from .schedules import Join as Join
from .schedules import Linear as Linear
from .schedules import Schedule as Schedule
from .schedules import Sigmoid as Sigmoid
from .schedules import Staged as Staged
from .target_rate import TargetRate as TargetRate

__all__ = [
    "ActiveUnits",
    "Attribute",
    "Callback",
    "CollapseDetector",
    "Constant",
    "Cosine",
    "Cyclical",
    "Dashboard",
    "Diagnosis",
    "EnforcedFreeBits",
    "FreeBits",
    "Join",
    "KLAnnealing",
    "LatentSpace",
    "Linear",
    "MutualInformation",
    "Pictures",
    "PosteriorReader",
    "Schedule",
    "ScheduledKnob",
    "Sigmoid",
    "Staged",
    "TargetRate",
    "active_units",
    "diagnose",
    "mutual_information",
]
