"""Which neurons train: the `Selection`, and how a ranking of scores becomes one."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import save_tensors
from .neurons import NeuronGroup

FORMAT = "minegan_fast.selection"
SCOPES = ("global", "layer", "normalised")


@dataclass(eq=False)
class Selection:
    """The trained neurons of a model.

    rows: {layer: int64 [k], sorted}, only layers with any. sizes: {layer: (neurons, parameters per neuron)} of every
    candidate layer. budget: what `density` counts, "neurons" or "parameters". always: layers that train as a whole and
    that `density` leaves out, those of affine=True.
    """

    rows: dict[str, Tensor]
    sizes: dict[str, tuple[int, int]] = field(repr=False)
    budget: str = "neurons"
    always: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def density(self) -> float:
        """The fraction of the candidates that trains, in neurons or parameters as `budget` says."""
        weigh = (lambda size: 1) if self.budget == "neurons" else (lambda size: size[1])
        sizes = {name: size for name, size in self.sizes.items() if name not in self.always}
        trained = sum(len(self.rows.get(name, ())) * weigh(size) for name, size in sizes.items())
        return trained / max(1, sum(size[0] * weigh(size) for size in sizes.values()))

    def counts(self) -> dict[str, tuple[int, int]]:
        """{layer: (trained, all)} of every candidate layer."""
        return {name: (len(self.rows.get(name, ())), n) for name, (n, _) in self.sizes.items()}

    def shuffled(self, seed: int) -> "Selection":
        """The control that a score is held against: as many neurons in every layer, and so as many parameters, chosen
        at random."""
        generator = torch.Generator().manual_seed(int(seed))
        rows = {}
        for name in sorted(self.rows):
            drawn = torch.randperm(self.sizes[name][0], generator=generator, device="cpu")[: len(self.rows[name])]
            rows[name] = drawn.sort().values
        return replace(self, rows=rows)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Selection):
            return NotImplemented
        return self.sizes == other.sizes and {n: r.tolist() for n, r in self.rows.items()} == {
            n: r.tolist() for n, r in other.rows.items()
        }

    def save(self, path: str | os.PathLike):
        """Writes the selection as safetensors, atomically."""
        metadata = {"format": FORMAT, "version": "1", "budget": self.budget, "sizes": json.dumps(self.sizes)}
        metadata["always"] = json.dumps(sorted(self.always))
        save_tensors(path, self.rows, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Selection":
        """Reads what `save` wrote. ValueError where the file is something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(
                f"{os.fspath(path)!r} is not a selection: {error}; write one with Selection.save()"
            ) from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)!r} holds no selection; write one with Selection.save()")
        try:
            sizes = {name: tuple(size) for name, size in json.loads(metadata["sizes"]).items()}
            return cls(rows, sizes, metadata["budget"], frozenset(json.loads(metadata.get("always", "[]"))))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{os.fspath(path)!r} is a damaged selection ({reason}); write it again") from None


def sizes_of(layers: list[NeuronGroup]) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.neurons, layer.cost) for layer in layers}


def _selection(rows: dict[str, Tensor], layers: list[NeuronGroup], budget: str) -> Selection:
    """The selection of these rows and of all rows of the layers that always train."""
    whole = {layer.name: torch.arange(layer.neurons, device="cpu") for layer in layers if layer.always}
    return Selection({**rows, **whole}, sizes_of(layers), budget, frozenset(whole))


