"""Adapts a pretrained GAN to a few images by mining and sparse finetuning (MineGAN++, arXiv 2104.13742)."""

from . import layers, metrics, models
from .finetune import FrozenNeuronsChanged, Selection, SparseFinetuner, load_delta, unload_delta
from .layers import LazyPenalty, dragan_penalty, gradient_penalty, lazy_adam, path_length_penalty, r1_penalty
from .mining import Mined, Miner, MinerBank, MultiGenerator, load_mined
from .models import load_discriminator, load_generator, save_model
from .ops import backends, interpolate, mmd2, use_backend
from .training import transfer

__version__ = "0.1.0"

__all__ = [
    "FrozenNeuronsChanged",
    "LazyPenalty",
    "Mined",
    "Miner",
    "MinerBank",
    "MultiGenerator",
    "Selection",
    "SparseFinetuner",
    "backends",
    "dragan_penalty",
    "gradient_penalty",
    "interpolate",
    "layers",
    "lazy_adam",
    "load_delta",
    "load_discriminator",
    "load_generator",
    "load_mined",
    "metrics",
    "mmd2",
    "models",
    "path_length_penalty",
    "r1_penalty",
    "save_model",
    "transfer",
    "unload_delta",
    "use_backend",
]
