"""noise_bias_act against PyTorch's own functions, forward, gradients and second order, on every backend."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.ops import noise_bias_act, use_backend
from minegan_fast.ops.noise_bias_act import (
    noise_bias_act_backward,
    noise_bias_act_double_backward,
    noise_bias_act_forward,
)

GAIN = 1.7
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, C, H, W, samples of the noise (0: none), channels last
SHAPES = {
    "images": (2, 5, 7, 3, 2, False),
    "channels_last": (2, 5, 7, 3, 2, True),
    "shared_noise": (3, 4, 4, 4, 1, True),
    "no_noise": (2, 3, 5, 5, 0, False),
    "one_element": (1, 1, 1, 1, 1, False),
    "one_channel": (2, 1, 4, 3, 2, True),
    "one_position": (3, 6, 1, 1, 3, True),
    "many_positions": (1, 3, 33, 40, 1, True),
    "long_planes": (2, 2, 33, 40, 2, False),
    "no_sample": (0, 3, 4, 4, 1, False),
    "no_position": (2, 3, 0, 4, 1, False),
}


def make(name, dtype, device):
    """c, d, strength, bias; noise; cotangents of y, and of the gradients of c, d, strength and bias."""
    B, C, H, W, samples, last = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def image():
        x = normal(B, C, H, W).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if last else x

    small = torch.promote_types(dtype, torch.float32)
    first = [image(), (normal(B, C).abs() + 0.5).to(device, small), normal(1).to(device, small)]
    first.append(normal(C).to(device, small))
    noise = normal(samples, 1, H, W).to(device, small) if samples else None
    return first, noise, image(), [image(), *(torch.randn_like(t, dtype=small) for t in first[1:])]


def plain(c, d, noise, strength, bias, *, act="linear", alpha=0.2, gain=1.0):
    """In c's dtype, as PyTorch users write it."""
    y = c * d[:, :, None, None].to(c.dtype)
    if noise is not None:
        y = y + strength.to(c.dtype) * noise.to(c.dtype)
    y = y + bias.to(c.dtype)[:, None, None]
    return (F.leaky_relu(y, alpha) if act == "lrelu" else y) * gain


def three_orders(function, first, noise, gy, cotangents, **kwargs):
    """y; the gradients; and the gradients of <gradients, cotangents> by gy and all inputs."""
    first = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in first]
    gy = gy.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if noise is None:
        first, cotangents = [first[i] for i in (0, 1, 3)], [cotangents[i] for i in (0, 1, 3)]
        y = function(first[0], first[1], None, None, first[2], **kwargs)
    else:
        y = function(first[0], first[1], noise, *first[2:], **kwargs)
    gradients = grad(y, first, gy, create_graph=True)
    return y, *gradients, *grad(gradients, (gy, *first), cotangents, allow_unused=True)


def error(a, b):
    return (a.double() - b).abs().max().item() if b.numel() else 0.0


