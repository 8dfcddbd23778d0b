"""Which neurons a network has.

A neuron is one output unit: a row of a Linear, an output channel of a convolution, with the elements that follow it
(its bias element, its affine gain and shift). Neurons of the same tensors form a `NeuronGroup`. A module can name its
own, `neuron_parameters() -> [[("conv.weight", 1), ("activate.bias", 0)], ...]`: parameter names relative to the module
with the axis along which the neurons lie, the weight first and what follows it behind. Otherwise, in every module by
itself, the tensors that have the weight's length follow its rows, and each tensor that is left over is a layer of its
own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from .._torch import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

# torch.nn.utils.parametrize keeps the tensor behind `conv.weight` at `conv.parametrizations.weight.original`.
PARAMETRIZED = re.compile(r"(?:^|(?<=\.))parametrizations\.(\w+)\.original\d*$")


@dataclass(eq=False)
class Member:
    """One parameter of a layer; its neurons lie along `axis`."""

    name: str
    parameter: nn.Parameter
    axis: int
    guessed: bool = False  # neither its module's class nor its shape tells the axis


@dataclass(eq=False)
class NeuronGroup:
    """Neurons of the same tensors: neuron i is slice i of every member. `name` is the first member's."""

    name: str
    members: list[Member]
    conflict: str = ""  # why it cannot train by neurons
    always: bool = False  # all of its neurons train, whatever their scores

    @property
    def neurons(self) -> int:
        member = self.members[0]
        return member.parameter.shape[member.axis] if member.parameter.ndim else 1

    @property
    def cost(self) -> int:
        """Parameters per neuron."""
        return sum(m.parameter.numel() for m in self.members) // self.neurons


def compact(tensor: Tensor, axis: int, rows: Tensor | None = None) -> Tensor:
    """The slices `rows` (None: all) of `tensor` along `axis`, in front: [k, ...]; a 0-d tensor is one slice."""
    if tensor.ndim == 0:
        return tensor.reshape(1)
    if rows is not None:
        tensor = tensor.index_select(axis, rows)
    return tensor.movedim(axis, 0)


def flat_rows(tensor: Tensor, axis: int) -> Tensor:
    """`tensor` as a matrix [neurons, elements of a neuron]."""
    return compact(tensor, axis).flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


def owner(name: str) -> tuple[str, str]:
    """(module, tensor) names of a parameter: `a.conv.parametrizations.weight.original` is `weight` of `a.conv`."""
    module, _, local = PARAMETRIZED.sub(r"\1", name).rpartition(".")
    return module, local


def row_axis(module: nn.Module | None, local: str, parameter: Tensor) -> int:
    """The axis of a parameter along which its neurons lie, where its module does not say.

    0; for transposed convolutions 1 ([in, out, ...]); for weights [1, out, in, k, k] 1. Tensors other than weights
    skip leading axes of size 1 (a learned constant [1, C, 4, 4], a bias [1, C, 1, 1]).
    """
    shape = parameter.shape
    if parameter.ndim < 2:
        return 0
    weight = local.startswith("weight") or local.endswith("weight")
    if isinstance(module, TRANSPOSED_CONVOLUTIONS) and weight:
        return 0 if module.groups > 1 and shape[1] == 1 else 1  # depthwise: [channels, 1, ...]
    if isinstance(module, CONVOLUTIONS | nn.Linear):
        return 0
    if parameter.ndim == 2 and weight and _inputs_first(module, parameter):
        return 1
    longer = [axis for axis, size in enumerate(shape) if size > 1]
    if weight and not (parameter.ndim > 2 and len(longer) == 1):
        return 1 if parameter.ndim == 5 and shape[0] == 1 else 0
    return longer[0] if longer else 0


def _inputs_first(module: nn.Module | None, weight: Tensor) -> bool:
    """Whether a matrix is [in, out]: by the class of transformers' Conv1D, or by a bias of the length of axis 1."""
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor) or bias.ndim != 1:
        return False
    return type(module).__name__ == "Conv1D" or (len(bias) == weight.shape[1] != weight.shape[0])


def _guessed(module: nn.Module | None, parameter: Tensor) -> bool:
    """Whether nothing tells the axis of the neurons: a square matrix of a module of no known class."""
    known = isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag) or type(module).__name__ == "Conv1D"
    return not known and parameter.ndim == 2 and len(set(parameter.shape)) == 1


