"""An adapted GAN from its files, and how good it is."""

from pathlib import Path

import torch

from ..finetune import load_delta
from ..mining import Mined, Miner, load_miner
from ..models import has_discriminator, load_discriminator, load_generator
from .config import TransferConfig, load_config
from .evaluation import MEASURES, choose_features, generate, measure
from .folder import RESULTS, RunFolder
from .images import load_images
from .sources import choose_device, image_channels


def open_result(path: str | Path, which: str = "best", device: str | None = None, source=None, miner=None) -> Mined:
    """The sampler in a run's folder, or of a delta file over its `source` (with `miner`, or the one beside it).

    ValueError/FileNotFoundError: no run there, none of that name, a delta without its source.
    """
    path, where = Path(path), choose_device(device)
    if path.suffix == ".safetensors" and not path.exists():
        raise FileNotFoundError(f"no delta at {str(path)!r}: check the path; results from before stage 2 have none")
    if path.is_file():
        if source is None:
            raise ValueError(f"{path} is a delta: name the checkpoint that it was trained from with --source")
        generator = load_generator(source)
        load_delta(generator, path)
        beside = path.with_name("miner.safetensors")
        network = load_miner(miner or beside) if miner or beside.exists() else _identity(generator.latent_dim)
    else:
        if which not in RESULTS:
            raise ValueError(f"which must be one of {', '.join(RESULTS)}, got {which!r}")
        folder = getattr(RunFolder(path), which)
        if not (folder / "generator.safetensors").is_file():
            raise FileNotFoundError(f"no {which} result in {str(path)!r}: give the folder that transfer wrote")
        generator, network = load_generator(folder / "generator.safetensors"), load_miner(folder / "miner.safetensors")
    return Mined(generator, network).to(where).eval()


def _identity(latent_dim: int) -> Miner:
    """A residual miner before its first step."""
    return Miner(latent_dim, depth=1).eval()


@torch.no_grad()
def evaluate_result(path, which, device, source, miner, images, samples: int, features, seed: int) -> dict:
    """Metrics of an adapted GAN against a folder: {"metrics": {...}, "generated", "real", "features", "seed"}."""
    sampler = open_result(path, which, device, source, miner)
    generator = sampler.generator
    real = load_images(images, generator.resolution, image_channels(generator)).images
    critic = None
    if Path(path).is_dir():
        config = TransferConfig(**load_config(path))
        features, source = features or config.features, config.source
        if config.critic:
            critic = load_discriminator(config.critic)
    if critic is None and source and features in (None, "critic") and has_discriminator(source):
        critic = load_discriminator(source)
    extractor = choose_features(features, critic, real, next(generator.parameters()).device)
    fake = generate(sampler, samples, seed)
    return {
        "metrics": measure(extractor(fake), extractor(real), MEASURES),
        "generated": len(fake),
        "real": len(real),
        "features": extractor.name,
        "seed": seed,
    }
