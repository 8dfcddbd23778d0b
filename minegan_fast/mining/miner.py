"""The miner: a small network that turns a normal vector into the part of the latent space that a target needs.

MineGAN (Wang et al. 2020, arXiv 1912.05270): u ~ N(0, I), z = M(u), image = G(M(u)). The published code starts from a
random miner, which destroys the source's images at the first step; here the miner is residual and starts as the
identity, so mining starts at the source GAN's own distribution.
"""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._torch import is_tracing, own_modules, own_parameters, transforms_active, watched
from ..ops.miner import DEPTH, Chain, mine
from .prior import project

FEW = 8  # samples: up to so many a single miner on a CPU is the library's, whose matrix-vector products are as fast

ACTIVATIONS = {"relu": nn.ReLU, "lrelu": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh, "linear": nn.Identity}


class Miner(nn.Module):
    """A multilayer perceptron u [B, input_dim] -> z [B, output_dim], or whatever else a generator takes.

    Args:
        latent_dim: size of the generator's input.
        depth: number of linear layers, >= 1 (the paper: 2 for MNIST, 4 elsewhere).
        width: size of the hidden layers; None takes latent_dim.
        input_dim, output_dim: sizes of u and z; None takes latent_dim.
        activation: "relu" | "lrelu" | "tanh" | "linear", between the layers.
        residual: z = u + f(u) with f's last layer zero at the start: the miner is the identity until it has learnt.
            Needs input_dim == output_dim.
        affine: z = A u + b + f(u) with A and b that train too, for sizes that differ; see `match`.
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
        affine: bool = False,
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
            "affine": affine,
        }
        for name in ("latent_dim", "depth", "width", "input_dim", "output_dim"):
            if self.config[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {self.config[name]}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if affine and not residual:
            raise ValueError("affine=True makes a residual miner's skip connection affine; leave residual=True with it")
        if residual and not affine and input_dim != output_dim:
            raise ValueError(
                f"a residual miner needs input_dim == output_dim, got {input_dim} and {output_dim}; "
                "make them equal or pass residual=False, or affine=True"
            )
        self.input_dim, self.output_dim = input_dim, output_dim
        sizes = [input_dim] + [width] * (depth - 1) + [output_dim]
        linears = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)]
        layers: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            layers += [ACTIVATIONS[activation](), linear]
        self.layers = nn.Sequential(*layers)
        self.skip = nn.Linear(input_dim, output_dim) if affine else nn.Identity() if residual else None
        if residual:
            nn.init.zeros_(linears[-1].weight)
            nn.init.zeros_(linears[-1].bias)

    def forward(self, u: Tensor, sphere: bool = False) -> Tensor:
        """sphere: project z onto the sphere, as `project` does."""
        if u.ndim != 2 or u.shape[1] != self.input_dim:
            raise ValueError(f"u must have shape [B, {self.input_dim}], got {list(u.shape)}")
        chain = self.chain(u, sphere)
        return self._by_layers(u, sphere) if chain is None else mine([chain])[0]

    def _by_layers(self, u: Tensor, sphere: bool) -> Tensor:
        z = self.layers(u)
        z = z if self.skip is None else self.skip(u) + z
        return project(z, "sphere") if sphere else z

    def chain(self, u: Tensor, sphere: bool = False) -> Chain | None:
        """What the op `miner` takes in the place of this miner's layers. None where they are to be called: for few
        samples, under autocast, inside a transform or a trace, where someone watches or has replaced a layer, and where
        they will refuse u."""
        if not u.is_cuda and len(u) <= FEW:
            return None
        layers: list[Any]
        layers, skip = [*own_modules(self.layers).values()], self.skip
        linears = layers[::2]
        if isinstance(skip, nn.Linear):
            layers.append(skip)
            linears.append(skip)
        if any(map(watched, layers)) or any(type(layer) is not nn.Linear for layer in linears):
            return None
        # Where the layer itself would look for them; a weight that is not there is no parameter, but computed.
        pairs: list[Any] = [(own.get("weight"), own.get("bias")) for own in map(own_parameters, linears)]
        if not u.numel() or len(linears) > DEPTH or not takes(u, *itertools.chain.from_iterable(pairs)):
            return None
        around = None if skip is None else pairs.pop() if isinstance(skip, nn.Linear) else "identity"
        weights, biases = zip(*pairs, strict=True)
        return Chain(u, weights, biases, self.config["activation"], around, sphere)

    @torch.no_grad()
    def match(self, samples: Tensor) -> None:
        """Sets A and b so that A u + b, u ~ N(0, I), has the mean of `samples` [N, output_dim], and of their covariance
        the input_dim largest principal components: all of it, where input_dim suffices. A single sample is b, A = 0.
        """
        if not isinstance(self.skip, nn.Linear) or samples.ndim != 2 or samples.shape[1] != self.output_dim:
            raise ValueError(
                f"match() takes samples [N, {self.output_dim}] and a miner with affine=True, got {list(samples.shape)} "
                f"and affine={self.config['affine']}"
            )
        mean = samples.double().mean(0)
        _, deviations, axes = torch.linalg.svd((samples.double() - mean) / len(samples) ** 0.5, full_matrices=False)
        axes, kept = axes[: self.input_dim], deviations[: self.input_dim]
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # an axis has two directions
        self.skip.bias.copy_(mean)
        self.skip.weight.zero_()
        self.skip.weight[:, : len(kept)] = (axes * kept[:, None]).T


def takes(u: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the op `miner` may take u and these parameters here, rather than PyTorch's own operations."""
    if torch.is_autocast_enabled(u.device.type) or transforms_active() or is_tracing():
        return False
    plain = (Tensor, nn.Parameter)
    return all(p is not None and type(p) in plain and p.dtype == u.dtype and p.device == u.device for p in parameters)


def mine_together(miners: Sequence[nn.Module], u: Tensor, sphere: bool) -> list[Tensor]:
    """What each miner gives for u, in one call where it can be; `sphere` is for the first."""
    together = all(isinstance(m, Miner) and not watched(m) and m.input_dim == u.shape[-1] for m in miners)
    if len(miners) > 1 and together and u.ndim == 2:
        chains = [cast(Miner, m).chain(u, sphere and i == 0) for i, m in enumerate(miners)]
        if None not in chains:
            return mine(cast(list[Chain], chains))
    first, *others = miners
    if isinstance(first, Miner):
        z = first(u, sphere=sphere)
    else:
        z = project(first(u), "sphere") if sphere else first(u)
    return [z, *(m(u) for m in others)]
