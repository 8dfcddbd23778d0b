"""One optimizer step of the selected rows of many tensors as one call.

A tensor is a compact leaf [k, ...] with its moments; row i of it is a row rows[i] of a weight along `axis`. With
g = grad / grad_scale and t the number of steps of a row, in the order of operations of torch.optim:

    adam, sgd   g += λ w                                      adamw   w *= 1 - η λ
    adam(w)     m += (1 - β₁) (g - m),  v = β₂ v + (1 - β₂) g²
                w -= η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
    sgd         u = μ u + g,  w -= η u
    then        e += (1 - d) (w - e),  weight[rows] = w

Adam: Kingma & Ba 2015, arXiv 1412.6980; AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101. t is counted per row,
as rows that join later are younger; the bias corrections are computed in float64. A non-zero found_inf (that of
torch.amp.GradScaler) means that nothing changes. A tensor without a gradient only has its average e moved.

Leaf, gradient, moments and average are float32 or float64 and lie alike in memory; the weight has the leaf's
dtype or, with float32 leaves as its masters, bfloat16 or float16. What is laid out otherwise is copied or written
through by PyTorch; tensors of other dtypes, or whose rows are not one run of memory each, are the reference's.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._torch import PastSubclasses
from ._op import DTYPE_CODES, device_and_stream, mutating
from ._row_table import RowTensor, Table, check_row_tensor, fill_state, none_missing, refuse_capture, rows_are_flat

OPTIMIZERS = ("adam", "adamw", "sgd")
RULES = ("adam", "adamw", "sgd", "momentum")  # Rule in csrc/ops.h


@dataclass(slots=True)
class Hyperparameters:
    """The numbers of one step, as torch.optim names them."""

    lr: float | Tensor  # a tensor has one element, of any real dtype, and may be on any device
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    ema_decay: float | None = None  # None where no average is kept


def check_lr(lr: float | Tensor) -> None:
    """TypeError where a learning rate is a tensor that does not hold one real number."""
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.is_complex() or lr.dtype == torch.bool):
        raise TypeError(f"lr must be a number or a tensor of one real number, got {lr.dtype} {list(lr.shape)}")


def _placed(hyper: Hyperparameters, device: torch.device) -> Hyperparameters:
    """The same with lr as the kernels read it: a number or, from one GPU to another, float32 or float64 on `device`."""
    lr = hyper.lr
    if not isinstance(lr, Tensor):
        return hyper
    check_lr(lr)
    if "cpu" in (lr.device.type, device.type):
        return replace(hyper, lr=lr.item())
    return replace(hyper, lr=lr.to(device, lr.dtype if lr.dtype == torch.float32 else torch.float64))


class RowUpdate:
    """The step of `optimizer` ("adam" | "adamw" | "sgd") for a list of tensors, planned once and called often.

    State that is missing is made: zeros, and an average equal to the leaf. State of another dtype, device or memory
    layout than its leaf is replaced by one that fits.

    momentum: whether SGD keeps a momentum buffer. ema: whether averages are kept.

    Addresses are looked at before each step, and what has moved is planned again. Under CUDA-graph capture, where that
    would need a copy from the host, it is a RuntimeError: take one step before the capture, keep the gradients
    (`zero_grad(set_to_none=False)`), and give lr as a tensor on the device if it is to change between replays.

    TypeError, ValueError where tensors or rows do not fit each other.
    """

    def __init__(self, optimizer: str, tensors: Sequence[RowTensor], momentum: bool = False, ema: bool = False):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(map(repr, OPTIMIZERS))}, got {optimizer!r}")
        self.rule, self.momentum = "momentum" if optimizer == "sgd" and momentum else optimizer, momentum
        self.tensors, self.ema = list(tensors), ema
        for tensor in self.tensors:
            check_row_tensor(tensor)
        self._plan()

    @torch.no_grad()
    def _plan(self):
        with PastSubclasses():
            refuse_capture([t.leaf for t in self.tensors])
            self.held = [t.leaf for t in self.tensors] + [t.weight for t in self.tensors if t.weight is not None]
            self.addresses, self.layouts = [t.data_ptr() for t in self.held], self._layouts()
            kinds: dict[tuple, list[int]] = {}
            for i, t in enumerate(self.tensors):
                fill_state(t, self.rule, self.ema)
                flat = t.leaf.dtype in (torch.float32, torch.float64) and rows_are_flat(t.leaf)
                weight_dtype = t.leaf.dtype if t.weight is None else t.weight.dtype
                kinds.setdefault((t.leaf.device, t.leaf.dtype, weight_dtype, flat), []).append(i)
            self.tables = [
                (Table(self.rule, [self.tensors[i] for i in indices], flat), indices)
                for (*_, flat), indices in kinds.items()
            ]

    def _layouts(self) -> list[tuple]:
        return [(t.data_ptr(), t.dtype, t.stride()) for t in self.held]

    def moved(self) -> bool:
        """Whether a leaf or weight has other memory, dtype or strides than it was planned with."""
        with PastSubclasses():
            return self.layouts != self._layouts()

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Tensor | None],
        hyper: Hyperparameters,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        moved: bool | None = None,
    ) -> None:
        """Steps every tensor by its gradient; those with None only have their average moved.

        grads: one for each tensor, of its leaf's shape; read, never written.
        grad_scale, found_inf: one-element tensors as torch.amp.GradScaler gives them.
        moved: the answer of `moved()`, from a caller that has it; None compares the addresses.
        """
        if len(grads) != len(self.tensors):
            raise ValueError(
                f"there are {len(self.tensors)} tensors, got {len(grads)} gradients; give one or None each"
            )
        if self.ema != (hyper.ema_decay is not None):
            raise ValueError("ema_decay must be given if and only if the plan was made with ema=True")
        if (self.rule == "sgd" and hyper.momentum) or (self.rule == "momentum" and not hyper.momentum):
            raise ValueError("momentum must be non-zero if and only if the plan was made with momentum=True")
        with PastSubclasses():
            if moved or (moved is None and self.addresses != [*map(Tensor.data_ptr, self.held)]):
                self._plan()
            for table, indices in self.tables:
                numbers = _placed(hyper, table.device)
                table.take(grads if len(self.tables) == 1 else [grads[i] for i in indices])
                try:
                    row_update(table, numbers, _on(grad_scale, table.device), _on(found_inf, table.device))
                finally:
                    table.grads = ()
            written = self.held
            if not none_missing(grads):
                written = [
                    s for t, g in zip(self.tensors, grads, strict=True) if g is not None for s in (t.leaf, t.weight)
                ]
                written = [t for t in written if t is not None]
            torch.autograd.graph.increment_version(written)


@mutating
def row_update(table: Table, hyper: Hyperparameters, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if found_inf is not None and found_inf.item():
        return
    inverse = None if grad_scale is None else grad_scale.double().reciprocal().float()
    for t, grad in zip(table.tensors, table.grads, strict=True):
        if grad is not None:
            _step(table.rule, t, grad if inverse is None else grad * inverse.to(grad.dtype), hyper)
        if hyper.ema_decay is not None:
            t.state["ema"].lerp_(t.leaf, 1 - hyper.ema_decay)
        if grad is not None:
            t.write()


def _step(rule: str, t: RowTensor, grad: Tensor, hyper: Hyperparameters):
    """The equations, on the leaf. Ages that are all equal give what torch.optim gives, to the bit."""
    leaf, state, lr, decay = t.leaf, t.state, float(hyper.lr), hyper.weight_decay
    if decay and rule == "adamw":
        leaf.mul_(1 - lr * decay)
    elif decay:
        grad = grad.add(leaf, alpha=decay)
    if rule in ("sgd", "momentum"):
        if rule == "momentum":
            grad = state["momentum_buffer"].mul_(hyper.momentum).add_(grad)
        leaf.add_(grad, alpha=-lr)
        return
    beta1, beta2 = hyper.betas
    step, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
    step += 1
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    age = step[0].item()
    if bool((step == age).all()):
        correction1, correction2 = 1 - beta1**age, 1 - beta2**age
        denominator = (square.sqrt() / correction2**0.5).add_(hyper.eps)
        leaf.addcdiv_(mean, denominator, value=-(lr / correction1))
    else:
        age = step.double().reshape(-1, *[1] * (leaf.ndim - 1))
        correction1, correction2 = ((1 - beta**age).to(leaf.dtype) for beta in (beta1, beta2))
        denominator = (square.sqrt() / correction2.sqrt()).add_(hyper.eps)
        leaf.sub_(lr / correction1 * mean / denominator)


@torch.no_grad()
def dense_step(optimizer: str, tensor: RowTensor, grad: Tensor, hyper: Hyperparameters) -> None:
    """One step of one tensor without a plan, by the reference; makes the state that is missing."""
    rule = "momentum" if optimizer == "sgd" and hyper.momentum else optimizer
    fill_state(tensor, rule, False)
    _step(rule, tensor, grad, _placed(hyper, tensor.leaf.device))


# Launchers.


def _numbers(hyper: Hyperparameters) -> array:
    """RowStep in csrc/ops.h. An lr that is a tensor is 0 here: the kernel reads it from its own argument."""
    lr = 0.0 if isinstance(hyper.lr, Tensor) else hyper.lr
    ema = 0.0 if hyper.ema_decay is None else 1 - hyper.ema_decay
    logs = [math.log2(beta) if beta else -math.inf for beta in hyper.betas]
    return array("d", (lr, *hyper.betas, *logs, hyper.eps, hyper.weight_decay, hyper.momentum, ema))


def _on(flag: Tensor | None, device: torch.device) -> Tensor | None:
    """One of GradScaler's numbers on that device in float32, as the kernels read it."""
    if flag is None or (flag.dtype == torch.float32 and flag.device == device):
        return flag
    return flag.to(device, torch.float32)


