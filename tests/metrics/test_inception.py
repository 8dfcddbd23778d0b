"""Inception v3 from files of weights: the network against the paper's tables, and what becomes of the images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minegan_fast.metrics import FeatureExtractor, features
from minegan_fast.metrics.inception import CLASSES, from_weights

VARIANTS = ("torchvision", "fid")


class Weights(dict):
    """Random weights under the names that the equations ask for. They are views of one storage, so that files are
    small; running variances keep activations near one."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.base = torch.randn(2_000_000, generator=self.generator)

    def conv(self, x, name, channels, kernel, stride=1, padding=(0, 0)):
        """Convolution, batch norm with running statistics, ReLU."""
        shape = (channels, x.shape[1], *kernel)
        fan_in = shape[1] * shape[2] * shape[3]
        if f"{name}.conv.weight" not in self:
            start = int(torch.randint(400_000, (), generator=self.generator))
            self[f"{name}.conv.weight"] = self.base[start : start + channels * fan_in].view(shape)
            uniform = torch.rand(3, channels, generator=self.generator) + 0.5
            normal = torch.randn(2, channels, generator=self.generator)
            self[f"{name}.bn.weight"], self[f"{name}.bn.bias"] = uniform[0], normal[0] / 2
            self[f"{name}.bn.running_var"] = uniform[1] * fan_in
            self[f"{name}.bn.running_mean"] = normal[1] * fan_in**0.5 / 4
        weight, gain, bias, mean, variance = (
            self[f"{name}.{tensor}"].to(x.dtype)
            for tensor in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        )
        y = F.conv2d(x, weight, stride=stride, padding=padding)
        y = (y - mean.view(-1, 1, 1)) / (variance + 0.001).sqrt().view(-1, 1, 1)
        return (y * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)).clamp(min=0)


def average(x, padding_counts):
    total = F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
    return total / (9 if padding_counts else F.avg_pool2d(torch.ones_like(x), 3, 1, 1, divisor_override=1))


