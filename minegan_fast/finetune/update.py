"""One optimizer step of one parameter: Adam, AdamW, SGD with momentum, in the order of operations of torch.optim.

Adam (Kingma & Ba 2015, arXiv 1412.6980), AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); t counts a row's steps:

    g += λ w                             (adam, sgd)         w *= 1 - η λ       (adamw)
    m += (1 - β₁) (g - m)                v = β₂ v + (1 - β₂) g²
    w -= η / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
    sgd:  u = μ u + g,  w -= η u
"""

import torch
from torch import Tensor

OPTIMIZERS = ("adam", "adamw", "sgd")


@torch.no_grad()
def update(optimizer: str, parameter: Tensor, grad: Tensor, state: dict, group: dict, per_row: bool):
    """Steps `parameter` in place. state: tensors that it makes at the first step; `step` is float32, [k] if per_row
    (rows that joined later are younger: their bias correction is their own), a scalar otherwise."""
    lr, decay = float(group["lr"]), group["weight_decay"]
    if optimizer == "sgd":
        if decay:
            grad = grad.add(parameter, alpha=decay)
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            grad = state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        parameter.add_(grad, alpha=-lr)
        return
    if "step" not in state:
        state["step"] = torch.zeros(len(parameter)) if per_row else torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    beta1, beta2 = group["betas"]
    step, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
    step += 1
    if decay and optimizer == "adam":
        grad = grad.add(parameter, alpha=decay)
    elif decay:
        parameter.mul_(1 - lr * decay)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    age = step.flatten()[0].item()
    if bool((step == age).all()):
        correction1, correction2 = 1 - beta1**age, 1 - beta2**age
        denominator = (square.sqrt() / correction2**0.5).add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-(lr / correction1))
    else:
        age = step.double().reshape(-1, *[1] * (parameter.ndim - 1))
        correction1, correction2 = ((1 - beta**age).to(parameter.device, parameter.dtype) for beta in (beta1, beta2))
        denominator = (square.sqrt() / correction2.sqrt()).add_(group["eps"])
        parameter.sub_(lr / correction1 * mean / denominator)


@torch.no_grad()
def unscale(optimizer: torch.optim.Optimizer, group) -> bool:
    """Divides the gradients by what a GradScaler left for this step; True, and no change, where it found inf.

    With a process group one rank's inf is everyone's.
    """
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        if group is not None:
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX, group=group)
        if found_inf.item():
            return True
    if scale is not None:
        inverse = scale.double().reciprocal().float()
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            if p.grad is not None:
                p.grad.mul_(inverse.to(p.grad.device))
    return False


@torch.no_grad()
def carry(state: dict, old_rows: Tensor, rows: Tensor, leaf: Tensor) -> dict:
    """The state of a leaf with `rows` from that of its predecessor with `old_rows`: kept rows keep theirs, the moments
    of new ones start at zero, their EMA at their value."""
    rows, old_rows = rows.cpu(), old_rows.cpu()
    kept = torch.isin(rows, old_rows)
    source = torch.searchsorted(old_rows, rows[kept])
    carried = {}
    for key, old in state.items():
        new = leaf.detach().clone() if key == "ema" else old.new_zeros(len(rows), *old.shape[1:])
        new[kept.to(new.device)] = old[source.to(old.device)]
        carried[key] = new
    return carried
