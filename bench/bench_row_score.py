"""row_score over all gradients of a network, which is memory-bound; and what it is for: scoring a generator's neurons.

The second compares with the usual protocol (AdAM, Zhao et al. 2022): one image at a time, every gradient to the host,
squared and summed there.
"""

import functools

import torch
from clock import Provider
from measure import OURS, Case, clone_of
from torch.nn import functional as F

from minegan_fast import SparseFinetuner
from minegan_fast.finetune.neurons import find_layers
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator
from minegan_fast.ops import row_score

# resolution and widths of StyleGAN2: a small one, whose calls are overhead, and config-f at 256 pixels
NETWORKS = {
    "StyleGAN2-32": {"resolution": 32, "latent_dim": 64, "channel_base": 1024, "channel_max": 64, "mapping_layers": 2},
    "StyleGAN2-256": {"resolution": 256},
}
LARGEST = {"test_row_score": "StyleGAN2-256"}
SCORED = {"cpu": {"StyleGAN2-32": (16, 8)}, "cuda": {"StyleGAN2-32": (64, 32), "StyleGAN2-256": (64, 16)}}


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    for argument, names in (("network", NETWORKS), ("scored", NETWORKS)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, list(names)[: 1 if quick else None])


def gradients(network: str, device: str) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Random gradients of all parameters, their row axes, and where each one's rows begin."""
    with torch.device("meta"):
        layers = find_layers(StyleGAN2Generator(**NETWORKS[network]))
    grads, axes, starts, end = [], [], [], 0
    for layer in layers:
        for member in layer.members:
            grads.append(torch.randn(member.parameter.shape, device=device))
            axes.append(member.axis)
            starts.append(end)
            end += layer.neurons
    return grads, axes, [*starts, end]


def test_row_score(compare, device, network):
    grads, axes, starts = gradients(network, device)
    *starts, rows = starts
    totals = torch.zeros(rows, dtype=torch.float64, device=device)
    others = [[d for d in range(g.dim()) if d != axis] for g, axis in zip(grads, axes, strict=True)]

    def add_up(squares):
        sums = [s.sum(dims) if dims else s for s, dims in zip(squares, others, strict=True)]
        return (totals + torch.cat([s.reshape(-1) for s in sums]),)

    def ours():
        return (row_score(totals, grads, starts, axes=axes),)

    expected = add_up([g.double().square() for g in grads])
    size = sum(g.nbytes for g in grads)
    case = Case("row_score", "reduction", (len(grads), sum(g.numel() for g in grads)), torch.float32, size, expected)
    providers = [Provider(OURS, lambda: ours, backend) for backend in ("cuda", "triton", "cpp", "reference")]
    providers.append(Provider("eager", lambda: lambda: add_up([g.square() for g in grads])))
    providers.append(Provider("foreach", lambda: lambda: add_up(torch._foreach_mul(grads, grads))))
    compare(case, [*providers, clone_of(size, device)])


@functools.lru_cache(maxsize=2)
def pair(network: str, device: str, dtype: torch.dtype):
    """A generator and the critic whose opinion is the loss; in that no sample sees its batch."""
    torch.manual_seed(0)
    sizes = NETWORKS[network]
    generator = StyleGAN2Generator(**sizes)
    kept = {name: sizes[name] for name in ("resolution", "channel_base", "channel_max") if name in sizes}
    critic = StyleGAN2Discriminator(**kept).requires_grad_(False)
    return generator.to(device, dtype), critic.to(device, dtype)


def test_scoring(compare, device, scored):
    if scored not in SCORED[device]:
        return
    images, batch = SCORED[device][scored]
    latents = torch.randn(images, NETWORKS[scored].get("latent_dim", 512), device=device)

    def loss(generator, critic, z):
        features = critic.features(generator(z, noise="constant"), group=1)
        return F.softplus(-critic.final_linear[1](features)).mean()

    def by_scoring(networks, size, **options):
        generator, critic = networks
        z = latents.to(generator.input.input.dtype)
        finetuner = SparseFinetuner(generator)
        with finetuner.scoring(**options):
            for part in z.split(size):
                loss(generator, critic, part).backward()
        scores = finetuner.scores()
        return (torch.cat([scores[layer.name] for layer in finetuner.layers]).sqrt(),)

    def by_images():
        generator, critic = pair(scored, device, torch.float32)
        layers = find_layers(generator)
        totals = {layer.name: torch.zeros(layer.neurons) for layer in layers}
        for z in latents.split(1):
            loss(generator, critic, z).backward()
            for layer in layers:
                for m in layer.members:
                    if m.parameter.grad is not None:
                        dims = [d for d in range(m.parameter.dim()) if d != m.axis]
                        square = m.parameter.grad.detach().cpu().square()
                        totals[layer.name] += (square.sum(dims) if dims else square) / images
            generator.zero_grad()
        return (torch.cat(list(totals.values())).sqrt(),)

    def one_backward():
        generator, critic = pair(scored, device, torch.float32)
        loss(generator, critic, latents[:batch]).backward()
        generator.zero_grad()
        return ()

    expected = by_scoring(pair(scored, device, torch.float64), 1, samples=1)
    generator, critic = pair(scored, device, torch.float32)
    size = images * sum(p.nbytes for p in generator.parameters())
    case = Case(
        "row_score", f"scoring by {batch}", (images, NETWORKS[scored]["resolution"]), torch.float32, size, expected,
        yardstick="one image a pass, to the host",
        # in float32 the sign in front of a leaky ReLU may round the other way, which changes a gradient by so much
        rounding=1e-3,
    )  # fmt: skip
    both = generator, critic
    providers = [
        Provider(OURS, lambda: lambda: by_scoring(both, batch), backend) for backend in ("triton", "cpp", "reference")
    ]
    providers += [
        Provider("one image a pass, on the device", lambda: lambda: by_scoring(both, 1, samples=1)),
        Provider("one image a pass, to the host", lambda: by_images),
        Provider("one backward of a batch", lambda: one_backward, floor=True),
    ]
    compare(case, providers)
