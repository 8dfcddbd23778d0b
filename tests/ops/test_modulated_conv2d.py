"""modulated_conv2d against the equations of the paper: weights of each sample, a loop over samples."""

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.ops import modulated_conv2d, use_backend
from minegan_fast.ops.modulated_conv2d import modulate_backward, modulate_double_backward, modulate_forward

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
# B, I, O, H, W, size of the kernel, options, channels last
CASES = {
    "3x3": (2, 5, 3, 6, 4, 3, {}, False),
    "3x3_channels_last": (2, 5, 3, 6, 4, 3, {}, True),
    "1x1_plain": (2, 4, 3, 5, 5, 1, {"demodulate": False, "scale": 0.3}, True),
    "5x5": (1, 2, 3, 4, 6, 5, {"scale": 0.2}, False),
    "up": (2, 4, 3, 3, 5, 3, {"up": True}, False),
    "up_channels_last": (2, 4, 3, 3, 5, 3, {"up": True, "scale": 0.5}, True),
    "up_1x1": (2, 3, 2, 3, 4, 1, {"up": True}, True),
    "up_7x7": (1, 2, 2, 4, 4, 7, {"up": True, "demodulate": False}, False),
    "down": (2, 4, 3, 6, 8, 3, {"down": True}, True),
    "down_1x1": (2, 3, 2, 5, 4, 1, {"down": True, "demodulate": False}, False),
    "one_element": (1, 1, 1, 1, 1, 3, {}, False),
    "no_sample": (0, 3, 2, 4, 4, 3, {}, False),
}
EPILOGUE = {"act": "lrelu", "gain": 1.5}


def make(name, dtype, device):
    """x, weight, style, strength, bias; noise, gy and the cotangents of the five gradients; the options."""
    B, inputs, outputs, H, W, size, options, last = CASES[name]
    generator = torch.Generator().manual_seed(0)
    small = torch.promote_types(dtype, torch.float32)

    def normal(*shape, kind=small):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, kind)
        return x.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else x

    first = [normal(B, inputs, H, W, kind=dtype), normal(outputs, inputs, size, size), normal(B, inputs)]
    first += [normal(1), normal(outputs)]
    if options.get("up"):
        H, W = 2 * H, 2 * W
    if options.get("down"):
        H, W = H // 2, W // 2
    options = dict(options)
    if options.get("up") or options.get("down"):
        taps = TAPS / (4 if options.get("up") else 8)
        options["kernel"] = taps.to(device)
    gy = normal(B, outputs, H, W, kind=dtype)
    return first, normal(B, 1, H, W), gy, [normal(*t.shape, kind=t.dtype) for t in first], options


def filtered(x, kernel, before, after):
    """Convolved with the outer product of the taps, tap by tap."""
    pad = F.pad(x, (before, after, before, after))
    n = len(kernel)
    h, w = pad.shape[2] - n + 1, pad.shape[3] - n + 1
    return sum(
        kernel[n - 1 - i] * kernel[n - 1 - j] * pad[:, :, i : i + h, j : j + w] for i in range(n) for j in range(n)
    )


