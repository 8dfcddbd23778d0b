"""Networks of the paper and their files."""

from .biggan import BigGANDiscriminator, BigGANGenerator
from .biggan_deep import BigGANDeepGenerator
from .checkpoint import has_discriminator, load_discriminator, load_generator, save_model
from .dcgan import DCGANDiscriminator, DCGANGenerator
from .exporting import export_biggan, export_nvidia, export_rosinality, export_stylegan
from .inspection import convert, inspect
from .pgan import PGANDiscriminator, PGANGenerator
from .stylegan import StyleGANDiscriminator, StyleGANGenerator
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

__all__ = [
    "BigGANDeepGenerator",
    "BigGANDiscriminator",
    "BigGANGenerator",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "PGANDiscriminator",
    "PGANGenerator",
    "StyleGAN2Discriminator",
    "StyleGAN2Generator",
    "StyleGANDiscriminator",
    "StyleGANGenerator",
    "convert",
    "export_biggan",
    "export_nvidia",
    "export_rosinality",
    "export_stylegan",
    "has_discriminator",
    "inspect",
    "load_discriminator",
    "load_generator",
    "save_model",
]
