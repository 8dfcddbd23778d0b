"""The miner: a small network that turns a normal vector into the part of the latent space that a target needs.

MineGAN (Wang et al. 2020, arXiv 1912.05270): u ~ N(0, I), z = M(u), image = G(M(u)). The published code starts from a
random miner, which destroys the source's images at the first step; here the miner is residual and starts as the
identity, so mining starts at the source GAN's own distribution.
"""

import itertools

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "lrelu": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh, "linear": nn.Identity}


class Miner(nn.Module):
    """A multilayer perceptron u [B, input_dim] -> z [B, output_dim].

    Args:
        latent_dim: size of the generator's input.
        depth: number of linear layers, >= 1 (the paper: 2 for MNIST, 4 elsewhere).
        width: size of the hidden layers; None takes latent_dim.
        input_dim, output_dim: sizes of u and z; None takes latent_dim.
        activation: "relu" | "lrelu" | "tanh" | "linear", between the layers.
        residual: z = u + f(u) with f's last layer zero at the start: the miner is the identity until it has learnt.
            Needs input_dim == output_dim.
    """

    def __init__(
        self,
        latent_dim: int,
        depth: int = 2,
        width: int | None = None,
        input_dim: int | None = None,
        output_dim: int | None = None,
        activation: str = "relu",
        residual: bool = True,
    ):
        super().__init__()
        width, input_dim, output_dim = (latent_dim if d is None else d for d in (width, input_dim, output_dim))
        self.config = {
            "latent_dim": latent_dim,
            "depth": depth,
            "width": width,
            "input_dim": input_dim,
            "output_dim": output_dim,
            "activation": activation,
            "residual": residual,
        }
        for name in ("latent_dim", "depth", "width", "input_dim", "output_dim"):
            if self.config[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {self.config[name]}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if residual and input_dim != output_dim:
            raise ValueError(
                f"a residual miner needs input_dim == output_dim, got {input_dim} and {output_dim}; "
                "make them equal or pass residual=False"
            )
        self.input_dim, self.output_dim, self.residual = input_dim, output_dim, residual
        sizes = [input_dim] + [width] * (depth - 1) + [output_dim]
        layers = [nn.Linear(*sizes[:2])]
        for pair in itertools.pairwise(sizes[1:]):
            layers += [ACTIVATIONS[activation](), nn.Linear(*pair)]
        self.layers = nn.Sequential(*layers)
        if residual:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def forward(self, u: Tensor) -> Tensor:
        if u.ndim != 2 or u.shape[1] != self.input_dim:
            raise ValueError(f"u must have shape [B, {self.input_dim}], got {list(u.shape)}")
        z = self.layers(u)
        return u + z if self.residual else z


class Mined(nn.Module):
    """A generator behind its miner: u [B, miner.input_dim] -> images.

    Args:
        generator: z -> images, or (z, class embedding) -> images where there is a class miner.
        miner: u -> z.
        class_miner: u -> class embedding, for conditional generators: the class is mined in embedding space.

    Keywords of the call go to the generator.
    """

    def __init__(self, generator: nn.Module, miner: nn.Module, class_miner: nn.Module | None = None):
        super().__init__()
        self.generator, self.miner, self.class_miner = generator, miner, class_miner
        produced, wanted = getattr(miner, "output_dim", None), getattr(generator, "latent_dim", None)
        if None not in (produced, wanted) and produced != wanted:
            raise ValueError(f"the miner gives {produced} numbers, but the generator takes z of {wanted}")

    @property
    def input_dim(self) -> int:
        dim = getattr(self.miner, "input_dim", None)
        if dim is None:
            raise ValueError(f"{type(self.miner).__name__} has no input_dim; give it one, or call with your own u")
        return dim

    def forward(self, u: Tensor, **keywords) -> Tensor:
        z = self.miner(u)
        if self.class_miner is None:
            return self.generator(z, **keywords)
        return self.generator(z, self.class_miner(u), **keywords)

    @torch.no_grad()
    def sample(self, batch: int, generator: torch.Generator | None = None, **keywords) -> Tensor:
        """Images of `batch` draws u ~ N(0, I).

        A torch.Generator makes the result reproducible: u comes from it, and so does the seed under which the generator
        network runs, for its noise injection; the global random state is left as it was.
        """
        like = next(itertools.chain(self.miner.parameters(), self.parameters()), torch.empty(()))
        source = like.device if generator is None else generator.device
        u = torch.randn(batch, self.input_dim, generator=generator, device=source, dtype=like.dtype).to(like.device)
        if generator is None:
            return self(u, **keywords)
        seed = int(torch.randint(2**62, (), generator=generator, device=source))
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach GPUs that are not forked
            if like.is_cuda:
                with torch.cuda.device(like.device):
                    torch.cuda.manual_seed(seed)
            return self(u, **keywords)
