"""Networks of the paper and their files."""

from .checkpoint import export_rosinality, has_discriminator, load_discriminator, load_generator, save_model
from .pgan import PGANDiscriminator, PGANGenerator
from .stylegan import StyleGANDiscriminator, StyleGANGenerator
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

__all__ = [
    "PGANDiscriminator",
    "PGANGenerator",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "StyleGANDiscriminator",
    "StyleGANGenerator",
    "export_rosinality",
    "has_discriminator",
    "load_discriminator",
    "load_generator",
    "save_model",
]
