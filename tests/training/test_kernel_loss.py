import pytest
import torch
from feature_networks import Shared, images
from torch import nn

from minegan_fast.models import BigGANDiscriminator, StyleGAN2Generator
from minegan_fast.ops import mmd2
from minegan_fast.training import kernel_loss
from minegan_fast.training.kernel_loss import KernelLoss, gathering
from minegan_fast.training.loss_features import LossFeatures
from minegan_fast.training.processes import Processes

TARGET = ((images(count=9) + 1) * 127.5).byte()


def loss(network=None, target=TARGET, taps=None, **settings):
    torch.manual_seed(0)
    network = network or Shared()
    return KernelLoss(LossFeatures(network, target, taps=taps), target, **settings)


def generator():
    torch.manual_seed(1)
    G = StyleGAN2Generator(32, latent_dim=8, mapping_layers=2, channel_base=128, channel_max=8).eval()
    for name, parameter in G.named_parameters():
        if parameter.numel() == 1:  # strengths of the noise, which begin at 0
            assert "noise" in name
            nn.init.constant_(parameter, 0.3)
    return G


def gradients(G):
    result = torch.cat([p.grad.flatten() for p in G.parameters() if p.grad is not None])
    G.zero_grad()
    return result


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_distance_is_the_sum_of_mmd2_over_the_groups(unbiased):
    features = LossFeatures(Shared(), TARGET)
    kernel = KernelLoss(features, TARGET, unbiased=unbiased, scales=(0.5, 1.5), flips=True)
    x = images(count=5).flip(2) / 2
    both = torch.cat([TARGET, TARGET.flip(3)]).float() / 127.5 - 1
    expected = []
    for f, y in zip(features(x), features(both), strict=True):
        median = float(torch.pdist(y.double()).quantile(0.5))
        expected.append(mmd2(f, y, bandwidth=[0.5 * median, 1.5 * median], unbiased=unbiased))
    torch.testing.assert_close(kernel.distances(x), torch.stack(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(kernel(x), torch.stack(expected).sum(), rtol=1e-3, atol=1e-5)
    assert kernel.target.count == 18
    assert loss(flips=False).target.count == 9


@pytest.mark.parametrize("part", [None, 7, 9])
def test_one_part_is_an_ordinary_backward(part):
    kernel, G, z = loss(), generator(), torch.randn(7, 8)
    torch.manual_seed(3)
    value = kernel.backward(lambda first, last: G(z[first:last]), 7, part, scale=torch.tensor(4.0))
    got = gradients(G)
    torch.manual_seed(3)
    expected = kernel(G(z))
    (expected * 4).backward()
    assert torch.equal(value, expected)
    torch.testing.assert_close(got, gradients(G), rtol=1e-4, atol=1e-6 * float(got.abs().max()))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("part", [1, 3, 4])
def test_parts_are_the_whole_batch(part, views):
    """The generator draws its own noise, and views are drawn; both are the same in the two runs of a part."""
    kernel = loss(views=views, augment="color,translation" if views > 1 else "")
    G, z = generator(), torch.randn(7, 8)
    calls = []

    def make(first, last):
        calls.append((first, last, torch.is_grad_enabled()))
        return G(z[first:last])

    torch.manual_seed(3)
    value = kernel.backward(make, 7, part)
    after = torch.rand(())
    got = gradients(G)
    parts = [(i, min(i + part, 7)) for i in range(0, 7, part)]
    assert calls == [(*p, False) for p in parts] + [(*p, True) for p in parts]
    torch.manual_seed(3)
    made = [kernel._features(make(*p)) for p in parts]
    whole = kernel._distances([torch.cat(group) for group in zip(*made, strict=True)]).sum()
    whole.backward()
    assert torch.equal(after, torch.rand(()))  # draws go on as if each part had been made once
    expected = gradients(G)
    torch.testing.assert_close(value, whole.detach(), rtol=1e-5, atol=1e-6)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_two_processes_have_the_gradient_of_all_samples():
    """Three samples here and two there; what travels between them is handed over by the test."""
    kernel, G, z = loss(), generator(), torch.randn(5, 8)
    for parameter in G.parameters():
        if parameter.numel() == 1:
            parameter.requires_grad_(False).zero_()  # no noise
    expected = kernel(G(z))
    expected.backward()
    whole = gradients(G)
    with torch.no_grad():
        features = kernel._features(G(z))
    mean = torch.zeros_like(whole)
    for rows in (slice(0, 3), slice(3, 5)):
        own = z[rows]

        def gather(groups, rows=rows):
            for group, f in zip(groups, features, strict=True):
                torch.testing.assert_close(group, f[rows], rtol=1e-3, atol=1e-4)
            return features, rows

        value = kernel.backward(lambda a, b, own=own: G(own[a:b]), len(own), 2, gather=gather, processes=2)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-6)
        mean += gradients(G) / 2
    assert (mean - whole).norm() < 1e-4 * whole.norm()


def test_features_of_all_processes_are_gathered(monkeypatch):
    groups = [[torch.full((n, d), float(10 * rank + d)) for d in (2, 3)] for rank, n in enumerate((3, 2, 2))]

    def all_gather(out, padded):
        assert padded.shape == (3, 5)
        for o, g in zip(out, groups, strict=True):
            o[: len(g[0])] = torch.cat(g, 1)

    monkeypatch.setattr("torch.distributed.all_gather", all_gather)
    everyone, rows = gathering(Processes(1, 3), 7)(groups[1])
    assert rows == slice(3, 5)
    for k, group in enumerate(everyone):
        assert torch.equal(group, torch.cat([g[k] for g in groups]))
    assert gathering(Processes(), 7) is None


def test_gradient_flows_to_images_and_moves_them_to_the_target():
    network = BigGANDiscriminator(32, num_classes=2, channels=[8, 12, 12, 16], attention=())
    kernel = loss(network)
    x = (images(count=6) / 3).requires_grad_()
    optimizer = torch.optim.Adam([x], 0.05)
    start = float(kernel(x.detach()))
    for _ in range(15):
        optimizer.zero_grad()
        kernel(x).backward()
        assert x.grad.flatten(1).any(1).all()
        optimizer.step()
    assert float(kernel(x.detach())) < 0.5 * start


def test_kernels_reach_a_source_that_is_far_away():
    near = TARGET[:6].flip(3).float() / 127.5 - 1
    far = 1 - 0.01 * images(count=6).abs()  # white paper, nearly
    plain, close, reaching = loss(), loss(source=[near[:3], near[3:]]), loss(source=[far[:3], far[3:]])
    assert close.bandwidths == plain.bandwidths
    wide = [g for g, bandwidths in enumerate(reaching.bandwidths) if len(bandwidths) == 4]
    assert wide
    features = [plain.features(x) for x in (far, TARGET.float() / 127.5 - 1)]
    for g in wide:
        distance = float(torch.cdist(features[0][g], features[1][g]).median())
        assert reaching.bandwidths[g] == [*plain.bandwidths[g], pytest.approx(distance, rel=1e-4)]
        assert distance > kernel_loss.REACH * max(plain.bandwidths[g])
    slopes = []
    for kernel in (plain, reaching):
        x = far.clone().requires_grad_()
        kernel.distances(x)[wide].sum().backward()
        slopes.append((x.grad * (x.detach() - TARGET[:6].float().mean() / 127.5 + 1)).sum())
    assert slopes[1] > 2 * slopes[0].abs()  # towards the target


def test_target_and_generated_images_are_changed_alike(monkeypatch):
    settings = {"views": 3, "augment": "translation:0.5", "flips": True}
    kernel = loss(**settings)
    assert kernel.target.count == 9 * 2 * 3
    assert torch.equal(kernel.target.y, loss(**settings).target.y)
    assert not torch.equal(kernel.target.y, loss(**settings, seed=1).target.y)
    seen = []
    monkeypatch.setattr(kernel, "features", type("Seen", (), {
        "resized": kernel.features.resized, "__call__": lambda self, x, _: seen.append(x)})())  # fmt: skip
    x = torch.rand(8, 3, 32, 32)
    kernel._features(x)
    assert seen[0].shape == (8, 3, 96, 96), "changed after they were enlarged"
    assert not torch.equal(seen[0], kernel.features.resized(x))


def spots(count, columns, seed):
    """Grey images with a bright spot of 6 x 6 at any row, and at any of `columns`."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.randint(100, 140, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    for image in result:
        row = int(torch.randint(26, (), generator=generator))
        column = int(columns[torch.randint(len(columns), (), generator=generator)])
        image[:, row : row + 6, column : column + 6] = 250
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [10, 40])
def test_mirror_images_count_where_they_look_alike(count, seed):
    """A rule of few images that depended on their number would say of 10 what it does not say of 40."""
    anywhere, left = spots(count, range(27), seed), spots(count, range(6), seed)
    assert loss(target=anywhere).target.count == 2 * count
    assert loss(target=left).target.count == count
    assert loss(target=left, flips=True).target.count == 2 * count
    assert loss(target=anywhere, flips=False).target.count == count


def test_of_very_many_images_the_first_say_whether_mirror_images_look_alike(monkeypatch):
    monkeypatch.setattr(kernel_loss, "MOST", 20)
    both = torch.cat([spots(20, range(6), 0), spots(80, range(27), 1)])
    assert not loss(target=both).flips
    assert loss(target=both.flip(0)).flips


def test_wrong_targets_are_named():
    with pytest.raises(ValueError, match="at least 2 target images, got 1"):
        loss(target=TARGET[:1])
    with pytest.raises(ValueError, match="all 3 target images are equal: give different images"):
        loss(target=TARGET[:1].expand(3, -1, -1, -1))
    half = torch.cat([TARGET[:1].expand(8, -1, -1, -1), TARGET[:1].flip(2)])
    with pytest.raises(
        ValueError, match="half of the pairs of samples coincide; in the features 'pixels 8x8' of Shared: give"
    ):
        loss(target=half)
    with pytest.raises(ValueError, match=r"target images must be uint8 \[N, C, R, R\], got torch.float32"):
        KernelLoss(LossFeatures(Shared(), TARGET), images())
    for views, augment in ((2, ""), (0, "color"), (-1, "color")):
        with pytest.raises(ValueError, match="views is at least 1, and more need augment"):
            loss(views=views, augment=augment)
    for settings in ({"scales": ()}, {"scales": (0.0,)}, {"batch": 0}):
        with pytest.raises(ValueError, match="scales must be > 0 and batch at least 1"):
            loss(**settings)


def test_wrong_batches_are_named():
    kernel, G, z = loss(), generator(), torch.randn(4, 8)
    one = "the unbiased kernel distance needs a batch of at least 2: set batch=2 or more"
    with pytest.raises(ValueError, match=one):
        kernel(images(count=1))
    with pytest.raises(ValueError, match=one):
        kernel.backward(lambda a, b: G(z[a:b]), 1)
    assert loss(unbiased=False)(images(count=1)).isfinite()
    with pytest.raises(ValueError, match="part must be at least 1 sample, or None for all, got 0"):
        kernel.backward(lambda a, b: G(z[a:b]), 4, 0)
    given = iter(range(10))
    with pytest.raises(ValueError, match="the second time other images were made for the same samples"):
        kernel.backward(lambda a, b: G(z[a:b] + next(given)), 4, 2)
    with pytest.raises(ValueError, match=r"features 'pixels 8x8' of Shared hold NaN or inf \(the images hold NaN"):
        kernel(images() * float("nan"))
