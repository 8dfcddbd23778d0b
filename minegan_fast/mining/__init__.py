"""Mining: which part of a pretrained GAN's latent space comes closest to the target."""

from .checkpoint import load_miner, save_miner
from .miner import Mined, Miner

__all__ = ["Mined", "Miner", "load_miner", "save_miner"]
