"""What the package relies on of each private name of torch, checked on the torch that is installed."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minegan_fast import _torch


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Asked(nn.Parameter):
    """A subclass that counts how often it is asked, and hides its gradient, its data and whether it requires one."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Asked.asked += 1
        return super().__torch_function__(func, types, args, kwargs or {})

    @property
    def grad(self):
        return "hidden"

    @property
    def data(self):
        return "hidden"

    @property
    def requires_grad(self):
        return "hidden"


def test_past_subclasses():
    x = Asked(torch.ones(2))
    before = Asked.asked
    with _torch.PastSubclasses():
        y = x * 2
    assert Asked.asked == before
    assert type(y) is Tensor
    assert y.requires_grad
    x * 2
    assert Asked.asked > before


def test_version():
    x = torch.ones(2)
    first = _torch.version_of(x)
    x.add_(1)
    assert _torch.version_of(x) == _torch.version_of(x.detach()) == first + 1
    torch.autograd.graph.increment_version([x])
    assert _torch.version_of(x) == first + 2
    with torch.inference_mode():
        made = torch.ones(2)
    with pytest.raises(RuntimeError, match="Inference tensors do not track version counter"):
        _torch.version_of(made)


def test_own_gradient():
    x = Asked(torch.ones(2))
    assert _torch.own_grad(x) is None
    g = torch.ones(2)
    with _torch.PastSubclasses():
        _torch.set_own_grad(x, g)
        assert _torch.own_grad(x) is g
        _torch.set_own_grad(x, None)
        assert _torch.own_grad(x) is None
    assert x.grad == "hidden"


def test_own_data():
    x = Asked(torch.ones(2))
    with _torch.PastSubclasses():
        data = _torch.own_data(x)
        assert type(data) is Tensor
        assert data.data_ptr() == x.data_ptr()
        assert not data.requires_grad
        new = torch.zeros(3, dtype=torch.float64)
        _torch.set_own_data(x, new)
        assert x.data_ptr() == new.data_ptr()
        assert x.dtype == torch.float64
    assert x.data == "hidden"


def test_own_requires_grad():
    for requires_grad in (True, False):
        x = Asked(torch.ones(2), requires_grad)
        with _torch.PastSubclasses():
            assert _torch.own_requires_grad(x) is requires_grad
        assert x.requires_grad == "hidden"


def test_views():
    x = torch.ones(2, 3)
    assert _torch.is_view(x.view(6))
    assert not _torch.is_view(x)
    assert not _torch.is_view(x.clone())


def test_functions_that_a_subclass_is_asked_for_an_attribute():
    seen = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2, 3).as_subclass(Asked)
    for name in ("data", "grad", "requires_grad", "T"):
        seen.clear()
        getattr(x, name)
        assert _torch.descriptor(name).__get__ in seen
    seen.clear()
    x.grad = None
    del x.grad
    assert seen == [_torch.descriptor("grad").__set__, _torch.descriptor("grad").__delete__]


def test_tracing_tells_of_itself():
    seen = []
    torch.jit.trace(lambda x: seen.append(_torch.is_tracing()) or x + 1, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert not _torch.is_tracing()


def test_fill_with_zeros():
    tensors = [torch.ones(2, 3), torch.ones(3, 2).T.to(torch.float64), torch.ones(())]
    _torch.fill_with_zeros(tensors)
    assert all(t.count_nonzero() == 0 and t._version == 1 for t in tensors)


def test_overlap():
    assert _torch.overlaps_itself(torch.ones(1).expand(3))
    assert not _torch.overlaps_itself(torch.ones(3, 2).T)


def test_gradient_hooks():
    parameter = nn.Parameter(torch.ones(2))
    assert not _torch.has_gradient_hooks(parameter)
    for register in (parameter.register_hook, parameter.register_post_accumulate_grad_hook):
        handle = register(lambda _: None)
        assert _torch.has_gradient_hooks(parameter)
        handle.remove()
        assert not _torch.has_gradient_hooks(parameter)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_and_its_backward(transposed):
    x = random(2, 4, 5, 5).requires_grad_()
    weight = (random(4, 3, 3, 3) if transposed else random(6, 2, 3, 3)).requires_grad_()
    output_padding, groups = ([1, 0], 1) if transposed else ([0, 0], 2)
    arguments = [2, 2], [1, 0], [1, 1], transposed, output_padding, groups
    y = _torch.convolution(x, weight, None, *arguments)
    if transposed:
        expected = F.conv_transpose2d(x, weight, None, 2, (1, 0), (1, 0))
    else:
        expected = F.conv2d(x, weight, None, 2, (1, 0), 1, 2)
    torch.testing.assert_close(y, expected)
    gy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(expected, (x, weight), gy)
    found, nothing, _ = _torch.convolution_backward(gy, x, weight, None, *arguments, (True, False, False))
    torch.testing.assert_close(found, dx)
    assert nothing is None
    # Of an operand that the wanted gradient does not depend on, only the shape is read.
    shape_alone = weight.new_full((1,), float("nan")).expand(weight.shape)
    _, found, _ = _torch.convolution_backward(gy, x, shape_alone, None, *arguments, (False, True, False))
    torch.testing.assert_close(found, dw)


def test_backward_of_rectifiers():
    x, gy = torch.tensor([-2.0, -0.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert _torch.threshold_backward(gy, x, 0).tolist() == [0, 0, 0, 4]
    assert _torch.leaky_relu_backward(gy, x, 0.5, False).tolist() == [0.5, 1, 1.5, 4]


def test_average_pool_and_its_backward():
    x = random(2, 3, 5, 7).requires_grad_()
    arguments = [3], [2], [1], True, False, None
    y = _torch.avg_pool2d(x, *arguments)
    torch.testing.assert_close(y, F.avg_pool2d(x, 3, 2, 1, True, False))
    gy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, gy)
    shape_alone = torch.full_like(x, float("nan"))
    torch.testing.assert_close(_torch.avg_pool2d_backward(gy, shape_alone, *arguments), dx)


def test_another_shape_without_a_view():
    class Flat(Function):
        @staticmethod
        def forward(ctx, x):
            return _torch.without_view(x * 1, (x.numel(),))

        @staticmethod
        def backward(ctx, gy):
            return gy.view(2, 3)

    x = torch.arange(6.0).view(2, 3).requires_grad_()
    y = Flat.apply(x)
    assert not _torch.is_view(y)
    y.mul_(2)  # of a view that a Function returned it is an error
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))
    plain = torch.ones(2, 3)
    assert _torch.without_view(plain, (3, 2)).data_ptr() == plain.data_ptr()


