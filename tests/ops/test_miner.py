"""Chains of miners against PyTorch's own operations in float64: values, three orders, what each of them leaves out."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.mining import project
from minegan_fast.models import StyleGAN2Generator, StyleGANGenerator
from minegan_fast.ops import Chain, Mapping, miner, use_backend
from minegan_fast.ops.miner import miner_backward, miner_forward, miner_second_order, plain

# N (None: a single miner), B, sizes, activation, skip, sphere, sizes of the mapping network, a u for each miner
SHAPES = {
    "one layer": (None, 1, (4, 3), "relu", None, False, (), False),
    "identity": (3, 5, (4, 6, 4), "relu", "identity", False, (), False),
    "affine": (2, 17, (5, 35, 7, 3), "lrelu", "affine", True, (), True),
    "tanh": (2, 3, (3, 7, 6, 3), "tanh", "identity", True, (), False),
    "mapping": (2, 4, (4, 6, 5), "tanh", None, False, (3, 6), True),
    "sphere and mapping": (1, 2, (4, 5, 4), "lrelu", "affine", True, (7,), False),
    "linear": (None, 33, (3, 18, 2), "linear", None, False, (), False),
    "eight layers": (2, 2, (3, 2, 3, 2, 3, 2, 3, 2, 3), "relu", "identity", False, (), False),
}
PAIR = ("identity", "affine", "one layer", "mapping")  # chains that differ in all, in one call


def make(name, dtype=torch.float64, device="cpu") -> Chain:
    N, B, sizes, activation, skip, sphere, mapped, own = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))

    def draw(*size, scale=1.0):
        return scale * torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    lead = () if N is None else (N,)
    u = draw(*(lead if own else ()), B, sizes[0])
    pairs = itertools.pairwise(sizes)
    weights, biases = zip(*((draw(*lead, o, i, scale=i**-0.5), draw(*lead, o)) for i, o in pairs), strict=True)
    if skip == "affine":
        skip = draw(*lead, sizes[-1], sizes[0]), draw(*lead, sizes[-1])
    mapping = None
    if mapped:
        pairs = itertools.pairwise((sizes[-1], *mapped))
        layers = [(draw(o, i), draw(o), (0.3, 0.7, 1.4)) for i, o in pairs]
        mapping = Mapping(*zip(*layers, strict=True))
    return Chain(u, weights, biases, activation, skip, sphere, mapping)


def leaves_of(chain: Chain) -> list[torch.Tensor]:
    """What has a gradient: u, weights and biases in turn, A and a."""
    around = chain.skip if isinstance(chain.skip, tuple) else ()
    return [chain.u, *itertools.chain.from_iterable(zip(chain.weights, chain.biases, strict=True)), *around]


def with_leaves(chain: Chain, leaves) -> Chain:
    u, *rest = leaves
    depth = len(chain.weights)
    skip = tuple(rest[2 * depth :]) if isinstance(chain.skip, tuple) else chain.skip
    return chain._replace(u=u, weights=rest[: 2 * depth : 2], biases=rest[1 : 2 * depth : 2], skip=skip)


def formula(chain: Chain) -> torch.Tensor:
    """The equations, miner by miner."""
    single = chain.weights[0].ndim == 2
    act = {"relu": F.relu, "lrelu": lambda a: F.leaky_relu(a, 0.2), "tanh": torch.tanh, "linear": lambda a: a}
    found = []
    for n in range(1 if single else len(chain.weights[0])):
        u = chain.u if chain.u.ndim == 2 else chain.u[n]
        h = u
        for l, (W, b) in enumerate(zip(chain.weights, chain.biases, strict=True)):
            W, b = (W, b) if single else (W[n], b[n])
            h = F.linear(act[chain.activation](h) if l else h, W, b)
        if chain.skip == "identity":
            h = h + u
        elif chain.skip:
            h = h + F.linear(u, *(chain.skip if single else (chain.skip[0][n], chain.skip[1][n])))
        for _ in range(chain.sphere + (chain.mapping is not None)):
            h = project(h, "sphere")
        for M, m, (c, d, gain) in zip(*(chain.mapping or ((), (), ())), strict=True):
            h = gain * F.leaky_relu(F.linear(h, c * M, d * m), 0.2)
        found.append(h)
    return found[0] if single else torch.stack(found)


def three_orders(function, chains, third=True):
    """Values; first gradients with and without a graph; second ones by all, gz too; third ones of a sum of squares."""
    groups = [[t.detach().requires_grad_() for t in leaves_of(chain)] for chain in chains]
    leaves = [t for group in groups for t in group]
    zs = function([with_leaves(chain, group) for chain, group in zip(chains, groups, strict=True)])
    draws = torch.Generator().manual_seed(1)

    def like(ts):
        return [torch.randn(t.shape, generator=draws, dtype=torch.float64).to(t).requires_grad_() for t in ts]

    gzs = like(zs)
    without = grad(zs, leaves, gzs, retain_graph=True)
    first = grad(zs, leaves, gzs, create_graph=True)
    cotangents = like(first)
    inputs = [*leaves, *gzs]
    second = grad(first, inputs, cotangents, retain_graph=True, allow_unused=True)
    found = [*zs, *without, *first, *second]
    if third:
        again = grad(first, inputs, cotangents, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in again if g is not None)
        found += [*again, *grad(total, inputs, allow_unused=True)]
    return found


def assert_equal(ours, theirs, bound):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:  # a gradient that is zero
            other = b if a is None else a
            assert other is None or not other.any(), i
            continue
        assert a.shape == b.shape
        assert (a - b).abs().max() <= bound * b.abs().max().clamp_min(1e-3), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [*((name,) for name in SHAPES), PAIR], ids=" and ".join)
def test_equals_the_equations(backend, device, names, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("takes float32")
    ours = three_orders(miner, [make(name, dtype, device) for name in names], third=dtype == torch.float64)
    plainly = lambda chains: [formula(chain) for chain in chains]  # noqa: E731
    chains = [make(name, torch.float64, device) for name in names]
    theirs = three_orders(plainly, chains, third=dtype == torch.float64)
    assert all(z.dtype == dtype for z in ours[: len(names)])
    assert_equal(ours, theirs, 1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("name", ["identity", "affine", "tanh", "mapping"])
def test_gradients_of_two_orders(name):
    chain = make(name)
    chain = chain._replace(u=chain.u[..., :2, :])
    leaves = [t.requires_grad_() for t in leaves_of(chain)]
    function = lambda *leaves: miner([with_leaves(chain, leaves)])[0]  # noqa: E731
    for backend in ("reference", None):
        with use_backend(backend):
            assert gradcheck(function, leaves)
            assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", ["affine", "tanh", "sphere and mapping"])
def test_some_leaves_alone_get_the_gradients_that_all_of_them_get(backend, device, name):
    chain = make(name, torch.float32, device)
    count = len(leaves_of(chain))
    everything = three_orders(miner, [chain], third=False)
    gradients = everything[1 : 1 + count]
    for wanted in ([i] for i in range(count)):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves_of(chain))]
        (z,) = miner([with_leaves(chain, leaves)])
        gz = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(z)
        gz.requires_grad_()
        (one,) = grad(z, [leaves[i] for i in wanted], gz, create_graph=True)
        assert torch.equal(one, gradients[wanted[0]])
        (second,) = grad(one, gz, torch.ones_like(one))
        doubles = [t.detach().double().requires_grad_(i in wanted) for i, t in enumerate(leaves_of(chain))]
        mapping = chain.mapping
        if mapping:
            mapping = Mapping(
                [w.double() for w in mapping.weights], [b.double() for b in mapping.biases], mapping.scales
            )
        expected = formula(with_leaves(chain, doubles)._replace(mapping=mapping))
        g = gz.detach().double().requires_grad_()
        (one,) = grad(expected, [doubles[i] for i in wanted], g, create_graph=True)
        assert_equal([second], grad(one, g, torch.ones_like(one)), 2e-5)


def test_a_chain_whose_z_is_not_used_gets_no_gradient(backend, device):
    chains = [make(name, torch.float32, device) for name in ("identity", "one layer")]
    leaves = [[t.requires_grad_() for t in leaves_of(chain)] for chain in chains]
    zs = miner([with_leaves(chain, group) for chain, group in zip(chains, leaves, strict=True)])
    first = grad(zs[1].sum(), [*leaves[0], *leaves[1]], allow_unused=True)
    assert [g is None for g in first] == [True] * len(leaves[0]) + [False] * len(leaves[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["identity", "affine", "sphere and mapping"])
def test_half_precision_is_as_exact_as_plain_pytorch(name, dtype):
    chain = make(name, dtype)
    wide = [t.double() for t in leaves_of(chain)]
    mapping = chain.mapping
    if mapping:
        mapping = Mapping([w.double() for w in mapping.weights], [b.double() for b in mapping.biases], mapping.scales)
    exact = formula(with_leaves(chain, wide)._replace(mapping=mapping))
    errors = [(z.double() - exact).abs().max() for z in (miner([chain])[0], formula(chain))]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.abs().max()


def test_other_strides(backend, device):
    chain = make("affine", torch.float32, device)
    leaves = leaves_of(chain)
    turned = [t.mT.contiguous().mT if t.ndim > 1 else t for t in leaves]
    spread = [torch.stack([t, -t], -1)[..., 0] for t in leaves]
    expected = three_orders(miner, [chain], third=False)
    for others in (turned, spread):
        groups = three_orders_of(others, chain)
        for a, b in zip(groups, expected[: len(groups)], strict=True):
            assert torch.equal(a, b)


def three_orders_of(leaves, chain):
    leaves = [t.requires_grad_() for t in leaves]
    (z,) = miner([with_leaves(chain, leaves)])
    gz = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(z)
    return [z, *grad(z, leaves, gz.mT.contiguous().mT)]


@pytest.mark.parametrize("family", [StyleGANGenerator, StyleGAN2Generator])
def test_the_mapping_network_is_that_of_the_generator(backend, device, family):
    G = family(8, latent_dim=6, style_dim=5, mapping_layers=3, channel_base=64, channel_max=8).to(device)
    with torch.no_grad():
        for parameter in G.style.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    layers = [m for m in G.style if hasattr(m, "scale")]
    if family is StyleGANGenerator:
        parameters = [(m.linear.weight_orig, m.linear.bias, (m.scale, 1.0, 1.0)) for m in layers]
    else:
        parameters = [(m.weight, m.bias, (m.scale, m.lr_mul, 2**0.5)) for m in layers]
    chain = make("identity", torch.float32, device)
    weights = [torch.randn(3, 6, 6, device=device) / 3 for _ in range(2)]
    biases = [torch.randn(3, 6, device=device) for _ in range(2)]
    u = torch.randn(4, 6, device=device)
    chain = Chain(u, weights, biases, "relu", "identity", mapping=Mapping(*zip(*parameters, strict=True)))
    leaves = [t.requires_grad_() for t in leaves_of(chain)]
    (w,) = miner([with_leaves(chain, leaves)])
    expected = torch.stack([G.mapping(z) for z in formula(with_leaves(chain._replace(mapping=None), leaves))])
    torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-5)
    gw = torch.randn_like(w)
    for a, b in zip(grad(w, leaves, gw), grad(expected, leaves, gw), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in G.parameters())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads_and_in_every_run(threads):
    torch.set_num_threads(threads)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            W = [torch.randn(3, 100, 100).div_(10).requires_grad_() for _ in range(2)]
            b = [torch.randn(3, 100, requires_grad=True) for _ in range(2)]
            (z,) = miner([Chain(torch.randn(20, 100), W, b, "tanh", "identity", True)])
            runs.append([z, *grad(z, [*W, *b], torch.randn_like(z))])
        torch.set_num_threads(1)
        torch.manual_seed(0)
        W = [torch.randn(3, 100, 100).div_(10).requires_grad_() for _ in range(2)]
        b = [torch.randn(3, 100, requires_grad=True) for _ in range(2)]
        (z,) = miner([Chain(torch.randn(20, 100), W, b, "tanh", "identity", True)])
        runs.append([z, *grad(z, [*W, *b], torch.randn_like(z))])
    finally:
        torch.set_num_threads(1)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


def test_every_instruction_set(tmp_path):
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    best = native.cpu_isa()
    try:
        for isa in range(best + 1):
            native.set_cpu_isa(isa)
            for name in ("affine", "tanh", "linear"):
                theirs = three_orders(lambda chains: [formula(chain) for chain in chains], [make(name)], third=False)
                for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
                    assert_equal(three_orders(miner, [make(name, dtype)], third=False), theirs, bound)
    finally:
        native.set_cpu_isa(best)


@pytest.mark.parametrize(("N", "B", "width"), [(1, 64, 150), (2, 48, 64), (3, 32, 130), (1, 130, 97)])
def test_blocks_of_every_width(N, B, width):
    pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    W = [torch.randn(N, width, width, requires_grad=True) for _ in range(2)]
    b = [torch.randn(N, width, requires_grad=True) for _ in range(2)]
    u = torch.randn(B, width, requires_grad=True)
    gz = torch.randn(N, B, width)
    found = []
    for backend, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (u, *W, *b)]
        with use_backend(backend):
            (z,) = miner([Chain(leaves[0], leaves[1:3], leaves[3:], "relu", "identity")])
            found.append([z, *grad(z, leaves, gz.to(dtype))])
    assert_equal(*found, 2e-5)


def test_nan_stays_nan(backend, device):
    chain = make("identity", torch.float32, device)
    chain.u[1, 2] = float("nan")
    (z,) = miner([chain])
    assert z[:, 1].isnan().all()
    assert not z[:, 0].isnan().any()


def test_compiles_in_one_graph(backend, device):
    torch.compiler.reset()
    chain = make("affine", torch.float32, device)
    results = []
    for function in (torch.compile(miner, fullgraph=True, backend="aot_eager"), miner):
        leaves = [t.detach().requires_grad_() for t in leaves_of(chain)]
        (z,) = function([with_leaves(chain, leaves)])
        results.append([z, *grad(z.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(backend, device):
    chain = make("tanh", torch.float32, device)
    tensors = [t.contiguous() for t in leaves_of(chain)]
    kinds, scales = [3, 3, 1, 1, 0], []
    z, kept = miner_forward(tensors[0], tensors, kinds, scales, True)
    wanted = [True] * len(tensors)
    args = (tensors[0], tensors, [z], [kept], kinds, scales, wanted, [True], True)
    *gradients, adjoint = miner_backward(*args)
    second = (tensors[0], tensors, [z], gradients, [kept, adjoint], kinds, scales, wanted, [True], wanted, [True])
    calls = (
        (miner_forward, (tensors[0], tensors, kinds, scales, True)),
        (miner_backward, args),
        (miner_second_order, second),
    )
    for op, arguments in calls:
        torch.library.opcheck(op.library, arguments, test_utils=("test_schema", "test_faketensor"))


def test_plain_is_the_same_function():
    for name in SHAPES:
        chain = make(name)
        torch.testing.assert_close(plain(chain), formula(chain), rtol=0, atol=1e-12)


def wrong(**changes):
    return [make("affine")._replace(**changes)]


GOOD = make("affine")


@pytest.mark.parametrize(
    ("chains", "error", "message"),
    [
        ([], ValueError, "chains is empty: give one Chain at least"),
        (GOOD, TypeError, "chains must be a sequence of Chain, not Chain"),
        ([nn.Identity()], TypeError, "chains must hold Chain, the chain is Identity"),
        (wrong(u=GOOD.u.float()), TypeError, "the weight of layer 1 of the chain is torch.float64, u torch.float32"),
        (wrong(u=GOOD.u.int()), TypeError, "u of the chain must be a float32, .* tensor, got torch.int32"),
        (wrong(u=GOOD.u[..., :4]), ValueError, r"weight of layer 1 of the chain must have the shape \[2, 35, 4\]"),
        (wrong(u=GOOD.u[0, 0]), ValueError, r"u of the chain must have the shape \[B, I\] or \[2, B, I\]"),
        (wrong(u=GOOD.u[:1]), ValueError, r"u of the chain must have the shape \[B, I\] or \[2, B, I\]"),
        (wrong(u=GOOD.u[:, :0]), ValueError, r"without a 0, got \[2, 0, 5\]"),
        (wrong(weights=()), ValueError, "the chain must have 1 to 8 weights and as many biases, got 0 and 3"),
        (wrong(weights=GOOD.weights * 3, biases=GOOD.biases * 3), ValueError, "1 to 8 weights .*, got 9 and 9"),
        (wrong(biases=GOOD.biases[:2]), ValueError, "as many biases, got 3 and 2"),
        (wrong(biases=GOOD.biases[::-1]), ValueError, r"bias of layer 1 of the chain must have the shape \[2, 35\]"),
        (wrong(activation="gelu"), ValueError, "one of linear, relu, lrelu, tanh, got 'gelu'"),
        (wrong(skip="identity"), ValueError, r"the chain gives 3 numbers for 5: skip must be None or a pair"),
        (wrong(skip="both"), ValueError, "must be None, \"identity\" or a pair .*, got 'both'"),
        (wrong(skip=GOOD.skip[::-1]), ValueError, r"weight of the skip connection of the chain .*\[2, 3, 5\]"),
        (wrong(mapping=Mapping([GOOD.u[0]], [GOOD.u[0, 0]], [(1, 1, 1)])), ValueError, "of the mapping network"),
        (
            [GOOD, GOOD._replace(u=GOOD.u.to("meta"))],
            ValueError,
            "u of chain 1 must be on the device of the first chain",
        ),
    ],
)
def test_wrong_arguments_are_named(chains, error, message):
    with pytest.raises(error, match=message):
        miner(chains)
