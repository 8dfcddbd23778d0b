"""Banks of miners, 512 wide and with 16 samples as the paper has them: forward, and forward with backward.

Competitors: a loop over `nn.Sequential`, torch.func.vmap over stacked modules, and `torch.baddbmm` layer by layer with
weights that are stored transposed. Floors: a copy of the least bytes, those of the weights and, with the backward, of
the weights again and of their gradients; and products of matrices with as many operations.
"""

import copy

import pytest
import torch
from clock import Provider
from measure import OURS, Case, clone_of
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from minegan_fast.ops import Chain, miner

CASES = [  # N, B, width, layers
    (1, 16, 512, 2),
    (1, 32, 512, 2),
    (1, 128, 512, 2),
    (8, 16, 512, 2),
    (8, 16, 512, 4),
    (64, 16, 128, 2),
    (64, 16, 512, 2),
]
LARGEST = {"test_miner": "64x16x512x2"}


def networks(N, width, layers, device) -> list[nn.Sequential]:
    torch.manual_seed(0)
    found = []
    for _ in range(N):
        parts = [part for _ in range(layers) for part in (nn.ReLU(), nn.Linear(width, width, device=device))]
        found.append(nn.Sequential(*parts[1:]))
    return found


def stacked(nets) -> list[torch.Tensor]:
    """Weight and bias of each layer in turn, [N, out, in] and [N, out]."""
    rows = [[p.detach() for p in net.parameters()] for net in nets]
    return [torch.stack(column).requires_grad_() for column in zip(*rows, strict=True)]


# Each way: z of all miners, what has a gradient, and of those gradients the parts that are the first miner's.


def ours(nets, u):
    leaves = stacked(nets)
    return lambda: miner([Chain(u, leaves[::2], leaves[1::2])])[0], leaves, lambda grads: [g[0] for g in grads]


def one(nets, u):
    """Of a single miner, as `Miner` has it."""
    leaves = [p.detach()[0].requires_grad_() for p in stacked(nets)]
    return lambda: miner([Chain(u, leaves[::2], leaves[1::2])])[0], leaves, list


def loop(nets, u):
    leaves = [p for net in nets for p in net.parameters()]
    count = len(leaves) // len(nets)
    return lambda: [net(u) for net in nets], leaves, lambda grads: grads[:count]


def vmapped(nets, u):
    parameters, _ = stack_module_state(nets)
    shape = copy.deepcopy(nets[0]).to("meta")
    run = vmap(lambda p: functional_call(shape, p, (u,)))
    return lambda: run(parameters), [*parameters.values()], lambda grads: [g[0] for g in grads]


def batched(nets, u):
    leaves = [p.detach() for p in stacked(nets)]
    leaves = [(p.mT.contiguous() if p.ndim == 3 else p[:, None]).requires_grad_() for p in leaves]

    def call():
        x = u.expand(len(nets), *u.shape)
        for l in range(0, len(leaves), 2):
            x = torch.baddbmm(leaves[l + 1], x.relu() if l else x, leaves[l])
        return x

    return call, leaves, lambda grads: [g[0, 0] if i % 2 else g[0].mT for i, g in enumerate(grads)]


@pytest.mark.parametrize("step", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_miner(compare, device, pytestconfig, case, step):
    if pytestconfig.getoption("--quick") and case is not CASES[0]:
        pytest.skip("not of --quick")
    N, B, width, layers = case
    training = step == "forward + backward"
    nets = networks(N, width, layers, device)
    u, gz = (torch.randn(*size, device=device) for size in ((B, width), (N, B, width)))

    def make(way, nets=nets, u=u, gz=gz):
        function, leaves, first = way(nets, u)

        def call():
            if not training:
                with torch.no_grad():
                    return (part(function()),)
            z = function()
            given = [*gz] if isinstance(z, list) else gz if z.ndim == 3 else gz[0]
            return part(z).detach(), *first(torch.autograd.grad(z, leaves, given))

        def part(z):
            return z[0] if isinstance(z, list) or z.ndim == 3 else z

        return lambda: call

    expected = make(loop, [copy.deepcopy(net).double() for net in nets], u.double(), gz.double())()()
    weights = 4 * N * layers * (width * width + width)
    product = 2 * N * B * width * width  # of a layer: forward, by the weight and, but for the first layer, by its input
    count = layers + (2 * layers - 1) * training
    x, w = torch.randn(N * B, width, device=device), torch.randn(width, width, device=device)
    providers = [
        Provider(OURS, make(one if N == 1 else ours)),
        Provider("nn.Sequential in a loop", make(loop)),
        Provider("vmap", make(vmapped)),
        Provider("baddbmm", make(batched)),
        Provider("products", lambda: lambda: [x @ w for _ in range(count)], floor=True),
        clone_of(weights * (3 if training else 1), device),
    ]
    case = Case(
        "miner", step, case, torch.float32, bytes=weights * (3 if training else 1), expected=expected,
        flops=count * product, yardstick="nn.Sequential in a loop", rounding=1e-6,
    )  # fmt: skip
    compare(case, providers)