class Probe(Function):
    """Asks in its backward which of its two inputs the pass reaches."""

    said: tuple

    @staticmethod
    def forward(ctx, x, w):
        return x * w

    @staticmethod
    def backward(ctx, gy):
        Probe.said = tuple(_torch.pass_reaches(node, unknown=None) for node, _ in ctx.next_functions)
        return gy, gy


def test_which_nodes_a_pass_reaches():
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = Probe.apply(x.exp(), w.exp()).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    assert Probe.said == (True, False)
    y.backward(inputs=[w], retain_graph=True)
    assert Probe.said == (False, True)
    y.backward(retain_graph=True)
    assert Probe.said == (True, True)
    assert _torch.pass_reaches(y.grad_fn, unknown=None) is None, "no pass runs"


def test_which_leaves_a_pass_reaches():
    """backward() brings a leaf its gradient. Of the leaf that grad() is given the engine will not say."""
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    y = Probe.apply(x, w).sum()
    y.backward(retain_graph=True)
    assert Probe.said == (True, True)
    y.backward(inputs=[x], retain_graph=True)
    assert Probe.said == (True, False)
    torch.autograd.grad(y, x)
    assert Probe.said == (None, False)


def test_leaves_of_a_graph():
    x, w, v = (torch.ones(2, requires_grad=True) for _ in range(3))
    y = Probe.apply(x * 2, w) + x + torch.ones(2)
    assert set(_torch.leaves_of(y * y.detach())) == {x, w}
    assert len(_torch.leaves_of(y)) == 2
    assert _torch.leaves_of(v) == [v]
    assert _torch.leaves_of(v.detach()) == []


class Noted(Function):
    """Notes in its backward the pass that runs, and what is called after it."""

    events: list

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gy):
        Noted.events.append(_torch.current_pass())
        if len(Noted.events) == 1:
            _torch.after_pass(lambda: Noted.events.append(x_grad()))
        return gy


def x_grad() -> bool:
    return Noted.leaf.grad is not None


def test_passes_have_numbers_and_an_end():
    Noted.events, Noted.leaf = [], torch.ones(2, requires_grad=True)
    assert _torch.current_pass() == -1
    Noted.apply(Noted.apply(Noted.leaf)).sum().backward()
    first, again, whole = Noted.events
    assert first == again >= 0
    assert whole, "the callback comes when the gradient is there"
    Noted.apply(Noted.leaf).sum().backward()
    assert Noted.events[-1] not in (first, -1)
    assert _torch.current_pass() == -1


def test_transforms():
    said = []

    def function(x):
        said.append(_torch.transforms_active())
        return x.sum()

    torch.func.vmap(function)(torch.ones(2, 3))
    torch.func.grad(function)(torch.ones(3))
    function(torch.ones(3))
    with torch.autograd.forward_ad.dual_level():
        function(torch.ones(3))
    function(torch.ones(3))
    assert said == [True, True, False, True, False]


class Doubled(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return factor * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gy):
        return ctx.factor * gy, None


