"""Callbacks for any LightningModule that trains a variational autoencoder."""

from .base import Callback as Callback
from .capacity import Capacity as Capacity
from .collapse_detector import CollapseDetector as CollapseDetector
from .control.attribute_path import AttributePath as AttributePath
from .control.attribute_scheduler import AttributeScheduler as AttributeScheduler
from .control.attribute_writer import AttributeWriter as AttributeWriter
from .dashboard import Dashboard as Dashboard
from .enforced_free_bits import EnforcedFreeBits as EnforcedFreeBits
from .free_bits import FreeBits as FreeBits
from .geco import GECO as GECO
from .kl_annealing import KLAnnealing as KLAnnealing
from .latent_space import LatentSpace as LatentSpace
from .metrics.active_units import ActiveUnits as ActiveUnits
from .metrics.active_units import active_units as active_units
from .metrics.categorical import CategoricalInformation as CategoricalInformation
from .metrics.categorical import ClassUsage as ClassUsage
from .metrics.categorical import categorical_mutual_information as categorical_mutual_information
from .metrics.categorical import class_usage as class_usage
from .metrics.categorical import dead_classes as dead_classes
from .metrics.categorical import perplexity as perplexity
from .metrics.categorical import unimix as unimix
from .metrics.collapse_state import CollapseState as CollapseState
from .metrics.collapse_state import collapse_state as collapse_state
from .metrics.latent_monitor import LatentMonitor as LatentMonitor
from .metrics.latent_report import LatentReport as LatentReport
from .metrics.mutual_information import mutual_information as mutual_information
from .pictures import Pictures as Pictures
from .reading.distribution_reader import DistributionReader as DistributionReader
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
    "GECO",
    "ActiveUnits",
    "AttributePath",
    "AttributeScheduler",
    "AttributeWriter",
    "Callback",
    "Capacity",
    "CategoricalInformation",
    "ClassUsage",
    "CollapseDetector",
    "CollapseState",
    "Constant",
    "Cosine",
    "Cyclical",
    "Dashboard",
    "DistributionReader",
    "EnforcedFreeBits",
    "FreeBits",
    "Join",
    "KLAnnealing",
    "LatentMonitor",
    "LatentReport",
    "LatentSpace",
    "Linear",
    "Pictures",
    "Schedule",
    "Sigmoid",
    "Staged",
    "TargetRate",
    "active_units",
    "categorical_mutual_information",
    "class_usage",
    "collapse_state",
    "dead_classes",
    "mutual_information",
    "perplexity",
    "unimix",
]
