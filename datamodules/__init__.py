"""Data sets that a VAE trains on, as LightningDataModules."""

from .base import DataModule
from .batch_loader import BatchLoader
from .cifar10 import CIFAR10
from .digits import Digits
from .gaussian import Gaussian
from .images import Images
from .linear_vae import LinearVAEOptimum, linear_vae_optimum
from .mnist import KMNIST, MNIST, FashionMNIST
from .omniglot import Omniglot
from .stream_loader import StreamLoader
from .svhn import SVHN
from .tensor_loader import TensorLoader

__all__ = [
    "CIFAR10",
    "KMNIST",
    "MNIST",
    "SVHN",
    "BatchLoader",
    "DataModule",
    "Digits",
    "FashionMNIST",
    "Gaussian",
    "Images",
    "LinearVAEOptimum",
    "Omniglot",
    "StreamLoader",
    "TensorLoader",
    "linear_vae_optimum",
]
