import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from minegan_fast.ops import dense_is_faster, row_gradient, use_backend
from minegan_fast.ops.row_gradient import row_gradient_convolution, rows_of_own_kernel

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYERS = {
    0: (F.linear,) * 2,
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}


@dataclass
class Layer:
    """A layer of n outputs and which of them are selected."""

    x: tuple[int, ...]
    n: int
    rows: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    transposed: bool = False
    output_padding: int = 0
    groups: int = 1

    def __call__(self, x, weight):
        """The layer's own forward in PyTorch; `weight` has a row for each output in front."""
        function = LAYERS[len(self.kernel)][self.transposed]
        if not self.kernel:
            return function(x, weight)
        if self.transposed:
            return function(
                x, weight.transpose(0, 1), None, self.stride, self.padding, self.output_padding, 1, self.dilation
            )
        return function(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def weight(self, dtype, device="cpu"):
        channels = self.x[1] if self.kernel else self.x[-1]
        return torch.randn(self.n, channels // self.groups, *self.kernel).to(device, dtype)

    def select(self, gy):
        """gy of the selected outputs."""
        axis = 1 if self.kernel else -1
        return gy.index_select(axis % gy.dim(), torch.tensor(self.rows, device=gy.device))

    def ours(self, x, gy, rows=None):
        """gy is of the selected outputs or, with `rows`, of all."""
        group = None
        if self.groups > 1:
            group = torch.tensor(self.rows, device=x.device) // (self.n // self.groups)
        geometry = self.kernel, self.stride, self.padding, self.dilation, self.transposed, self.groups, group
        return row_gradient(x, gy, *geometry, rows)

    def dense(self, x, gy):
        """PyTorch's gradient of the whole weight, and of it the rows."""
        weight = self.weight(x.dtype, x.device).requires_grad_()
        return grad(self(x, weight), weight, gy)[0][list(self.rows)]


L = {
    "linear": Layer((5, 7), 6, (1, 4)),
    "linear_3d": Layer((2, 5, 7), 6, (0, 1, 5)),
    "linear_4d": Layer((2, 3, 2, 7), 4, (2,)),
    "linear_vector": Layer((7,), 4, (2, 3)),
    "linear_17": Layer((40, 9), 20, tuple(range(17))),
    "conv1d": Layer((2, 5, 19), 6, (0, 3), (3,), 1, 1),
    "conv1d_stride_dilation": Layer((3, 4, 23), 6, (5,), (4,), 3, 2, 2),
    "conv1d_groups": Layer((2, 6, 11), 9, (0, 4, 5, 8), (3,), 1, 1, groups=3),
    "conv2d_1x1": Layer((2, 9, 5, 7), 4, (1, 2, 3), (1, 1)),
    "conv2d_3x3": Layer((2, 5, 6, 7), 4, (1, 3), (3, 3), 1, 1),
    "conv2d_one_row": Layer((2, 20, 16, 16), 4, (2,), (3, 3), 1, 1),
    "conv2d_three_rows": Layer((3, 7, 9, 33), 4, (0, 1, 3), (3, 3), 1, 1),
    "conv2d_eight_rows": Layer((1, 18, 8, 17), 9, tuple(range(1, 9)), (3, 3), 1, 1),
    "conv2d_17_rows": Layer((2, 5, 5, 6), 18, tuple(range(17)), (3, 3), 1, 1),
    "conv2d_many_positions": Layer((2, 3, 40, 41), 4, (0, 2), (3, 3), 1, 1),
    "conv2d_valid": Layer((2, 4, 6, 9), 4, (0, 2), (3, 3)),
    "conv2d_wide_padding": Layer((2, 4, 5, 4), 4, (0, 2), (3, 3), 1, (3, 4)),
    "conv2d_kernel_larger_than_image": Layer((2, 4, 2, 3), 4, (0, 2), (5, 5), 1, 2),
    "conv2d_even_kernel": Layer((2, 4, 7, 6), 4, (3,), (4, 2), (2, 1), (1, 0)),
    "conv2d_stride_2": Layer((2, 4, 9, 8), 5, (0, 2, 4), (3, 3), 2, 1),
    "conv2d_stride_leaves_a_rest": Layer((2, 4, 10, 11), 5, (0, 2), (2, 3), (3, 2), (0, 1)),
    "conv2d_dilation": Layer((2, 4, 11, 9), 5, (0, 2), (3, 3), 1, (2, 1), (2, 1)),
    "conv2d_stride_dilation": Layer((2, 4, 12, 13), 5, (1,), (3, 3), 2, 2, 2),
    "conv2d_1x1_stride_2": Layer((2, 6, 8, 9), 5, (1, 2), (1, 1), 2),
    "conv2d_one_sample_one_pixel": Layer((1, 6, 1, 1), 3, (0, 2), (3, 3), 1, 1),
    "conv2d_no_sample": Layer((0, 6, 4, 4), 3, (0, 2), (3, 3), 1, 1),
    "conv2d_groups": Layer((2, 8, 5, 6), 12, (0, 2, 3, 7, 11), (3, 3), 1, 1, groups=4),
    "conv2d_group_twice_in_any_order": Layer((2, 6, 5, 6), 6, (4, 0, 5), (3, 3), 2, 1, groups=2),
    "depthwise": Layer((2, 7, 6, 5), 7, (0, 3, 6), (3, 3), 1, 1, groups=7),
    "depthwise_multiplier": Layer((2, 4, 6, 5), 8, (1, 2, 7), (3, 3), 1, 1, groups=4),
    "conv3d": Layer((2, 3, 4, 5, 6), 4, (0, 3), (3, 2, 3), 1, 1),
    "conv3d_stride_dilation": Layer((2, 3, 7, 6, 9), 4, (2,), (2, 3, 2), (2, 1, 2), (0, 1, 1), (2, 2, 1)),
    "transposed1d": Layer((2, 4, 7), 5, (0, 4), (4,), 2, 1, transposed=True),
    "transposed2d": Layer((2, 4, 5, 6), 5, (1, 3), (3, 3), 2, transposed=True),
    "transposed2d_output_padding": Layer((2, 4, 5, 6), 5, (1, 3, 4), (3, 3), 2, 1, transposed=True, output_padding=1),
    "transposed2d_stride_1": Layer((2, 4, 5, 6), 5, (2,), (3, 3), 1, 1, transposed=True),
    "transposed2d_dilation": Layer((2, 4, 4, 5), 9, tuple(range(8)), (3, 2), (2, 3), (2, 1), (2, 1), transposed=True),
    "transposed3d": Layer((2, 3, 3, 2, 4), 4, (0, 2), (3, 2, 3), 2, 1, transposed=True, output_padding=1),
}  # fmt: skip


def operands(layer, dtype, device="cpu"):
    """x, the gradient gy of all outputs, and the selected part of it."""
    x = torch.randn(layer.x).to(device, dtype)
    gy = torch.randn(layer(x.double(), layer.weight(torch.float64, device)).shape).to(device, dtype)
    return x, gy, layer.select(gy)


def run_or_skip(backend, dtype, layer):
    if layer.kernel and row_gradient_convolution.lacks(backend, dtype=dtype) is not None:
        pytest.skip(f"{backend} takes no {dtype}")
    if backend == "triton" and dtype != torch.float32 and not torch.cuda.is_available():
        pytest.skip("the interpreter's half precision is wrong")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", L)
def test_equals_the_rows_of_the_dense_gradient(backend, device, name, dtype):
    layer = L[name]
    run_or_skip(backend, dtype, layer)
    x, gy, selected = operands(layer, dtype, device)
    actual = layer.ours(x, selected)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    truth = layer.dense(x.double(), gy.double())
    assert actual.shape == truth.shape
    if dtype == torch.float64:
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
        return
    assert (actual - truth).abs().max() <= tolerance(layer, x, gy, truth)


def tolerance(layer, x, gy, truth):
    """Twice PyTorch's own error, which may be small by luck: then one rounding of the largest sum of magnitudes."""
    error = (layer.dense(x, gy) - truth).abs().max()
    scale = layer.dense(x.double().abs(), gy.double().abs()).max()
    return 2 * error + torch.finfo(x.dtype).eps * scale


# One has the taps, strides and axes of L, the others are cut in every way: along each axis, by channels, into shares.
LAST = {name: replace(layer, x=(layer.x[0], 37, *layer.x[2:])) for name, layer in L.items()
        if layer.kernel and layer.groups == 1 and layer.x[0]}  # fmt: skip
LAST |= {
    "1d_long": Layer((2, 16, 700), 5, (1, 3), (5,), 1, 2),
    "3d_long": Layer((1, 16, 9, 7, 6), 3, (0, 2), (3, 3, 3), 1, 1),
    "300_channels": Layer((2, 300, 16, 17), 7, (0, 2, 3, 4, 6), (3, 3), 1, 1),
    "300_channels_transposed": Layer((2, 300, 16, 17), 4, (3, 1), (3, 3), 2, transposed=True),
    "300_channels_1x1": Layer((2, 300, 16, 17), 2, (0, 1), (1, 1)),
    "300_channels_stride_2": Layer((3, 300, 21, 22), 9, tuple(range(9)), (3, 3), 2, 1),
}  # fmt: skip


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("name", LAST)
def test_channels_side_by_side(backend, device, name):
    layer = LAST[name]
    x, gy, selected = operands(layer, torch.float32, device)
    rows = torch.tensor(layer.rows, device=device)
    truth = layer.dense(x.double(), gy.double())
    allowed = tolerance(layer, x, gy, truth)
    actual = layer.ours(channels_last(x), channels_last(gy), rows)
    assert actual.is_contiguous()
    assert (actual - truth).abs().max() <= allowed
    if backend == "cpp":  # others lay all of them out alike
        for one, two, which in ((x, gy, rows), (channels_last(x), gy, rows), (channels_last(x), selected, None)):
            assert (layer.ours(one, two, which) - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", ["linear_3d", "conv2d_3x3", "conv2d_groups", "depthwise", "transposed2d", "conv1d"])
def test_rows_of_all_outputs_equal_the_gathered_ones(backend, device, name):
    layer = L[name]
    x, gy, selected = operands(layer, torch.float32, device)
    rows = torch.tensor(layer.rows, device=device)
    torch.testing.assert_close(layer.ours(x, gy, rows), layer.ours(x, selected), rtol=0, atol=0)
    none = replace(layer, rows=())
    shape = layer.ours(x, selected).shape
    assert none.ours(x, gy, rows[:0]).shape == (0, *shape[1:])
    twice = replace(layer, rows=layer.rows * 2)
    double = layer.ours(x, selected).repeat(2, *[1] * (len(shape) - 1))
    torch.testing.assert_close(twice.ours(x, gy, rows.repeat(2)), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d_stride_2", "conv2d_groups", "transposed2d"])
def test_gradients_through_rows(name):
    layer = L[name]
    x, gy, _ = operands(layer, torch.float64)
    rows = torch.tensor(layer.rows)
    x, gy = (t.requires_grad_() for t in (x, gy))
    assert gradcheck(lambda x, gy: layer.ours(x, gy, rows), (x, gy))
    assert gradgradcheck(lambda x, gy: layer.ours(x, gy, rows), (x, gy))


def test_a_row_that_is_none_of_the_outputs(backend, device):
    if device == "cuda":
        pytest.skip("a GPU says so later, and is lost")
    x, gy = torch.randn(2, 16, 4, 5), torch.randn(2, 3, 4, 5)
    for image in (x, channels_last(x)):
        for wrong in (3, -1):
            with pytest.raises((IndexError, RuntimeError), match=r"out of|rows must be from 0 to 2"):
                row_gradient(image, gy, (3, 3), 1, 1, rows=torch.tensor([0, wrong]))


@pytest.mark.parametrize("name", ["conv2d_3x3", "conv2d_stride_2", "transposed2d_output_padding", "conv2d_groups"])
@pytest.mark.parametrize("layout", ["channels_last", "every_other", "transposed", "expanded"])
def test_any_memory_layout(backend, device, name, layout):
    layer = L[name]
    x, gy, _ = operands(layer, torch.float32, device)

    def lay(t):
        match layout:
            case "channels_last":
                return t.contiguous(memory_format=torch.channels_last)
            case "every_other":
                return torch.stack((t, t + 1), -1)[..., 0]
            case "transposed":
                return t.transpose(0, -1).contiguous().transpose(0, -1)
            case "expanded":
                return t[:, :, :1].expand_as(t)

    x, gy = lay(x), lay(gy)
    expected = layer.dense(x.double(), gy.double())
    for one, two in ((x, lay(layer.select(gy))), (x.contiguous(), lay(layer.select(gy))), (x, layer.select(gy))):
        torch.testing.assert_close(layer.ours(one, two).double(), expected, rtol=1e-4, atol=1e-4)


SMALL = [name for name, layer in L.items() if max(layer.x, default=0) < 10 and len(layer.rows) < 5]


@pytest.mark.parametrize("name", SMALL)
def test_first_and_second_order_gradients(name):
    layer = L[name]
    x, _, gy = (t.requires_grad_() for t in operands(layer, torch.float64))
    assert gradcheck(layer.ours, (x, gy))
    assert gradgradcheck(layer.ours, (x, gy))


@pytest.mark.parametrize("name", ["linear", "conv2d_stride_2", "depthwise", "transposed2d"])
def test_higher_orders_equal_those_of_the_dense_gradient(backend, device, name):
    """Of a function of dW that is not linear, against PyTorch's gradients of its own dense gradient."""
    layer = L[name]
    x, gy, _ = operands(layer, torch.float32, device)

    def orders(a, b, dW):
        first = grad(dW.pow(3).sum(), (a, b), create_graph=True)
        return [dW, *first, *grad(sum(g.square().sum() for g in first), (a, b))]

    a, b = x.clone().requires_grad_(), gy.clone().requires_grad_()
    ours = orders(a, b, layer.ours(a, layer.select(b)))
    a, b = x.double().requires_grad_(), gy.double().requires_grad_()
    weight = layer.weight(torch.float64, device).requires_grad_()
    dense = grad(layer(a, weight), weight, b, create_graph=True)[0][list(layer.rows)]
    for actual, expected in zip(ours, orders(a, b, dense), strict=True):
        assert (actual.double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_one_operand_alone_may_need_a_gradient():
    layer = L["conv2d_3x3"]
    x, _, gy = operands(layer, torch.float64)
    for which in (0, 1):
        tensors = [x.clone(), gy.clone()]
        tensors[which].requires_grad_()
        (one,) = grad(layer.ours(*tensors).square().sum(), tensors[which])
        both = [t.detach().requires_grad_() for t in tensors]
        torch.testing.assert_close(one, grad(layer.ours(*both).square().sum(), both)[which], rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["conv2d_three_rows", "conv2d_stride_2", "transposed2d_dilation", "conv3d", "depthwise", "300_channels"]
)
def test_same_bits_whatever_the_number_of_threads(backend, device, name):
    layer = L.get(name) or LAST[name]
    x, _, gy = operands(layer, torch.float32, device)
    x = channels_last(x) if name in LAST and name not in L else x
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(layer.ours(x, gy))
    finally:
        torch.set_num_threads(threads)
    if backend != "reference":  # the library's sums are its own affair
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["fp32_precision", "allow_tf32"])
def test_either_setting_of_tf32_is_followed(name):
    pytest.importorskip("triton")
    from minegan_fast.kernels.row_gradient import _tf32_allowed

    cudnn = torch.backends.cudnn
    owner = cudnn if name == "allow_tf32" else getattr(cudnn, "conv", None)
    if owner is None:
        pytest.skip("this torch has the old setting alone")
    try:
        for allowed in (False, True):
            setattr(owner, name, allowed if owner is cudnn else "tf32" if allowed else "ieee")
            assert _tf32_allowed() == allowed
    finally:
        cudnn.allow_tf32 = True  # the default, of both


def test_autocast_changes_nothing():
    for name in ("linear", "conv2d_3x3"):
        x, _, gy = (t.requires_grad_() for t in operands(L[name], torch.float32))
        expected = L[name].ours(x, gy)
        gradients = grad(expected.square().sum(), (x, gy))
        with torch.autocast("cpu", torch.bfloat16):
            dW = L[name].ours(x, gy)
        torch.testing.assert_close((dW, *grad(dW.square().sum(), (x, gy))), (expected, *gradients), rtol=0, atol=0)


def test_no_neuron():
    assert row_gradient(torch.randn(2, 3, 4, 4), torch.randn(2, 0, 4, 4), (3, 3), 1, 1).shape == (0, 3, 3, 3)
    assert row_gradient(torch.randn(2, 3), torch.randn(2, 0)).shape == (0, 3)


def test_opcheck(backend, device):
    for name in ("conv2d_3x3", "transposed2d_output_padding", "conv2d_no_sample", "depthwise", "conv1d"):
        layer = L[name]
        x, _, gy = operands(layer, torch.float32, device)
        axes = [[v] * len(layer.kernel) for v in (layer.stride, layer.padding, layer.dilation)]
        if layer.groups > 1:
            x = x[:, list(layer.rows)]
        groups = 1 if layer.groups == 1 else len(layer.rows)
        args = (x, gy, list(layer.kernel), *axes, layer.transposed, groups, True)
        for more in ((), (torch.tensor([1], device=device),) if groups == 1 else (None,)):
            tests = "test_schema", "test_faketensor"
            torch.library.opcheck(row_gradient_convolution.library, args + more, test_utils=tests)


@pytest.mark.parametrize("name", ["linear", "conv2d_3x3", "transposed2d_output_padding"])
def test_compiles_in_one_graph(backend, device, name):
    torch.compiler.reset()
    x, gy, selected = operands(L[name], torch.float32, device)
    compiled = torch.compile(L[name].ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, selected), L[name].ours(x, selected))
    rows = torch.tensor(L[name].rows, device=device)
    torch.testing.assert_close(compiled(x, gy, rows), L[name].ours(x, selected))


@pytest.fixture
def table(monkeypatch):
    module = importlib.import_module("minegan_fast.ops.row_gradient")  # the function of that name hides the module
    found = {"own": {}, "dense": {"cpu": {"3x3 stride 1": 0.5, "linear": 0.75}}}
    monkeypatch.setattr(module, "_TABLE", found)
    return found


def test_the_table_says_from_which_share_the_dense_gradient_is_faster(table):
    image = torch.randn(2, 4, 8, 8)
    assert [dense_is_faster(k, 8, image, (3, 3)) for k in (3, 4, 8)] == [False, True, True]
    assert [dense_is_faster(k, 8, image[:, 0, 0]) for k in (5, 6)] == [False, True]
    for other in ({"kernel": (5, 5)}, {"kernel": (3, 3), "stride": 2}, {"kernel": (3, 3), "transposed": True}):
        assert [dense_is_faster(k, 8, image, **other) for k in (7, 8)] == [False, True]


def test_the_nearest_measured_case_decides(table):
    cases = [{"channels": 512, "positions": 256, "rows": 2}, {"channels": 64, "positions": 65536, "rows": 9}]
    table["own"]["some processor"] = {"3x3 stride 1": cases}
    assert rows_of_own_kernel("some processor", "3x3 stride 1", 256, 200) == 2
    assert rows_of_own_kernel("some processor", "3x3 stride 1", 100, 16384) == 9
    assert rows_of_own_kernel("some processor", "5x5 stride 1", 512, 256) == 0
    assert rows_of_own_kernel("another processor", "3x3 stride 1", 512, 256) == 0


def test_unforced_the_table_chooses_and_forced_it_does_not(table, monkeypatch):
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    calls = []
    own = native.row_gradient_cpu
    monkeypatch.setattr(native, "row_gradient_cpu", lambda *args: (calls.append(args), own(*args)))
    layer = L["conv2d_three_rows"]
    x, _, gy = operands(layer, torch.float32)
    processor = f"cpu {('baseline', 'avx2', 'avx512')[native.cpu_isa()]}"
    for rows, expected in ((3, 1), (2, 0)):
        table["own"][processor] = {"3x3 stride 1": [{"channels": 7, "positions": 300, "rows": rows}]}
        calls.clear()
        with use_backend(None):
            layer.ours(x, gy)
        assert len(calls) == expected
    with use_backend("cpp"):
        layer.ours(x, gy)
    assert len(calls) == 1


def test_each_layout_has_its_own_part_of_the_table(table, monkeypatch):
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    calls = []
    for name in ("row_gradient_cpu", "row_gradient_last_cpu"):
        own = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, own=own, name=name: (calls.append(name), own(*args)))
    layer = replace(L["conv2d_three_rows"], x=(3, 16, 9, 33))
    x, gy, _ = operands(layer, torch.float32)
    rows = torch.tensor(layer.rows)
    processor = f"cpu {('baseline', 'avx2', 'avx512')[native.cpu_isa()]}"
    cases = [{"channels": 16, "positions": 300, "rows": 3}]
    for key, expected in (
        ("3x3 stride 1", "row_gradient_cpu"),
        ("3x3 stride 1, channels last", "row_gradient_last_cpu"),
    ):
        table["own"][processor] = {key: cases}
        calls.clear()
        with use_backend(None):
            layer.ours(x, gy, rows)
            layer.ours(channels_last(x), gy, rows)
            layer.ours(channels_last(x)[:, :15], gy, rows)
        assert calls == [expected]


def test_every_instruction_set_is_right():
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    best = native.cpu_isa()
    try:
        for isa in range(best + 1):
            native.set_cpu_isa(isa)
            for name in ("conv2d_eight_rows", "conv2d_stride_2", "transposed2d_dilation", "conv3d", "depthwise"):
                x, gy, selected = operands(L[name], torch.float32)
                with use_backend("cpp"):
                    actual = L[name].ours(x, selected)
                expected = L[name].dense(x.double(), gy.double())
                torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
            for layer in LAST.values():
                x, gy, _ = operands(layer, torch.float32)
                truth = layer.dense(x.double(), gy.double())
                with use_backend("cpp"):
                    actual = layer.ours(channels_last(x), channels_last(gy), torch.tensor(layer.rows))
                assert (actual - truth).abs().max() <= tolerance(layer, x, gy, truth)
    finally:
        native.set_cpu_isa(best)


X, GY = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 6, 5)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0], GY), {}, TypeError, "x must be a float32, .* got list"),
        ((X, GY.int()), {}, TypeError, "gy must be a float32, .* got torch.int32"),
        ((X, GY.double()), {}, TypeError, "gy must have x's dtype and device"),
        ((X, GY.to("meta")), {}, TypeError, "gy must have x's dtype and device, .* on meta"),
        ((torch.randn(2, 4), torch.randn(3, 5)), {}, ValueError, r"but the last axis, got \[2, 4\], \[3, 5\]"),
        ((torch.tensor(1.0), torch.tensor(1.0)), {}, ValueError, "agree in all but the last axis"),
        ((X, GY, (3, 0)), {}, ValueError, r"kernel must be .* got \(3, 0\)"),
        ((X, GY, (1, 1, 1, 1)), {}, ValueError, "kernel must be"),
        ((X, GY, (3, 3), 0, 1), {}, ValueError, "stride must be a number >= 1, .* got 0"),
        ((X, GY, (3, 3), 1, (1, 1, 1)), {}, ValueError, r"padding must be a number >= 0, or 2 .* got \(1, 1, 1\)"),
        ((X, GY, (3, 3), 1, "same"), {}, ValueError, "padding must be .* got 'same'"),
        ((X, GY, (3, 3), 1, 1, 0), {}, ValueError, "dilation must be a number >= 1"),
        ((X[0], GY[0], (3, 3), 1, 1), {}, ValueError, r"with 4 axes and one B, got \[4, 6, 5\] .* unsqueeze"),
        ((X, GY[:1], (3, 3), 1, 1), {}, ValueError, "one B"),
        ((X, GY, (3, 3)), {}, ValueError, r"gy must have the positions \[4, 3\] .* got \[6, 5\]"),
        ((X, GY, (3, 3), 2, 1), {"transposed": True}, ValueError, r"x must have the positions \[3, 3\]"),
        ((X, GY, (3, 3), 1, 1), {"groups": 3}, ValueError, "groups must divide x's 4 channels, got 3"),
        ((X, GY, (3, 3), 1, 1), {"groups": 2}, ValueError, r"group must be int64 \[3\] on cpu, .* got None"),
        ((X, GY, (3, 3), 1, 1), {"groups": 2, "group": torch.zeros(3)}, ValueError, "got torch.float32"),
        ((X, GY, (3, 3), 1, 1), {"groups": 2, "transposed": True}, ValueError, "1 for a transposed convolution, got 2"),
        ((X, GY, (3, 3), 1, 1), {"rows": [0]}, ValueError, r"rows must be int64 \[k\] on cpu, got \[0\]"),
        ((X, GY, (3, 3), 1, 1), {"rows": torch.ones(3)}, ValueError, r"rows must be .* got torch.float32 \[3\] on cpu"),
        ((X, GY, (3, 3), 1, 1), {"rows": torch.zeros(1, 1).long()}, ValueError, r"rows must be .* \[1, 1\]"),
        ((X, GY[0], (3, 3), 1, 1), {"rows": torch.tensor([0])}, ValueError, "with 4 axes and one B"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        row_gradient(*args, **kwargs)
