import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.ops import _op, bias_act, use_backend
from minegan_fast.ops.bias_act import bias_act_backward, bias_act_forward

ACTS = ("linear", "relu", "lrelu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GAIN = 2**0.5

# name: (shape, dim, how the tensor lies in memory)
INPUTS = {
    "images": ((2, 3, 4, 4), 1, "contiguous"),
    "channels_last": ((2, 8, 5, 3), 1, "channels_last"),
    "channels_last_odd": ((3, 5, 2, 7), 1, "channels_last"),
    "channels_last_3d": ((2, 4, 2, 3, 2), 1, "channels_last_3d"),
    "features": ((7, 5), 1, "contiguous"),
    "many_rows": ((150, 20), 1, "contiguous"),
    "long_channels": ((2, 2, 4100), 1, "contiguous"),
    "first_dim": ((4, 3, 5), 0, "contiguous"),
    "last_dim": ((4, 3, 5), -1, "contiguous"),
    "vector": ((9,), 0, "contiguous"),
    "one": ((1, 1), 1, "contiguous"),
    "one_channel": ((5, 1, 3), 1, "contiguous"),
    "no_sample": ((0, 3, 2), 1, "contiguous"),
    "no_channel": ((5, 0), 1, "contiguous"),
    "transposed": ((6, 4, 3), 1, "transposed"),
    "every_other": ((4, 3, 6), 1, "every_other"),
    "unaligned": ((2, 8, 4), 1, "unaligned"),
    "expanded": ((3, 4, 5), 1, "expanded"),
}


def lay(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, lying in memory as said."""
    match layout:
        case "channels_last" | "channels_last_3d":
            return x.contiguous(memory_format=getattr(torch, layout))
        case "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        case "every_other":
            return torch.stack((x, x + 1), -1)[..., 0]
        case "unaligned":
            return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
        case "expanded":
            return x[:1].expand_as(x)
    return x


def make(name: str, dtype: torch.dtype, device: str):
    """x, b, and the cotangents dy, ddx, ddb; all but b lie in memory as the input of that name does."""
    shape, dim, layout = INPUTS[name]
    x, dy, ddx = (lay(torch.randn(shape).to(device, dtype), layout) for _ in range(3))
    b, ddb = torch.randn(2, shape[dim]).to(device, dtype)
    return x, b, dy, ddx, ddb, dim


def plain(x, b=None, *, dim=1, act="linear", alpha=0.2, gain=1.0):
    """The definition in PyTorch's own operations and gradients."""
    v = x if b is None else x + b.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
    return {"linear": lambda v: v, "relu": F.relu, "lrelu": lambda v: F.leaky_relu(v, alpha)}[act](v) * gain


def three_orders(function, x, b, dy, ddx, ddb, **kwargs):
    """y; dx, db; and the gradient of <dx, ddx> + <db, ddb> by dy."""
    x, b, dy = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, b, dy))
    y = function(x, b, **kwargs)
    dx, db = grad(y, (x, b), dy, create_graph=True)
    (ddy,) = grad((dx, db), dy, (ddx, ddb))
    return {"y": y, "dx": dx, "db": db, "ddy": ddy}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_matches_reference(backend, device, name, dtype, act):
    *tensors, dim = make(name, dtype, device)
    kwargs = {"dim": dim, "act": act, "gain": GAIN}
    ours = three_orders(bias_act, *tensors, **kwargs)
    theirs = three_orders(plain, *tensors, **kwargs)
    truths = three_orders(plain, *(t.double() for t in tensors), **kwargs)
    for quantity, truth in truths.items():
        actual, expected = ours[quantity], theirs[quantity]
        assert actual.dtype == dtype
        assert actual.shape == expected.shape
        if truth.numel():
            # At most twice PyTorch's own error, which may be none by luck: then one rounding of the largest result, or,
            # for sums, of the largest sum of magnitudes.
            scale = truth.abs()
            if quantity == "db":
                scale = truths["dx"].abs().movedim(dim, 0).reshape(len(truth), -1).sum(1)
            allowed = 2 * (expected - truth).abs().max() + torch.finfo(dtype).eps * scale.max()
            assert (actual - truth).abs().max() <= allowed, quantity


