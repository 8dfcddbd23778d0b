"""BigGAN-PyTorch (ajbrock): a folder of state dicts, `G_ema.pth`, `G.pth`, `D.pth`."""

import re

from ..biggan import BigGANDiscriminator, BigGANGenerator, discriminator_size
from ._layout import Layout, State, highest


def _blocks(state: State) -> int:
    return highest(state, r"blocks\.(\d+)\..*") + 1


def _normalised(state: State) -> dict:
    # A network without spectral norm has no u. The shapes do not tell its eps, which hardly matters.
    return {} if "linear.u0" in state else {"sn_eps": None}


def _generator(state: State) -> dict:
    blocks = _blocks(state)
    outputs = [state[f"blocks.{i}.0.conv1.weight"].shape[0] for i in range(blocks)]
    first, gain = state["linear.weight"].shape[1], state["blocks.0.0.bn1.gain.weight"]
    shared = "shared.weight" in state
    classes, class_dim = state["shared.weight"].shape if shared else (gain.shape[0], 1)
    hierarchical = shared and gain.shape[1] > class_dim
    return {
        "resolution": 4 << blocks,
        "latent_dim": first * (blocks + 1) if hierarchical else first,
        "class_dim": class_dim,
        "num_classes": classes,
        "channels": [state["blocks.0.0.conv1.weight"].shape[1], *outputs],
        "attention": [8 << i for i in range(blocks) if f"blocks.{i}.1.gamma" in state],
        "hierarchical": hierarchical,
        "shared": shared,
        "image_channels": state["output_layer.2.weight"].shape[0],
    } | _normalised(state)


def _discriminator(state: State) -> dict:
    blocks = _blocks(state)
    resolution = 2 << blocks
    image_channels = state["blocks.0.0.conv1.weight"].shape[1]
    found = (i for i in range(blocks) if f"blocks.{i}.1.gamma" in state)
    names = [f"blocks.{i}.0.conv{{}}.weight" for i in range(blocks)]
    inner, outer = ([state[name.format(conv)].shape[0] for name in names] for conv in (1, 2))
    return {
        "resolution": resolution,
        "num_classes": state["embed.weight"].shape[0],
        "channels": outer,
        "attention": sorted({discriminator_size(resolution, i) for i in found}, reverse=True),
        "wide": inner == outer,
        "image_channels": image_channels,
    } | _normalised(state)


def _convert(state: State) -> State:
    """Without what the forward does not read: singular values behind the first, counters of other batch norms, whose
    statistics sit one module deeper."""
    renamed = {re.sub(r"\.bn\.(?:stored|running)_(mean|var)$", r".stored_\1", key): t for key, t in state.items()}
    unused = re.compile(r".*\.(?:(?:u|sv)[1-9]\d*|bn\.(?:accumulation_counter|num_batches_tracked))")
    return {key: tensor for key, tensor in renamed.items() if not unused.fullmatch(key)}


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        project="BigGAN-PyTorch",
        role="generator",
        model=BigGANGenerator,
        signature=("blocks.0.0.bn1.gain.weight", "blocks.0.0.conv_sc.weight", "output_layer.2.weight"),
        containers=("G_ema", "G"),
        averaged=("G_ema",),
        config=_generator,
        convert=_convert,
    ),
    Layout(
        project="BigGAN-PyTorch",
        role="discriminator",
        model=BigGANDiscriminator,
        signature=("blocks.0.0.conv2.weight", "blocks.0.0.conv_sc.weight", "embed.weight"),
        containers=("D",),
        config=_discriminator,
        convert=_convert,
    ),
)
