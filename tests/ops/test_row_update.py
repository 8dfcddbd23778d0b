"""Every backend against the reference in float64, the reference against torch.optim; what must not change, does not."""

import copy

import pytest
import torch
from torch import nn

from minegan_fast import SparseFinetuner
from minegan_fast.ops import Hyperparameters, RowTensor, RowUpdate, use_backend
from minegan_fast.ops._row_table import Table
from minegan_fast.ops.row_update import _placed, dense_step

# (shape of the weight, axis, number of rows): rows of 4617, 27, 3 and 1 elements, whole 16-byte packs, a row
# longer than a work item, transposed convolutions, a weight [1, out, in, k, k], a scalar.
SHAPES = [
    ((5, 513, 3, 3), 0, 3),
    ((9, 3, 3, 3), 0, 4),
    ((8, 3, 1, 1), 0, 2),
    ((33,), 0, 20),
    ((12, 16), 0, 5),
    ((6, 5), 0, 6),
    ((4, 7, 3, 3), 1, 3),
    ((8, 6, 4, 4), 1, 5),
    ((1, 6, 8, 2, 2), 1, 2),
    ((), 0, 1),
]
OPTIMIZERS = {
    "adam": {"betas": (0.5, 0.99)},
    "adam beta 0": {"betas": (0.0, 0.99), "weight_decay": 0.1, "ema_decay": 0.9},
    "adamw": {"betas": (0.9, 0.999), "weight_decay": 0.1, "ema_decay": 0.3},
    "sgd": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "ema_decay": 0.9},
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}


def hyper(name, **more):
    return Hyperparameters(**{"lr": 1e-2, **OPTIMIZERS[name], **more})


def rule(name):
    return {"momentum": "sgd"}.get(name.split()[0], name.split()[0])


def compact(t, axis, rows):
    return t.reshape(1) if t.ndim == 0 else t.index_select(axis, rows).movedim(axis, 0)


def make(shape, axis, k, dtype="float32", device="cpu", layout=torch.contiguous_format):
    leaf_dtype, weight_dtype = DTYPES[dtype]
    weight = torch.randn(shape).to(device, weight_dtype)
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=layout)
    n = shape[axis] if shape else 1
    rows = torch.randperm(n)[:k].sort().values.to(device)
    leaf = compact(weight, axis, rows).to(leaf_dtype).contiguous()
    return RowTensor(leaf, {}, weight, rows, axis)


def twin(t):
    """A copy in float64."""
    weight = None if t.weight is None else t.weight.to(torch.float64, copy=True)
    state = {k: v.clone() if k == "step" else v.to(torch.float64, copy=True) for k, v in t.state.items()}
    return RowTensor(t.leaf.to(torch.float64, copy=True), state, weight, t.rows, t.axis)


def plan(name, tensors):
    settings = OPTIMIZERS[name]
    return RowUpdate(rule(name), tensors, momentum=bool(settings.get("momentum")), ema="ema_decay" in settings)


def skip_interpreted(dtype, backend, device):
    if (dtype, backend, device) == ("bfloat16", "triton", "cpu"):
        pytest.skip("Triton's interpreter truncates to bfloat16")