def test_a_function_is_applied_with_and_without_transforms(monkeypatch):
    x = random(3).requires_grad_()
    _torch.apply_function(Doubled, x, 2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    both = torch.func.vmap(lambda x: _torch.apply_function(Doubled, x, 2))(torch.ones(2, 3))
    assert torch.equal(both, torch.full((2, 3), 2.0))
    monkeypatch.setattr(Function, "apply", None)  # it is gone past without a transform
    assert torch.equal(_torch.apply_function(Doubled, x, 2), 2 * x)


def test_hooks_on_saved_tensors():
    assert not _torch.saved_tensors_are_hooked()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert _torch.saved_tensors_are_hooked()
    assert not _torch.saved_tensors_are_hooked()


def test_checkpointing_hooks_saved_tensors():
    said = []

    def function(x):
        said.append(_torch.saved_tensors_are_hooked())
        return x.exp()

    torch.utils.checkpoint.checkpoint(function, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert said == [True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing():
    said = []

    def function(x):
        said.append(_torch.is_tracing())
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    function(torch.ones(2))
    assert said == [True, False]


def test_untraced():
    said = []

    @_torch.untraced
    def function(x):
        said.append(torch.compiler.is_dynamo_compiling())
        return x + 1

    torch._dynamo.reset()
    assert torch.equal(
        torch.compile(lambda x: function(2 * x) * 3, backend="eager")(torch.ones(2)), torch.full((2,), 9.0)
    )
    assert said == [False]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: function(2 * x) * 3, backend="eager", fullgraph=True)(torch.ones(3))


def test_dispatch_modes():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    assert not _torch.is_in_torch_dispatch_mode()
    with Mode():
        assert _torch.is_in_torch_dispatch_mode()


def test_convolution_classes():
    plain, transposed = nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1)
    assert isinstance(plain, _torch.CONVOLUTIONS)
    assert isinstance(transposed, _torch.CONVOLUTIONS)
    assert isinstance(transposed, _torch.TRANSPOSED_CONVOLUTIONS)
    assert not isinstance(plain, _torch.TRANSPOSED_CONVOLUTIONS)
    assert not isinstance(nn.Linear(1, 1), _torch.CONVOLUTIONS)


def test_batched_gradients():
    x, seen = torch.randn(3, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda grad: seen.append(_torch.is_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(x * 2, x, torch.ones(3))
    assert seen == [True]
    assert not _torch.is_batched(x)


def test_own_modules():
    net = nn.Sequential(nn.Linear(2, 2))
    assert _torch.own_modules(net) == {"0": net[0]}


def test_who_makes_a_parameter():
    """The constructor detaches a tensor of another class, which is asked."""

    class Asks(Tensor):
        made = False

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is Tensor.detach:
                Asks.made = cls.asks()
            return super().__torch_function__(func, types, args, kwargs or {})

        @staticmethod
        def asks():
            return _torch.parameter_is_made(2)

    tensor = torch.ones(2).as_subclass(Asks)
    tensor.detach()
    assert not Asks.made
    nn.Parameter(tensor)
    assert Asks.made


@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
def test_weight_norm_is_left_to_python():
    _torch.leave_weight_norm_to_python()
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    explained = torch._dynamo.explain(net)(torch.ones(1, 3))
    assert not any("weight_norm" in graph.code for graph in explained.graphs)


def test_own_parameters():
    layer = nn.Linear(2, 2)
    assert list(_torch.own_parameters(layer)) == ["weight", "bias"]
    other = nn.Parameter(torch.zeros(3))
    _torch.own_parameters(layer)["weight"] = other
    assert layer.weight is other
    assert next(layer.parameters()) is other
    _torch.own_parameters(layer).pop("bias")
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize(
    "watch",
    [
        lambda m: m.register_forward_hook(print),
        lambda m: m.register_forward_pre_hook(print),
        lambda m: m.register_full_backward_hook(print),
        lambda m: m.register_full_backward_pre_hook(print),
    ],
)
def test_watched(watch):
    layer = nn.Linear(2, 2)
    assert not _torch.watched(layer)
    handle = watch(layer)
    assert _torch.watched(layer)
    assert not _torch.watched(nn.Sequential(layer))
    handle.remove()
    assert not _torch.watched(layer)


def test_compiled_module():
    layer = nn.Linear(2, 2)
    assert _torch.compiled_module(torch.compile(layer)) is layer
    assert _torch.compiled_module(layer) is None


def test_grad_scaler_leaves_the_unscaling_to_the_optimizer():
    class Recording(_torch.UnscalingOptimizer):
        def step(self):
            self.seen = self.grad_scale.item(), self.found_inf.item(), parameter.grad.tolist()

    parameter = nn.Parameter(torch.ones(2))
    optimizer = Recording([parameter], {})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.unscale_in_step()
    for factor, found in ((1.0, 0.0), (float("inf"), 1.0)):
        parameter.grad = None
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        assert optimizer.seen == (8.0, found, [8.0 * factor] * 2)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        scaler.update()


def test_grad_scaler_unscales_for_an_optimizer_that_does_not_ask_for_it():
    class Counting(_torch.UnscalingOptimizer):
        steps = 0

        def step(self):
            self.steps += 1
            assert not hasattr(self, "grad_scale")
            assert parameter.grad.tolist() == [1.0, 1.0]

    parameter = nn.Parameter(torch.ones(2))
    optimizer = Counting([parameter], {})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf")):
        parameter.grad = None
        scaler.scale((parameter * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps == 1, "the step with an inf is skipped"
