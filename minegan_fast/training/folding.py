"""Batch norm in eval mode as part of the convolution before it.

With y = W * x + b and (y - mean) / sqrt(variance + e) g + s, the two are one convolution of weight W g / sqrt(variance
+ e), and its bias follows (Jacob et al. 2018, arXiv 1712.05877, section 3.2).
"""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(network: nn.Module, x: Tensor) -> nn.Module | None:
    """A copy of a network in eval mode whose batch norms are folded into the convolutions that they follow.

    x: an input [B, C, H, W]. A forward of it shows which batch norm reads which convolution, but not what else the
        network does with a convolution's output: compare the copy with the network.

    Returns None where nothing can be folded.
    """
    if isinstance(network, torch.jit.ScriptModule):
        return None
    folded = copy.deepcopy(network)
    pairs = _pairs(folded, x)
    for conv, norm, path in pairs:
        parent, _, name = path.rpartition(".")
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        setattr(folded.get_submodule(parent), name, nn.Identity())
    return folded.requires_grad_(False) if pairs else None


def _pairs(network: nn.Module, x: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, str]]:
    """(convolution, the batch norm that reads its output, and its path), both called once in a forward."""
    calls, outputs, readers, handles = Counter(), {}, [], []
    owners = Counter(id(p) for module in network.modules() for p in module.parameters(recurse=False))

    def convolved(module, arguments, output):
        calls[module] += 1
        outputs[id(output)] = module, output  # kept, so that no other tensor takes its id

    def normalised(path):
        def read(module, arguments):
            calls[module] += 1
            if arguments and id(arguments[0]) in outputs:
                readers.append((outputs[id(arguments[0])][0], module, path))

        return read

    for path, module in network.named_modules():
        # One owner: a weight that is computed from others, as by weight norm, has none, and a shared one has several.
        if isinstance(module, nn.Conv2d) and owners[id(module.weight)] == 1:
            handles.append(module.register_forward_hook(convolved))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and not module.training:
            handles.append(module.register_forward_pre_hook(normalised(path)))
    try:
        with torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(conv for conv, _, _ in readers)
    return [(conv, norm, path) for conv, norm, path in readers if calls[conv] == times[conv] == calls[norm] == 1]