def gradients(tensors, missing=None):
    return [None if i == missing else torch.randn_like(t.leaf) for i, t in enumerate(tensors)]


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_equal(tensors, twins, frozen):
    for t, exact, before in zip(tensors, twins, frozen, strict=True):
        # a handful of operations a step, each rounded once, on numbers of about 1
        tolerance = 1e-13 if t.leaf.dtype == torch.float64 else 2e-6
        close(t.leaf, exact.leaf, tolerance)
        for key, value in t.state.items():
            close(value, exact.state[key], tolerance)
        assert torch.equal(compact(t.weight, t.axis, t.rows), t.leaf.to(t.weight.dtype).reshape(t.leaf.shape))
        if t.weight.ndim:
            others = torch.ones(t.weight.shape[t.axis], dtype=torch.bool, device=t.rows.device)
            others[t.rows] = False
            ours, theirs = (compact(d, t.axis, others.nonzero().flatten()) for d in (t.weight, before))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_reference_in_float64(name, dtype, backend, device):
    skip_interpreted(dtype, backend, device)
    tensors = [make(*shape, dtype, device) for shape in SHAPES]
    plain = RowTensor(torch.randn(6, 5, dtype=DTYPES[dtype][0], device=device))
    frozen, twins = [t.weight.clone() for t in tensors], [twin(t) for t in [*tensors, plain]]
    ours = plan(name, [*tensors, plain])
    with use_backend("reference"):
        exact = plan(name, twins)
    for step in range(3):
        grads = gradients([*tensors, plain], missing=step)  # a tensor without a gradient has younger rows afterwards
        kept = [None if g is None else g.clone() for g in grads]
        ours.step(grads, hyper(name))
        with use_backend("reference"):
            exact.step([None if g is None else g.double() for g in grads], hyper(name))
        assert all(g is None or torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    assert_equal(tensors, twins[:-1], frozen)
    close(plain.leaf, twins[-1].leaf, 2e-6)


def test_rows_of_different_age(backend, device):
    tensors = [make(*shape, device=device) for shape in SHAPES]
    for t in tensors:
        t.state["step"] = torch.randint(0, 40, (len(t.leaf),)).float().to(device)
        t.state |= {"exp_avg": torch.randn_like(t.leaf), "exp_avg_sq": torch.rand_like(t.leaf)}
    ages = [t.state["step"].clone() for t in tensors]
    frozen, twins = [t.weight.clone() for t in tensors], [twin(t) for t in tensors]
    grads = gradients(tensors)
    plan("adam", tensors).step(grads, hyper("adam"))
    with use_backend("reference"):
        plan("adam", twins).step([g.double() for g in grads], hyper("adam"))
    assert_equal(tensors, twins, frozen)
    assert all(torch.equal(t.state["step"], age + 1) for t, age in zip(tensors, ages, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_last_weights(dtype, backend, device):
    """With leaves that lie as the weight does, and with contiguous ones; with gradients that lie as neither."""
    skip_interpreted(dtype, backend, device)
    tensors = [make(*shape, dtype, device, torch.channels_last) for shape in SHAPES]
    for t in tensors[:2]:
        t.leaf = t.leaf.contiguous(memory_format=torch.channels_last)
    frozen, twins = [t.weight.clone() for t in tensors], [twin(t) for t in tensors]
    grads = gradients(tensors)
    grads[0], grads[6] = grads[0].contiguous(), grads[6].contiguous(memory_format=torch.channels_last)
    grads[4] = grads[4].t().contiguous().t()
    ours = plan("adamw", tensors)
    with use_backend("reference"):
        exact = plan("adamw", twins)
    for _ in range(2):
        ours.step(grads, hyper("adamw"))
        with use_backend("reference"):
            exact.step([g.double() for g in grads], hyper("adamw"))
    assert_equal(tensors, twins, frozen)
    assert tensors[0].state["exp_avg"].stride() == tensors[0].leaf.stride()


def test_memory_that_the_kernels_do_not_read(backend, device):
    """Leaves that are views at odd offsets or not runs of memory, a weight with three strides, half gradients."""
    base = torch.randn(200, device=device)
    odd = make((9, 3, 3, 3), 0, 4, device=device)
    odd.leaf = base[1:109].view(4, 3, 3, 3).copy_(odd.leaf)
    transposed = make((12, 16), 0, 5, device=device)
    transposed.leaf = transposed.leaf.t().contiguous().t()
    strided = make((5, 4, 3, 2), 0, 3, device=device)
    apart = torch.empty(2, 3, 9, 5, device=device).permute(3, 2, 1, 0)[:, ::2, :, :][:, :4]
    strided.weight = apart.copy_(strided.weight)
    tensors = [odd, transposed, strided, make((6, 5), 0, 6, device=device)]
    frozen, twins = [t.weight.clone() for t in tensors], [twin(t) for t in tensors]
    grads = gradients(tensors)
    grads[3] = grads[3].bfloat16()
    plan("adam", tensors).step(grads, hyper("adam"))
    with use_backend("reference"):
        plan("adam", twins).step([g.double() for g in grads], hyper("adam"))
    assert_equal(tensors, twins, frozen)
    assert base[0].isfinite()
    assert len(Table("adam", [strided], True).indirect) == 1


def test_many_tensors(backend, device):
    count = 40 if backend == "triton" else 300
    tensors = [make(*SHAPES[3 + i % 3], device=device) for i in range(count)]
    frozen, twins, grads = [t.weight.clone() for t in tensors], [twin(t) for t in tensors], gradients(tensors)
    plan("momentum", tensors).step(grads, hyper("momentum"))
    with use_backend("reference"):
        plan("momentum", twins).step([g.double() for g in grads], hyper("momentum"))
    assert_equal(tensors, twins, frozen)


def test_large_enough_for_several_threads(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("too many elements for the interpreter")
    tensors = [make(shape, 0, shape[0] // 2, device=device) for shape in ((300, 2500), (3, 100_000), (70_000,))]
    frozen, twins, grads = [t.weight.clone() for t in tensors], [twin(t) for t in tensors], gradients(tensors)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        plan("adam", tensors).step(grads, hyper("adam"))
    finally:
        torch.set_num_threads(threads)
    with use_backend("reference"):
        plan("adam", twins).step([g.double() for g in grads], hyper("adam"))
    assert_equal(tensors, twins, frozen)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scaled_gradients_and_inf(name, backend, device):
    tensors, scale = [make(*shape, device=device) for shape in SHAPES], torch.full((1,), 1024.0, device=device)
    others = copy.deepcopy(tensors)
    scaled, plain = plan(name, tensors), plan(name, others)
    for _ in range(2):
        grads = gradients(tensors)
        scaled.step([g * 1024 for g in grads], hyper(name), scale, torch.zeros(1, device=device))
        before = copy.deepcopy([(t.leaf, t.weight, t.state) for t in tensors])
        grads_with_inf = [torch.full_like(g, float("inf")) for g in grads]
        scaled.step(grads_with_inf, hyper(name), scale, torch.ones(1, device=device))
        for t, (leaf, weight, state) in zip(tensors, before, strict=True):
            assert torch.equal(t.leaf, leaf)
            assert torch.equal(t.weight, weight)
            assert all(torch.equal(value, state[key]) for key, value in t.state.items())
        plain.step(grads, hyper(name))
    for t, other in zip(tensors, others, strict=True):
        assert torch.equal(t.leaf, other.leaf)  # 1024 is a power of two
        assert all(torch.equal(value, other.state[key]) for key, value in t.state.items())


TORCH = {
    "adam": (torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8}),
    "adam beta 0": (torch.optim.Adam, {"betas": (0.0, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"betas": (0.5, 0.9), "eps": 1e-8, "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name, dtype, backend, device):
    """20 steps of a whole parameter and a scalar. The reference: to the bit, in torch's dtypes, bfloat16 too."""
    if dtype == torch.bfloat16 and backend != "reference":
        pytest.skip("parameters that are bfloat16 as a whole are the reference's")
    kind, options = TORCH[name]
    ours = [torch.randn(shape, device=device).to(dtype) for shape in ((5, 33), ())]
    theirs = [p.clone().requires_grad_() for p in ours]
    optimizer = kind(theirs, lr=1e-2, foreach=False, **options)
    update = RowUpdate(rule(name), [RowTensor(p) for p in ours], momentum=name == "momentum")
    for _ in range(20):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        update.step(grads, Hyperparameters(lr=1e-2, **options))
        for p, q in zip(ours, theirs, strict=True):
            if backend == "reference":
                assert torch.equal(p, q)
            else:
                # torch fuses multiplications with additions where a vector is full and not in its tail: up to a
                # rounding a step of the moments, whose ratio moves the parameter by lr
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(p, q.detach(), rtol=4 * eps, atol=20 * eps)


def test_a_tensor_as_learning_rate(backend, device):
    for value, dtype in ((0.25, torch.float32), (0.25, torch.float64), (0.25, torch.bfloat16), (2, torch.int64)):
        tensors = [make(*shape, device=device) for shape in SHAPES[:5]]
        others, grads = copy.deepcopy(tensors), gradients(tensors)
        plan("adam", tensors).step(grads, hyper("adam", lr=torch.tensor([value], dtype=dtype, device=device)))
        plan("adam", others).step(grads, hyper("adam", lr=float(value)))
        assert all(torch.equal(t.leaf, o.leaf) for t, o in zip(tensors, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_a_learning_rate_on_a_gpu_reaches_the_kernels_in_float32_or_float64(dtype):
    placed = _placed(Hyperparameters(torch.ones((), dtype=dtype, device="meta")), torch.device("meta")).lr
    assert placed.dtype == (torch.float32 if dtype == torch.float32 else torch.float64)
    assert _placed(Hyperparameters(torch.full((1,), 3, dtype=dtype)), torch.device("cuda:1")).lr == 3.0


@pytest.mark.parametrize("lr", [torch.ones(2), torch.ones(0), torch.tensor(1j), torch.tensor(True)], ids=repr)
def test_a_learning_rate_that_is_no_number(lr):
    tensor = make((5, 4), 0, 2)
    before = tensor.leaf.clone()
    with pytest.raises(TypeError, match=r"lr must be a number or a tensor of one real number, got torch\.\w+ \["):
        RowUpdate("sgd", [tensor]).step([torch.ones_like(tensor.leaf)], Hyperparameters(lr))
    with pytest.raises(TypeError, match="lr must be a number"):
        dense_step("sgd", tensor, torch.ones_like(tensor.leaf), Hyperparameters(lr))
    assert torch.equal(tensor.leaf, before)
    with pytest.raises(TypeError, match="lr must be a number"):
        SparseFinetuner(nn.Linear(2, 2), lr=lr)


def test_results_do_not_depend_on_the_instruction_set(backend, device):
    native = pytest.importorskip("minegan_fast._C")
    if backend != "cpp":
        pytest.skip("the CPU's")
    results, best = [], native.cpu_isa()
    start = [make(*shape, "bfloat16") for shape in SHAPES]
    grads = gradients(start)
    try:
        for isa in range(best + 1):
            native.set_cpu_isa(isa)
            tensors = copy.deepcopy(start)
            plan("adamw", tensors).step(grads, hyper("adamw"))
            results.append([*(t.weight for t in tensors), *(v for t in tensors for v in t.state.values())])
    finally:
        native.set_cpu_isa(best)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_memory_that_moves_is_followed(backend, device):
    """`.data =`, other gradients, other state of the same plan; a deep copy steps by itself."""
    tensors = [make(*shape, device=device) for shape in SHAPES]
    for t in tensors:
        t.leaf, t.weight = nn.Parameter(t.leaf), nn.Parameter(t.weight, requires_grad=False)
    others = copy.deepcopy(tensors)
    ours, same = plan("adam beta 0", tensors), plan("adam beta 0", others)
    with torch.no_grad():
        for step in range(4):
            if step == 1:
                tensors[0].leaf.data = tensors[0].leaf.data.clone()
                tensors[1].weight.data = tensors[1].weight.data.clone()
            elif step == 2:
                tensors[2].weight.data = tensors[2].weight.data.contiguous(memory_format=torch.channels_last)
            elif step == 3:
                kept = ours
                ours = copy.deepcopy(ours)
                assert not {t.leaf.data_ptr() for t in ours.tensors} & {t.leaf.data_ptr() for t in kept.tensors}
                tensors = ours.tensors
            grads = gradients(others)
            ours.step([g.clone() for g in grads], hyper("adam beta 0"))
            same.step(grads, hyper("adam beta 0"))
            for t, other in zip(tensors, others, strict=True):
                assert torch.equal(t.leaf, other.leaf)
                assert torch.equal(t.weight, other.weight)


def test_a_module_that_changes_dtype_takes_its_state_along(backend, device):
    layer = nn.Linear(5, 3, device=device)
    update = RowUpdate("adam", [RowTensor(p) for p in layer.parameters()])
    update.step([torch.ones_like(p) for p in layer.parameters()], Hyperparameters(lr=0.1))
    layer.double()
    update.step([torch.ones_like(p) for p in layer.parameters()], Hyperparameters(lr=0.1))
    assert update.tensors[0].state["exp_avg"].dtype == torch.float64
    assert update.tensors[0].state["step"].tolist() == [2, 2, 2]


def test_autograd_notices_the_write(backend, device):
    t = make((6, 5), 0, 3, device=device)
    t.leaf = nn.Parameter(t.leaf)
    t.weight = nn.Parameter(t.weight)
    unused = nn.Parameter(torch.ones(2, device=device))
    update = RowUpdate("adam", [t, RowTensor(unused)])
    results = [p.square().sum() for p in (t.leaf, t.weight, unused)]
    update.step([torch.ones_like(t.leaf), None], Hyperparameters(lr=0.1))
    for result in results[:2]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()
    results[2].backward()


def test_wrong_input(backend, device):
    def tensor(**changes):
        parts = {"leaf": torch.zeros(2, 5), "weight": torch.zeros(4, 5), "rows": torch.tensor([1, 3]), "axis": 0}
        parts |= changes
        return RowTensor(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in parts.items()})

    for changes, kind, message in (
        ({"leaf": torch.zeros(2, 5).int()}, TypeError, "dense floating-point tensor, got torch.int32"),
        ({"leaf": torch.zeros(1, 5).expand(2, 5)}, ValueError, "clone"),
        ({"rows": None}, ValueError, "weight and rows belong together"),
        ({"leaf": torch.zeros(2, 5).double()}, TypeError, "got torch.float32 and torch.float64"),
        ({"axis": 2}, ValueError, "axis must be one of the weight's 2, got 2"),
        ({"rows": torch.tensor([], dtype=torch.int64)}, ValueError, "non-empty int64 vector"),
        ({"rows": torch.tensor([1.0, 3.0])}, ValueError, "non-empty int64 vector"),
        ({"leaf": torch.zeros(2, 4)}, ValueError, r"must have shape \[2, 5\], got \[2, 4\]"),
        ({"rows": torch.tensor([1, 4])}, ValueError, "distinct and between 0 and 3"),
        ({"rows": torch.tensor([-1, 3])}, ValueError, "distinct and between 0 and 3"),
        ({"rows": torch.tensor([1, 1])}, ValueError, "distinct"),
        ({"state": {"exp_avg": torch.zeros(2, 4)}}, ValueError, "exp_avg must have its leaf's shape"),
        ({"state": {"step": torch.zeros(3)}}, ValueError, "step must be one number for each of 2 rows"),
    ):
        with pytest.raises(kind, match=message):
            RowUpdate("adam", [tensor(**changes)])
    with pytest.raises(ValueError, match="optimizer must be one of 'adam', 'adamw', 'sgd', got 'lion'"):
        RowUpdate("lion", [tensor()])
    t = tensor()
    update, grad = RowUpdate("adam", [t]), torch.ones(2, 5, device=device)
    for grads, given, kind, message in (
        ([], {}, ValueError, "there are 1 tensors, got 0 gradients"),
        ([grad.to_sparse()], {}, TypeError, "sparse"),
        ([grad.int()], {}, TypeError, "torch.int32"),
        ([grad[:1]], {}, ValueError, r"shape and device, \[2, 5\]"),
        ([1.0], {}, TypeError, "got float"),
        ([grad], {"ema_decay": 0.9}, ValueError, "ema=True"),
    ):
        with pytest.raises(kind, match=message):
            update.step(grads, Hyperparameters(lr=0.1, **given))
    with pytest.raises(ValueError, match="momentum=True"):
        RowUpdate("sgd", [tensor()]).step([grad], Hyperparameters(lr=0.1, momentum=0.9))
    assert not t.leaf.any()
    assert not t.state["step"].any()
    update.step([grad], Hyperparameters(lr=0.1))
    assert t.weight[t.rows].all()
