"""Where in the sources a run mines, and where its miners start: at each source's own distribution."""

import copy
from typing import TypeAlias, cast

import torch
from torch import Tensor

from ..mining import Mined, Miner, MultiGenerator, Spread
from ..mining.mined import learned_constant
from ..mining.offload import Transfers
from ..mining.prior import default_prior, own_latents
from .config import TransferConfig
from .generators import Generator, Several, class_count, named_labels, networks, placed
from .processes import Processes
from .randomness import keep_and_set_random_state

Network: TypeAlias = Mined | MultiGenerator


def new_network(
    config: TransferConfig,
    generator: Generator,
    processes: Processes,
    device: torch.device,
    sleep: Transfers | None = None,
) -> Network:
    """The generator behind new miners; several generators each behind its own, of which one wins a sample.

    The miners are on the device, and so are the generators unless they sleep. Of those that the configuration spreads
    over the processes each has its own there, and the others stay where they are.

    sleep: where generators sleep, if the configuration lets them.

    ValueError: as in `new_branches`.
    """
    mined = new_branches(config, generator, device)
    if not isinstance(generator, Several):
        return mined[0].to(device)
    if not config.spread:
        return mixed(config, generator, mined, processes, device, sleep)
    spread, N = Spread(), len(generator)
    own = {i: network for i, network in enumerate(generator) if i in spread.own(N)}
    if not config.offload:
        for network in own.values():
            network.to(device)
    places = spread.placed([own.get(i) for i in range(N)])
    mined = [m if i in own else m.before(places[i]).to(device) for i, m in enumerate(mined)]
    return _mixed(config, generator, mined, spread, sleep if config.offload else None)


def new_branches(config: TransferConfig, generator: Generator, device: torch.device) -> list[Mined]:
    """Each generator behind new miners, which are on the device; the generators are where they were.

    ValueError: as in `new_mined`, of several with the source's name.
    """
    each = networks(generator)
    of_some, mined = any(class_count(network) for network in each), []
    for i, network in enumerate(each):
        own = copy.copy(config)
        if of_some and not class_count(network):
            own.mined_class = None
        try:
            with placed(network, device):
                mined.append(new_mined(own, network).to(device))
        except ValueError as error:
            raise ValueError(
                f"{generator.names[i]}: {error}" if isinstance(generator, Several) else str(error)
            ) from None
    return mined


def mixed(
    config: TransferConfig,
    generator: Several,
    mined: list[Mined],
    processes: Processes,
    device: torch.device,
    sleep: Transfers | None,
) -> MultiGenerator:
    """All generators behind these miners, whichever they were behind, in each process; asleep where there is `sleep`
    and the configuration, or a device that not all would fit on, wants it."""
    for branch, network in zip(mined, generator, strict=True):
        branch.generator = network if sleep else network.to(device)
    found = _mixed(config, generator, mined, None, sleep)
    found.exchange = processes.total
    return found


def _mixed(config, generator: Several, mined, spread: Spread | None, sleep: Transfers | None) -> MultiGenerator:
    return MultiGenerator(
        [branch.generator for branch in mined], mined, resize=generator.resize, explore=config.explore,
        names=generator.names, offload=sleep, spread=spread,
    )  # fmt: skip


def miners_of(network: Network) -> list[Tensor]:
    """All that a network holds beside its generators."""
    generators = {id(t) for b in branches(network) for t in (*b.generator.parameters(), *b.generator.buffers())}
    return [t for t in (*network.parameters(), *network.buffers()) if id(t) not in generators]


def latents_of(network: Network, i: int, u: Tensor) -> Tensor:
    """What generator i gets for u."""
    return network.latents_of(i, u) if isinstance(network, MultiGenerator) else network.latents(u)


def spread_of(network: Network) -> Spread | None:
    """The processes over which generators are spread; None where each has all of them."""
    return network.runner.spread if isinstance(network, MultiGenerator) else None


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
    labels = named_labels(config.mined_class, classes, "the source's")
    size = generator.latent_dim if config.mine == "z" else generator.style_dim
    shape = {"depth": config.miner_depth, "width": config.miner_width}
    with keep_and_set_random_state(config.seed, "miner"):
        miner = Miner(size, **shape)
        if classes:
            start = class_embeddings(generator)[labels]
            class_miner = Miner(generator.latent_dim, **shape, output_dim=start.shape[1], affine=True)
            class_miner.match(start)
    constant = learned_constant(generator) if config.mine_constant else None
    prior = config.prior or default_prior(config.mine)
    reference = own_latents(generator, config.mine, labels=labels)
    return Mined(generator, miner, class_miner, config.mine, constant, prior, reference)


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