@pytest.mark.parametrize("act", ACTS)
def test_keeps_the_memory_layout(backend, device, act):
    for name in ("images", "channels_last", "channels_last_3d"):
        x, b, dy, *_, dim = make(name, torch.float32, device)
        y = bias_act(x.requires_grad_(), b.requires_grad_(), dim=dim, act=act, gain=GAIN)
        assert y.stride() == x.stride()
        assert grad(y, x, dy)[0].stride() == x.stride()


def test_large_tensors_shared_by_threads(backend, device):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter has no threads and needs seconds for these")
    threads = torch.get_num_threads()
    try:
        results = {}
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            for shape, layout in (((3, 7, 199, 201), "contiguous"), ((3, 7, 199, 201), "channels_last")):
                generator = torch.Generator().manual_seed(1)
                x, dy, ddx = (lay(torch.randn(shape, generator=generator).to(device), layout) for _ in range(3))
                b, ddb = torch.randn(2, 7, generator=generator).to(device)
                ours = three_orders(bias_act, x, b, dy, ddx, ddb, act="lrelu", gain=GAIN)
                truth = three_orders(plain, *(t.double() for t in (x, b, dy, ddx, ddb)), act="lrelu", gain=GAIN)
                for quantity in ours:
                    torch.testing.assert_close(ours[quantity].double(), truth[quantity], rtol=1e-5, atol=1e-4)
                    if backend != "reference":
                        first = results.setdefault((layout, quantity), ours[quantity])
                        assert torch.equal(first, ours[quantity]), "bits must not depend on the number of threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_and_second_order_gradients(backend, device, layout, act):
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("minutes in the interpreter; test_matches_reference holds its second order against PyTorch's")
    x = lay(torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device), layout).requires_grad_()
    b = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda x, b: bias_act(x, b, act=act, gain=GAIN), (x, b))
    assert gradgradcheck(lambda x, b: bias_act(x, b, act=act, gain=GAIN), (x, b))
    assert gradgradcheck(lambda x: bias_act(x, act=act, gain=GAIN), (x,))


def test_third_order(backend, device):
    """Of a function that is not piecewise linear any more."""
    results = []
    for function in (bias_act, plain):
        torch.manual_seed(0)
        x = torch.randn(4, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
        b = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
        value = (function(x, b, act="lrelu", gain=GAIN) ** 4).sum()
        for _ in range(3):
            gradients = grad(value, (x, b), create_graph=True)
            value = sum((g**2).sum() for g in gradients)
        results.append((*gradients, value))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("needed", ["x", "b"])
def test_only_some_gradients(backend, device, needed, act):
    x, b, dy, ddx, ddb, dim = make("images", torch.float64, device)
    wanted, cotangent = (x, ddx) if needed == "x" else (b, ddb)
    results = []
    for function in (bias_act, plain):
        leaf, dy_leaf = wanted.clone().requires_grad_(), dy.clone().requires_grad_()
        y = function(leaf if needed == "x" else x, leaf if needed == "b" else b, dim=dim, act=act, gain=GAIN)
        (first,) = grad(y, leaf, dy_leaf, create_graph=True)
        results.append((y, first, grad(first, dy_leaf, cotangent)[0]))
    torch.testing.assert_close(*results)


def test_r1_penalty_of_a_network(backend, device):
    """The use that second order is for: the penalty's gradient reaches weights and biases before and after the op."""
    results = []
    for function in (bias_act, plain):
        torch.manual_seed(0)
        shapes = ((6, 3, 3, 3), (6,), (1, 6 * 16))
        weights = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=device, requires_grad=True)
        h = function(F.conv2d(x, weights[0], padding=1), weights[1], act="lrelu", gain=GAIN)
        logits = F.linear(h.flatten(1) ** 2, weights[2])
        (gradient,) = grad(logits.sum(), x, create_graph=True)
        results.append(grad(gradient.square().sum(), weights))
    torch.testing.assert_close(*results)


