"""FeatureExtractor: conversions, eval mode, outputs, files, and everything it must refuse."""

import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minegan_fast.metrics import FeatureExtractor

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def images(n=6, channels=3, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Network(nn.Module):
    """Convolution, batch norm whose batch statistics differ from its running ones, dropout."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.conv(x)))


class Record(nn.Module):
    """Keeps what it was given; features are the pixels."""

    def forward(self, x):
        self.inputs = [*getattr(self, "inputs", []), x]
        return x.flatten(1).float()


class Output(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def given(x, **options):
    record = Record()
    FeatureExtractor(record, **options)(x)
    return torch.cat(record.inputs)


def test_features_are_those_of_eval_mode_in_batches():
    torch.manual_seed(0)
    network, x = Network(), images(10)
    network.train()
    network(x)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    features = FeatureExtractor(network, batch=3)(x)
    assert features.shape == (10, 5)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name])
    expected = network.eval()(x).mean((2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_put_back_as_they_were_found(fails):
    network = Network().train()
    network.norm.eval()
    extractor = FeatureExtractor(nn.Sequential(network, Output(lambda x: 1 / 0)) if fails else network)
    if fails:
        with pytest.raises(ZeroDivisionError):
            extractor(images())
    else:
        extractor(images())
    assert [network.training, network.conv.training, network.norm.training, network.drop.training] == [
        True,
        True,
        False,
        True,
    ]


def test_mode_is_eval_at_every_call_whatever_happened_between():
    network, x = Network(), images()
    extractor = FeatureExtractor(network)
    before = extractor(x)
    network.train()
    assert torch.equal(extractor(x), before)


def test_each_range_is_converted_once():
    x = images()
    torch.testing.assert_close(given(x), x)
    torch.testing.assert_close(given(x, normalize="[0,1]"), (x + 1) / 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (((x + 1) / 2).movedim(1, 3) - mean) / std
    torch.testing.assert_close(given(x, normalize="imagenet"), expected.movedim(3, 1))
    torch.testing.assert_close(given(x, normalize="[0,255]"), (x + 1) * 127.5)
    torch.testing.assert_close(given(x, normalize="tensorflow"), ((x + 1) * 127.5 - 128) / 128)
    as_uint8 = given(x, normalize="uint8")
    assert as_uint8.dtype == torch.uint8
    assert torch.equal(as_uint8, ((x + 1) * 127.5).round().to(torch.uint8))


def test_uint8_images_mean_the_same_as_floats():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(given(every, normalize="uint8"), every)
    torch.testing.assert_close(given(every), every / 127.5 - 1)
    assert torch.equal(given(every / 127.5 - 1, normalize="uint8"), every)
    assert torch.equal(given(every.numpy(), normalize="uint8"), every)


def test_generator_outputs_beyond_the_range_are_clamped():
    x = torch.tensor([-3.0, -1.0, 0.5, 2.5]).view(1, 1, 2, 2)
    assert given(x).flatten().tolist() == [-1, -1, 0.5, 1]
    assert given(x, normalize="uint8").flatten().tolist() == [0, 0, 191, 255]


def test_grey_images_are_repeated():
    grey = images(channels=1)
    assert torch.equal(given(grey, channels=3), grey.expand(-1, 3, -1, -1))
    assert given(grey).shape[1] == 1
    assert given(grey, normalize="imagenet").shape[1] == 3
    assert torch.equal(given(images(), channels=3), images())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_antialiased_and_stays_in_range(interpolation):
    x = torch.where(images(size=16) > 0, 1.0, -1.0)
    small = given(x, resolution=5, interpolation=interpolation)
    expected = F.interpolate(x, (5, 5), mode=interpolation, antialias=True).clamp(-1, 1)
    torch.testing.assert_close(small, expected)
    large = given(x, resolution=(20, 24), interpolation=interpolation)
    assert large.shape == (6, 3, 20, 24)
    assert large.abs().max() <= 1
    assert torch.equal(given(x, resolution=16), x)
    # Without antialiasing a fine checkerboard aliases; with it, it is grey.
    board = (torch.arange(64).view(1, 1, 64, 1) + torch.arange(64)) % 2 * 2.0 - 1
    assert given(board, resolution=8)[..., 1:-1, 1:-1].abs().max() < 0.05


def test_resizing_agrees_with_pillow():
    image = pytest.importorskip("PIL.Image")
    x = images(1, 1, 32)
    for interpolation, resample in [("bilinear", image.BILINEAR), ("bicubic", image.BICUBIC)]:
        expected = image.fromarray(x[0, 0].numpy()).resize((13, 13), resample)
        small = given(x, resolution=13, interpolation=interpolation)[0, 0]
        torch.testing.assert_close(small, torch.from_numpy(np.array(expected)).clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [lambda x: (x, None), lambda x: [x], lambda x: x.mean((2, 3), keepdim=True)])
def test_outputs_that_are_understood(make):
    x = images()
    torch.testing.assert_close(FeatureExtractor(Output(make))(x), x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: {"features": x}, TypeError, "must return a tensor .* not dict"),
        (lambda x: (), TypeError, "not tuple"),
        (lambda x: x.mean((1, 2, 3)), ValueError, r"must return \[6, D\] or \[6, D, h, w\] for 6 images, got \[6\]"),
        (lambda x: x.flatten(2), ValueError, r"got \[6, 3, 64\]"),
        (lambda x: x.mean((2, 3))[:1], ValueError, r"for 6 images, got \[1, 3\]"),
    ],
)
def test_outputs_that_are_not_are_named(make, error, message):
    with pytest.raises(error, match=message):
        FeatureExtractor(Output(make))(images())


def test_ambient_autocast_does_not_change_features():
    network, x = Network(), images()
    expected = FeatureExtractor(network)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(FeatureExtractor(network)(x), expected)


@pytest.mark.parametrize(("dtype", "out"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_images_take_the_type_of_the_network(dtype, out):
    network = Network().to(dtype)
    features = FeatureExtractor(network)(images().double())
    assert features.dtype == out
    if dtype == torch.float64:
        expected = network.eval()(images().double()).mean((2, 3))
        torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("freeze", [False, True])
def test_torchscript_file(tmp_path, freeze):
    torch.manual_seed(0)
    network, x = Network(), images()
    network(x)
    expected = FeatureExtractor(network)(x)
    scripted = torch.jit.script(network.eval() if freeze else network.train())
    torch.jit.save(torch.jit.freeze(scripted) if freeze else scripted, tmp_path / "network.pt")
    for path in (tmp_path / "network.pt", str(tmp_path / "network.pt")):
        extractor = FeatureExtractor(path, batch=4)
        torch.testing.assert_close(extractor(x), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(extractor(x), extractor(x))


class Detector(nn.Module):
    """The interface of the TorchScript networks of StyleGAN2-ADA's metrics."""

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        assert img.shape[1] == 3
        features = img.float().flatten(1)
        return features if return_features else features.softmax(1)


def test_networks_of_stylegan2_ada_are_asked_for_features_of_uint8(tmp_path):
    torch.jit.save(torch.jit.script(Detector()), tmp_path / "inception.pt")
    x = images(2, 1, 8)
    as_bytes = ((x + 1) * 127.5).round().expand(-1, 3, -1, -1)
    for network in (tmp_path / "inception.pt", torch.jit.load(tmp_path / "inception.pt")):
        assert torch.equal(FeatureExtractor(network)(x), as_bytes.flatten(1))
    clean = FeatureExtractor(tmp_path / "inception.pt", resolution=5, interpolation="bicubic", normalize="[0,255]")
    expected = F.interpolate(as_bytes, (5, 5), mode="bicubic", antialias=True).clamp(0, 255)
    torch.testing.assert_close(clean(x), expected.flatten(1), rtol=0, atol=1e-4)


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path):
    fuse = tmp_path / "exploded"
    torch.save(Bomb(fuse), tmp_path / "zip.pth")
    torch.save(Bomb(fuse), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(fuse)))
    for name in ("zip.pth", "legacy.pth", "plain.pkl"):
        with pytest.raises(ValueError, match=r"was refused: .*; nothing of it was run"):
            FeatureExtractor(tmp_path / name)
    assert not fuse.exists()


