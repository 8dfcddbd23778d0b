"""A generator behind its miners: where in a pretrained GAN mining takes place."""

import copy
import itertools
from typing import cast

import torch
from torch import Tensor, nn

from .draws import draw_inputs, seeded_by
from .miner import mine_together
from .prior import Mapped, Whitening, check_prior, latent_statistics, on_sphere, prior_penalty

PLACES = ("z", "w")


class Mined(nn.Module):
    """A generator behind its miners: u [B, input_dim] -> images.

    What is mined depends on the generator's family (MineGAN, arXiv 1912.05270, mines z, and in BigGAN the class too):

        z                            G(M(u))
        z and class embedding        G(M(u), C(u))          BigGAN and others: C(u) stands for the embedding of a label
        w                            G(M(mapping(u)))       StyleGAN, StyleGAN2: M stands behind the mapping network
        w and class embedding        G(M(mapping(u, C(u)))) a conditional StyleGAN2
        the learned constant         G(..., constant=c)     StyleGAN, StyleGAN2: c [1, C, 4, 4] trains; with z or w

    Args:
        generator: z -> images, or (z, class embedding) -> images where there is a class miner.
        miner: u -> z, or w -> w.
        class_miner: u -> class embedding, for conditional generators: the class is mined in embedding space.
        place: "z" | "w". "w" needs a generator with `mapping(z) -> w` and the keyword `latents`.
        constant: [1, C, 4, 4], copied: takes the place of the generator's learned constant, and trains.
        prior: "sphere" | "moments" | "sphere+moments" | "shell" | "none": how the mined z or w stays near what the
            generator was trained on, see `prior`. The sphere, for z alone, is a part of the network; a trainer adds the
            penalty to its loss.
        reference: where the generator's own w lie (`prior.own_latents`); the penalty and the statistics of w need it.

    Keywords of the call go to the generator.
    """

    def __init__(
        self,
        generator: nn.Module,
        miner: nn.Module,
        class_miner: nn.Module | None = None,
        place: str = "z",
        constant: Tensor | None = None,
        prior: str = "none",
        reference: Whitening | None = None,
    ):
        super().__init__()
        self.generator, self.miner, self.class_miner, self.place = generator, miner, class_miner, place
        self.prior, self.reference = prior, reference
        self.constant = None
        name = type(generator).__name__
        if place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
        check_prior(prior, place)
        if place == "w" and not hasattr(generator, "mapping"):
            raise ValueError(f"{name} has no mapping network, so w cannot be mined in it: take z")
        if class_miner is not None and getattr(generator, "num_classes", None) == 0:
            raise ValueError(f"{name} has no classes, so it takes no class miner")
        latent = "latent_dim" if place == "z" else "style_dim"
        self._check_size("the miner gives", getattr(miner, "output_dim", None), latent)
        if place == "w":
            self._check_size("the miner takes", getattr(miner, "input_dim", None), latent)
        self._check_size("the class miner gives", getattr(class_miner, "output_dim", None), "class_dim")
        if constant is not None:
            own = learned_constant(generator)
            if constant.shape != own.shape:
                raise ValueError(f"the constant must have shape {list(own.shape)}, got {list(constant.shape)}")
            self.constant = nn.Parameter(constant.detach().to(own, copy=True))

    def _check_size(self, what: str, size: int | None, attribute: str) -> None:
        wanted = getattr(self.generator, attribute, None)
        if None not in (size, wanted) and size != wanted:
            kind = {"latent_dim": "z", "style_dim": "w", "class_dim": "class embeddings"}[attribute]
            raise ValueError(f"{what} {size} numbers, but the generator takes {kind} of {wanted}")

    @property
    def input_dim(self) -> int:
        """The size of u."""
        holder, name = (self.miner, "input_dim") if self.place == "z" else (self.generator, "latent_dim")
        dim = getattr(holder, name, None)
        if dim is None:
            raise ValueError(f"{type(holder).__name__} has no {name}; give it one, or call with your own u")
        return dim

    def forward(self, u: Tensor, **keywords) -> Tensor:
        if self.class_miner is None or self.place == "w":
            return self.images(self.latents(u), u, **keywords)
        latents, classes = mine_together([self.miner, self.class_miner], u, on_sphere(self.prior))
        return self._images(latents, [classes], keywords)

    def best(self, u: Tensor, critic=None, count: bool | None = None, **keywords) -> tuple[Tensor, Tensor]:
        """`MultiGenerator.best` of this one generator, which always wins."""
        return self(u, **keywords), torch.zeros(len(u), dtype=torch.int64, device=u.device)

    def latents(self, u: Tensor) -> Tensor:
        """What the generator gets for u: z [B, latent_dim] after the projection, or w [B, style_dim]; not the class."""
        if self.place == "w":
            classes = [] if self.class_miner is None else [self.class_miner(u)]
            return self.miner(cast(Mapped, self.generator).mapping(u, *classes))
        (z,) = mine_together([self.miner], u, on_sphere(self.prior))
        return z

    def images(self, latents: Tensor, u: Tensor, **keywords) -> Tensor:
        """The images of `latents(u)`; u gives the class embedding."""
        classes = [] if self.class_miner is None or self.place == "w" else [self.class_miner(u)]
        return self._images(latents, classes, keywords)

    def _images(self, latents: Tensor, classes: list[Tensor], keywords: dict) -> Tensor:
        if self.constant is not None:
            keywords = {"constant": self.constant, **keywords}
        if self.place == "w":
            return self.generator(latents, latents=True, **keywords)
        return self.generator(latents, *classes, **keywords)

    def penalty(self, latents: Tensor) -> Tensor:
        """`prior_penalty` of a batch of `latents(u)`."""
        return prior_penalty(latents, self.prior, self._own())

    def statistics(self, latents: Tensor) -> dict[str, float]:
        """`latent_statistics` of a batch of `latents(u)`."""
        return latent_statistics(latents, self._own())

    def _own(self) -> Whitening | None:
        if self.place == "w" and self.reference is None:
            raise ValueError("w is compared with the mapping's own: give reference=own_latents(generator, 'w')")
        return self.reference

    def before(self, generator: nn.Module) -> "Mined":
        """Copies of these miners, before another generator."""
        miners = copy.deepcopy((self.miner, self.class_miner))
        return Mined(generator, *miners, self.place, self.constant, self.prior, self.reference)

    def mining_parameters(self) -> list[nn.Parameter]:
        """What mining trains: the parameters of the miners, and the constant."""
        miners = [m for m in (self.miner, self.class_miner) if m is not None]
        return [p for m in miners for p in m.parameters()] + ([] if self.constant is None else [self.constant])

    def mining_state(self) -> dict[str, Tensor]:
        """The state dict without the generator's part."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("generator.")}

    def load_mining_state(self, state: dict[str, Tensor]) -> None:
        """What `mining_state` gave; the generator stays as it is. RuntimeError where the names differ."""
        if state.keys() != self.mining_state().keys():
            raise RuntimeError(f"the miners have {sorted(self.mining_state())}, not {sorted(state)}")
        self.load_state_dict(state, strict=False)

    @torch.no_grad()
    def sample(self, batch: int, generator: torch.Generator | None = None, **keywords) -> Tensor:
        """Images of `batch` draws u ~ N(0, I).

        A torch.Generator makes the result reproducible: u comes from it, and so does the seed under which the generator
        network runs, for its noise injection; the global random state is left as it was.
        """
        like = next(itertools.chain(self.miner.parameters(), self.parameters()), torch.empty(()))
        u = draw_inputs(batch, self.input_dim, like, generator)
        with seeded_by(generator, like):
            return self(u, **keywords)


def learned_constant(generator: nn.Module) -> Tensor:
    """The learned constant [1, C, 4, 4] that a generator's synthesis begins with. ValueError: it has none."""
    constant = getattr(generator, "learned_constant", None)
    if not isinstance(constant, Tensor):
        raise ValueError(
            f"{type(generator).__name__} has no learned constant to mine; that is possible in StyleGAN and StyleGAN2"
        )
    return constant