def test_the_output_is_saved_and_not_the_input():
    x = torch.randn(2, 3, requires_grad=True)
    y = bias_act(x, act="lrelu")
    (saved,) = y.grad_fn.saved_tensors
    assert saved.data_ptr() == y.data_ptr()
    assert bias_act(x, gain=2.0).grad_fn.saved_tensors == (None,)


def test_nothing_to_do_returns_x():
    x = torch.randn(2, 3)
    assert bias_act(x) is x


def test_without_bias_any_number_of_dimensions(backend, device):
    for shape in ((), (3,), (2, 3)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(bias_act(x, act="relu", gain=3.0), F.relu(x) * 3)


def test_infinity_and_nan(backend, device):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0], device=device)
    for act in ("relu", "lrelu"):
        torch.testing.assert_close(bias_act(x, act=act, gain=2.0), plain(x, act=act, gain=2.0), equal_nan=True)


def test_bias_of_another_dtype(backend, device):
    """As under autocast: half-precision activations, float32 parameters."""
    x = torch.randn(4, 3, device=device, dtype=torch.bfloat16)
    b = torch.randn(3, device=device, requires_grad=True)
    y = bias_act(x, b, act="relu", gain=2.0)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, bias_act(x, b.bfloat16(), act="relu", gain=2.0))
    y.sum().backward()
    assert b.grad.dtype == torch.float32


def test_strided_bias(backend, device):
    x, b = torch.randn(4, 3, device=device), torch.randn(6, device=device)[::2]
    torch.testing.assert_close(bias_act(x, b), x + b)


def test_db_has_the_same_bits_every_time(backend, device):
    x, b = torch.randn(200, 24, device=device), torch.zeros(24, device=device, requires_grad=True)
    first = grad(bias_act(x, b, act="lrelu").square().sum(), b)[0]
    for _ in range(3):
        assert torch.equal(grad(bias_act(x, b, act="lrelu").square().sum(), b)[0], first)