def equations(w, x, variant):
    """The features, block by block. x: [N, 3, H, W], float64."""
    counts = variant == "torchvision"

    def c1(x, name, channels):
        return w.conv(x, name, channels, (1, 1))

    def c3(x, name, channels):
        return w.conv(x, name, channels, (3, 3), padding=(1, 1))

    def row(x, name, channels, n):
        return w.conv(x, name, channels, (1, n), padding=(0, n // 2))

    def column(x, name, channels, n):
        return w.conv(x, name, channels, (n, 1), padding=(n // 2, 0))

    def half(x, name, channels):
        return w.conv(x, name, channels, (3, 3), stride=2)

    x = half(x, "Conv2d_1a_3x3", 32)
    x = w.conv(x, "Conv2d_2a_3x3", 32, (3, 3))
    x = c3(x, "Conv2d_2b_3x3", 64)
    x = F.max_pool2d(x, 3, 2)
    x = c1(x, "Conv2d_3b_1x1", 80)
    x = w.conv(x, "Conv2d_4a_3x3", 192, (3, 3))
    x = F.max_pool2d(x, 3, 2)
    for name, pooled, sum_of_channels in (("Mixed_5b", 32, 256), ("Mixed_5c", 64, 288), ("Mixed_5d", 64, 288)):
        b = f"{name}.branch"
        five = w.conv(c1(x, f"{b}5x5_1", 48), f"{b}5x5_2", 64, (5, 5), padding=(2, 2))
        double = c3(c3(c1(x, f"{b}3x3dbl_1", 64), f"{b}3x3dbl_2", 96), f"{b}3x3dbl_3", 96)
        x = torch.cat([c1(x, f"{b}1x1", 64), five, double, c1(average(x, counts), f"{b}_pool", pooled)], 1)
        assert x.shape[1] == sum_of_channels
    b = "Mixed_6a.branch"
    double = half(c3(c1(x, f"{b}3x3dbl_1", 64), f"{b}3x3dbl_2", 96), f"{b}3x3dbl_3", 96)
    x = torch.cat([half(x, f"{b}3x3", 384), double, F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1] == 768
    for name, n in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        b = f"{name}.branch"
        seven = column(row(c1(x, f"{b}7x7_1", n), f"{b}7x7_2", n, 7), f"{b}7x7_3", 192, 7)
        double = column(c1(x, f"{b}7x7dbl_1", n), f"{b}7x7dbl_2", n, 7)
        double = column(row(double, f"{b}7x7dbl_3", n, 7), f"{b}7x7dbl_4", n, 7)
        double = row(double, f"{b}7x7dbl_5", 192, 7)
        x = torch.cat([c1(x, f"{b}1x1", 192), seven, double, c1(average(x, counts), f"{b}_pool", 192)], 1)
        assert x.shape[1] == 768
    b = "Mixed_7a.branch"
    seven = column(row(c1(x, f"{b}7x7x3_1", 192), f"{b}7x7x3_2", 192, 7), f"{b}7x7x3_3", 192, 7)
    three = half(c1(x, f"{b}3x3_1", 192), f"{b}3x3_2", 320)
    x = torch.cat([three, half(seven, f"{b}7x7x3_4", 192), F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1] == 1280
    for name in ("Mixed_7b", "Mixed_7c"):
        b = f"{name}.branch"
        pooled = F.max_pool2d(x, 3, 1, 1) if (variant, name) == ("fid", "Mixed_7c") else average(x, counts)
        three, double = c1(x, f"{b}3x3_1", 384), c3(c1(x, f"{b}3x3dbl_1", 448), f"{b}3x3dbl_2", 384)
        parts = [c1(x, f"{b}1x1", 320)]
        parts += [row(three, f"{b}3x3_2a", 384, 3), column(three, f"{b}3x3_2b", 384, 3)]
        parts += [row(double, f"{b}3x3dbl_3a", 384, 3), column(double, f"{b}3x3dbl_3b", 384, 3)]
        x = torch.cat([*parts, c1(pooled, f"{b}_pool", 192)], 1)
        assert x.shape[1] == 2048
    return x.mean((2, 3))


def images(n=2, size=(32, 32), channels=3, seed=1):
    return torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(seed)) * 2.2 - 1.1


@pytest.fixture(scope="module")
def weights():
    made = Weights()
    equations(made, images(1, (75, 75)).double(), "fid")
    return made


def state(weights, variant, dtype=None):
    """What such a file holds: counters and an auxiliary classifier in torchvision's alone."""
    classes = {"torchvision": 1000, "fid": 1008}[variant]
    tensors = {"fc.weight": torch.zeros(1).expand(classes, 2048), "fc.bias": torch.zeros(classes)}
    if variant == "torchvision":
        tensors["AuxLogits.conv0.conv.weight"] = torch.zeros(1).expand(128, 768, 1, 1)
        tensors |= {
            name.replace("weight", "num_batches_tracked"): torch.tensor(7) for name in weights if ".bn.w" in name
        }
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in (weights | tensors).items()}


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    for variant in VARIANTS:
        torch.save(state(weights, variant), folder / f"{variant}.pth")
    return folder


class Record(nn.Module):
    def forward(self, x):
        self.x = x
        return x.mean((2, 3))


def given(path, x, **options):
    """What the network of that file is given."""
    record = Record()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "from_weights", lambda state, device: (record, CLASSES[len(state["fc.weight"])]))
        FeatureExtractor(path, **options)(x)
    return record.x


def bytes_of(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round()


def test_the_network_is_the_papers(weights):
    x, pooled = images(2, (107, 91)).double(), {}
    for variant in VARIANTS:
        network, told = from_weights(state(weights, variant, torch.float64))
        assert told == variant
        ours = pooled[variant] = network(x)
        assert ours.shape == (2, 2048)
        torch.testing.assert_close(ours, equations(weights, x, variant), rtol=1e-10, atol=1e-11)
        assert 0.1 < ours.std() < 10
    assert (pooled["fid"] - pooled["torchvision"]).norm() > 0.01 * pooled["fid"].norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_gives_the_features_of_its_network(weights, files, variant):
    x = images(2, (107, 91))
    extractor = FeatureExtractor(files / f"{variant}.pth", resolution=(107, 91))
    assert extractor.variant == variant
    ours = extractor(x)
    assert ours.shape == (2, 2048)
    assert ours.dtype == torch.float32
    x = bytes_of(x).double()
    x = x / 127.5 - 1 if variant == "torchvision" else (x - 128) / 128
    expected = equations(weights, x, variant)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_other_containers_and_prefixes(weights, files, tmp_path):
    x = images(1, (75, 75))
    expected = FeatureExtractor(files / "fid.pth", resolution=75)(x)
    named = {f"module.{name}": tensor for name, tensor in state(weights, "fid").items()}
    torch.save(named, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "state_dict": named}, tmp_path / "nested.pth")
    half = {name: tensor.half().contiguous() for name, tensor in state(weights, "fid").items()}
    save_file(half, tmp_path / "half.safetensors")
    for name in ("legacy.pt", "nested.pth"):
        assert torch.equal(FeatureExtractor(str(tmp_path / name), resolution=75)(x), expected)
    extractor = FeatureExtractor(tmp_path / "half.safetensors", resolution=75)
    assert all(tensor.dtype == torch.float32 for tensor in extractor.module.parameters())
    assert (extractor(x) - expected).norm() < 0.02 * expected.norm()


def test_a_pickled_network_is_read_as_data(files, tmp_path):
    network = FeatureExtractor(files / "fid.pth").module
    network.fc = nn.Linear(2048, 1008)
    torch.save(network, tmp_path / "network.pth")
    x = images(1, (75, 75))
    read = FeatureExtractor(tmp_path / "network.pth", resolution=75)
    assert torch.equal(read(x), FeatureExtractor(files / "fid.pth", resolution=75)(x))


@pytest.mark.parametrize("size", [(64, 48), (299, 299), (400, 320)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_are_those_of_clean_fid(files, variant, size):
    """8 bits, then PIL's bicubic kernel in floating point channel by channel, clamped."""
    image = pytest.importorskip("PIL.Image")
    x = images(1, size)
    resized = [image.fromarray(channel.numpy()).resize((299, 299), image.BICUBIC) for channel in bytes_of(x)[0]]
    expected = torch.from_numpy(np.stack([np.array(channel) for channel in resized])).clamp(0, 255)
    expected = expected / 127.5 - 1 if variant == "torchvision" else (expected - 128) / 128
    # 1e-4 is a hundredth of a grey level: PyTorch places the kernels in float32, PIL in float64.
    as_bytes = given(files / f"{variant}.pth", bytes_of(x).to(torch.uint8))
    for ours in (given(files / f"{variant}.pth", x), as_bytes):
        torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-4)


def test_the_resizing_of_pytorch_fid(files):
    x = images(2, (320, 400))
    options = {"interpolation": "bilinear", "antialias": False, "normalize": "[-1,1]"}
    small = given(files / "fid.pth", x, **options)
    expected = F.interpolate(bytes_of(x) / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(small, expected, rtol=0, atol=2e-6)
    assert (small - given(files / "fid.pth", x)).abs().mean() > 0.01


def test_every_default_can_be_overridden(files):
    x = images(1, (80, 80))
    path = files / "fid.pth"
    assert torch.equal(given(path, x, resolution=80, normalize="[-1,1]", quantize=False), x.clamp(-1, 1))
    assert given(path, x, resolution=(75, 90)).shape == (1, 3, 75, 90)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((bytes_of(x) / 255).movedim(1, 3) - mean) / std
    torch.testing.assert_close(given(path, x, resolution=80, normalize="imagenet"), expected.movedim(3, 1))
    bilinear = F.interpolate(bytes_of(x) / 127.5 - 1, (75, 75), mode="bilinear", antialias=True)
    small = given(path, x, resolution=75, interpolation="bilinear", normalize="[-1,1]")
    torch.testing.assert_close(small, bilinear, rtol=0, atol=2e-6)


def test_a_network_of_the_users_sees_what_it_saw_before():
    x = images(1, (20, 20)).clamp(-1, 1)
    record = Record()
    FeatureExtractor(record)(x)
    assert torch.equal(record.x, x)
    FeatureExtractor(record, quantize=True)(x)
    torch.testing.assert_close(record.x, bytes_of(x) / 127.5 - 1)


def test_batches_modes_and_grey_images(files):
    x = images(3, (40, 40), channels=1)
    extractor = FeatureExtractor(files / "fid.pth", batch=2, resolution=75)
    expected = extractor(x)
    extractor.module.train()
    assert torch.equal(extractor(x), expected)
    torch.testing.assert_close(torch.cat([extractor(image[None]) for image in x]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(extractor(x.expand(-1, 3, -1, -1)), expected)
    assert not any(tensor.requires_grad for tensor in extractor.module.parameters())


def changed(tensors, **changes):
    """Tensors with dots of names as double underscores; None leaves one out."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Mixed_5b__branch1x1__conv__weight": None}, r"missing: Mixed_5b\.branch1x1\.conv\.weight"),
        ({"Mixed_8a__conv__weight": torch.ones(1)}, r"unexpected: Mixed_8a\.conv\.weight"),
        (
            {"Conv2d_1a_3x3__bn__bias": torch.ones(31)},
            r"wrong: Conv2d_1a_3x3\.bn\.bias is \[31\], expected \[32\]",
        ),
        ({"Conv2d_1a_3x3__bn__bias": torch.ones(32).int()}, r"bn\.bias holds torch\.int32, expected floats"),
        ({"Conv2d_1a_3x3__bn__bias": "ones"}, r"bn\.bias holds str, expected floats"),
        ({"Conv2d_1a_3x3__bn__bias": torch.full((32,), torch.nan)}, r"bn\.bias holds NaN or inf"),
        ({"fc__weight": None}, r"fc\.weight tells torchvision's .* and here it is not there"),
        ({"fc__weight": torch.zeros(1).expand(10, 2048)}, r"and here it is \[10, 2048\]"),
        ({"fc__weight": 3}, r"and here it is \['no tensor'\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(weights, tmp_path, changes, message):
    torch.save(changed(state(weights, "fid"), **changes), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth: .*{message}"):
        FeatureExtractor(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 74}, "Inception v3 takes 75x75 pixels and more, got resolution 74"),
        ({"channels": 1}, "take 3 channels of floats, got channels=1"),
        ({"normalize": "uint8"}, "take 3 channels of floats, .*normalize='uint8'"),
    ],
)
def test_options_that_the_network_cannot_follow_are_refused(files, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(files / "fid.pth", **options)


def test_against_torchvision(weights, files):
    """Whose model takes ImageNet's range and converts it to [-1, 1] itself where it has the public weights."""
    models = pytest.importorskip("torchvision.models")
    model = models.inception_v3(weights=None, init_weights=False, transform_input=True)
    tensors = state(weights, "torchvision")
    assert tensors.keys() - {"AuxLogits.conv0.conv.weight"} <= model.state_dict().keys()
    assert all(name.startswith("AuxLogits.") for name in model.state_dict().keys() - tensors.keys())
    model.load_state_dict(tensors, strict=False)
    model.fc = nn.Identity()
    x = bytes_of(images(2, (299, 299))) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model.eval()((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    ours = FeatureExtractor(files / "torchvision.pth")(x * 2 - 1)
    assert (ours - expected).norm() < 1e-5 * expected.norm()
