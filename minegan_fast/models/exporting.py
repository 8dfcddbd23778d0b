"""Networks in the files of other programs, which load them strictly: rosinality's two, NVIDIA's, BigGAN-PyTorch."""

from pathlib import Path

import torch

from ..files.atomic import atomic_folder, atomic_path, save_torch
from ..files.pickle_writing import write_pickle
from .biggan import BigGANDiscriminator, BigGANGenerator
from .checkpoint import on_cpu, writable
from .layouts import biggan_writing, nvidia_tf_writing, stylegan_writing
from .stylegan import StyleGANDiscriminator, StyleGANGenerator
from .stylegan2 import StyleGAN2Discriminator, StyleGAN2Generator

# What the programs train with where nobody says otherwise. rosinality's for StyleGAN2: the rate, and in how many steps
# a regularisation of G or D comes once; for StyleGAN: the rate, and how much of it the mapping network gets.
RATE, EVERY = 0.002, {"g": 4, "d": 16}
STYLEGAN_RATE, OF_MAPPING = 0.001, 0.01
BIGGAN_RATES = {"G": 5e-5, "D": 2e-4}
# What BigGAN-PyTorch remembers of a training, of one that has not begun.
UNTRAINED = {"itr": 0, "epoch": 0, "save_num": 0, "save_best_num": 0, "best_IS": 0, "best_FID": 999999}


def export_rosinality(
    path: str | Path, generator: StyleGAN2Generator, discriminator: StyleGAN2Discriminator | None = None
) -> Path:
    """Writes a StyleGAN2 as rosinality/stylegan2-pytorch does: {"g_ema", "g", "latent_avg"}, a torch.save file.

    With a discriminator also {"d", "g_optim", "d_optim"}, the optimizers new ones: what that program's training goes on
    from. Its `args` and `ada_aug_p`, which it writes and does not read, are left out.

    That program builds channels by one table, which several others have changed: any channels are written.

    Raises:
        TypeError, OSError: as in `save_model`.
        ValueError: no program of that layout builds such a network.
    """
    path = writable(path)
    _check_classes("rosinality", StyleGAN2Generator, generator, StyleGAN2Discriminator, discriminator)
    check_rosinality(generator, discriminator)
    weights = on_cpu(generator)
    weights.pop("latent_avg", None)  # that program has it beside the network
    content = {"g_ema": weights, "g": weights, "latent_avg": generator.centre()[0].detach().cpu()}
    if discriminator is not None:
        content["d"] = on_cpu(discriminator)
        for name, network in (("g", generator), ("d", discriminator)):
            ratio = EVERY[name] / (EVERY[name] + 1)
            optimizer = torch.optim.Adam(network.parameters(), lr=RATE * ratio, betas=(0.0, 0.99**ratio))
            content[f"{name}_optim"] = optimizer.state_dict()
    save_torch(path, content)
    return path


def check_rosinality(generator: StyleGAN2Generator, discriminator: StyleGAN2Discriminator | None = None) -> None:
    """ValueError: no program of that layout builds such a network, whatever its table of channels."""
    config = generator.config
    found = []
    if config["architecture"] != "skip":
        found.append(f"a generator of architecture {config['architecture']!r}, and it has the one with skips")
    if discriminator is not None and discriminator.config["architecture"] != "resnet":
        kind = discriminator.config["architecture"]
        found.append(f"a discriminator of architecture {kind!r}, and it has the residual one")
    if generator.num_classes:
        found.append("classes, and it has none")
    for network in (generator, discriminator):
        if network is not None and network.image_channels != 3:
            found.append(f"images of {network.image_channels} channels, and it has RGB")
    if config["latent_dim"] != config["style_dim"]:
        found.append(f"z of {config['latent_dim']} and w of {config['style_dim']} numbers, and it has one size")
    if found:
        raise ValueError(
            f"rosinality/stylegan2-pytorch cannot hold this network: {'; '.join(dict.fromkeys(found))}; take nvidia or "
            "safetensors"
        )


