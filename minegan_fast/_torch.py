"""The one door to what PyTorch does not document: every private name that the package needs, under a name of ours.

tests/test_torch.py and test_torch_ddp.py call each of them on the torch that is installed and check what the package
relies on. Where a new version of torch lacks a name, importing or calling it here is an AttributeError or an
ImportError; nothing falls back to a guess.
"""

# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# In this file alone, because torch neither exports these names nor, some of them, declares them in its stubs.

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_in_torch_dispatch_mode"]  # whether someone, such as the compiler, looks at every operation of ATen

# Tensors.

PastSubclasses = torch._C.DisableTorchFunctionSubclass
"""A context in which torch does not ask `__torch_function__` of tensor subclasses, but runs the operation itself."""

version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
"""How often a tensor's memory was written to in place. RuntimeError for a tensor made in inference mode."""


def descriptor(name: str) -> Any:
    """What gets, sets and deletes an attribute of Tensor: `__torch_function__` is given its methods as the function."""
    return inspect.getattr_static(Tensor, name)


# Gradient, data and requires_grad of the tensor itself. A subclass may define them as properties of its own; these
# getters and setters go past them.
_grad, _data, _requires_grad = map(descriptor, ("grad", "data", "requires_grad"))
own_grad: Callable[[Tensor], Tensor | None] = _grad.__get__
set_own_grad: Callable[[Tensor, Tensor | None], None] = _grad.__set__
own_data: Callable[[Tensor], Tensor] = _data.__get__
set_own_data: Callable[[Tensor, Tensor], None] = _data.__set__
own_requires_grad: Callable[[Tensor], bool] = _requires_grad.__get__

fill_with_zeros: Callable[[list[Tensor]], None] = torch._foreach_zero_
"""Writes zeros into tensors, one at least; on a GPU in a few launches for all of them."""

is_tracing: Callable[[], bool] = torch.jit.is_tracing
"""Whether torch.jit.trace records what is called."""

is_view = Tensor._is_view
"""Whether autograd takes the tensor for a view of another."""


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements certainly share memory, as those of an expanded tensor do."""
    return torch._debug_has_internal_overlap(tensor) == 1


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether this very tensor has a hook that waits for its gradient or for the accumulation of it."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


# Functions of ATen. ATen keeps their schemas stable, but their names are not documented.
convolution = torch.ops.aten.convolution
convolution_backward = torch.ops.aten.convolution_backward
threshold_backward = torch.ops.aten.threshold_backward
leaky_relu_backward = torch.ops.aten.leaky_relu_backward
avg_pool2d = torch.ops.aten.avg_pool2d
avg_pool2d_backward = torch.ops.aten.avg_pool2d_backward


def without_view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same memory in another shape, as a tensor that autograd does not take for a view.

    A Function may therefore return it, and whoever gets it may write into it."""
    return torch.ops.aten._unsafe_view(tensor, list(shape))


# The backward pass that runs, and who watches the forward.


def pass_reaches(node: torch.autograd.graph.Node, unknown: bool) -> bool:
    """Whether the backward pass that runs now will come to this node of the graph.

    unknown: the answer where the engine raises instead. It does so for a leaf that torch.autograd.grad was given, and
        outside of a backward pass."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return unknown


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves to which a backward from the tensor brings a gradient, each once."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found, seen, left = [], {tensor.grad_fn}, [tensor.grad_fn]
    while left:
        node = left.pop()
        if hasattr(node, "variable"):  # only nodes that accumulate have one
            found.append(node.variable)
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        left += new
    return found


def current_pass() -> int:
    """The number of the backward pass that runs in this thread; -1 where none runs."""
    return torch._C._current_graph_task_id()


def after_pass(callback: Callable[[], None]) -> None:
    """Calls back when the backward pass that runs now has ended, before `backward()` returns."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def transforms_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) or forward-mode differentiation runs this code."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def apply_function(function: type[torch.autograd.Function], *args):
    """`function.apply(*args)`. Without a transform of torch.func it leaves out what Function does for one, such as
    reading the signature of its forward, which takes longer than a small layer."""
    if torch.compiler.is_compiling() or transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]


is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor stands for several, as gradients do in a backward pass with is_grads_batched."""


def saved_tensors_are_hooked() -> bool:
    """Whether hooks on saved tensors are set, as checkpointing and offloading set them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


is_tracing = torch.jit.is_tracing
"""Whether torch.jit.trace records this code."""

untraced = torch._disable_dynamo
"""A decorator: torch.compile leaves calls of the function to Python. torch.compiler.disable does the same, and imports
the compiler at once."""

# Modules.

CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, BATCH_NORMS = _ConvNd, _ConvTransposeNd, _BatchNorm


def parameter_is_made(depth: int) -> bool:
    """Whether the function that is `depth` calls above the caller's is the constructor of nn.Parameter."""
    return sys._getframe(depth + 1).f_code is nn.Parameter.__new__.__code__


@functools.cache
def leave_weight_norm_to_python() -> None:
    """torch.compile breaks its graph at weight_norm's function, which otherwise gets there past __torch_function__.

    This imports the compiler."""
    import torch._dynamo

    torch._dynamo.disallow_in_graph(torch._weight_norm)


own_modules: Callable[[nn.Module], dict[str, nn.Module | None]] = operator.attrgetter("_modules")
own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = operator.attrgetter("_parameters")
"""The dictionary in which a module keeps its own parameters. What is put there is a parameter of it, unchecked."""


def watched(module: nn.Module) -> bool:
    """Whether hooks of this very module run when it is called, or when gradients flow through it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module inside the one that torch.compile returned; None where `model` is not such a module."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


class UnscalingOptimizer(torch.optim.Optimizer):
    """An optimizer to which GradScaler can leave the division by the scale and the skipping of a step."""

    def unscale_in_step(self) -> None:
        """From now on GradScaler leaves both to `step()`: it always calls it, sets `grad_scale` and `found_inf` before
        that, and deletes them after."""
        self._step_supports_amp_scaling = True


# DistributedDataParallel.


def active_ddp() -> DistributedDataParallel | None:
    """The wrapper whose forward runs."""
    return DistributedDataParallel._active_ddp_module


def reduce_these(ddp: DistributedDataParallel, named: list[tuple[str, nn.Parameter]]) -> None:
    """Gives DDP a new reducer, which reduces these parameters, in place of the one that its constructor made.

    The calls are those of the constructor. The communication hooks and the static graph of the old reducer are set
    anew. Called within a forward, the new reducer expects the backward of that forward."""
    ddp._module_parameters = [p for _, p in named]
    ddp._static_graph_delay_allreduce_enqueued = False  # its first backward is the new reducer's
    names = {i: name for i, (name, _) in enumerate(named)}
    sparse = {p for m in ddp.module.modules() if getattr(m, "sparse", False) for p in m.parameters(recurse=False)}
    ddp._ddp_init_helper(ddp._module_parameters, [p in sparse for _, p in named], names, ddp.static_graph)
    for hook, state in ddp._comm_hooks:
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
    if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()
