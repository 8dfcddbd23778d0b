"""Several GANs mined together: MineGAN's mining of multiple generators (Wang et al. 2020, arXiv 1912.05270).

Each of N generators G_i stands behind a miner M_i of its own, and one critic D judges all of them. A sample u is given
to every branch, and the image that the critic scores highest stands for it:

    who(u) = argmax_i D(G_i(M_i(u)))        L_D = E max_i D(G_i(M_i(u))) - E D(x)        L_M = -E max_i D(G_i(M_i(u)))

p_i is how often branch i wins. Afterwards an image of the mixture is G_i(M_i(u)) with i ~ p and u ~ N(0, I).

The gradient of a maximum is that of the winner. So all branches are scored without a graph, and then each generator
runs once more, with a graph, on the samples that it won: together as many as the batch has, whatever N is.
With frozen generators, whose backward takes about as long as their forward, that is N + 2 passes for 2 N: of two GANs
it saves memory alone.

Generators of one architecture could run as one batched network (torch.func.vmap over stack_module_state). On a CPU
that is no faster: 8 generators of transposed convolutions and batch norm, 64 pixels, took 1.1 times the loop's time
without a graph and 1.25 times with one for 16 samples, 0.9 and 1.0 times for 4. The ops of this package refuse
transforms besides. So there is the loop.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.winner import winner
from .branches import Bank, branches, check_devices, input_size, is_bank
from .draws import draw_inputs, random_state, seeded_by, set_random_state
from .mined import Mined
from .offload import Offload, Transfers, pinned_memory
from .passes import resized, same, scored
from .prior import project
from .runner import Runner
from .spread import Spread

COLLAPSED, SOON = 0.99, 20  # the share of one branch that is named, and the steps before that it is not


class MultiGenerator(nn.Module):
    """Several generators behind their miners: u [B, input_dim] -> images [B, C, H, W], each from one of them.

    Args:
        generators: modules whose images have one shape. Their latent sizes and families may differ. `Mined` says what
            they take.
        bank: the miners: a `MinerBank`, one call for all; or a list with, for each generator, a miner of z or a `Mined`
            around that generator, which may mine w, a class and a learned constant; None: for each a new `Miner`, which
            starts as the identity.
        class_miners: for each generator its class miner or None, where `bank` holds miners of z. A class-conditional
            generator needs one.
        prior: of the miners of z, see `Mined`; a `Mined` has its own.
        resize: None, or the height and width that all images are brought to, where they differ: an int or a pair.
            Bilinear, with a filter where it shrinks.
        decay: how much of the counted wins stays from step to step; 1 counts all steps alike.
        explore: the share of a batch, 0 to 1, that `best` gives to branches at random.
        names: what messages call the generators; None: by number and class.
        offload: "cpu": frozen weights of generators sleep in pinned memory of the host, and those of at most two at a
            time are on the miners' GPU, one that runs and the next one (see offload.py). Values and gradients are the
            same bits. The generators may be given on the CPU. The images that are returned keep no graph of their
            generators: their backward makes them once more, so of N GANs it is N + 3 passes for N + 2, and once
            differentiable.
        spread: None, or the ranks that share the generators, each of which gives its own and, in the places of others,
            None. All calls are those of all ranks, with the same u and critic, and give on each what one process would
            give, to rounding; spread.py says how, and who gets which gradient. Where a generator or the critic fails on
            one rank, all raise its error.

    A branch whose miner takes fewer numbers than another's takes the first of u.

    Generators are as the caller left them, in eval mode or not, but `best` refuses one that does not make the same
    image of the same sample twice. Keywords of the calls go to every generator.

    Attributes: branches (a `Mined` for each generator), bank (the bank, or None), input_dim (the size of u), names,
    runner (how they run; with offload `runner.offload.rest()` puts all to sleep), exchange (None, or what makes of the
    wins [N] that one process counts in a step, float64, those of all).

    ValueError: there is no generator; generators or miners are on different devices; images differ in channels, or in
    resolution without `resize`; a conditional generator has no class miner; numbers of miners and generators differ; a
    `Mined` holds another generator; there is no GPU for `offload`; and what `Mined` refuses. To see the shapes, the
    constructor makes one image of each generator, in eval mode.
    """

    def __init__(
        self,
        generators: Iterable[nn.Module],
        bank: Bank | Sequence[nn.Module] | None = None,
        class_miners: Sequence[nn.Module | None] | None = None,
        prior: str = "none",
        resize: int | tuple[int, int] | None = None,
        decay: float = 0.99,
        explore: float = 0.0,
        names: Sequence[str] | None = None,
        offload: "str | Transfers | None" = None,
        spread: Spread | None = None,
    ):
        super().__init__()
        if not (0 < decay <= 1 and 0 <= explore <= 1):
            raise ValueError(
                f"decay must be above 0, at most 1, and explore from 0 to 1, got {decay!r} and {explore!r}"
            )
        self.resize = (resize, resize) if isinstance(resize, int) else resize
        self.decay, self.explore = decay, explore
        generators = [*generators] if spread is None else spread.placed([*generators])
        self.runner = Runner(len(generators), spread)
        given = range(len(generators)) if names is None else names
        self.names = [
            f"generator {n} ({getattr(g, 'kind', type(g).__name__)})" if names is None else str(n)
            for n, g in zip(given, generators, strict=True)
        ]
        self.bank: nn.Module | None = cast(nn.Module, bank) if is_bank(bank) else None
        self.branches = nn.ModuleList(branches(generators, self.names, bank, class_miners, prior))
        self._sizes = [input_size(branch) for branch in self._mined()]
        if offload is not None:
            self.runner.offload = self._offloaded(offload)
        check_devices(self._mined(), self.names, generators=offload is None)
        self._shape: tuple[int, ...] | None = None
        self._first = 0  # the generator whose images have that shape
        self.reset()
        if spread is not None:
            spread.equalise([t for t in self.mining_state().values() if t is not self.wins])
        self.exchange: Callable[[Tensor], Tensor] | None = None
        self._counted, self._collapse_named = 0, False
        self._nan_named: set[int] = set()
        self._repeating: set[int] = set()  # the branches that were seen to make an image twice
        if len(self) > 1:
            self._probe()

    def __len__(self) -> int:
        return len(self.branches)

    def _mined(self) -> list[Mined]:
        return [cast(Mined, branch) for branch in self.branches]

    def _offloaded(self, offload: "str | Transfers") -> Offload:
        """The generators from now on, asleep where the miners are not."""
        device = next((p.device for p in self.mining_parameters()), torch.device("cpu"))
        if isinstance(offload, str):
            if offload != "cpu":
                raise ValueError(f'offload must be "cpu" or None, got {offload!r}')
            offload = pinned_memory(device)
        return Offload({i: self._mined()[i].generator for i in self.runner.own}, device, offload)

    def _apply(self, fn, recurse=True):
        if self.runner.offload is None:
            return super()._apply(fn, recurse)
        return self.runner.offload.applied(lambda f: super(MultiGenerator, self)._apply(f, recurse), fn)

    @property
    def input_dim(self) -> int:
        """The size of u. ValueError: no miner says it."""
        sizes = [size for size in self._sizes if size is not None]
        return max(sizes) if sizes else self._mined()[0].input_dim

    @property
    def probabilities(self) -> Tensor:
        """p [N], float64 on the CPU, sums to 1: the share of samples that each branch has won in the counted steps,
        where a step weighs `decay` times as much as the next. Before the first one as `reset` says."""
        total = self.wins.sum()
        return self.wins / total if total > 0 else self._before / self._before.sum()

    def reset(self, among: Sequence[bool] | None = None) -> None:
        """Forgets the wins, as stage 2 begins with other networks. Until the next step p is equal for all generators,
        or for those that `among` [N] says."""
        self.wins = torch.zeros(len(self), dtype=torch.float64)
        self._before = torch.ones_like(self.wins) if among is None else torch.tensor(among, dtype=torch.float64)

    def forward(self, u: Tensor, who: Tensor | None = None, **keywords) -> Tensor:
        """The images [B, C, H, W] of u. who [B]: which generator makes each; None: drawn from `probabilities`."""
        self._check_inputs(u)
        who = self.runner.agreed(self._drawn(len(u)), u.device) if who is None else who
        if who.shape != u.shape[:1]:
            raise ValueError(f"who must name a generator for each of {len(u)} samples, got shape {list(who.shape)}")
        counts = torch.bincount(who, minlength=len(self)).tolist()
        if len(counts) > len(self):
            raise ValueError(f"who names generator {len(counts) - 1}, but there are {len(self)}")
        order = who.argsort(stable=True).to(u.device)
        return self._made(order, counts, u, keywords)

    def images_of(self, i: int, u: Tensor, **keywords) -> Tensor:
        """The images of generator i alone; of a spread one its owner calls it, and nothing is exchanged. ValueError:
        another rank holds it."""
        self._check_inputs(u)
        if i not in self.runner.own:
            raise ValueError(f"{self.names[i]} is not held by this rank, which has {[*self.runner.own]}")
        counts, order = [len(u) if i == n else 0 for n in range(len(self))], torch.arange(len(u), device=u.device)
        ((_, _, images),) = self.runner.parts(self._making(keywords), order, counts, u)
        return images

    def latents_of(self, i: int, u: Tensor) -> Tensor:
        """What generator i gets for u, as `Mined.latents` says."""
        with self.runner.awake(i, None):  # its mapping gives the w that its miner takes
            return self._mined()[i].latents(u[:, : self._sizes[i]])

    @torch.no_grad()
    def sample(self, batch: int, generator: torch.Generator | None = None, return_who: bool = False, **keywords) -> Any:
        """Images of `batch` draws i ~ p, u ~ N(0, I); each generator runs once, on its share.

        A torch.Generator makes the result reproducible, as that of `Mined.sample`. return_who: also who [batch], int64
        on the CPU: the generator that each image came from.
        """
        like = next(itertools.chain(self.mining_parameters(), self.parameters()), torch.empty(()))
        u = self.runner.agreed(draw_inputs(batch, self.input_dim, like, generator), like.device)
        who = self.runner.agreed(self._drawn(batch, generator), like.device)
        with seeded_by(generator, like):
            images = self(u, who, **keywords)
        return (images, who) if return_who else images

    def _drawn(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """who [batch], on the CPU; of one generator nothing is drawn, so that its images are those of a `Mined`."""
        if len(self) == 1:
            return torch.zeros(batch, dtype=torch.int64)
        device = torch.device("cpu") if generator is None else generator.device
        points = torch.rand(batch, generator=generator, device=device, dtype=torch.float64).cpu()
        who = torch.searchsorted(self.probabilities.cumsum(0), points, right=True)
        return who.clamp_(max=int(self.probabilities.nonzero().max()))  # the sum may be rounded to below 1

    def best(
        self, u: Tensor, critic: Callable[[Tensor], Tensor], count: bool | None = None, **keywords
    ) -> tuple[Tensor, Tensor]:
        """The images [B, C, H, W] of u that the critic scores highest, and who [B], int64, made each. Ties go to the
        first generator.

        critic: images [B, C, H, W] -> scores [B], or [B, ...], whose means count. It judges one branch at a time,
            without a gradient, in the mode that it is in.
        count: whether the wins enter p. None: where gradients are recorded, so a miner's step counts and a critic's,
            which runs under no_grad, does not.

        The images have the value and the gradient of the plain formulation, which makes all N images of a sample with a
        graph and picks one: to rounding, as a network may sum in another order for another number of samples. For this
        the generators run a second time, each on the samples that it won, under the random state that they had the
        first time: what they draw for a batch is drawn for all of it again, and the rows of these samples are taken.
        (That holds for torch's rand, randn, rand_like, randn_like, normal_ and uniform_ from the default generators.)
        Without gradients there is no second time. Afterwards the random state is that after the first. Memory is that
        of one branch with its graph, and of the N B images where gradients are off.

        Of the share `explore` of the samples, drawn one by one, the image is that of a random branch instead, and who
        says so. It does not enter p: the branch that had won is counted.

        A score of NaN never wins, nor does an image with NaN or inf: a warning names the generator, once. Another one
        says, once, when one branch wins nearly all.

        ValueError: u has another size; a sample has no score that is a number; the scores have another shape; a
        generator made another image the second time.
        """
        self._check_inputs(u)
        recorded = torch.is_grad_enabled()
        if len(self) == 1:
            self._count([len(u)] if (recorded if count is None else count) else None)
            order, counts = torch.arange(len(u), device=u.device), [len(u)]
            return self._made(order, counts, u, keywords), torch.zeros_like(order)
        latents = self._latents(u)
        kept: list[Tensor | None] = [None] * len(self)
        states: list[tuple[Tensor, ...] | None] = [None] * len(self)

        def score() -> list[Tensor]:
            scores = []
            for i in self.runner.own:
                with self.runner.turn(i, u.device):
                    before = random_state(u.device)
                    images = self._images(i, u, latents[i], keywords)
                    states[i] = None if same(before, random_state(u.device)) else before
                    scores.append(scored(critic, images))
                kept[i] = images if not recorded or i not in self._repeating else None
            return scores

        with torch.no_grad():
            scores = self.runner.scores(score, len(self), u)
            order, counts, who = self._winners(scores, recorded if count is None else count)
            if self.runner.spread is not None and self.explore:  # each rank has drawn for itself
                who = self.runner.agreed(who, u.device)
                order, counts = who.argsort(stable=True), torch.bincount(who, minlength=len(self)).tolist()
        # A weight that was converted without a graph would be taken in the passes with one, too.
        torch.clear_autocast_cache()
        if not recorded:
            return self.runner.together(
                lambda: [cast(Tensor, kept[i])[rows] for i, rows in self.runner.rows(order, counts)],
                order, counts, u, [],
            ), who  # fmt: skip
        after = random_state(u.device)
        images = self._made(order, counts, u, keywords, latents, states, kept)
        set_random_state(after, u.device)
        return images, who

    def _making(self, keywords: dict) -> Callable[[int, Tensor, Tensor | None], Tensor]:
        return lambda i, u, z: self._images(i, u, z, keywords)

    def _made(self, order, counts, u, keywords, latents=None, states=None, kept=None) -> Tensor:
        """The images of the batch, whose samples `order` groups by generator. latents, states: as of `Runner.parts`;
        kept: what each generator has made of all of u, or None."""

        def make() -> list[Tensor]:
            parts = self.runner.parts(self._making(keywords), order, counts, u, latents, states)
            for i, rows, part in parts:
                self._check_repeats(i, part, kept and kept[i], rows)
            return [part for _, _, part in parts]

        return self.runner.together(make, order, counts, u, [*self.parameters()])

    def _latents(self, u: Tensor) -> list[Tensor | None]:
        """What a bank gives each generator, by one call for all; without a bank each branch asks its own miner."""
        if self.bank is None:
            return [None] * len(self)
        return [project(z, branch.prior) for z, branch in zip(self.bank(u), self._mined(), strict=True)]

    def _winners(self, scores: Tensor, count: bool) -> tuple[Tensor, list[int], Tensor]:
        """The order of the samples, how many are whose, and who, with the exploration; and what has to be said."""
        found = winner(scores)
        host = torch.cat([found.counts, found.nans]).tolist()  # the only wait for a GPU
        B, counts, nans = scores.shape[1], host[: len(self)], host[len(self) :]
        if sum(counts) < B:
            raise ValueError(
                f"for {B - sum(counts)} of {B} samples no generator has a score: the critic gives NaN, or the images "
                f"of all {len(self)} hold NaN or inf"
            )
        for i, missing in enumerate(nans):
            if missing and i not in self._nan_named:
                self._nan_named.add(i)
                warnings.warn(
                    f"{self.names[i]} cannot win {missing} of {B} samples: its images hold NaN or inf, or the critic's "
                    "score of them is NaN",
                    stacklevel=3,
                )
        self._count(counts if count else None)
        if self.explore:
            chance, which = torch.rand(B, 2, device=scores.device).T
            given = (which * len(self)).long().clamp_(max=len(self) - 1)
            branch = torch.arange(len(self), device=scores.device)[:, None]
            lifted = (branch == given) & (chance < self.explore) & ~scores.isnan()
            found = winner(scores.masked_fill(lifted, torch.inf))
            counts = found.counts.tolist()
        return found.order, counts, found.who

    def take(self, shares: Tensor) -> None:
        """Makes p that of another selector, `Mixture.p` say: shares [N], which sum to 1."""
        self._adopt(shares, "That may be right", stacklevel=3)

    def _count(self, counts: list[int] | None) -> None:
        if counts is None:
            return
        new = torch.tensor(counts, dtype=torch.float64)
        new = new if self.exchange is None else self.exchange(new)
        advice = "That may be right; if not, explore= gives them a share of each batch"
        self._adopt(self.decay * self.wins + new, advice, stacklevel=5)

    def _adopt(self, wins: Tensor, advice: str, stacklevel: int) -> None:
        self.wins = wins
        self._counted += 1
        share, i = self.probabilities.max(0)
        if share >= COLLAPSED and len(self) > 1 and self._counted >= SOON and not self._collapse_named:
            self._collapse_named = True
            warnings.warn(
                f"{self.names[int(i)]} has {100 * float(share):.1f} % of the samples, so the others hardly learn any "
                f"more. {advice}",
                stacklevel=stacklevel,
            )

    def _images(self, i: int, u: Tensor, z: Tensor | None, keywords: dict) -> Tensor:
        branch, u = self._mined()[i], u[:, : self._sizes[i]]
        images = branch(u, **keywords) if z is None else branch.images(z, u, **keywords)
        images = images if self.resize is None else resized(images, self.resize)
        self._check_shape(i, tuple(images.shape[1:]))
        return images

    def _check_shape(self, i: int, shape: tuple[int, ...]) -> None:
        if self._shape is None:
            self._shape, self._first = shape, i
        if shape != self._shape:
            what = f"{self.names[i]} makes images {[*shape]}, {self.names[self._first]} {[*self._shape]}: "
            if shape[:1] != self._shape[:1]:
                raise ValueError(f"{what}the channels must be the same")
            raise ValueError(f"{what}resize={max(*shape[1:], *self._shape[1:])} would bring all to one size")

    @torch.no_grad()
    def _probe(self) -> None:
        """Makes one image of each branch, and leaves no trace."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            found = self.runner.collect(lambda: [(i, self._probe_one(i)) for i in self.runner.own])
            self._shape = None  # of all ranks' generators it is that of the first one
            for i, shape in found:
                if shape is not None:
                    self._check_shape(i, shape)
        finally:
            for module, training in modes:
                module.training = training

    def _probe_one(self, i: int) -> tuple[int, ...] | None:
        """The shape of branch i's images; None where its miner does not say what it takes."""
        like = next(self.branches[i].parameters(), torch.empty(()))
        like = like.new_empty((), device=self.runner.offload.device) if self.runner.offload else like
        with torch.random.fork_rng([like.device] if like.is_cuda else []), self.runner.awake(i, None):
            size = self._sizes[i]
            return None if size is None else tuple(self._images(i, like.new_ones(1, size), None, {}).shape[1:])

    def _check_inputs(self, u: Tensor) -> None:
        size = None if None in self._sizes else self.input_dim
        if u.ndim != 2 or u.shape[1] != (size or u.shape[1]):
            raise ValueError(f"u must have shape [B, {'U' if size is None else size}], got {list(u.shape)}")

    def _check_repeats(self, i: int, again: Tensor, kept: Tensor | None, rows: Tensor) -> None:
        if kept is None:
            return
        before = kept[rows]
        if not (again.detach() - before).norm() <= 1e-2 * before.norm():
            raise ValueError(
                f"{self.names[i]} made other images of the same samples the second time: best() needs generators in "
                "eval mode, which draw their noise from torch's default generators"
            )
        self._repeating.add(i)

    def before(self, generators: Iterable[nn.Module] | nn.Module) -> "MultiGenerator":
        """A copy, miners and wins included, before other generators: several, or a module that gives them; of those
        that another rank holds None is read."""
        pairs = zip(self._mined(), cast(Iterable[nn.Module], generators), strict=True)
        own = [(branch.generator, g) for i, (branch, g) in enumerate(pairs) if i in self.runner.own]
        memo: dict[int, Any] = {id(before): g for before, g in own}
        if all(before is g for before, g in own):
            memo[id(self.runner)] = self.runner  # a second one would move the same weights
        return copy.deepcopy(self, memo)

    def mining_parameters(self) -> list[nn.Parameter]:
        """What mining trains: the parameters of all miners, and mined constants."""
        own = [p for branch in self._mined() for p in branch.mining_parameters()]
        return own if self.bank is None else [*self.bank.parameters(), *own]

    def mining_state(self) -> dict[str, Any]:
        """The state dict without the generators: miners, constants, and the wins."""
        generator = tuple(f"branches.{i}.generator." for i in range(len(self)))
        return {name: t for name, t in self.state_dict().items() if not name.startswith(generator)}

    def load_mining_state(self, state: dict[str, Any]) -> None:
        """What `mining_state` gave; the generators stay as they are. RuntimeError where the names differ."""
        if state.keys() != self.mining_state().keys():
            raise RuntimeError(f"the miners have {sorted(self.mining_state())}, not {sorted(state)}")
        self.load_state_dict(state, strict=False)

    # No buffer, which half() would round and a GPU would have to be waited for.
    def get_extra_state(self) -> Tensor:
        return self.wins

    def set_extra_state(self, state: Tensor) -> None:
        if state.shape != self.wins.shape:
            raise ValueError(f"the wins are those of {len(state)} generators, and there are {len(self)}")
        self.wins = state.to("cpu", torch.float64, copy=True)