def test_a_pickle_dressed_as_torchscript_runs_nothing(tmp_path):
    fuse, path = tmp_path / "exploded", tmp_path / "network.pt"
    torch.jit.save(torch.jit.script(Network()), path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, pickle.dumps(Bomb(fuse)) if name.endswith(("/data.pkl", "/constants.pkl")) else data)
    with pytest.raises(ValueError, match="cannot be read as TorchScript"):
        FeatureExtractor(path)
    assert not fuse.exists()


def test_weights_of_another_network_are_refused_with_the_remedy(tmp_path):
    torch.save(Network().state_dict(), tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    for name, keys in (("other", r"conv\.bias, conv\.weight, norm\.bias, .* and 3 more"), ("empty", "nothing")):
        with pytest.raises(ValueError, match=rf"but {keys}\. For another network build it, load its weights with"):
            FeatureExtractor(tmp_path / f"{name}.pth")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*missing\.pt"):
        FeatureExtractor(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="no file"):
        FeatureExtractor(tmp_path)
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(ValueError, match=r"text\.pt is neither .* \(expected a TorchScript file or a file of"):
        FeatureExtractor(tmp_path / "text.pt")
    torch.jit.save(torch.jit.script(Network()), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        FeatureExtractor(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (images()[0], ValueError, r"images must be \[N, C, H, W\].*got \[3, 8, 8\]"),
        (images()[:0], ValueError, "at least one image"),
        (images(channels=2), ValueError, "images have 2 channels, the network takes 3: give 1 or 3"),
        (images().int(), TypeError, r"floating point in \[-1, 1\] or uint8, not torch\.int32"),
        ((images() + 1) * 127.5, ValueError, r"expected \[-1, 1\]: convert 0..255 by x / 127\.5 - 1"),
    ],
)
def test_wrong_images_are_named(x, error, message):
    with pytest.raises(error, match=message):
        FeatureExtractor(Network(), channels=3)(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_image_that_is_not_finite_is_named(value):
    x = images()
    x[2, 0, 0, 0] = x[4, 1, 2, 3] = value
    with pytest.raises(ValueError, match="2 of 6 images hold NaN or inf, the first is image 2"):
        FeatureExtractor(Network())(x)


def test_images_that_seem_to_be_in_0_1_warn():
    with pytest.warns(UserWarning, match=r"images in \[0, 1\]\? expected \[-1, 1\]"):
        FeatureExtractor(Network())(images().abs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureExtractor(Network())(images())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path_or_module": lambda x: x}, TypeError, "expected an nn.Module or the path .* not function"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        (
            {"normalize": "0-1"},
            ValueError,
            r"unknown normalize '0-1': one of \[-1,1\], \[0,1\], \[0,255\], imagenet, tensorflow, uint8",
        ),
        ({"interpolation": "nearest"}, ValueError, "must be 'bilinear' or 'bicubic', got 'nearest'"),
        ({"resolution": 0}, ValueError, "resolution must be a positive int or a pair"),
        ({"resolution": (8, 8, 8)}, ValueError, "resolution must be a positive int or a pair"),
        ({"device": "cpu"}, ValueError, "a module stays where it is"),
    ],
)
def test_wrong_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureExtractor(**{"path_or_module": Network(), **arguments})


def test_a_list_of_images_is_named():
    with pytest.raises(TypeError, match="images must be a tensor or array of numbers, not list"):
        FeatureExtractor(Record())(list(images(2)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(tmp_path):
    torch.jit.save(torch.jit.script(Network()), path := tmp_path / "network.pt")
    with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
        FeatureExtractor(path, device="cuda")