@pytest.mark.parametrize("act", ["linear", "lrelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_reference(backend, device, name, dtype, act):
    first, noise, gy, cotangents = make(name, dtype, device)
    if backend == "triton" and device == "cpu" and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the interpreter computes half precision wrongly")
    kwargs = {"act": act, "gain": GAIN}
    wide = [[t.double() for t in first], noise if noise is None else noise.double(), gy.double()]
    truths = three_orders(plain, *wide, [t.double() for t in cotangents], **kwargs)
    ours = three_orders(noise_bias_act, first, noise, gy, cotangents, **kwargs)
    theirs = three_orders(plain, first, noise, gy, cotangents, **kwargs)
    assert ours[0].dtype == dtype
    assert ours[0].stride() == first[0].stride() or 1 in first[0].shape
    for i, (a, b, truth) in enumerate(zip(ours, theirs, truths, strict=True)):
        if truth is None:  # exactly 0; ours is a sum that cancels, as y gives c back
            truth, b = torch.zeros_like(a, dtype=torch.float64), 0 * a
        # At most twice PyTorch's own error, which may be none by luck; then some roundings of the largest result, and
        # of a sum of B H W products of numbers of size 1 to 4, which add up like a random walk: c comes back out of the
        # rounded y.
        terms = gy.numel() / max(1, truth.numel()) if i else 0
        slack = 8 * torch.finfo(dtype).eps * ((truth.abs().max().item() if truth.numel() else 0) + 4 * terms**0.5)
        assert error(a, truth) <= 2 * error(b, truth) + slack, i


@pytest.mark.parametrize("name", ["channels_last", "no_noise"])
def test_first_and_second_order_gradients(backend, device, name):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("minutes in the interpreter; test_matches_reference holds its second order against PyTorch's")
    B, C = 2, 2
    c = torch.randn(B, C, 2, 3, dtype=torch.float64, device=device)
    c = c.contiguous(memory_format=torch.channels_last).requires_grad_()
    d = (torch.rand(B, C, dtype=torch.float64, device=device) + 0.5).requires_grad_()
    strength, bias = (torch.randn(n, dtype=torch.float64, device=device, requires_grad=True) for n in (1, C))
    noise = torch.randn(B, 1, 2, 3, dtype=torch.float64, device=device) if name == "channels_last" else None

    def function(c, d, strength, bias):
        strength = None if noise is None else strength
        return noise_bias_act(c, d, noise, strength, bias, act="lrelu", gain=GAIN)

    used = (c, d, strength, bias)
    assert gradcheck(function, used)
    assert gradgradcheck(function, used)


def test_third_order(backend, device):
    results = []
    for function in (noise_bias_act, plain):
        torch.manual_seed(0)
        c, noise = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(1, 1, 2, 2, dtype=torch.float64)
        d, strength, bias = torch.rand(2, 3) + 0.5, torch.randn(1), torch.randn(3)
        inputs = [t.double().to(device).requires_grad_() for t in (c, d, strength, bias)]
        value = (function(*inputs[:2], noise.to(device), *inputs[2:], act="lrelu", gain=GAIN) ** 4).sum()
        for _ in range(3):
            gradients = grad(value, inputs, create_graph=True)
            value = sum((g**2).sum() for g in gradients)
        results.append((*gradients, value))
    torch.testing.assert_close(*results)


def test_noise_that_is_searched_for_has_its_gradient(backend, device):
    first, noise, gy, _ = make("images", torch.float64, device)
    c, d, strength, bias = first
    results = [
        grad(f(c, d, n, strength, bias, act="lrelu", gain=GAIN), n, gy)
        for f in (noise_bias_act, plain)
        for n in [noise.clone().requires_grad_()]
    ]
    torch.testing.assert_close(*results)


def test_strength_and_bias_of_each_sample(backend, device):
    (c, d, _, _), noise, *_ = make("images", torch.float32, device)
    strength, bias = torch.randn(2, 1, device=device), torch.randn(2, 5, device=device)
    y = noise_bias_act(c, d, noise, strength, bias, act="lrelu")
    for b in range(2):
        one = noise_bias_act(c[b : b + 1], d[b : b + 1], noise[b : b + 1], strength[b], bias[b], act="lrelu")
        torch.testing.assert_close(y[b : b + 1], one)


def test_parts_may_be_left_out(backend, device):
    (c, d, strength, bias), noise, *_ = make("images", torch.float32, device)
    assert noise_bias_act(c) is c
    torch.testing.assert_close(noise_bias_act(c, gain=2.0), c * 2)
    torch.testing.assert_close(noise_bias_act(c, d), c * d[:, :, None, None])
    torch.testing.assert_close(noise_bias_act(c, None, noise, strength), c + strength * noise)
    torch.testing.assert_close(noise_bias_act(c, bias=bias, act="lrelu"), F.leaky_relu(c + bias[:, None, None], 0.2))


def test_c_is_not_saved():
    c = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = noise_bias_act(c, torch.ones(2, 3), act="lrelu")
    images = [t for t in y.grad_fn.saved_tensors if t is not None and t.dim() == 4]
    assert [t.data_ptr() for t in images] == [y.data_ptr()]


@pytest.fixture
def native():
    module = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    isa = module.cpu_isa()
    yield module
    module.set_cpu_isa(isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_and_any_number_of_threads_give_the_same_bits(native, dtype):
    threads = torch.get_num_threads()
    try:
        for name in ("channels_last", "many_positions", "long_planes"):
            tensors = make(name, dtype, "cpu")
            results = []
            for isa in range(native.cpu_isa() + 1):
                native.set_cpu_isa(isa)
                torch.set_num_threads(1 + isa)
                with use_backend("cpp"):
                    results.append(three_orders(noise_bias_act, *tensors, act="lrelu", gain=GAIN))
            for result in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_large_tensors_shared_by_threads(backend, device):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter has no threads and needs seconds for these")
    threads = torch.get_num_threads()
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            c, gy, hc = torch.randn(3, 2, 7, 111, 103).to(device)
            c, gy, hc = (t.contiguous(memory_format=layout) for t in (c, gy, hc))
            d, bias, strength = torch.rand(2, 7) + 0.5, torch.randn(7), torch.randn(1)
            first = [c, *(t.to(device) for t in (d, strength, bias))]
            noise, cotangents = torch.randn(2, 1, 111, 103).to(device), [hc, *map(torch.randn_like, first[1:])]
            results = []
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(three_orders(noise_bias_act, first, noise, gy, cotangents, act="lrelu"))
            doubles = [[t.double() for t in group] for group in (first, cotangents)]
            truth = three_orders(plain, doubles[0], noise.double(), gy.double(), doubles[1], act="lrelu")
            for i, (a, b, expected) in enumerate(zip(*results, truth, strict=True)):
                assert backend == "reference" or torch.equal(a, b), i
                # the roundings of a sum of products of size 1 to 4 add up like a random walk
                terms = gy.numel() / expected.numel()
                assert error(a, expected) <= 2e-6 * (expected.abs().max().item() + 4 * terms**0.5), i
    finally:
        torch.set_num_threads(threads)


def library_calls(device):
    for name in ("images", "channels_last", "no_noise", "no_sample"):
        (c, d, strength, bias), noise, gy, (hc, *_) = make(name, torch.float32, device)
        k = torch.rand(4, *d.shape, device=device)
        small = d, None if noise is None else strength[:, None], bias[None]
        for given in (small, (None, None, bias[None]), (d, None, None)):
            n = noise if given[1] is not None else None
            yield noise_bias_act_forward, (c, n, *given, 0.2, GAIN)
            yield noise_bias_act_backward, (gy, c, n, *given, 0.2, GAIN)
        yield noise_bias_act_double_backward, (hc, gy, c, noise, k, 0.2, GAIN)


def test_opcheck(backend, device):
    for op, args in library_calls(device):
        torch.library.opcheck(op.library, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_in_one_graph(backend, device):
    (c, d, strength, bias), noise, gy, _ = make("channels_last", torch.float32, device)
    inputs = [t.requires_grad_() for t in (c, d, strength, bias)]

    def layer(c, d, strength, bias):
        return noise_bias_act(c * 2, d, noise, strength, bias, act="lrelu", gain=GAIN) + 1

    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = function(*inputs)
        results.append((y, *grad(y, inputs, gy)))
    torch.testing.assert_close(*results)


def test_tiles_of_very_many_channels_fit_the_grid():
    blocks = pytest.importorskip("minegan_fast.kernels.noise_bias_act").blocks
    for last in (False, True):
        tile = blocks(70_000_000, 2048, last)
        assert 70_000_000 / tile["BC"] <= 65535
        assert tile["BC"] * tile["BP"] <= 2048
    assert blocks(70_000, 2048, False) == {"BC": 2, "BP": 512}


C = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((None,), {}, TypeError, "c must be a float32.*got NoneType"),
        ((C.long(),), {}, TypeError, "c must be a float32.*got torch.int64"),
        ((C[0],), {}, ValueError, r"c must have shape \[B, C, H, W\], got \[3, 4, 5\]"),
        ((C, [1.0]), {}, TypeError, "d must be .* or None, got list"),
        ((C, C[0, :, 0, 0]), {}, ValueError, r"d must have shape \[2, 3\], got \[3\]"),
        ((C, None, C[:, :1], None), {}, ValueError, "noise and strength go together"),
        ((C, None, None, C[0, 0, 0]), {}, ValueError, "noise and strength go together"),
        (
            (C, None, C, C[0, 0, 0, :1]),
            {},
            ValueError,
            r"noise must have shape \[2 or 1, 1, 4, 5\], got \[2, 3, 4, 5\]",
        ),
        ((C, None, C[:, :1], C[0, 0, 0]), {}, ValueError, r"strength must hold one element or .*\[2, 1\], got \[5\]"),
        ((C, None, None, None, C[0, 0, 0]), {}, ValueError, r"bias must have shape \[3\] or \[2, 3\], got \[5\]"),
        ((C, None, None, None, C[0, :, 0, 0].to("meta")), {}, ValueError, "bias must be on the device of c, cpu, got"),
        ((C,), {"act": "relu"}, ValueError, 'act must be "linear" or "lrelu", got \'relu\''),
        ((C,), {"alpha": 0.0}, ValueError, "alpha must be finite and > 0, got 0.0"),
        ((C,), {"gain": float("nan")}, ValueError, "gain must be finite and > 0, got nan"),
    ],
)
def test_wrong_arguments_are_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        noise_bias_act(*args, **kwargs)
