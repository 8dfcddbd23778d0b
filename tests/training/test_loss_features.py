import pytest
import torch
import torch.nn.functional as F
from feature_networks import Shared, images, vgg
from torch import nn

from minegan_fast.metrics import FeatureExtractor
from minegan_fast.metrics.inception import Inception
from minegan_fast.models import BigGANDiscriminator, StyleGAN2Discriminator
from minegan_fast.training.folding import fold_batch_norms
from minegan_fast.training.loss_features import LossFeatures


class Smooth(nn.Module):
    """Differentiable everywhere: finite differences are exact to their order."""

    def __init__(self, channels=3):
        super().__init__()
        self.one, self.two = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).tanh()).tanh().mean((2, 3))


def shared(statistics=True):
    """With batch norm statistics that are not 0 and 1."""
    torch.manual_seed(0)
    network = Shared().train()
    if statistics:
        network(images(count=8) * 3 + 1)
        nn.init.uniform_(network.norm.weight)
        nn.init.uniform_(network.norm.bias)
    return network.eval()


def of_unit_rms(*parts):
    return torch.cat([part / part.square().mean().sqrt() for part in parts], 1)


def by_hand(m, p):
    """The two groups of maps by their definitions."""
    m = m.double()
    flat = m.flatten(2)
    groups = [of_unit_rms(flat.mean(2), (flat.var(2, unbiased=False) + 1e-8).sqrt())]
    if p > 1:
        size = m.shape[2] // p
        fields = m.unfold(2, size, size).unfold(3, size, size).flatten(4)
        least = 1e-4 * flat.var(2, unbiased=False)[:, :, None, None]
        variances = torch.maximum(fields.var(4, unbiased=False), least) + 1e-8
        groups.append(of_unit_rms(fields.mean(4).flatten(1), variances.sqrt().flatten(1)))
    return groups


NETWORKS = {
    "shared": shared,
    "biggan": lambda: BigGANDiscriminator(32, num_classes=2, channels=[8, 12, 12, 16], attention=()),
    "stylegan2": lambda: StyleGAN2Discriminator(32, channel_base=128, channel_max=16),
    "inception": lambda: Inception("fid"),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_groups_of_networks_of_every_kind(kind):
    torch.manual_seed(0)
    network = NETWORKS[kind]().eval()
    x = images(80 if kind == "inception" else 32, count=3)
    features = LossFeatures(network, x)
    groups = features.fit(x)
    assert [list(g.shape) for g in groups] == [[3, size] for size in features.sizes]
    x.requires_grad_()
    for i, (again, group) in enumerate(zip(features(x), groups, strict=True)):
        torch.testing.assert_close(again, group, rtol=1e-4, atol=1e-5)
        (slope,) = torch.autograd.grad(again.square().sum(), x, retain_graph=True)
        assert slope.flatten(1).any(1).all(), features.names[i]


@pytest.mark.parametrize("fields", [1, 2, 4])
def test_parts_have_unit_rms_on_the_target(fields):
    network, x = shared(), images(count=7)
    features = LossFeatures(network, x, resolution=32, fields=fields, pixels=(), batch=3)
    expected = []
    with torch.no_grad():
        for m in features.maps(x):  # 16, 8 and 4 pixels
            expected += by_hand(m, min(fields, 2 if m.shape[2] == 4 else 4))
    groups = features.fit(x)
    for group, e in zip(groups, expected, strict=True):
        torch.testing.assert_close(group.double(), e, rtol=1e-3, atol=1e-3)
    for group, part in zip(groups, features(x[2:4] / 2), strict=True):
        assert not torch.allclose(group[2:4], part)  # the scales stay those of the target
    as_bytes = ((x + 1) * 127.5).round().byte()
    for of_bytes, e in zip(features.fit([as_bytes[:2], as_bytes[2:]]), expected, strict=True):
        torch.testing.assert_close(of_bytes.double(), e, rtol=0, atol=0.05)


def test_pixels_are_groups_of_their_own():
    x = images(16, count=5)
    features = LossFeatures(shared(), x, pixels=(4, 8, 32))
    groups = dict(zip(features.names, features.fit(x), strict=True))
    assert "pixels 32x32" not in groups, "the images have 16"
    expected = of_unit_rms(x.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).flatten(1))
    torch.testing.assert_close(groups["pixels 4x4"], expected, rtol=1e-4, atol=1e-5)


