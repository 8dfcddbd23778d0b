"""Class-conditional StyleGAN2-ADA: networks and NVIDIA's files against their equations in float64."""

import copy
import math

import pytest
import torch
from models.test_nvidia_files import CHANNELS, equations, of_ada, of_tf
from nvidia_files import ada_of, critic_of, network_tree, tf_of, write_tf_pickle, write_torch_pickle
from safetensors.torch import save_file

import minegan_fast as mf
from minegan_fast.mining import own_latents
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator, export_nvidia, export_rosinality
from minegan_fast.training.critics import without_labels

LABELS = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(3)
    g = StyleGAN2Generator(
        16, 9, mapping_layers=2, style_dim=11, channels=CHANNELS, latent_avg=True, num_classes=5, class_dim=7
    ).double()
    with torch.no_grad():
        g.latent_avg.copy_(torch.randn(11))
        for p in g.parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.3)
    return g.eval()


def critic(**sizes):
    torch.manual_seed(4)
    d = StyleGAN2Discriminator(16, channels=CHANNELS, num_classes=5, **sizes).double()
    with torch.no_grad():
        for p in d.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return d.eval()


def score(d, images, label):
    """The logits by the equations, from the activations before the last layer."""
    p = d.state_dict()
    o = d.features(images) @ p["final_linear.1.weight"].T / math.sqrt(CHANNELS[4]) + p["final_linear.1.bias"]
    m = p["embed.weight"][:, label] / math.sqrt(5) + p["embed.bias"]
    m = m / (m.square().mean() + 1e-8).sqrt()
    for i in range(1, 1 + d.config["mapping_layers"]):
        y = p[f"class_mapping.{i}.weight"] @ m * (0.01 / math.sqrt(len(m))) + 0.01 * p[f"class_mapping.{i}.bias"]
        m = torch.where(y > 0, y, 0.2 * y) * math.sqrt(2)
    return o @ m / math.sqrt(len(m))


def write(kind, path, g, d):
    averaged, judge = g.state_dict(), critic_of(d.state_dict(), 16, kind == "tf")
    if kind == "torch":
        write_torch_pickle(path, G_ema=ada_of(averaged) | {"mapping.w_avg": g.latent_avg}, D=judge)
    elif kind == "tf":
        own = network_tree(tf_of(averaged) | {"dlatent_avg": g.latent_avg})
        write_tf_pickle(path, own, network_tree(judge, ()), own)
    else:
        state = {f"G_ema.{k}": t.clone() for k, t in (ada_of(averaged) | {"mapping.w_avg": g.latent_avg}).items()}
        save_file(state | {f"D.{k}": t.clone() for k, t in judge.items()}, path)