def export_stylegan(
    path: str | Path, generator: StyleGANGenerator, discriminator: StyleGANDiscriminator | None = None
) -> Path:
    """Writes a StyleGAN as rosinality/style-based-gan-pytorch does: {"g_running", "generator"}, a torch.save file.

    With a discriminator also {"discriminator", "g_optimizer", "d_optimizer"}, the optimizers new ones. That program
    builds networks of up to 1024 px; the resolutions above the generator's own are written untrained.

    Raises:
        TypeError, OSError: as in `save_model`.
        ValueError: that program builds no such network.
    """
    path = writable(path)
    _check_classes("StyleGAN", StyleGANGenerator, generator, StyleGANDiscriminator, discriminator)
    for model in (generator, discriminator):
        if model is not None:
            stylegan_writing.check(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        whole = stylegan_writing.whole_generator(generator)
        critic = None if discriminator is None else stylegan_writing.whole_discriminator(discriminator)
    weights = on_cpu(whole)
    content = {"g_running": weights, "generator": weights}
    if critic is not None:
        settings = {"lr": STYLEGAN_RATE, "betas": (0.0, 0.99)}
        optimizer = torch.optim.Adam(whole.generator.parameters(), **settings)
        mapping = {"params": whole.style.parameters(), "lr": STYLEGAN_RATE * OF_MAPPING, "mult": OF_MAPPING}
        optimizer.add_param_group(mapping)
        content |= {"discriminator": on_cpu(critic), "g_optimizer": optimizer.state_dict()}
        content["d_optimizer"] = torch.optim.Adam(critic.parameters(), **settings).state_dict()
    save_torch(path, content)
    return path


def export_nvidia(path: str | Path, generator: StyleGAN2Generator, discriminator: StyleGAN2Discriminator) -> Path:
    """Writes a StyleGAN2 as NVIDIA's programs for TensorFlow do: a pickle of (G, D, Gs), G and Gs the same.

    NVIDIA's programs for PyTorch (stylegan2-ada-pytorch and stylegan3) convert it when they load it. It holds arrays
    and no code: neither source text, which NVIDIA's programs for TensorFlow need, nor a name that only some versions of
    numpy know.

    Raises:
        TypeError, OSError: as in `save_model`.
        ValueError: channels that do not follow min(base / resolution, max), a filter other than StyleGAN2's, classes.
    """
    path = writable(path)
    _check_classes("NVIDIA", StyleGAN2Generator, generator, StyleGAN2Discriminator, discriminator)
    if generator.num_classes:  # what stands for a mined class is no label, and their program takes labels alone
        raise ValueError("no networks with classes are written in NVIDIA's layout: take save_model (--to safetensors)")
    g = nvidia_tf_writing.network(generator, generator.centre()[0])
    networks = (g, nvidia_tf_writing.network(discriminator), g)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write_pickle(file, networks)
    return path


def export_biggan(
    folder: str | Path, generator: BigGANGenerator, discriminator: BigGANDiscriminator | None = None
) -> list[Path]:
    """Writes a BigGAN as BigGAN-PyTorch does, into a folder that is new or empty: `G.pth`, `G_ema.pth` (the same),
    `D.pth`, `state_dict.pth`, `G_optim.pth` and `D_optim.pth`; without a discriminator no `D*.pth`.

    `state_dict.pth` says that no step was made, and holds the options with which that program builds the networks; the
    optimizers are new ones. Returns the files; either all of them are written or none.

    Raises:
        TypeError, OSError: as in `save_model`.
        FileExistsError: there is something in the folder.
        ValueError: that program builds no such network.
    """
    _check_classes("BigGAN-PyTorch", BigGANGenerator, generator, BigGANDiscriminator, discriminator)
    options = biggan_writing.options(generator, discriminator)
    if discriminator is not None:
        biggan_writing.check_critic(discriminator, generator)
    contents: dict[str, dict] = {"G": on_cpu(generator), "G_ema": on_cpu(generator)}
    contents |= {} if discriminator is None else {"D": on_cpu(discriminator)}
    contents["state_dict"] = UNTRAINED | {"config": options}
    for name, network in (("G", generator), ("D", discriminator)):
        if network is not None:
            optimizer = torch.optim.Adam(network.parameters(), lr=BIGGAN_RATES[name], betas=(0.0, 0.999))
            contents[f"{name}_optim"] = optimizer.state_dict()
    with atomic_folder(folder) as temporary:
        for name, content in contents.items():
            save_torch(temporary / f"{name}.pth", content)
    return [Path(folder) / f"{name}.pth" for name in contents]


def _check_classes(layout: str, generator_class: type, generator, critic_class: type, critic) -> None:
    for model, expected in ((generator, generator_class), (critic, critic_class)):
        if not isinstance(model, expected) and not (model is None and expected is critic_class):
            raise TypeError(f"the {layout} layout takes a {expected.__name__}, got a {type(model).__name__}")