@pytest.fixture
def native():
    module = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    isa = module.cpu_isa()
    yield module
    module.set_cpu_isa(isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(native, dtype):
    for name in ("channels_last", "many_rows", "long_channels"):
        *tensors, dim = make(name, dtype, "cpu")
        results = []
        for isa in range(native.cpu_isa() + 1):
            native.set_cpu_isa(isa)
            with use_backend("cpp"):
                results.append(three_orders(bias_act, *tensors, dim=dim, act="lrelu", gain=GAIN))
        for result in results[1:]:
            assert all(torch.equal(result[q], results[0][q]) for q in result)
    with pytest.raises(ValueError, match="no such instruction set"):
        native.set_cpu_isa(9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gain", [1.0, 0.37, 2.0**-9, 1000.0])
def test_native_half_precision_rounds_as_torch_does(native, dtype, gain):
    """Every one of the 65536 values, times gains that lead into the subnormals and beyond the largest number."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    with use_backend("cpp"):
        y = bias_act(x[:, None], torch.zeros(1, dtype=dtype), gain=gain)[:, 0]
    torch.testing.assert_close(y, (x.float() * gain).to(dtype), rtol=0, atol=0, equal_nan=True)


def library_calls(device):
    for name in ("images", "channels_last", "features", "vector", "one_channel", "no_sample"):
        x, b, dy, *_, dim = make(name, torch.float32, device)
        dim %= x.dim()
        y = torch.randn_like(x)
        yield bias_act_forward, (x, b, None, dim, 0.2, GAIN)
        yield bias_act_forward, (x, None, y, dim, 0.0, GAIN)
        yield bias_act_backward, (dy, y, dim, 0.2, GAIN)


def test_opcheck(backend, device):
    for op, args in library_calls(device):
        torch.library.opcheck(op.library, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_under_autograd_and_dynamic_shapes():
    for op, args in library_calls("cpu"):
        torch.library.opcheck(op.library, args)


def test_compiles_in_one_graph(backend, device):
    x, b, dy, *_, dim = make("channels_last", torch.float32, device)
    x, b = x.requires_grad_(), b.requires_grad_()

    def layer(x, b):
        return bias_act(x * 2, b, dim=dim, act="lrelu", gain=GAIN) + 1

    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = function(x, b)
        results.append((y, *grad(y, (x, b), dy)))
    torch.testing.assert_close(*results)


def test_fake_tensors_take_shapes_only():
    with torch._subclasses.FakeTensorMode():
        x = torch.ones(2, 3, 4, requires_grad=True)
        y = bias_act(x, torch.ones(3), act="lrelu")
        assert y.shape == (2, 3, 4)
        assert grad(y.sum(), x)[0].shape == (2, 3, 4)


def test_backward_runs_on_the_forward_backend(backend, device, monkeypatch):
    """Also where the engine calls it from another thread, outside the block that forced the backend."""
    x = torch.randn(4, 3, device=device, requires_grad=True)
    y = bias_act(x, act="lrelu")
    used = []
    choose = _op.Op._choose
    monkeypatch.setattr(_op.Op, "_choose", lambda op, *key: used.append(key[0]) or choose(op, *key))
    for op in (bias_act_forward, bias_act_backward):
        monkeypatch.setattr(op, "_chosen", {})
    with use_backend(None):
        y.sum().backward()
    assert used == [backend]


def test_tensor_subclasses_see_the_call():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is bias_act:
                seen.append(kwargs["act"])
                args = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
                return bias_act(*args, **kwargs)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, b = torch.randn(2, 3), torch.randn(3)
    y = bias_act(x, b.as_subclass(Watched), act="relu")
    assert seen == ["relu"]
    assert torch.equal(y, bias_act(x, b, act="relu"))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((None,), {}, TypeError, "x must be a float32.*got NoneType"),
        ((X.long(),), {}, TypeError, "x must be a float32.*got torch.int64"),
        ((X.cfloat(),), {}, TypeError, "x must be .*got torch.complex64"),
        ((X, [0.0] * 3), {}, TypeError, "b must be .*got list"),
        ((X, torch.zeros(3).long()), {}, TypeError, "b must be .*got torch.int64"),
        ((X, torch.zeros(2)), {}, ValueError, r"b must have shape \[3\], x's size along dim 1, got \[2\]"),
        ((X, torch.zeros(1, 3)), {}, ValueError, r"b must have shape \[3\].*got \[1, 3\]"),
        ((X, torch.zeros(3)), {"dim": 2}, ValueError, r"dim must be an axis of x, whose shape is \[2, 3\], got 2"),
        ((X, torch.zeros(3)), {"dim": -3}, ValueError, "dim must be an axis of x.*got -3"),
        ((X, torch.zeros(3, device="meta")), {}, ValueError, "b must be on the device of x, cpu, got meta"),
        ((X,), {"act": "gelu"}, ValueError, 'act must be "linear", "relu" or "lrelu", got \'gelu\''),
        ((X,), {"alpha": -0.1}, ValueError, "alpha must be finite and >= 0, got -0.1"),
        ((X,), {"alpha": float("inf")}, ValueError, "alpha must be finite and >= 0, got inf"),
        ((X,), {"gain": 0.0}, ValueError, "gain must be finite and > 0, got 0.0"),
        ((X,), {"gain": -1.0}, ValueError, "gain must be finite and > 0, got -1.0"),
        ((X,), {"gain": float("nan")}, ValueError, "gain must be finite and > 0, got nan"),
    ],
)
def test_wrong_arguments_are_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        bias_act(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_than_2_to_the_31_elements(backend, memory_format):
    shape = (2, 40, 5200, 5200)
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs a GPU with 40 GiB free")
    x = torch.ones(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=memory_format).requires_grad_()
    b = torch.arange(40, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with use_backend(backend):
        y = bias_act(x, b, act="lrelu")
        db = grad(y[1, -1, -1, -8:].sum() * 2 + y[0, :, 0, 0].sum(), b)[0]
    assert torch.equal(y[1, :, -1, -1], b + 1)
    assert db.tolist() == [1.0] * 39 + [17.0]
