"""Mining: which part of a pretrained GAN's latent space comes closest to the target."""

from .checkpoint import load_mined, load_miner, save_miner
from .mined import Mined
from .miner import Miner

__all__ = ["Mined", "Miner", "load_mined", "load_miner", "save_miner"]