def choose(scores: Mapping[str, Tensor], layers, density, budget, scope, policy) -> Selection:
    """The selection that the scores {layer: [neurons]} ask for, ranked where they are; only its rows come to the CPU.

    "train_top" trains the highest scores, "freeze_top" the lowest; ties go by (name, row). scope "global" ranks all
    neurons together and trains the first max(1, round(density·n)), or with budget "parameters" the first ones until
    they hold density times the parameters: fewer than one neuron's parameters too many. scope "layer" trains the first
    max(1, round(density·n)) of each layer; the neurons of a layer are equally large, so both budgets mean the same.
    scope "normalised" ranks all neurons together by their scores in units of the mean score of their layer, so that no
    layer wins by its scale; where that mean is zero, so is the score. Layers that always train are not ranked: all
    their rows train, and density leaves them out. ValueError where a score is not finite.
    """
    sizes = sizes_of([layer for layer in layers if not layer.always])
    names = sorted(sizes)
    if not names:
        return _selection({}, layers, budget)
    flat = torch.cat([scores[name] for name in names])
    if not flat.isfinite().all():
        bad = [name for name in names if not scores[name].isfinite().all()]
        raise ValueError(
            f"the scores of {', '.join(bad)} are not finite: a gradient was inf or NaN; nothing was selected. "
            "Lower the loss scale or leave out the bad batch, and score again"
        )
    counts, costs = (
        torch.tensor(column, device="cpu") for column in zip(*(sizes[name] for name in names), strict=True)
    )
    layer = torch.repeat_interleave(torch.arange(len(names), device="cpu"), counts).to(flat.device)
    if scope == "normalised":
        means = torch.stack([scores[name].double().mean() for name in names])[layer]
        flat = torch.where(means == 0, 0.0, flat / means)
    order = flat.argsort(descending=policy == "train_top", stable=True)
    if scope == "layer":
        order = order[layer[order].argsort(stable=True)]
        position = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
        quota = torch.tensor([max(1, round(density * n)) for n in counts.tolist()], device="cpu")
        taken = position < quota.repeat_interleave(counts)
    elif budget == "parameters":
        # a target that rounding error alone lifts above a whole number of parameters is that number
        target = density * int((counts * costs).sum()) * (1 - 1e-12)
        cost = costs.to(flat.device)[layer[order]]
        taken = (cost.cumsum(0) - cost).double() < target
    else:
        taken = torch.arange(len(order), device="cpu") < max(1, round(density * len(order)))
    chosen = order[taken.to(flat.device)].sort().values.cpu()
    ends = counts.cumsum(0)
    parts = chosen.tensor_split(torch.searchsorted(chosen, ends)[:-1])
    rows = {
        name: part - end + n
        for name, part, end, n in zip(names, parts, ends.tolist(), counts.tolist(), strict=True)
        if len(part)
    }
    return _selection(rows, layers, budget)


def selection_by_hand(rows: Mapping[str, object] | Selection, layers: list[NeuronGroup], budget: str) -> Selection:
    """A checked selection from {layer: row numbers or boolean mask}, or one that was saved. Layers that always train
    need not be named.

    ValueError/TypeError where a name or a row does not fit the layers, or nothing is selected.
    """
    sizes = sizes_of(layers)
    if not isinstance(rows, Selection | Mapping):
        raise TypeError(f"a selection is a Selection or {{layer: rows}}, got {type(rows).__name__}")
    if isinstance(rows, Selection):
        if any(sizes.get(name) != rows.sizes[name] for name in rows.rows):
            raise ValueError("the selection is of another model: its layers have other names or sizes; select anew")
        rows = rows.rows
    always = {layer.name for layer in layers if layer.always}
    followers = {m.name: layer.name for layer in layers for m in layer.members[1:]}
    checked = {}
    for name, given in rows.items():
        if name not in sizes:
            hint = (
                f"it follows the neurons of {followers[name]!r}" if name in followers else f"there are {sorted(sizes)}"
            )
            raise ValueError(f"{name!r} is no layer of neurons; {hint}")
        try:
            given = torch.as_tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"the rows of {name!r} must be integers or a boolean mask, got {given!r}") from None
        n = sizes[name][0]
        if given.dtype == torch.bool and given.shape == (n,):
            given = given.nonzero().flatten()
        if given.numel() == 0:
            continue
        if given.ndim != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"the rows of {name!r} must be a list of integers or a boolean mask of {n}")
        given = given.long().sort().values
        if given[0] < 0 or given[-1] >= n:
            raise ValueError(f"rows {given[0]} to {given[-1]} of {name!r} are out of range; it has rows 0 to {n - 1}")
        if (given[1:] == given[:-1]).any():
            raise ValueError(f"the rows of {name!r} hold duplicates; name each row once")
        if name in always and len(given) < n:
            raise ValueError(f"affine=True trains all {n} rows of {name!r}; leave it out of the selection")
        checked[name] = given
    if not checked and not always:
        raise ValueError("the selection is empty; name at least one row")
    return _selection(checked, layers, budget)
