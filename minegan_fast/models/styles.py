"""What generators with a mapping network z -> w have in common: truncation, and mixing of styles."""

import torch
from torch import Tensor, nn

from .network import Network


class StyleBased(Network):
    """A subclass has `style` (the mapping network), `latent_dim`, `style_dim`, `num_layers` and the methods below."""

    style: nn.Sequential
    latent_dim: int
    style_dim: int
    num_layers: int

    @property
    def learned_constant(self) -> Tensor:
        """What the synthesis begins with, [1, C, 4, 4]."""
        raise NotImplementedError

    def synthesis(self, w: Tensor, noise: str | list[Tensor] = "random", constant: Tensor | None = None) -> Tensor:
        """w [B, L, style_dim] -> images."""
        raise NotImplementedError

    def mapping(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z [B, latent_dim] -> w [B, style_dim]. y: of a conditional network labels, integers [B], or class embeddings
        [B, class_dim]. ValueError: another shape, or a y that is missing or too many."""
        self._check_latents(z)
        if y is not None:
            raise ValueError("this network has no classes: give no labels")
        return self.style(z)

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z must have shape [B, {self.latent_dim}], got {list(z.shape)}")

    @torch.no_grad()
    def mean_latent(self, samples: int = 4096, seed: int = 0) -> Tensor:
        """Mean of w over `samples` seeded draws of z, and of labels where there are any: [1, style_dim]."""
        generator, like = torch.Generator().manual_seed(seed), self.learned_constant
        z = torch.randn(samples, self.latent_dim, generator=generator).to(like)
        if not self.num_classes:
            return self.mapping(z).mean(0, keepdim=True)
        labels = torch.randint(self.num_classes, (samples,), generator=generator).to(like.device)
        return self.mapping(z, labels).mean(0, keepdim=True)

    def centre(self) -> Tensor:
        """[1, style_dim], the centre of truncation: the mean of w that the training has kept, else `mean_latent`."""
        kept = getattr(self, "latent_avg", None)
        return self.mean_latent() if kept is None else kept[None]

    def forward(
        self,
        z: Tensor | tuple[Tensor, Tensor],
        y: Tensor | None = None,
        *,
        truncation: float = 1.0,
        crossover: int | None = None,
        noise: str | list[Tensor] = "random",
        latents: bool = False,
        return_latents: bool = False,
        constant: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Images of z.

        Args:
            z: [B, latent_dim]; a pair of them mixes styles: the second takes over at layer `crossover`.
            y: of a conditional network, as `mapping` takes it; for both z of a pair. None where z is w.
            truncation: ψ in w = mean + ψ (w - mean); 1 leaves w alone, 0 gives the mean image.
            crossover: first layer of the second style, 0..L; None draws one in 1..L-1 for the whole batch.
            noise: "random" | "constant" | "none" | list of maps, as in `synthesis`.
            latents: z is already w, [B, style_dim] or [B, L, style_dim].
            return_latents: return (images, w [B, L, style_dim]) instead of images.
            constant: as in `synthesis`.

        Raises:
            ValueError: a shape, crossover or noise that is not as above.
        """
        first, second = z if isinstance(z, (tuple, list)) else (z, None)
        w = self._layer_styles(first, y, latents)
        if second is not None:
            other = self._layer_styles(second, y, latents)
            if crossover is None:
                crossover = int(torch.randint(1, self.num_layers, ()))
            if not 0 <= crossover <= self.num_layers or other.shape != w.shape:
                raise ValueError(
                    f"mixing takes two z of one shape and crossover in 0..{self.num_layers}, "
                    f"got {list(first.shape)}, {list(second.shape)} and {crossover}"
                )
            w = torch.cat((w[:, :crossover], other[:, crossover:]), 1)
        elif crossover is not None:
            raise ValueError(f"crossover={crossover} needs a pair of z to mix: G((z1, z2), crossover=...)")
        if truncation != 1.0:
            center = self.centre().to(w.dtype)
            w = center + truncation * (w - center)
        image = self.synthesis(w, noise, constant)
        return (image, w) if return_latents else image

    def _layer_styles(self, z: Tensor, y: Tensor | None, latents: bool) -> Tensor:
        w = z if latents else self.mapping(z, y)
        return w[:, None].expand(-1, self.num_layers, -1) if w.ndim == 2 else w

    def _check_synthesis(self, w: Tensor, constant: Tensor | None) -> None:
        if w.ndim != 3 or w.shape[1:] != (self.num_layers, self.style_dim):
            raise ValueError(f"w must have shape [B, {self.num_layers}, {self.style_dim}], got {list(w.shape)}")
        own = self.learned_constant.shape
        if constant is not None and (constant.shape[1:] != own[1:] or constant.shape[0] not in (1, w.shape[0])):
            expected = f"[1 or {w.shape[0]}, {own[1]}, 4, 4]"
            raise ValueError(f"constant must have shape {expected}, got {list(constant.shape)}")
