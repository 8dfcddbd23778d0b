"""Mining: which part of a pretrained GAN's latent space comes closest to the target."""

from .bank import MinerBank
from .checkpoint import load_bank, load_mined, load_miner, save_miner
from .mined import Mined
from .miner import Miner
from .mixture import Mixture
from .multi import MultiGenerator
from .offload import device_bytes
from .prior import PRIORS, default_prior, latent_statistics, own_latents, prior_penalty, project
from .spread import Spread

__all__ = [
    "PRIORS",
    "Mined",
    "Miner",
    "MinerBank",
    "Mixture",
    "MultiGenerator",
    "Spread",
    "default_prior",
    "device_bytes",
    "latent_statistics",
    "load_bank",
    "load_mined",
    "load_miner",
    "own_latents",
    "prior_penalty",
    "project",
    "save_miner",
]
