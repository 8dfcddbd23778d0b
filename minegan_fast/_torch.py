"""The one door to what PyTorch does not document: every private name that the package needs, under a name of ours.

A new version of torch is tried with tests/test_torch.py, which calls each of them. Nothing here answers with a guess
where a name is gone: importing or calling it is an AttributeError then, and that test says which.
"""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_in_torch_dispatch_mode"]

# Tensors. ----------------------------------------------------------------------------------------------------------

PastSubclasses = torch._C.DisableTorchFunctionSubclass
"""A context in which `__torch_function__` of tensor subclasses is not asked, as torch's own default method has it."""

version_of = operator.attrgetter("_version")
"""How often a tensor's memory was written to in place. RuntimeError for a tensor made in inference mode."""

# The gradient itself, past a subclass whose `grad` is a property of its own.
own_grad, set_own_grad = Tensor.grad.__get__, Tensor.grad.__set__
own_data, set_own_data = Tensor.data.__get__, Tensor.data.__set__
own_requires_grad = Tensor.requires_grad.__get__

is_view = Tensor._is_view


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements certainly share memory, as those of an expanded tensor do."""
    return torch._debug_has_internal_overlap(tensor) == 1


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether someone waits for the gradient of this very tensor, by hooks of either kind."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


# Functions whose schema ATen keeps and whose names it does not document.
convolution = torch.ops.aten.convolution
convolution_backward = torch.ops.aten.convolution_backward
threshold_backward = torch.ops.aten.threshold_backward
leaky_relu_backward = torch.ops.aten.leaky_relu_backward
avg_pool2d = torch.ops.aten.avg_pool2d
avg_pool2d_backward = torch.ops.aten.avg_pool2d_backward


def without_view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The same memory in another shape, which autograd does not take for a view: a Function may return it and others
    may write into it."""
    return torch.ops.aten._unsafe_view(tensor, list(shape))


# The backward pass under way. ----------------------------------------------------------------------------------------


def pass_reaches(node, unknown: bool) -> bool:
    """Whether the backward pass that runs now will come to this node of the graph. `unknown` is the answer where the
    engine refuses the question: for a leaf that autograd.grad was given, and in some versions for any leaf then."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return unknown


def current_pass() -> int:
    """A number of the backward pass that runs in this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


def after_pass(callback: Callable[[], None]) -> None:
    """Calls back when the backward pass that runs now has ended, before `backward()` returns."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def transforms_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, ...) is running this code."""
    return torch._C._are_functorch_transforms_active()


is_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor stands for several, as gradients do in a backward pass with is_grads_batched."""


def saved_tensors_are_hooked() -> bool:
    """Whether hooks on saved tensors are set, as checkpointing and offloading set them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


# Modules. ----------------------------------------------------------------------------------------------------------

CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS = _ConvNd, _ConvTransposeNd

own_modules = operator.attrgetter("_modules")
own_parameters = operator.attrgetter("_parameters")
"""The dictionary in which a module keeps its own parameters; what is put there is its parameter, without a check."""


def compiled_module(model: nn.Module) -> nn.Module | None:
    """The module inside what torch.compile made of it."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


class UnscalingOptimizer(torch.optim.Optimizer):
    """An optimizer to which GradScaler can leave the unscaling and the skipped step."""

    def unscale_in_step(self):
        """From now on GradScaler sets `grad_scale` and `found_inf` and always calls `step()`."""
        self._step_supports_amp_scaling = True


# DistributedDataParallel. --------------------------------------------------------------------------------------------


def active_ddp() -> DistributedDataParallel | None:
    """The wrapper whose forward is running."""
    return DistributedDataParallel._active_ddp_module


def reduce_these(ddp: DistributedDataParallel, named: list[tuple[str, nn.Parameter]]) -> None:
    """Gives DDP a new reducer, of these parameters, in place of the one that its constructor made: by the same calls,
    with its communication hooks and its static graph."""
    ddp._module_parameters = [p for _, p in named]
    names = {i: name for i, (name, _) in enumerate(named)}
    sparse = {p for m in ddp.module.modules() if getattr(m, "sparse", False) for p in m.parameters(recurse=False)}
    ddp._ddp_init_helper(ddp._module_parameters, [p in sparse for _, p in named], names, ddp.static_graph)
    for hook, state in ddp._comm_hooks:
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
    if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()
