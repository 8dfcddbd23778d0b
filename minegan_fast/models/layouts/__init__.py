"""The public projects' files, one module a family, and which of them a file is."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from . import biggan, biggan_deep, dcgan, nvidia_tf, nvidia_torch, pgan, pgan_tf, stylegan, stylegan2
from ._layout import Layout, State, as_it_is

__all__ = [
    "LAYOUTS",
    "MINERS",
    "MODELS",
    "Found",
    "Layout",
    "State",
    "as_it_is",
    "describe",
    "families",
    "find",
    "foreign",
]

# A family adds its module's LAYOUTS here; the first layout that fits a file is taken.
LAYOUTS: tuple[Layout, ...] = (
    *biggan.LAYOUTS,
    *biggan_deep.LAYOUTS,
    *pgan.LAYOUTS,
    *pgan_tf.LAYOUTS,
    *stylegan.LAYOUTS,
    *stylegan2.LAYOUTS,
    *nvidia_torch.LAYOUTS,
    *nvidia_tf.LAYOUTS,
    *dcgan.LAYOUTS,
)

# What a file of this project may hold: {(family, role): class}.
MODELS = {(layout.model.family, layout.role): layout.model for layout in LAYOUTS}

# The names that projects give an exponential moving average of a network.
AVERAGED = r"(?i)ema|avg|average|running|^Gs$"

MOST_PREFIXED = 32  # networks under prefixes that are looked at
LONGEST_SHOWN = 100  # letters of a key in a message

# Keys by which a miner of the original MineGAN is told, with what it mines and for which family.
MINERS = {
    "transform.0.weight": "miner of the original MineGAN for StyleGAN or StyleGAN2",
    "linear8.weight": "miner of the original MineGAN for BigGAN",
    "transform_4.0.weight": "miner of the noise maps, of the original MineGAN for StyleGAN",
    "relu2.bias": "miner of the learned constant, of the original MineGAN for StyleGAN2",
}

# Keys that tell GANs of other kinds, which are not read here; some of them have all names of one that is.
FOREIGN = {
    "synthesis.input.freqs": "StyleGAN3 generator",
    "synthesis.init.init.0.weight_orig": "Projected GAN's generator",
    "feat_8.1.weight_orig": "FastGAN generator",
    "to_rgbs.0.iwt.ll": "SWAGAN generator",
    "from_rgbs.1.dwt.ll": "SWAGAN discriminator",
    "blocks.0.to_style1.weight": "StyleGAN2 generator of lucidrains/stylegan2-pytorch",
}
# Keys of networks that are not read here, but that are taken for one of these GANs or lie beside one.
OTHERS = FOREIGN | {"layer1.0.conv1.weight": "ResNet classifier"} | MINERS


@dataclass(frozen=True)
class Found:
    """A network's tensors in a file.

    Attributes:
        layout: how they are written.
        state: the tensors, under the file's names without `module.` prefixes.
        container: the file's key that holds them; None: the file itself.
        averaged: whether they are an exponential moving average; None: the file does not say.
        passed_over: other keys of the file that hold the same network (the raw weights beside the averaged ones).
    """

    layout: Layout
    state: State
    container: str | None
    averaged: bool | None
    passed_over: tuple[str, ...] = ()


def families(name: str) -> tuple[str, ...]:
    """The families that a user means by `name`: "biggan" is either of the BigGANs."""
    return ("biggan", "biggan_deep") if name == "biggan" else (name,)


def find(data: Mapping, role: str) -> Found | None:
    """The network of that role in a file's data: in a training file's container, or the file itself.

    Averaged weights are preferred to raw ones. Containers that the layout names are searched first, then the others,
    whose name may say that they are averaged. Where none holds one, names with a prefix are: safetensors cannot nest,
    and a program that trains several networks as one module writes them so.
    """
    states = _states(data)
    held = []
    for layout in LAYOUTS:
        if layout.role == role:
            others = [k for k in data if k not in layout.containers]
            others.sort(key=lambda k: re.search(AVERAGED, str(k)) is None)
            for container in (*layout.containers, None, *others):
                state = states.get(container, {})
                if all(key in state for key in layout.signature):
                    by_name = container not in (*layout.containers, None) and re.search(AVERAGED, str(container))
                    averaged = None if container is None else container in layout.averaged or bool(by_name)
                    held.append(Found(layout, state, container, averaged))
    if not held:
        prefixed = (found for layout in LAYOUTS if layout.role == role for found in _prefixed(states, layout))
        held = list(itertools.islice(prefixed, MOST_PREFIXED))
    if not held:
        return None
    best = next((found for found in held if found.averaged), held[0])
    passed_over = tuple(found.container for found in held if found is not best)
    return replace(best, state={**best.state, **_at_the_top(data, best.layout)}, passed_over=passed_over)


def _states(data: Mapping) -> dict[object, State]:
    """The tensors of the file itself (None) and of each of its containers. A dict under many names is read once."""
    made: dict[int, State] = {}
    for value in (data, *data.values()):
        if id(value) not in made and isinstance(value, Mapping):
            made[id(value)] = _tensors(value)
    found: dict[object, State] = {key: made[id(v)] for key, v in data.items() if isinstance(v, Mapping)}
    return found | {None: made[id(data)]}


def _prefixed(states: Mapping[object, State], layout: Layout) -> Iterator[Found]:
    """The networks of that layout whose tensors have a prefix, as in `g_ema.conv1.weight`, in the file itself or in one
    of its containers."""
    seen = set()
    for container in (None, *(key for key in states if key is not None)):
        state = states[container]
        last = "." + layout.signature[0]
        if id(state) in seen:
            continue
        seen.add(id(state))
        for prefix in dict.fromkeys(key.removesuffix(layout.signature[0]) for key in state if key.endswith(last)):
            if all(prefix + key in state for key in layout.signature):
                own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
                averaged = any(part in layout.averaged or re.search(AVERAGED, part) for part in prefix.split("."))
                name = prefix if container is None else f"{container}: {prefix}"
                yield Found(layout, own, f"{name}*", averaged or None)


def _at_the_top(data: Mapping, layout: Layout) -> State:
    """Of pSp's and e4e's files the average is [style_dim] or one for each layer, of which the first is taken."""
    found = {key: data.get(key) for key in layout.at_the_top}
    return {
        key: t.reshape(-1, t.shape[-1])[0] for key, t in found.items() if isinstance(t, Tensor) and t.ndim and t.numel()
    }


def _tensors(candidate) -> State:
    """The tensors of a state dict, without the prefixes that wrappers of a module add."""
    if not isinstance(candidate, Mapping):
        return {}
    named = {k: v for k, v in candidate.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {re.sub(r"^((module|_orig_mod)\.)+", "", k): v for k, v in named.items()}


def foreign(state: State) -> str | None:
    """What a network is that has the names of one that is read here, and others too."""
    return next((kind for key, kind in FOREIGN.items() if key in state), None)


def describe(data: Mapping, role: str) -> str:
    """For an error: what the file looks like, its first keys, and ten keys by which a layout would have been told."""
    states = {id(state): state for state in _states(data).values()}.values()
    known = OTHERS | {layout.signature[0]: f"{layout.model.family} {layout.role}" for layout in LAYOUTS}
    looks = (
        f"It looks like a {kind} (it has {key}). "
        for key, kind in known.items()
        if any(k == key or k.endswith("." + key) for state in states for k in state)
    )
    inside = (f"{top}.{key}" for top, inner in data.items() if isinstance(inner, Mapping) for key in inner)
    names = [name[:LONGEST_SHOWN] for name in itertools.islice(itertools.chain(map(str, data), inside), 10)]
    more = len(data) + sum(len(inner) for inner in data.values() if isinstance(inner, Mapping)) - len(names)
    shown = ", ".join(names) + (f" and {more} more" if more else "")
    told = {}
    for layout in sorted(LAYOUTS, key=lambda layout: layout.role != role):
        told.setdefault(layout.signature[0], f"{layout.signature[0]} ({layout.model.family} {layout.role})")
    would = ", ".join([*told.values()][:10])
    return f"{next(looks, '')}Its keys: {shown or 'none'}. Keys that would have told: {would}"