def find_layers(model: nn.Module) -> list[NeuronGroup]:
    """All layers of trainable neurons, in the model's order; a shared tensor counts once, under its first name.

    Raises ValueError where a module's `neuron_parameters()` names what it does not have, or unequal lengths.
    """
    parameters = dict(model.named_parameters())
    first_name = {id(p): name for name, p in parameters.items()}
    modules = dict(model.named_modules())
    layers, taken, declared = [], set(), set()
    aliases: dict[int, list[str]] = {}  # of tensors that have several names
    for name, p in model.named_parameters(remove_duplicate=False):
        if name != first_name[id(p)]:
            aliases.setdefault(id(p), []).append(name)

    def add(group: list[tuple[str, int]]):
        members = [
            Member(name, p := parameters[name], axis, name not in declared and _guessed(modules.get(owner(name)[0]), p))
            for name, axis in group
            if name not in taken
        ]
        taken.update(name for name, _ in group)
        members = [m for m in members if m.parameter.requires_grad and m.parameter.numel()]
        if members:
            layers.append(NeuronGroup(members[0].name, members))

    for prefix, module in modules.items():
        if declare := getattr(module, "neuron_parameters", None):
            for group in declare():
                group = _declared(module, prefix, group, first_name)
                declared.update(name for name, _ in group)
                add(group)
    by_owner: dict[str, list[str]] = {}
    for name in parameters:
        if name not in taken:
            by_owner.setdefault(owner(name)[0], []).append(name)
    for prefix, names in by_owner.items():
        axes = {name: row_axis(modules.get(prefix), owner(name)[1], parameters[name]) for name in names}
        lengths = {name: parameters[name].shape[axes[name]] if parameters[name].ndim else 1 for name in names}

        def rank(name):
            local, parameter = owner(name)[1], parameters[name]
            return (local != "weight", parameter.ndim < 2, -parameter.numel() if local == "weight" else 0)

        weight = min(names, key=rank)
        following = [name for name in names if name != weight and lengths[name] == lengths[weight]]
        add([(name, axes[name]) for name in (weight, *following)])
        for name in names:
            if name not in (weight, *following):
                add([(name, axes[name])])
    for layer in layers:
        for m in layer.members:
            for name in aliases.get(id(m.parameter), ()):
                axis = row_axis(model.get_submodule(owner(name)[0]), owner(name)[1], m.parameter)
                if axis != m.axis and m.name not in declared:
                    layer.conflict = (
                        f"{m.name!r} has its neurons along axis {m.axis}, and as {name!r} along axis {axis}: what "
                        "a neuron of it is cannot be said; exclude its modules, or let a module around them name its "
                        "neurons by neuron_parameters()"
                    )
            if getattr(modules.get(owner(m.name)[0]), "max_norm", None) is not None:
                layer.conflict = (
                    f"{m.name!r} is rewritten by max_norm in every forward, frozen rows too; exclude its module"
                )
    order = {name: i for i, name in enumerate(parameters)}
    return sorted(layers, key=lambda layer: order[layer.name])


def _declared(module, prefix, group, first_name) -> list[tuple[str, int]]:
    """Full names of what `neuron_parameters()` declared, looked up through parametrizations."""
    found, lengths = [], {}
    for local, axis in group:
        path, _, tensor = local.rpartition(".")
        parents = [f"{path}." if path else "", tensor]
        spellings = [local, f"{local}_orig", "{}parametrizations.{}.original".format(*parents)]
        own = dict(module.named_parameters())
        tensors = [own[s] for s in spellings if s in own][:1]
        if not tensors:  # weight_norm and its like keep several tensors behind one name
            tensors = [p for name, p in own.items() if PARAMETRIZED.sub(r"\1", name) == local]
        if not tensors:
            raise ValueError(
                f"{type(module).__name__}.neuron_parameters() names {local!r}, which module {prefix!r} does not "
                "have; name its parameters as named_parameters() lists them"
            )
        for p in tensors:
            if not -max(p.ndim, 1) <= axis < max(p.ndim, 1):
                raise ValueError(f"neuron_parameters() of module {prefix!r}: {local!r} has no axis {axis}")
            found.append((first_name[id(p)], axis % max(p.ndim, 1)))
            lengths[local] = p.shape[axis] if p.ndim else 1
    if len(set(lengths.values())) > 1:
        raise ValueError(f"neuron_parameters() of module {prefix!r} joins tensors of unequal length: {lengths}")
    return found


def filter_layers(layers: list[NeuronGroup], include, exclude) -> list[NeuronGroup]:
    """Layers whose module, or a module around it, matches a pattern of `include` and none of `exclude` (fnmatch).

    Raises ValueError where a pattern of `include` matches nothing or nothing is left.
    """
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude or []

    def matches(layer, pattern):
        parts = owner(layer.name)[0].split(".")
        return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))

    if not layers:
        raise ValueError(
            "the model has no parameter with requires_grad=True, so there is no neuron to finetune; "
            "call model.requires_grad_() before you build the optimizer"
        )
    for pattern in include or []:
        if not any(matches(layer, pattern) for layer in layers):
            modules = sorted({owner(layer.name)[0] for layer in layers})
            raise ValueError(
                f"include pattern {pattern!r} matches no module with trainable neurons; there are {modules}"
            )
    kept = [
        layer
        for layer in layers
        if (include is None or any(matches(layer, p) for p in include)) and not any(matches(layer, p) for p in exclude)
    ]
    if not kept:
        raise ValueError(f"include={include} and exclude={exclude} leave no neuron to finetune; widen the patterns")
    for layer in kept:
        if layer.conflict:
            raise ValueError(layer.conflict)
    return kept


def split_groups(layers: list[NeuronGroup], groups) -> list[tuple[list[NeuronGroup], dict]]:
    """The layers in parts, each with its options: first those of no group, then those that a group's `include` matches.

    ValueError, TypeError where a group has no include, or a layer matches two of them.
    """
    parts: list[tuple[list[NeuronGroup], dict]] = [([], {})]
    taken: dict[str, int] = {}
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or "include" not in group or "params" in group:
            raise TypeError(
                f"groups[{i}] must be a dict of include, patterns on names of modules, and options such as lr, got "
                f"{group!r}"
            )
        options = {name: value for name, value in group.items() if name != "include"}
        own = filter_layers(layers, group["include"], None)
        for layer in own:
            if layer.name in taken:
                raise ValueError(f"{layer.name!r} is in groups[{taken[layer.name]}] and in groups[{i}]: choose one")
            taken[layer.name] = i
        parts.append((own, options))
    parts[0][0].extend(layer for layer in layers if layer.name not in taken)
    return parts


def split_affine(layers: list[NeuronGroup]) -> list[NeuronGroup]:
    """The layers with the parameters that are one number per neuron in layers of their own, which always train."""
    result = []
    for layer in layers:
        for always in (False, True):
            members = [m for m in layer.members if (m.parameter.numel() == layer.neurons) is always]
            if members:
                result.append(NeuronGroup(members[0].name, members, always=always))
    return result
