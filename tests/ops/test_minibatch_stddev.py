import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from minegan_fast.ops import _op, minibatch_stddev, use_backend
from minegan_fast.ops.minibatch_stddev import (
    minibatch_stddev_backward,
    minibatch_stddev_double_backward,
    minibatch_stddev_forward,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# name: (shape, how it lies in memory, group, features)
CASES = {
    "groups of 4": ((8, 6, 4, 4), "contiguous", 4, 1),
    "groups of 4 channels_last": ((8, 6, 4, 4), "channels_last", 4, 1),
    "the whole batch": ((6, 4, 4, 4), "contiguous", None, 1),
    "two features": ((4, 6, 3, 5), "contiguous", 2, 2),
    "two features channels_last": ((4, 34, 2, 2), "channels_last", 2, 2),
    "a group that does not divide": ((6, 3, 4, 4), "contiguous", 4, 1),
    "a larger group than batch": ((3, 3, 4, 4), "contiguous", 4, 3),
    "single samples": ((3, 5, 4, 4), "channels_last", 1, 1),
    "one sample": ((1, 5, 2, 2), "contiguous", 4, 1),
    "one": ((1, 1, 1, 1), "contiguous", 4, 1),
    "one channel channels_last": ((4, 1, 3, 3), "channels_last", 4, 1),
    "one pixel channels_last": ((4, 20, 1, 1), "channels_last", 4, 2),
    "many elements": ((4, 70, 8, 8), "contiguous", 4, 2),
    "no sample": ((0, 3, 4, 4), "contiguous", 4, 1),
    "no pixel": ((2, 3, 0, 4), "contiguous", 4, 1),
    "transposed": ((4, 3, 4, 5), "transposed", 4, 1),
    "every other": ((4, 3, 4, 5), "every other", 2, 1),
    "expanded": ((4, 3, 4, 5), "expanded", 4, 1),
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
        case "expanded":
            return x[:1].expand_as(x)
    return x


def make(name: str, dtype: torch.dtype, device: str):
    """x, the cotangents dy of y and ddx of dx, and the other arguments."""
    (B, C, *size), layout, group, features = CASES[name]
    x, ddx = (lay(torch.randn(B, C, *size).to(device, dtype), layout) for _ in range(2))
    dy = torch.randn(B, C + features, *size).to(device, dtype)
    return x, dy, ddx, {"group": group, "features": features}


def plain(x, group=4, features=1):
    """The definition in PyTorch's own operations and gradients, sample by sample and feature by feature."""
    B, C = x.shape[:2]
    size = next((g for g in range(min(group or B, B), 0, -1) if B % g == 0), 1)
    planes = []
    for i in range(B):
        members = x[i % (B // size) :: B // size].to(torch.promote_types(x.dtype, torch.float32))
        spread = ((members - members.mean(0)).square().mean(0) + 1e-8).sqrt()
        means = [part.mean() for part in spread.split(C // features)]
        planes.append(torch.stack(means)[:, None, None].expand(-1, *x.shape[2:]))
    return torch.cat((x, torch.stack(planes).to(x.dtype) if planes else x[:, :features]), 1)


def three_orders(function, x, dy, ddx, kwargs):
    """y, dx, and the gradients of <dx, ddx> by dy and by x."""
    x, dy = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, dy))
    y = function(x, **kwargs)
    (dx,) = grad(y, x, dy, create_graph=True)
    ddy, gx = grad(dx, (dy, x), ddx, allow_unused=True)
    return {"y": y, "dx": dx, "ddy": ddy, "gx": torch.zeros_like(x) if gx is None else gx}


def terms(x, dy, ddx, group, features):
    """The largest term of gx, times |x| / s: what a rounding of x - u is to s. They cancel where samples are alike."""
    x, dy, ddx = x.double(), dy.double(), ddx.double()
    B, C, H, W = x.shape
    size = next(g for g in range(min(group or B, B), 0, -1) if B % g == 0)
    y, v = (t.reshape(size, B // size, features, C // features, H, W) for t in (x, ddx))
    s = (y.var(0, correction=0) + 1e-8).sqrt() if size > 1 else torch.full_like(y[0], 1e-4)
    D = dy[:, C:].reshape(size, B // size, features, H, W).sum((0, 3, 4)).abs()[:, :, None, None, None]
    return (D / (y[0, 0, 0].numel() * s) * v.abs().amax(0) * (1 + y.abs().amax(0) / s)).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(backend, device, name, dtype):
    *tensors, kwargs = make(name, dtype, device)
    ours = three_orders(minibatch_stddev, *tensors, kwargs)
    theirs = three_orders(plain, *tensors, kwargs)
    truths = three_orders(plain, *(t.double() for t in tensors), kwargs)
    for quantity, truth in truths.items():
        actual, expected = ours[quantity], theirs[quantity]
        assert actual.dtype == dtype
        assert actual.shape == truth.shape
        if truth.numel():
            # At most twice PyTorch's own error, which may be none by luck: then one rounding of the largest result and
            # some of the largest terms in the type that sums are in.
            wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            size = terms(*tensors, **kwargs) if quantity == "gx" else truth.abs().max()
            allowed = 2 * (expected - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max() + 8 * wide * size
            assert (actual - truth).abs().max() <= allowed, quantity


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_layout(backend, device, layout):
    for shape in ((4, 3, 4, 5), (4, 1, 3, 3), (4, 3, 1, 1)):
        x = lay(torch.randn(shape, device=device), layout).requires_grad_()
        y = minibatch_stddev(x)
        assert y.stride() == lay(y.detach(), layout).stride()
        assert grad(y, x, torch.randn_like(y).contiguous())[0].stride() == x.stride()


@pytest.mark.parametrize("name", ["groups of 4 channels_last", "two features", "a group that does not divide"])
def test_first_and_second_order_gradients(backend, device, name):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("minutes in the interpreter; test_matches_reference holds its second order against PyTorch's")
    x, *_, kwargs = make(name, torch.float64, device)
    x = x[..., :2, :1].clone(memory_format=torch.preserve_format).requires_grad_()
    assert gradcheck(lambda x: minibatch_stddev(x, **kwargs), (x,))
    assert gradgradcheck(lambda x: minibatch_stddev(x, **kwargs), (x,))


def test_third_order(backend, device):
    results = []
    for function in (minibatch_stddev, plain):
        torch.manual_seed(0)
        x = torch.randn(4, 2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
        value = (function(x) ** 3).sum()
        for _ in range(3):
            (gradient,) = grad(value, x, create_graph=True)
            value = gradient.square().sum()
        results.append((gradient, value))
    torch.testing.assert_close(*results)


def test_r1_penalty_of_a_network(backend, device):
    """The use that second order is for: the penalty's gradient reaches the weights before and after the op."""
    results = []
    for function in (minibatch_stddev, plain):
        torch.manual_seed(0)
        first = torch.randn(3, 2, 1, 1, dtype=torch.float64, device=device, requires_grad=True)
        second = torch.randn(1, 4, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
        x = torch.randn(4, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
        logits = torch.nn.functional.conv2d(function(torch.nn.functional.conv2d(x, first)), second)
        (gradient,) = grad(logits.square().sum(), x, create_graph=True)
        results.append(grad(gradient.square().sum(), (first, second)))
    torch.testing.assert_close(*results)


def test_equal_samples_have_no_deviation(backend, device):
    x = torch.randn(1, 3, 2, 2, device=device).expand(4, -1, -1, -1).clone().requires_grad_()
    y = minibatch_stddev(x)
    torch.testing.assert_close(y[:, 3], torch.full_like(y[:, 3], 1e-4))
    assert torch.isfinite(grad(y.sum(), x)[0]).all()


def test_any_number_of_threads_gives_the_same_bits():
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    isa, threads = native.cpu_isa(), torch.get_num_threads()
    x, dy, ddx = torch.randn(12, 200, 8, 8), torch.randn(12, 201, 8, 8), torch.randn(12, 200, 8, 8)
    try:
        results = []
        for number, level in ((1, isa), (3, isa), *((1, level) for level in range(isa))):
            torch.set_num_threads(number)
            native.set_cpu_isa(level)
            with use_backend("cpp"):
                results.append(three_orders(minibatch_stddev, x, dy, ddx, {}))
        for result in results[1:]:
            assert all(torch.equal(result[quantity], results[0][quantity]) for quantity in ("y", "dx", "ddy", "gx"))
    finally:
        torch.set_num_threads(threads)
        native.set_cpu_isa(isa)


def library_calls(device, names=("groups of 4", "two features channels_last", "one pixel channels_last", "no sample")):
    for name in names:
        x, dy, ddx, kwargs = make(name, torch.float32, device)
        dy = dy.contiguous(memory_format=_op.memory_format(x))
        size = min(kwargs["group"], max(1, x.shape[0]))
        yield minibatch_stddev_forward, (x, size, kwargs["features"])
        yield minibatch_stddev_backward, (dy, x, size, kwargs["features"])
        yield minibatch_stddev_double_backward, (ddx, dy, x, size, kwargs["features"])


def test_opcheck(backend, device):
    for op, args in library_calls(device):
        torch.library.opcheck(op.library, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_under_autograd_and_dynamic_shapes():
    for op, args in library_calls("cpu", ["two features channels_last"]):
        torch.library.opcheck(op.library, args)


def test_compiles_in_one_graph(backend, device):
    x, dy, _, kwargs = make("two features channels_last", torch.float32, device)
    x = x.requires_grad_()

    def layer(x):
        return minibatch_stddev(x * 2, **kwargs) + 1

    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = function(x)
        results.append((y, *grad(y, x, dy)))
    torch.testing.assert_close(*results)


def test_every_order_runs_on_the_forward_backend(backend, device, monkeypatch):
    """Also where the engine calls it from another thread, outside the block that forced the backend."""
    x = torch.randn(4, 2, 3, 3, device=device, requires_grad=True)
    y = minibatch_stddev(x)
    used = []
    choose = _op.Op._choose
    monkeypatch.setattr(_op.Op, "_choose", lambda op, *key: used.append(key[0]) or choose(op, *key))
    for op in (minibatch_stddev_forward, minibatch_stddev_backward, minibatch_stddev_double_backward):
        monkeypatch.setattr(op, "_chosen", {})
    with use_backend(None):
        grad(y.square().sum(), x, create_graph=True)[0].square().sum().backward()
    assert set(used) == {backend}


def test_tensor_subclasses_see_the_call():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is minibatch_stddev:
                seen.append(kwargs)
                return minibatch_stddev(*(a.as_subclass(torch.Tensor) for a in args), **kwargs)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(4, 2, 3, 3)
    y = minibatch_stddev(x.as_subclass(Watched), 2)
    assert seen == [{"group": 2, "features": 1}]
    assert torch.equal(y, minibatch_stddev(x, 2))


X = torch.zeros(4, 6, 2, 2)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None,), TypeError, "x must be a float32.*got NoneType"),
        ((X.long(),), TypeError, "x must be a float32.*got torch.int64"),
        ((X[0],), ValueError, r"x must have shape \[B, C, H, W\], got \[6, 2, 2\]"),
        ((X, 0), ValueError, "group must be an integer >= 1, or None for the whole batch, got 0"),
        ((X, 2.0), ValueError, "group must be an integer.*got 2.0"),
        ((X, 4, 4), ValueError, "features must be a divisor of x's 6 channels, got 4"),
        ((X, 4, 0), ValueError, "features must be a divisor.*got 0"),
        ((X[:, :0],), ValueError, "features must be a divisor of x's 0 channels, got 1"),
    ],
)
def test_wrong_arguments_are_named(args, error, message):
    with pytest.raises(error, match=message):
        minibatch_stddev(*args)
