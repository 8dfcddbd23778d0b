"""The programs that `export_run` writes for: which networks each builds, and by which call."""

from pathlib import Path
from typing import ClassVar, Generic, TypeVar, cast

from torch import nn

from ..mining import Mined
from ..models import (
    BigGANDiscriminator,
    BigGANGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    StyleGANDiscriminator,
    StyleGANGenerator,
    export_biggan,
    export_nvidia,
    export_rosinality,
    export_stylegan,
    save_model,
)
from ..models.exporting import check_rosinality
from ..models.layouts import MODELS, biggan_writing
from ..models.network import Network
from .critics import check_fit, new_critic
from .generators import as_generator
from .results import IsModuleError

G = TypeVar("G", bound=Network)
D = TypeVar("D", bound=Network)


class Program(Generic[G, D]):
    """A program whose files are written here; this one is this project.

    name: as messages say it. families: of the generators that it has. critic: the class of the discriminators that it
    has beside them.
    """

    name: ClassVar[str] = "minegan_fast"
    families: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys(family for family, _ in MODELS))
    critic: ClassVar[type] = Network

    def check(self, generator: G, left: Mined | None) -> None:
        """ValueError: the program builds no such generator, or cannot have the miners `left` before it. What `write`
        refuses itself is not checked here."""

    def why_not(self, critic: nn.Module, generator: G) -> str:
        """Why the program does not have that discriminator beside the generator; empty where it does."""
        if not isinstance(critic, self.critic):
            return f"it is a {type(critic).__name__}"
        try:
            check_fit(generator, critic)
            self.check_critic(cast(D, critic), generator)
        except ValueError as error:
            return str(error)
        return ""

    def check_critic(self, critic: D, generator: G) -> None:
        """ValueError: the program does not build that discriminator, of its class and size, beside the generator."""

    def fresh(self, generator: G) -> D | None:
        """A new discriminator beside the generator; None: the files need none, or the program has none."""
        return None

    def write(self, folder: Path, generator: G, critic: D | None) -> list[Path]:
        """Writes into a folder that is empty; returns the files. ValueError: the program builds no such network."""
        return [save_model(folder / "network.safetensors", generator, critic)]

    def opened(self, generator: G) -> str:
        """How the program builds or loads the generator."""
        return "minegan_fast.load_generator reads network.safetensors"


class Styled(Program[G, D]):
    """A program whose generators and discriminators have one table of channels, as the StyleGANs have."""

    def check_critic(self, critic: D, generator: G) -> None:
        if critic.config["channels"] != generator.config["channels"]:
            raise ValueError("its channels are not the generator's")

    def fresh(self, generator: G) -> D:
        return cast(D, new_critic(as_generator(generator), 0))


