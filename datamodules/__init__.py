"""Data sets that a VAE trains on, as LightningDataModules."""

from .arrays import Arrays
from .base import DataModule
from .cifar10 import CIFAR10
from .digits import Digits
from .gaussian import Gaussian
from .images import Images
from .linear_vae_optimum import LinearVAEOptimum, linear_vae_optimum
from .loaders.batch_loader import BatchLoader, DataError
from .loaders.stream_loader import StreamLoader
from .loaders.tensor_loader import TensorLoader
from .mnist import KMNIST, MNIST, FashionMNIST
from .omniglot import Omniglot
from .svhn import SVHN
from .table import Table

__all__ = [
    "CIFAR10",
    "KMNIST",
    "MNIST",
    "SVHN",
    "Arrays",
    "BatchLoader",
    "DataError",
    "DataModule",
    "Digits",
    "FashionMNIST",
    "Gaussian",
    "Images",
    "LinearVAEOptimum",
    "Omniglot",
    "StreamLoader",
    "Table",
    "TensorLoader",
    "linear_vae_optimum",
]
