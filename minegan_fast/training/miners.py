"""Where in the sources a run mines, and where its miners start: at each source's own distribution."""

import copy
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ..mining import Mined, Miner, MultiGenerator
from ..mining.mined import learned_constant
from ..mining.prior import default_prior, own_latents
from .config import TransferConfig
from .generators import Generator, Several, class_count
from .processes import Processes
from .randomness import keep_and_set_random_state

Network: TypeAlias = Mined | MultiGenerator


def new_network(config: TransferConfig, generator: Generator, processes: Processes) -> Network:
    """The generator behind new miners; several generators each behind its own, of which one wins a sample.

    ValueError: as in `new_mined`, with the source's name.
    """
    if not isinstance(generator, Several):
        return new_mined(config, generator)
    of_some = any(class_count(network) for network in generator)
    mined = []
    for name, network in zip(generator.names, generator, strict=True):
        own = copy.copy(config)
        if of_some and not class_count(network):
            own.mined_class = None
        try:
            mined.append(new_mined(own, cast(Generator, network)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    several = MultiGenerator(generator, mined, resize=generator.resize, explore=config.explore, names=generator.names)
    several.exchange = processes.total
    return several


def branches(network: Network) -> list[Mined]:
    """Of several generators, each with its miners; or the one that it is."""
    return [cast(Mined, branch) for branch in network.branches] if isinstance(network, MultiGenerator) else [network]


def shares(network: Network) -> list[float]:
    """How much each of `branches` has in the mixture."""
    return network.probabilities.tolist() if isinstance(network, MultiGenerator) else [1.0]


def new_mined(config: TransferConfig, generator: Generator) -> Mined:
    """The generator behind new miners.

    The miner of z or w starts as the identity (with the prior sphere: as the direction of u), and a mined constant as
    the generator's own. Mined w are compared with the mapping's distribution as it is now, before the mapping trains.

    The class miner starts as an affine map of u. Its values have the mean and the covariance of the source's class
    embeddings, or of the embeddings of the labels that `mined_class` names; for a single label they are its embedding,
    whatever u is. This matches mean and covariance only: it ignores that real classes are isolated points, independent
    of z.

    ValueError: the source has nothing to mine there, or `mined_class` names a label that it does not have.
    """
    if config.mine == "w" and not hasattr(generator, "mapping"):
        raise ValueError(f"mine is w, but {type(generator).__name__} has no mapping network: take mine z")
    classes, class_miner = class_count(generator), None
    if config.mined_class and not classes:
        raise ValueError(f"mined_class is {config.mined_class}, but {type(generator).__name__} has no classes")
    size = generator.latent_dim if config.mine == "z" else generator.style_dim
    shape = {"depth": config.miner_depth, "width": config.miner_width}
    with keep_and_set_random_state(config.seed, "miner"):
        miner = Miner(size, **shape)
        if classes:
            start = class_embeddings(generator)[_labels(config.mined_class, classes)]
            class_miner = Miner(generator.latent_dim, **shape, output_dim=start.shape[1], affine=True)
            class_miner.match(start)
    constant = learned_constant(generator) if config.mine_constant else None
    prior = config.prior or default_prior(config.mine)
    return Mined(generator, miner, class_miner, config.mine, constant, prior, own_latents(generator, config.mine))


def class_embeddings(generator: Generator) -> Tensor:
    """[num_classes, class_dim] on the CPU. ValueError: the generator does not give them."""
    embeddings = getattr(generator, "class_embeddings", None)
    if embeddings is None:
        raise ValueError(
            f"the source {type(generator).__name__} is class-conditional, but has no class_embeddings(): a method that "
            "returns the embedding of every class, [num_classes, class_dim], which the generator takes for a label"
        )
    with torch.no_grad():
        return embeddings().float().cpu()


def _labels(named: int | str | None, classes: int) -> list[int]:
    """[207, 208] for "207,208"; all labels for None."""
    if named is None:
        return list(range(classes))
    labels = [int(word) for word in str(named).split(",")]
    if max(labels) >= classes:
        raise ValueError(f"mined_class is {named}, but the source's labels are 0 to {classes - 1}")
    return labels