@pytest.mark.parametrize("kind", ["torch", "tf", "flat"])
def test_files_give_the_images_of_the_equations(tmp_path, generator, kind):
    path = tmp_path / ("x.safetensors" if kind == "flat" else "x.pkl")
    d = critic(mapping_layers=0)
    write(kind, path, generator, d)
    g, judge = mf.load_generator(path), mf.load_discriminator(path)
    assert (g.config, judge.config) == (generator.config, d.config)
    state = generator.state_dict()
    p = of_tf(tf_of(state), 2) if kind == "tf" else of_ada(ada_of(state), 2)
    z = torch.randn(3, 9, dtype=torch.float64)
    with torch.no_grad():
        images = g(z, LABELS, noise="constant")
        torch.testing.assert_close(images, equations(p, z, 2, 16, labels=LABELS), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(g(z, g.class_embeddings()[LABELS], noise="constant"), images, rtol=1e-7, atol=1e-7)
        other = g(z, LABELS.roll(1), noise="constant")
        assert (other - images).abs().mean() > 0.01
        expected = torch.stack([score(d, images, label)[i] for i, label in enumerate(LABELS)])
        torch.testing.assert_close(judge(images, LABELS), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", [{}, {"class_dim": 3, "projection": 8, "mapping_layers": 2}])
def test_files_of_the_critic(tmp_path, generator, sizes):
    d = critic(**sizes)
    write("torch", tmp_path / "x.pkl", generator, d)
    judge, images = mf.load_discriminator(tmp_path / "x.pkl"), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert judge.config == d.config
    with torch.no_grad():
        each = torch.stack([score(d, images, label) for label in range(5)])
        torch.testing.assert_close(judge(images, torch.tensor([1, 1, 1, 1])), each[1], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(judge(images), each.mean(0), rtol=1e-9, atol=1e-10)
        for labels, mined in (([0, 3], "0,3"), (range(5), None)):
            single = without_labels(judge, mined)
            torch.testing.assert_close(single(images), each[[*labels]].mean(0), rtol=1e-9, atol=1e-10)
            assert StyleGAN2Discriminator(**single.config).state_dict().keys() == single.state_dict().keys()
    assert judge.num_classes == 5
    with pytest.raises(ValueError, match=r"mined_class is 5, but the critic's labels are 0 to 4"):
        without_labels(judge, "5")


def test_our_own_file_and_truncation(tmp_path, generator):
    mf.save_model(tmp_path / "x.safetensors", generator, d := critic())
    g, judge = mf.load_generator(tmp_path / "x.safetensors"), mf.load_discriminator(tmp_path / "x.safetensors")
    z = torch.randn(3, 9, dtype=torch.float64)
    with torch.no_grad():
        w = g.mapping(z, LABELS)
        images = generator(z, LABELS, noise="constant", truncation=0.5)
        assert torch.equal(g(z, LABELS, noise="constant", truncation=0.5), images)
        centred = generator.latent_avg + 0.5 * (w - generator.latent_avg)
        torch.testing.assert_close(g(centred, latents=True, noise="constant"), images)
        assert torch.equal(judge(images, LABELS), d(images, LABELS))
        mixed = g((z, z.flip(0)), LABELS, crossover=2, noise="constant", return_latents=True)[1]
        assert torch.equal(mixed[:, 2], g.mapping(z.flip(0), LABELS))


def test_means_of_w_are_over_the_labels(generator):
    z = torch.randn(4096, 9, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        each = torch.stack([generator.mapping(z, torch.full((4096,), label)).mean(0) for label in range(5)])
        torch.testing.assert_close(generator.mean_latent(20000)[0], each.mean(0), rtol=0, atol=0.06)
        one = own_latents(generator, "w", labels=[2])
        torch.testing.assert_close(one.mean, each[2], rtol=0, atol=0.06)
        assert (own_latents(generator, "w").mean - each[2]).abs().max() > 0.2


def test_what_does_not_fit_is_named(tmp_path, generator):
    z = torch.randn(3, 9, dtype=torch.float64)
    for call, message in (
        (lambda: generator(z), "the network is conditional: give y"),
        (lambda: generator(z, torch.tensor([0, 1, 5])), r"labels must lie in 0\.\.4"),
        (lambda: generator(z, torch.randn(3, 5)), r"class embeddings must have shape \[B, 7\]"),
        (lambda: generator(z, LABELS[:2]), "z and y must be of one batch"),
        (lambda: StyleGAN2Generator(8, 4, channel_max=4)(torch.randn(3, 4), LABELS), "has no classes"),
        (lambda: StyleGAN2Discriminator(8, channel_max=4)(torch.randn(3, 3, 8, 8), LABELS), "has no classes"),
        (lambda: StyleGAN2Discriminator(8, num_classes=3, class_dim=2, mapping_layers=0), "no conditional discrim"),
        (lambda: export_rosinality(tmp_path / "x", generator), "classes, and it has none"),
        (lambda: export_nvidia(tmp_path / "x", generator, critic()), "no networks with classes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_from_before_ada_are_named(tmp_path, generator):
    tensors = tf_of(generator.state_dict())
    tensors["mapping/LabelConcat/weight"] = tensors.pop("mapping/LabelEmbed/weight")
    tree = network_tree(tensors)
    d = critic_of(critic(mapping_layers=0).state_dict(), 16, True)
    before = {k: t for k, t in d.items() if not k.startswith("LabelEmbed")}
    write_tf_pickle(tmp_path / "x.pkl", tree, network_tree(before, ()), tree)
    for load in (mf.load_generator, mf.load_discriminator):
        with pytest.raises(ValueError, match="a class-conditional StyleGAN2 from before ADA"):
            load(tmp_path / "x.pkl")
    write("tf", tmp_path / "y.pkl", generator, critic())
    with pytest.raises(ValueError, match="mapping_lrmul"):
        mf.load_discriminator(tmp_path / "y.pkl")


def test_the_embedding_trains_by_rows(generator):
    g = copy.deepcopy(generator).requires_grad_(True)
    z = torch.randn(3, 9, dtype=torch.float64)

    def gradients():
        g.zero_grad()
        g(z, LABELS, noise="constant").square().mean().backward()

    gradients()
    dense = g.embed.weight.grad.clone()
    assert dense.any()
    ft = mf.SparseFinetuner(g, criterion="random", density=0.3)
    ft.select({"embed.weight": [1, 4]})
    gradients()
    leaf = g.embed.weight.link.leaf
    torch.testing.assert_close(leaf.grad, dense[[1, 4]], rtol=1e-10, atol=1e-14)