class Rosinality(Styled[StyleGAN2Generator, StyleGAN2Discriminator]):
    name, families, critic = "rosinality/stylegan2-pytorch", ("stylegan2",), StyleGAN2Discriminator

    def check(self, generator: StyleGAN2Generator, left: Mined | None) -> None:
        check_rosinality(generator)
        channels, m = _channels(generator), self._multiplier(generator)
        if channels != {r: 512 if r <= 32 else 16384 // r * m for r in channels} or generator.resolution > 1024:
            raise ValueError(
                f"{self.name} builds networks of up to 1024 px, of 512 channels up to 32 px and 16384 m / resolution "
                f"above, and this one has {channels}: take nvidia or safetensors; for a program of yours whose table "
                "is another, minegan_fast.models.export_rosinality writes the file"
            )

    def check_critic(self, critic: StyleGAN2Discriminator, generator: StyleGAN2Generator) -> None:
        if critic.config["architecture"] != "resnet":
            raise ValueError("that program has the residual discriminator alone")
        super().check_critic(critic, generator)

    def write(self, folder: Path, generator: StyleGAN2Generator, critic: StyleGAN2Discriminator | None) -> list[Path]:
        return [export_rosinality(folder / "network.pt", generator, critic)]

    def opened(self, generator: StyleGAN2Generator) -> str:
        size, layers, m = generator.style_dim, generator.config["mapping_layers"], self._multiplier(generator)
        built = f"its model.py builds the generator by Generator({generator.resolution}, {size}, {layers}, {m})"
        if (size, layers) == (512, 8):
            return f"{built}; train.py --ckpt network.pt goes on from it with --channel_multiplier {m}"
        return f"{built}; its train.py and generate.py name 512 and 8 in the lines of args.latent and args.n_mlp"

    @staticmethod
    def _multiplier(generator: StyleGAN2Generator) -> int:
        return _channels(generator).get(64, 512) // 256


class RosinalityStyleGAN(Styled[StyleGANGenerator, StyleGANDiscriminator]):
    name, families, critic = "rosinality/style-based-gan-pytorch", ("stylegan",), StyleGANDiscriminator

    def check(self, generator: StyleGANGenerator, left: Mined | None) -> None:
        channels = _channels(generator)
        if channels != {r: min(16384 // r, 512) for r in channels} or generator.style_dim != 512:
            raise ValueError(
                f"{self.name} builds networks with w of 512 numbers and of min(16384 / resolution, 512) channels, and "
                f"this one has {generator.style_dim} and {channels}: take safetensors; for a program of yours whose "
                "sizes are others, minegan_fast.models.export_stylegan writes the file"
            )

    def write(self, folder: Path, generator: StyleGANGenerator, critic: StyleGANDiscriminator | None) -> list[Path]:
        return [export_stylegan(folder / "network.model", generator, critic)]

    def opened(self, generator: StyleGANGenerator) -> str:
        shown = f"step={generator.resolution.bit_length() - 3}"
        shown += f", alpha={generator.alpha}" if generator.alpha < 1 else ""
        layers = generator.config["mapping_layers"]
        return f"its model.py builds the generator by StyledGenerator(512, {layers}), and shows it with {shown}"


class Nvidia(Styled[StyleGAN2Generator, StyleGAN2Discriminator]):
    name, families, critic = "NVlabs/stylegan2-ada-pytorch", ("stylegan2",), StyleGAN2Discriminator

    def write(self, folder: Path, generator: StyleGAN2Generator, critic: StyleGAN2Discriminator | None) -> list[Path]:
        return [export_nvidia(folder / "network.pkl", generator, cast(StyleGAN2Discriminator, critic))]

    def opened(self, generator: StyleGAN2Generator) -> str:
        return "its programs take network.pkl as --network and --resume, and convert it as they read it"


class BigGANPyTorch(Program[BigGANGenerator, BigGANDiscriminator]):
    name, families, critic = "ajbrock/BigGAN-PyTorch", ("biggan",), BigGANDiscriminator

    def check(self, generator: BigGANGenerator, left: Mined | None) -> None:
        if left is not None and left.class_miner is not None and not generator.config["shared"]:
            raise ValueError(
                f"{self.name} without a shared class embedding takes labels alone, and the class of this run was "
                "mined: take safetensors"
            )

    def check_critic(self, critic: BigGANDiscriminator, generator: BigGANGenerator) -> None:
        biggan_writing.check_critic(critic, generator)

    def fresh(self, generator: BigGANGenerator) -> BigGANDiscriminator | None:
        return biggan_writing.critic_like(generator)

    def write(self, folder: Path, generator: BigGANGenerator, critic: BigGANDiscriminator | None) -> list[Path]:
        return export_biggan(folder, generator, critic)

    def opened(self, generator: BigGANGenerator) -> str:
        built = {k: v for k, v in biggan_writing.options(generator, None).items() if k not in ("model", "ema")}
        return f"its BigGAN.py builds the generator by Generator({', '.join(f'{k}={v!r}' for k, v in built.items())})"


PROGRAMS: dict[str, tuple[Program, ...]] = {
    "rosinality": (Rosinality(), RosinalityStyleGAN()),
    "nvidia": (Nvidia(),),
    "biggan": (BigGANPyTorch(),),
    "safetensors": (Program(),),
}


def program_of(to: str, generator: nn.Module) -> Program:
    """The program of that name that has the generator. ValueError: there is none."""
    family = getattr(generator, "family", None)
    for program in PROGRAMS[to]:
        if family in program.families:
            return program
    fits = [name for name, programs in PROGRAMS.items() for program in programs if family in program.families]
    if not fits:
        raise IsModuleError(f"{type(generator).__name__} is of no family known here")
    raise ValueError(f"{to} has no {family}: take {' or '.join(fits)}")


def _channels(network: Network) -> dict[int, int]:
    return {int(r): c for r, c in network.config["channels"].items()}
