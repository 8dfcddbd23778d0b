"""Many miners of one shape, each with weights of its own, in one call."""

import operator
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..ops.miner import Chain, mine, plain
from .miner import Miner, takes
from .prior import project


class _Stacked(nn.Module):
    """A linear layer of each miner: weight [n, out, in], bias [n, out]."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.stack([getattr(layer, name).detach() for layer in layers]))
            for name in ("weight", "bias")
        )


class _OfBank(Miner):
    """Miner i of a bank, whose memory its weights are. A copy of it is that of a copy of the bank."""

    def __init__(self, bank: "MinerBank", i: int):
        with torch.device("meta"):
            super().__init__(**bank.config)
        self.owner = (bank, i)  # in a tuple, since a module in an attribute would be a part of this one
        for name in [name for name, _ in self.named_parameters()]:
            layer, _, which = name.rpartition(".")
            part = bank.get_parameter(name)
            new = nn.Parameter(part.detach()[i], requires_grad=part.requires_grad)
            setattr(self.get_submodule(layer), which, new)

    def tie(self) -> None:
        """Takes the memory that the bank has now."""
        bank, i = self.owner
        for name, parameter in self.named_parameters():
            part = bank.get_parameter(name).detach()[i]
            if (part.data_ptr(), part.dtype, part.device) != (parameter.data_ptr(), parameter.dtype, parameter.device):
                parameter.data = part

    def __reduce_ex__(self, protocol):
        return operator.getitem, self.owner


def _tie_all(bank: "MinerBank", _=None) -> None:
    for miner in bank.miners_of.values():
        miner.tie()


class MinerBank(nn.Module):
    """n miners of one shape: u [B, input_dim], the same for all, or [n, B, input_dim] -> z [n, B, output_dim].

    Args:
        n: how many, >= 1.
        the others: as of `Miner`.

    bank[i] is a `Miner` with the weights of miner i, in the same memory: training one trains the other, also after the
    bank has moved to another device or dtype or has loaded a state dict. Gradients and requires_grad are each one's
    own. len(bank), iteration and bank[-1] work as for a list. A copy of bank[i], by copy.deepcopy or pickle, is that of
    a copy of the bank. Names in the state dict are those of Miner, each tensor with n in front.

    Attributes: `config` (the arguments of each miner), `input_dim`, `output_dim`.
    """

    def __init__(
        self,
        n: int,
        latent_dim: int,
        depth: int = 2,
        width: int | None = None,
        input_dim: int | None = None,
        output_dim: int | None = None,
        activation: str = "relu",
        residual: bool = True,
        affine: bool = False,
    ):
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        shape = (latent_dim, depth, width, input_dim, output_dim, activation, residual, affine)
        self._take([Miner(*shape) for _ in range(n)])

    @classmethod
    def of(cls, miners: Sequence[Miner]) -> "MinerBank":
        """A bank of copies of miners of one shape. ValueError: there is none, or their arguments differ."""
        miners = list(miners)
        if not miners:
            raise ValueError("a bank needs one miner at least")
        for i, miner in enumerate(miners):
            if miner.config != miners[0].config:
                raise ValueError(f"miner 0 is {miners[0].config}, miner {i} {miner.config}: a bank takes one shape")
        bank = cls.__new__(cls)
        nn.Module.__init__(bank)
        bank._take(miners)
        return bank

    def _take(self, miners: list[Miner]) -> None:
        first = miners[0]
        self.config, self.input_dim, self.output_dim = dict(first.config), first.input_dim, first.output_dim
        places = range(0, len(first.layers), 2)
        self.layers = nn.ModuleDict({str(i): _Stacked([cast(nn.Linear, m.layers[i]) for m in miners]) for i in places})
        affine = isinstance(first.skip, nn.Linear)
        self.skip = _Stacked([cast(nn.Linear, m.skip) for m in miners]) if affine else None
        self.miners_of = {}
        self.register_load_state_dict_post_hook(_tie_all)

    def forward(self, u: Tensor, sphere: bool = False) -> Tensor:
        """sphere: project each z onto the sphere, as `project` does."""
        n = len(self)
        if u.ndim not in (2, 3) or u.shape[-1] != self.input_dim or (u.ndim == 3 and len(u) != n):
            expected = f"[B, {self.input_dim}] or [{n}, B, {self.input_dim}]"
            raise ValueError(f"u must have shape {expected}, got {list(u.shape)}")
        layers = [cast(_Stacked, layer) for layer in self.layers.values()]
        skip = None if not self.config["residual"] else "identity"
        if self.skip is not None:
            skip = (self.skip.weight, self.skip.bias)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        chain = Chain(u, weights, biases, self.config["activation"], skip, sphere)
        around = skip if isinstance(skip, tuple) else ()
        if u.numel() and takes(u, *weights, *biases, *around):
            return mine([chain])[0]
        z = plain(chain._replace(sphere=False))
        return project(z.flatten(0, 1), "sphere").view(z.shape) if sphere else z

    def __len__(self) -> int:
        return len(cast(_Stacked, self.layers["0"]).weight)

    def __getitem__(self, i: int) -> Miner:
        n, index = len(self), operator.index(i)
        if not -n <= index < n:
            raise IndexError(f"there are {n} miners, from 0 to {n - 1}, got {index}")
        index %= n
        if index not in self.miners_of:
            self.miners_of[index] = _OfBank(self, index)
        self.miners_of[index].tie()
        return self.miners_of[index]

    def __iter__(self) -> Iterator[Miner]:
        return (self[i] for i in range(len(self)))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        _tie_all(self)
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"miners_of": {}}
