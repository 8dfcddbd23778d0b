import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.ops import _op, upfirdn2d, use_backend
from minegan_fast.ops.upfirdn2d import upfirdn2d_forward

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BINOMIAL = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

# name: (shape of x, how it lies in memory, shape of the kernel, other arguments)
CASES = {
    "blur after a transposed convolution": ((2, 3, 9, 9), "contiguous", 4, {"padding": 1, "gain": 4.0}),
    "blur channels_last": ((2, 5, 9, 7), "channels_last", 4, {"padding": (2, 2, 2, 2)}),
    "blur of many channels": ((1, 33, 5, 4), "channels_last", (4, 4), {"padding": 2}),
    "three taps": ((2, 3, 8, 8), "contiguous", 3, {"padding": 1}),
    "twice": ((2, 3, 6, 7), "contiguous", 4, {"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}),
    "twice channels_last": ((2, 3, 6, 7), "channels_last", 4, {"up": 2, "padding": (2, 1, 2, 1)}),
    "twice many channels": ((2, 18, 3, 2), "channels_last", 4, {"up": 2, "padding": (2, 1, 2, 1)}),
    "half": ((2, 3, 11, 8), "contiguous", 4, {"down": 2, "padding": 1}),
    "half channels_last": ((2, 3, 11, 8), "channels_last", (4, 4), {"down": 2, "padding": 1}),
    "half many channels": ((2, 20, 6, 6), "channels_last", 4, {"down": 2, "padding": 1, "flip": True}),
    "axes apart": ((2, 3, 5, 6), "contiguous", (2, 5), {"up": (1, 3), "down": (2, 1), "padding": (4, 0, 1, 2)}),
    "three halves": ((1, 2, 7, 9), "contiguous", (5, 7), {"up": 3, "down": 2, "padding": (3, 3, 2, 2), "flip": True}),
    "two thirds": ((1, 2, 7, 9), "channels_last", 9, {"up": 2, "down": 3, "padding": (-1, 6, 5, -2)}),
    "cropped": ((2, 2, 9, 8), "contiguous", 3, {"padding": (-2, -1, -3, 0)}),
    "only padding": ((2, 2, 1, 1), "contiguous", (2, 2), {"padding": (4, -2, -3, 6)}),
    "fewer taps than zeros": ((2, 2, 3, 4), "contiguous", 2, {"up": 4, "padding": 2, "gain": -3.0}),
    "more than one column": ((1, 66, 1, 40), "channels_last", 4, {"padding": 2}),
    "more than one block of rows": ((1, 2, 35, 3), "contiguous", 4, {"padding": 1}),
    "one": ((1, 1, 1, 1), "contiguous", 1, {}),
    "one pixel channels_last": ((2, 4, 1, 1), "channels_last", 4, {"up": 2, "padding": (2, 1, 2, 1)}),
    "one channel channels_last": ((2, 1, 4, 4), "channels_last", 3, {"padding": 1}),
    "no sample": ((0, 3, 4, 4), "contiguous", 4, {"padding": 2}),
    "no channel": ((2, 0, 4, 4), "contiguous", 4, {"padding": 2}),
    "transposed": ((2, 3, 6, 5), "transposed", 4, {"padding": 1}),
    "every other": ((2, 3, 6, 5), "every other", (4, 3), {"padding": 1}),
    "expanded": ((2, 3, 6, 5), "expanded", 4, {"padding": 1}),
    "unaligned": ((2, 3, 6, 5), "unaligned", 4, {"up": 2, "padding": 1}),
}


def lay(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, lying in memory as said."""
    match layout:
        case "channels_last":
            strides = (x[0].numel(), 1, x.shape[3] * x.shape[1], x.shape[1])
            return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
        case "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case "every other":
            return torch.stack((x, x + 1), -1)[..., 0]
        case "unaligned":
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        case "expanded":
            return x[:1].expand_as(x)
    return x


def make(name: str, dtype: torch.dtype, device: str):
    """x, the kernel, the cotangents dy of y and ddx of dx, and the other arguments."""
    shape, layout, taps, kwargs = CASES[name]
    x, ddx = (lay(torch.randn(shape).to(device, dtype), layout) for _ in range(2))
    kernel = torch.randn(taps).to(device, dtype)
    with use_backend("reference"):
        dy = torch.randn_like(upfirdn2d(x, kernel, **kwargs))
    return x, kernel, dy, ddx, kwargs


def plain(x, kernel, up=1, down=1, padding=0, flip=False, gain=1.0):
    """The definition by matrices that choose what each tap meets: y = sum over i, j of k[i, j] rows_i x columns_j'."""
    up, down = ((n, n) if isinstance(n, int) else n for n in (up, down))
    left, right, top, bottom = [padding] * 4 if isinstance(padding, int) else padding
    kernel = torch.outer(kernel, kernel) if kernel.dim() == 1 else kernel
    kernel = (kernel if flip else kernel.flip(0, 1)) * gain

    def chosen(axis, tap, before, after):
        size, u, d, k = x.shape[2 + axis], up[axis], down[axis], kernel.shape[axis]
        matrix = x.new_zeros((size * u + before + after - k) // d + 1, size)
        for j in range(len(matrix)):
            position = j * d + tap - before
            if position % u == 0 and 0 <= position // u < size:
                matrix[j, position // u] = 1
        return matrix

    rows = torch.stack([chosen(0, i, top, bottom) for i in range(kernel.shape[0])])
    columns = torch.stack([chosen(1, j, left, right) for j in range(kernel.shape[1])])
    return torch.einsum("ij,iph,bchw,jqw->bcpq", kernel, rows, x, columns)


def torchs(x, kernel, up=1, down=1, padding=0, flip=False, gain=1.0):
    """PyTorch's own: a depthwise convolution of the padded image in x's dtype."""
    up, down = ((n, n) if isinstance(n, int) else n for n in (up, down))
    left, right, top, bottom = [padding] * 4 if isinstance(padding, int) else padding
    kernel = torch.outer(kernel, kernel) if kernel.dim() == 1 else kernel
    kernel = (kernel if flip else kernel.flip(0, 1)) * gain
    B, C, H, W = x.shape
    x = F.pad(x.reshape(B, C, H, 1, W, 1), (0, up[1] - 1, 0, 0, 0, up[0] - 1)).reshape(B, C, H * up[0], W * up[1])
    x = F.pad(x, [max(p, 0) for p in (left, right, top, bottom)])
    x = x[:, :, max(-top, 0) : x.shape[2] - max(-bottom, 0), max(-left, 0) : x.shape[3] - max(-right, 0)]
    return F.conv2d(x, kernel.expand(C, 1, -1, -1), stride=down, groups=C) if C else x[:, :, 1:, 1:]


def three_orders(function, x, kernel, dy, ddx, kwargs):
    """y, dx, and the gradient of <dx, ddx> by dy."""
    x, dy = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, dy))
    y = function(x, kernel, **kwargs)
    (dx,) = grad(y, x, dy, create_graph=True)
    (ddy,) = grad(dx, dy, ddx)
    return {"y": y, "dx": dx, "ddy": ddy}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(backend, device, name, dtype):
    *tensors, kwargs = make(name, dtype, device)
    slow = name == "more than one column" or (dtype != torch.float32 and name not in list(CASES)[:2])
    if slow and (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter needs seconds for these")
    ours = three_orders(upfirdn2d, *tensors, kwargs)
    doubles = [t.double() for t in tensors]
    truths = three_orders(plain, *doubles, kwargs)
    theirs = three_orders(torchs, *tensors, kwargs) if tensors[0].numel() else truths
    sizes = three_orders(plain, *(t.abs() for t in doubles), kwargs)
    for quantity, truth in truths.items():
        actual = ours[quantity]
        assert actual.dtype == dtype
        assert actual.shape == truth.shape
        if truth.numel():
            # At most twice PyTorch's own error, which may be none by luck: then one rounding of the largest result, and
            # of the largest sum of magnitudes in the type that sums are in.
            wide = torch.promote_types(dtype, torch.float32)
            rounding = torch.finfo(dtype).eps * truth.abs().max() + torch.finfo(wide).eps * sizes[quantity].abs().max()
            assert (actual - truth).abs().max() <= 2 * (theirs[quantity] - truth).abs().max() + rounding, quantity


@pytest.mark.parametrize(
    "name", ["twice", "twice channels_last", "one pixel channels_last", "one channel channels_last"]
)
def test_keeps_the_memory_layout(backend, device, name):
    x, kernel, *_, kwargs = make(name, torch.float32, device)
    y = upfirdn2d(x.requires_grad_(), kernel, **kwargs)
    assert y.stride() == lay(y.detach(), CASES[name][1]).stride()
    for layout in ("contiguous", "channels_last", "transposed"):
        assert grad(y, x, lay(torch.randn_like(y).contiguous(), layout), retain_graph=True)[0].stride() == x.stride()


def test_a_product_and_any_other_kernel(backend, device):
    """Taps, their outer product, and kernels of higher rank, of zeros, of one entry."""
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, device=device)
    taps = torch.randn(4, dtype=torch.float64, device=device)
    others = [
        torch.outer(taps, taps),
        torch.randn(4, 4),
        torch.eye(3),
        torch.zeros(2, 3),
        F.one_hot(torch.tensor([2, 0])),
    ]
    for kernel in [taps, *others]:
        kernel = kernel.to(x)
        for kwargs in ({"padding": 2}, {"up": 2, "padding": 1}):
            torch.testing.assert_close(upfirdn2d(x, kernel, **kwargs), plain(x, kernel, **kwargs))


def test_what_falls_out_of_it(backend, device):
    x = torch.randn(2, 3, 8, 6, device=device)
    ones = torch.ones(2, device=device)
    assert torch.equal(upfirdn2d(x, ones, up=2, padding=(1, 0, 1, 0)), F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(upfirdn2d(x, ones / 2, down=2), F.avg_pool2d(x, 2))
    taps = BINOMIAL.to(device)
    weight = torch.outer(taps, taps).expand(3, 1, 4, 4)
    twice = F.conv_transpose2d(x, weight * 4, stride=2, padding=1, groups=3)
    torch.testing.assert_close(upfirdn2d(x, taps, up=2, padding=(2, 1, 2, 1), gain=4.0), twice)
    half = F.conv2d(x, weight, stride=2, padding=1, groups=3)
    torch.testing.assert_close(upfirdn2d(x, taps, down=2, padding=1), half)


@pytest.mark.parametrize("name", ["twice", "half many channels", "three halves", "two thirds", "cropped"])
def test_first_and_second_order_gradients(backend, device, name):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("minutes in the interpreter; test_matches_reference holds its second order against PyTorch's")
    x, kernel, *_, kwargs = make(name, torch.float64, device)
    x = x[:1, :1, :6, :6].clone().requires_grad_() if x.shape[1] < 16 else x[:1, :16, :2, :2].clone().requires_grad_()
    assert gradcheck(lambda x: upfirdn2d(x, kernel, **kwargs), (x,))
    assert gradgradcheck(lambda x: upfirdn2d(x, kernel, **kwargs), (x,))


def test_third_order(backend, device):
    """Of a function that is not linear."""
    results = []
    for function in (upfirdn2d, torchs):
        torch.manual_seed(0)
        x = torch.randn(1, 2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
        value = (function(x, BINOMIAL.to(x), up=2, padding=(2, 1, 2, 1)) ** 4).sum()
        for _ in range(3):
            (gradient,) = grad(value, x, create_graph=True)
            value = gradient.square().sum()
        results.append((gradient, value))
    torch.testing.assert_close(*results)


def test_path_length_of_a_network(backend, device):
    """The use that second order is for: the penalty's gradient reaches the weights before and after the op."""
    results = []
    for function in (upfirdn2d, torchs):
        torch.manual_seed(0)
        weights = [torch.randn(2, 3, 3, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
        w = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
        h = function(F.conv_transpose2d(w, weights[0].transpose(0, 1), stride=2), BINOMIAL.to(w), padding=1, gain=4.0)
        image = F.conv2d(h**2, weights[1].transpose(0, 1), padding=1)
        (gradient,) = grad((image * torch.randn_like(image)).sum(), w, create_graph=True)
        results.append(grad(gradient.square().sum().sqrt(), weights))
    torch.testing.assert_close(*results)


def test_any_number_of_threads_gives_the_same_bits():
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    isa, threads = native.cpu_isa(), torch.get_num_threads()
    x = {"contiguous": torch.randn(2, 3, 70, 131), "channels_last": torch.randn(2, 40, 40, 33)}
    try:
        for layout, kwargs in [
            (a, b) for a in x for b in ({"padding": 1}, {"up": 2}, {"down": 2}, {"up": 3, "down": 2})
        ]:
            results = []
            for number, level in ((1, isa), (3, isa), *((1, level) for level in range(isa))):
                torch.set_num_threads(number)
                native.set_cpu_isa(level)
                with use_backend("cpp"):
                    results.append(upfirdn2d(lay(x[layout], layout), BINOMIAL, **kwargs))
            torch.testing.assert_close(results[0], plain(x[layout], BINOMIAL, **kwargs))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)
        native.set_cpu_isa(isa)


def test_kernel_of_another_dtype(backend, device):
    """As in a module that was converted, or under autocast: the op runs in x's dtype."""
    x = torch.randn(1, 2, 6, 6, device=device)
    taps = BINOMIAL.to(device)
    with torch.autocast(device, torch.bfloat16):
        y = upfirdn2d(x, taps.bfloat16(), padding=1)
    assert torch.equal(y, upfirdn2d(x, taps, padding=1))
    assert upfirdn2d(x.bfloat16(), taps.double(), padding=1).dtype == torch.bfloat16
    assert torch.equal(upfirdn2d(x, torch.stack((taps, taps), 1)[:, 0], padding=1), y)


OPCHECKED = ("blur after a transposed convolution", "twice channels_last", "one pixel channels_last", "no sample")


def library_calls(device, names=OPCHECKED):
    for name in names:
        x, kernel, *_ = make(name, torch.float32, device)
        yield upfirdn2d_forward, (x, kernel, [2, 1], [1, 2], [2, 1, 3, 3], False, 2.0)


def test_opcheck(backend, device):
    for op, args in library_calls(device):
        torch.library.opcheck(op.library, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_under_autograd_and_dynamic_shapes():
    for op, args in library_calls("cpu", OPCHECKED[:2]):
        torch.library.opcheck(op.library, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, device, dynamic):
    if dynamic and backend != "cpp":
        pytest.skip("the compiler's time; shapes are the same for every backend")
    x, kernel, dy, _, kwargs = make("twice channels_last", torch.float32, device)
    x = x.requires_grad_()

    def layer(x):
        return upfirdn2d(x * 2, kernel, **kwargs) + 1

    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic), layer):
        y = function(x)
        results.append((y, *grad(y, x, dy)))
    torch.testing.assert_close(*results)


def test_backward_runs_on_the_forward_backend(backend, device, monkeypatch):
    """Also where the engine calls it from another thread, outside the block that forced the backend."""
    x = torch.randn(1, 2, 4, 3, device=device, requires_grad=True)
    y = upfirdn2d(x, BINOMIAL.to(device), padding=2)
    used = []
    choose = _op.Op._choose
    monkeypatch.setattr(_op.Op, "_choose", lambda op, *key: used.append(key[0]) or choose(op, *key))
    monkeypatch.setattr(upfirdn2d_forward, "_chosen", {})
    with use_backend(None):
        y.sum().backward()
    assert used == [backend]


def test_tensor_subclasses_see_the_call():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is upfirdn2d:
                seen.append(kwargs["padding"])
                return upfirdn2d(*(a.as_subclass(torch.Tensor) for a in args), **kwargs)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(1, 2, 4, 3)
    y = upfirdn2d(x.as_subclass(Watched), BINOMIAL, padding=2)
    assert seen == [2]
    assert torch.equal(y, upfirdn2d(x, BINOMIAL, padding=2))


X, K = torch.zeros(1, 2, 4, 5), torch.ones(3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((None, K), {}, TypeError, "x must be a float32.*got NoneType"),
        ((X.long(), K), {}, TypeError, "x must be a float32.*got torch.int64"),
        ((X, [1.0]), {}, TypeError, "kernel must be a float32.*got list"),
        ((X, K.int()), {}, TypeError, "kernel must be .*got torch.int32"),
        ((X[0], K), {}, ValueError, r"x must have shape \[B, C, H >= 1, W >= 1\], got \[2, 4, 5\]"),
        ((X[..., :0], K), {}, ValueError, r"x must have shape .*got \[1, 2, 4, 0\]"),
        ((X, X), {}, ValueError, r"kernel must have shape \[kh, kw\] or \[k\], no size 0, got \[1, 2, 4, 5\]"),
        ((X, K[:0]), {}, ValueError, r"kernel must have shape .*got \[0\]"),
        ((X, K.to("meta")), {}, ValueError, "kernel must be on the device of x, cpu, got meta"),
        ((X, K.clone().requires_grad_()), {}, ValueError, "kernel must not require a gradient.*detach"),
        ((X, K), {"up": 0}, ValueError, r"up must be an integer >= 1 or 2 of them, \(vertical, horizontal\), got 0"),
        ((X, K), {"up": (1, 2, 3)}, ValueError, r"up must be .*got \(1, 2, 3\)"),
        ((X, K), {"down": 1.5}, ValueError, "down must be .*got 1.5"),
        ((X, K), {"down": (1, -1)}, ValueError, r"down must be .*got \(1, -1\)"),
        ((X, K), {"padding": (1, 1)}, ValueError, r"padding must be .* 4 of them, \(left, right, top, bottom\), got"),
        ((X, K), {"padding": (1, 1, 1, 0.5)}, ValueError, "padding must be an integer or 4"),
        ((X, K), {"padding": (0, 0, -1, -1)}, ValueError, r"nothing is left along the vertical axis: x \[1, 2, 4, 5\]"),
        ((X, K), {"padding": (-4, 0, 0, 0)}, ValueError, "nothing is left along the horizontal axis.*pad more"),
        ((X, K), {"gain": float("nan")}, ValueError, "gain must be finite, got nan"),
    ],
)
def test_wrong_arguments_are_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        upfirdn2d(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_more_than_2_to_the_31_elements(backend, memory_format):
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs a GPU with 20 GiB free")
    x = torch.ones((2, 40, 5200, 5200), dtype=torch.bfloat16, device="cuda").to(memory_format=memory_format)
    with use_backend(backend):
        y = upfirdn2d(x, BINOMIAL.to("cuda"), padding=2)
    assert torch.equal(y[1, :, -3, -3], torch.ones_like(y[1, :, 0, 0]))