def test_small_maps_and_vectors_have_fewer_parts():
    torch.manual_seed(0)
    x, plain = images(16), {"resolution": 16, "pixels": ()}
    assert LossFeatures(shared(), x, taps=["relu#3"], **plain).sizes == [2 * 16]  # 2 pixels: no fields
    assert LossFeatures(shared(), x, taps=["pool"], **plain).sizes == [16]  # 1 pixel: no deviation
    assert LossFeatures(shared(), x, taps=["fc"], **plain).sizes == [5]


def test_small_images_are_enlarged_where_the_network_takes_that():
    x = images(32)
    assert LossFeatures(shared(), x)._prepared(x).shape[2] == 96
    assert LossFeatures(shared(), x, resolution=32)._prepared(x).shape[2] == 32
    assert LossFeatures(FeatureExtractor(shared()), x)._prepared(x).shape[2] == 32, "it says what it wants"
    own = BigGANDiscriminator(32, num_classes=2, channels=[8, 12, 12, 16], attention=())
    assert LossFeatures(own, x)._prepared(x).shape[2] == 32
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(196, 3))
    assert LossFeatures(fixed.eval(), x)._prepared(x).shape[2] == 32, "it takes no other size"


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    network = Smooth().double().eval()
    x = images(8).double()
    features = LossFeatures(network, x)
    features.fit(x)
    assert torch.autograd.gradcheck(lambda x: tuple(features(x)), (x.requires_grad_(),), atol=1e-6, rtol=1e-5)