def plain(x, weight, style, strength, bias, noise, *, demodulate=True, up=False, down=False, kernel=None, scale=1.0):
    """Equations 1 to 3 as they stand, and the rest of the layer."""
    results = []
    size = weight.shape[2]
    for b in range(len(x)):
        w = weight * scale * style[b, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        w, one = w.to(x.dtype), x[b : b + 1]
        if up:
            n = len(kernel)
            y = F.conv_transpose2d(one, w.transpose(0, 1), stride=2)
            y = filtered(y, kernel.to(x.dtype), (n - size) // 2 + 1, (n - size - 1) // 2 + 1)
        elif down:
            n = len(kernel)
            one = filtered(one, kernel.to(x.dtype), (n + size - 2) // 2, (n + size - 3) // 2)
            y = F.conv2d(one, w, stride=2)
        else:
            y = F.conv2d(one, w, padding=size // 2)
        results.append(y)
    y = torch.cat(results) if results else x.new_zeros(noise.shape).expand(-1, len(weight), -1, -1)
    y = y + strength.to(y.dtype) * noise.to(y.dtype) + bias.to(y.dtype)[:, None, None]
    return F.leaky_relu(y, 0.2) * 1.5


def ours(x, weight, style, strength, bias, noise, **options):
    return modulated_conv2d(x, weight, style, noise=noise, strength=strength, bias=bias, **EPILOGUE, **options)


def three_orders(function, first, noise, gy, cotangents, options):
    """y; the gradients; and the gradients of <gradients, cotangents> by gy and all inputs."""
    first = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in first]
    gy = gy.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(*first, noise, **options)
    gradients = grad(y, first, gy, create_graph=True, materialize_grads=True)
    wanted = [(g, c) for g, c in zip(gradients, cotangents, strict=True) if g.requires_grad]
    second = grad([g for g, _ in wanted], (gy, *first), [c for _, c in wanted], materialize_grads=True)
    return y, *gradients, *second


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(backend, device, name, dtype):
    if (backend, device) == ("triton", "cpu") and dtype in (torch.bfloat16, torch.float16):
        pytest.skip("the interpreter computes half precision wrongly")
    if name == "no_sample":
        first, noise, gy, _, options = make(name, dtype, device)
        y = ours(*(t.requires_grad_() for t in first), noise, **options)
        assert y.shape == gy.shape
        assert all(not g.any() for g in grad(y, first, gy))
        return
    *tensors, options = make(name, dtype, device)
    doubles = [[t.double() for t in part] if isinstance(part, list) else part.double() for part in tensors]
    actual = three_orders(ours, *tensors, options)
    expected = three_orders(plain, *tensors, options)
    truths = three_orders(plain, *doubles, options)
    assert actual[0].dtype == dtype
    assert actual[0].is_contiguous(memory_format=torch.channels_last if CASES[name][-1] else torch.contiguous_format)
    for i, (a, b, truth) in enumerate(zip(actual, expected, truths, strict=True)):
        # At most twice the error of the plain formulation in the same dtype, which may be small by luck, and then some
        # roundings of the norm of what was summed: intermediate results are rounded in another order.
        a, b = ((t.double() - truth).norm() for t in (a, b))
        assert a <= 2 * b + 16 * torch.finfo(dtype).eps * truth.norm().clamp_min(tensors[2].double().norm()), i


def test_the_weight_may_have_the_axis_that_stylegan2_gives_it():
    (x, weight, style, *_), _, _, _, options = make("up", torch.float64, "cpu")
    both = [modulated_conv2d(x, w, style, **options) for w in (weight, weight[None])]
    assert torch.equal(*both)


@pytest.mark.parametrize("name", ["3x3_channels_last", "up", "down", "1x1_plain"])
def test_first_and_second_order_gradients(backend, device, name):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("minutes in the interpreter; test_matches_reference holds its second order against PyTorch's")
    _, _, _, _, _, size, options, last = CASES[name]
    *_, options = make(name, torch.float64, device)
    shapes = ((1, 2, 2, 2), (1, 2, size, size), (1, 2))
    x, weight, style = (torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    inputs = (x, weight.requires_grad_(), style.requires_grad_())
    assert gradcheck(lambda *inputs: modulated_conv2d(*inputs, **options), inputs)
    assert gradgradcheck(lambda *inputs: modulated_conv2d(*inputs, **options), inputs)


@pytest.mark.parametrize("name", ["3x3", "up_channels_last", "down"])
def test_third_order(backend, device, name):
    results = []
    for function in (ours, plain):
        first, noise, *_, options = make(name, torch.float64, device)
        inputs = [t.requires_grad_() for t in first]
        value = (function(*inputs, noise, **options) ** 3).mean()
        for _ in range(3):
            gradients = grad(value, inputs, create_graph=True)
            value = sum((g**2).mean() for g in gradients)
        results.append(gradients)
    torch.testing.assert_close(*results)


def test_an_input_that_is_not_dense(backend, device):
    first, noise, gy, cotangents, options = make("3x3", torch.float64, device)
    strided = first[0].repeat_interleave(2, 3)[..., ::2]
    results = []
    for x in (strided, first[0]):
        leaf = x.detach().requires_grad_()
        inputs = [leaf * 1, *(t.detach().requires_grad_() for t in first[1:])]
        y = ours(*inputs, noise, **options)
        gradients = grad(y, (leaf, *inputs[1:]), gy, create_graph=True)
        results.append((y, *gradients, *grad(gradients, (leaf, *inputs[1:]), cotangents)))
    torch.testing.assert_close(*results)


def test_autocast(backend, device):
    """x and the convolution in bfloat16; style, norms and bias in float32."""
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter computes half precision wrongly")
    first, noise, gy, _, options = make("up_channels_last", torch.float32, device)
    inputs = [t.requires_grad_() for t in first]
    with torch.autocast(device, torch.bfloat16):
        y = ours(*inputs, noise, **options)
    assert y.dtype == torch.bfloat16
    exact = ours(*inputs, noise, **options)
    assert (y - exact).norm() < 4 * torch.finfo(torch.bfloat16).eps * exact.norm()
    for a, b in zip(grad(y, inputs, gy.bfloat16()), grad(exact, inputs, gy), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 8 * torch.finfo(torch.bfloat16).eps * b.norm()


@pytest.mark.parametrize("name", ["3x3_channels_last", "up", "1x1_plain"])
def test_the_scaled_input_is_not_kept(name):
    """Beside the result, autograd holds x, once, and no other image."""
    first, noise, *_, options = make(name, torch.float32, "cpu")
    x, weight, style, strength, bias = (t.requires_grad_() for t in first)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(x, weight, style, strength, bias, noise, **options)
    images = {p for p, t in kept.items() if t.dim() == 4 and t.shape[1] == x.shape[1] and t.shape[2:] == x.shape[2:]}
    assert images - {y.data_ptr()} == {x.data_ptr()}


def test_an_input_changed_after_the_forward_is_noticed():
    x = torch.randn(1, 2, 3, 3)
    weight = torch.randn(2, 2, 3, 3, requires_grad=True)
    y = modulated_conv2d(x, weight, torch.ones(1, 2))
    x.add_(1)
    with pytest.raises(RuntimeError, match="x was changed by an in-place operation"):
        y.sum().backward()


def test_results_have_the_same_bits_every_time(backend, device):
    *tensors, options = make("up_channels_last", torch.float32, device)
    first = three_orders(ours, *tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(first, three_orders(ours, *tensors, options), strict=True))


@pytest.fixture
def native():
    module = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    isa = module.cpu_isa()
    yield module
    module.set_cpu_isa(isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_instruction_set_and_any_number_of_threads_give_the_same_bits(native, dtype, layout):
    x, gy, hx = torch.randn(3, 2, 5, 97, 159).to(dtype)
    x, gy, hx = (t.contiguous(memory_format=layout) for t in (x, gy, hx))
    k = torch.randn(2, 2, 5, dtype=torch.promote_types(dtype, torch.float32))
    threads, results = torch.get_num_threads(), []
    try:
        for isa in range(native.cpu_isa() + 1):
            native.set_cpu_isa(isa)
            torch.set_num_threads(1 + isa)
            with use_backend("cpp"):
                result = modulate_forward(x, k[0]), *modulate_backward(gy, x, k[0])
                results.append((*result, *modulate_double_backward(hx, gy, x, k)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def library_calls(device):
    for name in ("3x3", "3x3_channels_last", "one_element", "no_sample"):
        (x, _, s, *_), *_ = make(name, torch.float32, device)
        gy, k = torch.randn_like(x), torch.stack((s, s))
        yield modulate_forward, (x, s)
        yield modulate_backward, (gy, x, s)
        yield modulate_double_backward, (gy, gy, x, k)


def test_opcheck(backend, device):
    for op, args in library_calls(device):
        torch.library.opcheck(op.library, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["3x3_channels_last", "up", "down"])
def test_compiles_in_one_graph(backend, device, name):
    first, noise, gy, _, options = make(name, torch.float32, device)
    inputs = [t.requires_grad_() for t in first]

    def layer(*inputs):
        return ours(*inputs, noise, **options) + 1

    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = function(*inputs)
        results.append((y, *grad(y, inputs, gy)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


X, W, S = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3, 3, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((None, W, S), {}, TypeError, "x must be a float32.*got NoneType"),
        ((X.int(), W, S), {}, TypeError, "x must be a float32.*got torch.int32"),
        ((X[0], W, S), {}, ValueError, r"x must have shape \[B, C, H, W\], got \[3, 4, 5\]"),
        ((X, 1.0, S), {}, TypeError, "weight must be .*got float"),
        ((X, W, S.long()), {}, TypeError, "style must be .*got torch.int64"),
        ((X, W.to("meta"), S), {}, ValueError, "weight must be on the device of x, cpu, got meta"),
        ((X, W[None, None], S), {}, ValueError, r"weight must have shape \[O, 3, k, k\], got \[1, 1, 6, 3, 3, 3\]"),
        ((X, W[:, :2], S), {}, ValueError, r"weight must have shape \[O, 3, k, k\], got \[6, 2, 3, 3\]"),
        ((X, W[:, :, :2, :2], S), {}, ValueError, "weight must have an odd kernel size, got 2"),
        ((X, W, S[:1]), {}, ValueError, r"style must have shape \[2, 3\].*got \[1, 3\]"),
        ((X, W, S), {"up": True, "down": True, "kernel": TAPS}, ValueError, "up and down exclude each other"),
        ((X, W, S), {"up": True}, ValueError, "kernel, the filter, goes with up or down"),
        ((X, W, S), {"kernel": TAPS}, ValueError, "kernel, the filter, goes with up or down"),
        (
            (X, W, S),
            {"up": True, "kernel": TAPS[:1]},
            ValueError,
            r"kernel must have shape \[n, n\] or \[n\] with n >= 2",
        ),
        ((X, W, S), {"bias": torch.zeros(3)}, ValueError, r"bias must have shape \[6\]"),
        ((X, W, S), {"noise": X[:, :1]}, ValueError, "noise and strength go together"),
        ((X, W, S), {"act": "relu"}, ValueError, 'act must be "linear" or "lrelu"'),
        ((X, W, S), {"gain": -1.0}, ValueError, "gain must be finite and > 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        modulated_conv2d(*args, **kwargs)