def _flag(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@row_update.register("cpp", dtypes=(torch.float32, torch.float64))
def _(native, table, hyper, grad_scale, found_inf):
    if not table.flat:
        return row_update.reference(table, hyper, grad_scale, found_inf)
    grads, numbers = array("q", table.addresses), _numbers(hyper)
    native.row_update_cpu(
        DTYPE_CODES[table.dtype],
        DTYPE_CODES[table.weight_dtype],
        RULES.index(table.rule),
        table.words.data_ptr(),
        grads.buffer_info()[0],
        len(grads),
        numbers.buffer_info()[0],
        _flag(grad_scale),
        _flag(found_inf),
        torch.get_num_threads(),
    )
    table.write_indirect()


@row_update.register("triton", dtypes=(torch.float32, torch.float64))
def _(kernels, table, hyper, grad_scale, found_inf):
    if not table.flat:
        return row_update.reference(table, hyper, grad_scale, found_inf)
    lr = hyper.lr if isinstance(hyper.lr, Tensor) else None
    kernels.row_update(
        table.rule, table.dtype, table.weight_dtype, table.to_device(), _numbers(hyper), lr, grad_scale, found_inf
    )
    table.write_indirect()


@row_update.register("cuda", dtypes=(torch.float32, torch.float64))
def _(native, table, hyper, grad_scale, found_inf):
    if not table.flat:
        return row_update.reference(table, hyper, grad_scale, found_inf)
    there, numbers = table.to_device(), _numbers(hyper)
    lr = hyper.lr if isinstance(hyper.lr, Tensor) else None
    native.row_update_cuda(
        DTYPE_CODES[table.dtype],
        DTYPE_CODES[table.weight_dtype],
        RULES.index(table.rule),
        there["words"].data_ptr(),
        there["grads"].data_ptr(),
        there["items"].data_ptr(),
        len(there["items"]),
        numbers.buffer_info()[0],
        _flag(lr),
        lr is not None and lr.dtype == torch.float32,
        _flag(grad_scale),
        _flag(found_inf),
        *device_and_stream(there["items"]),
    )
    table.write_indirect()