def test_images_are_neither_rounded_nor_clamped():
    extractor = FeatureExtractor(shared(), resolution=24, normalize="imagenet", interpolation="bicubic", quantize=True)
    x = images().requires_grad_()
    features = LossFeatures(extractor, x.detach())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    resized = F.interpolate(1.7 * x, (24, 24), mode="bicubic", antialias=True)
    network = shared()
    expected = network.norm(network.convs[0](((resized + 1) / 2 - mean) / std)).relu()
    got = features.maps(1.7 * x)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    slopes = [torch.autograd.grad(m.square().sum(), x, retain_graph=True)[0] for m in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


def test_grey_images_become_three_channels_where_they_must():
    grey = images(channels=1)
    three = LossFeatures(shared(), grey.expand(-1, 3, -1, -1))
    for a, b in zip(LossFeatures(shared(), grey).maps(grey), three.maps(grey.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(a, b)
    assert LossFeatures(Smooth(1).eval(), grey).maps(grey)[0].shape[1] == 4


def test_the_network_of_the_caller_stays_as_it_was():
    network = shared().train()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    features = LossFeatures(network, images())
    features.fit(images())
    sum(g.sum() for g in features(images().requires_grad_())).backward()
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in features._stages.network.parameters())


def test_autocast_around_the_call_does_not_matter_and_bf16_is_close():
    x = images(count=6)
    features, low = LossFeatures(shared(), x), LossFeatures(shared(), x, bf16=True)
    groups = features.fit(x)
    with torch.autocast("cpu", torch.bfloat16):
        around = features(x)
    for a, b, g in zip(around, low.fit(x), groups, strict=True):
        torch.testing.assert_close(a, g, rtol=1e-5, atol=1e-6)
        assert b.dtype == torch.float32
        assert (b - g).norm() / g.norm() < 0.06
    assert not torch.equal(low.fit(x)[-1], groups[-1])


def test_batch_norm_is_folded_where_that_changes_nothing():
    network, x = shared(), images()
    features = LossFeatures(network, x, resolution=32)
    assert isinstance(features._stages.network.norm, nn.Identity)
    expected = network.norm(network.convs[0](x)).relu()
    torch.testing.assert_close(features.maps(x)[0], expected, rtol=1e-4, atol=1e-5)
    tapped = LossFeatures(network, x, taps=["convs.0"], resolution=32)  # its output would be another
    torch.testing.assert_close(tapped.maps(x)[0], network.convs[0](x))
    assert isinstance(tapped._stages.network.norm, nn.BatchNorm2d)
    assert fold_batch_norms(vgg().eval(), images(40)) is None
    conv, norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
    for twice in ([conv, norm, conv, norm], [conv, norm, conv], [conv, norm, nn.Conv2d(3, 3, 3), norm]):
        assert fold_batch_norms(nn.Sequential(*twice).eval(), x) is None
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    assert fold_batch_norms(nn.Sequential(normed, nn.BatchNorm2d(4)).eval(), x) is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_files(tmp_path):
    torch.manual_seed(0)
    network, x = Smooth().eval(), images()
    torch.jit.save(torch.jit.script(network), tmp_path / "network.pt")
    features = LossFeatures(tmp_path / "network.pt", x, pixels=(), resolution=32)
    assert features.name.endswith("network.pt")
    assert features.sizes == [5]
    torch.testing.assert_close(features.maps(x)[0], network(x))

    class Detector(nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return img.float().flatten(1)[:, :6] if return_features else img.flatten(1).softmax(1)

    torch.jit.save(torch.jit.script(Detector()), tmp_path / "nvidia.pt")
    got = LossFeatures(tmp_path / "nvidia.pt", x).maps(x)[0]
    torch.testing.assert_close(got, ((x + 1) * 127.5).flatten(1)[:, :6])


class Rounded(Smooth):
    def forward(self, x):
        return super().forward((x * 127.5).round())


class Detached(Smooth):
    def forward(self, x):
        return super().forward(x.detach())


class Nothing(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3] * (x.flatten(1)[:, :3] > 2)


@pytest.mark.parametrize("network", [Rounded, Detached])
def test_what_is_not_differentiable_is_refused(network):
    with pytest.raises(ValueError, match=rf"{network.__name__} is not differentiable: its features 'norm' pass no"):
        LossFeatures(network().eval(), images())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_network_in_train_mode_is_refused():
    network = torch.jit.trace(shared().train(), images(), check_trace=False)
    with pytest.raises(
        ValueError, match=r"depend on the other images of its batch.*eval mode, also before it is traced"
    ):
        LossFeatures(network.eval(), images())


def test_wrong_images_and_features_are_named():
    x = images()
    features = LossFeatures(shared(), x)
    with pytest.raises(ValueError, match=r"call fit\(target images\) first"):
        features(x)
    features.fit(x)
    for wrong in (images(16), images(channels=1), x[0], x.byte()):
        with pytest.raises(ValueError, match=r"expected floating point images \[B, 3, 32, 32\], as the target's are"):
            features(wrong)
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]: convert 0..255"):
        features.fit((x + 1) * 127.5)
    with pytest.raises(ValueError, match="1 of 2 images hold NaN"):
        features.fit(x.clone().index_fill_(0, torch.tensor([1]), float("nan")))
    with pytest.raises(ValueError, match=r"features 'pixels 8x8' of Shared hold NaN or inf \(the images hold NaN"):
        features(x * float("nan"))
    with pytest.raises(ValueError, match="features 'pixels 8x8' of Shared are the same for all 2 target images"):
        features.fit(x[:1].expand(2, -1, -1, -1))
    broken = shared()
    broken.convs[1].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"features 'again#2' of Shared hold NaN or inf \(the images do not\)"):
        LossFeatures(broken, x)


def test_wrong_networks_and_arguments_are_named():
    x = images()
    with pytest.raises(ValueError, match=r"BigGANDiscriminator does not take images \[3, 32, 32\].*: give metrics"):
        LossFeatures(BigGANDiscriminator(64, num_classes=2, channel_width=4, attention=()), x)
    resized = LossFeatures(BigGANDiscriminator(64, num_classes=2, channel_width=4, attention=()), x, resolution=64)
    assert len(resized.taps) == 4
    with pytest.raises(ValueError, match=r"Smooth does not take images \[3, 32, 32\]"):
        LossFeatures(Smooth(1).eval(), x)
    with pytest.raises(ValueError, match="a FeatureExtractor has its own resolution and normalize"):
        LossFeatures(FeatureExtractor(shared()), x, resolution=64)
    for changes in ({"fields": 0}, {"pixels": (0,)}, {"batch": 0}):
        with pytest.raises(ValueError, match="fields, pixels and batch must be at least 1"):
            LossFeatures(shared(), x, **changes)
    dead = LossFeatures(Nothing().eval(), x * 0 + torch.linspace(3, -3, 32))
    with pytest.raises(ValueError, match=r"features '\(output\)' of Nothing are 0 for all target images: choose taps="):
        dead.fit(x)
