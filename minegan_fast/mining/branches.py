"""The branches of a `MultiGenerator`: a generator and its miners each, from what a user gives."""

import itertools
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .mined import Mined
from .miner import Miner


class Bank(Protocol):
    """N miners in one call: u [B, I] or [N, B, I] -> [N, B, O]. An nn.Module; bank[i] is the i-th miner."""

    def __call__(self, u: Tensor) -> Tensor: ...
    def __getitem__(self, i: int) -> nn.Module: ...
    def __len__(self) -> int: ...


class _OfBank(nn.Module):
    """The i-th miner of a bank, which is no module of this one: its parameters are the bank's."""

    def __init__(self, bank: Bank, i: int):
        super().__init__()
        self.bank: Bank
        object.__setattr__(self, "bank", bank)
        self.i = i
        for name in ("input_dim", "output_dim"):
            setattr(self, name, getattr(bank[i], name, None))

    def forward(self, u: Tensor) -> Tensor:
        # bank[i] has parameters of its own, in whose `grad` no optimizer of the bank would look.
        return self.bank(u)[self.i] if torch.is_grad_enabled() else self.bank[self.i](u)


def is_bank(miners) -> bool:
    """Whether they are a bank, whose one call gives what all of them give, rather than a list."""
    return isinstance(miners, nn.Module) and not isinstance(miners, nn.ModuleList)


def branches(
    generators: Sequence[nn.Module],
    names: Sequence[str],
    bank: Bank | Sequence[nn.Module] | None,
    class_miners: Sequence[nn.Module | None] | None,
    prior: str,
) -> list[Mined]:
    """A `Mined` for each generator; the arguments and errors are those of `MultiGenerator`."""
    N = len(generators)
    if not N:
        raise ValueError("a MultiGenerator needs at least one generator, got none")
    if bank is None:
        miners = [_identity(name, generator) for name, generator in zip(names, generators, strict=True)]
    else:
        miners = [_OfBank(cast(Bank, bank), i) for i in range(len(bank))] if is_bank(bank) else [*cast(Sequence, bank)]
    classes = [None] * N if class_miners is None else [*class_miners]
    for what, given in (("miners", miners), ("class miners", classes)):
        if len(given) != N:
            raise ValueError(f"there are {N} generators and {len(given)} {what}: give one for each")
    found = []
    for name, generator, miner, class_miner in zip(names, generators, miners, classes, strict=True):
        if isinstance(miner, Mined):
            if miner.generator is not generator:
                raise ValueError(f"the Mined in the place of {name} holds another one: make it by .before(generator)")
            if class_miner is not None:
                raise ValueError(f"the Mined around {name} has the class miner: leave it out of class_miners")
            branch = miner
        else:
            try:
                branch = Mined(generator, miner, class_miner, prior=prior)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if getattr(generator, "num_classes", 0) and branch.class_miner is None:
            raise ValueError(
                f"{name} is class-conditional and has no class miner: give it one in class_miners, or a Mined with one"
            )
        found.append(branch)
    return found


def _identity(name: str, generator: nn.Module) -> Miner:
    size = getattr(generator, "latent_dim", None)
    if not isinstance(size, int):
        raise ValueError(f"{name} has no latent_dim, so its miner must be given")
    like = next(itertools.chain(generator.parameters(), generator.buffers()), torch.empty(()))
    return Miner(size).to(like.device, like.dtype)


def input_size(branch: Mined) -> int | None:
    """The size of u; None where the miner does not say it."""
    try:
        return branch.input_dim
    except ValueError:
        return None


def check_devices(mined: Sequence[Mined], names: Sequence[str], generators: bool = True) -> None:
    """ValueError: generators, unless they are left out, or miners are on different devices."""
    first = None
    for name, branch in zip(names, mined, strict=True):
        tensors = [*branch.parameters(), *branch.buffers()] if generators else [*branch.mining_state().values()]
        for tensor in tensors:
            first = first or (name, tensor.device)
            if tensor.device != first[1]:
                raise ValueError(
                    f"{name} or its miner is on {tensor.device}, {first[0]} on {first[1]}: move all "
                    "of them to one device"
                )
