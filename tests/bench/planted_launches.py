"""Faults on purpose, for test_launches.py: prints as JSON what bench/launches.py says of each."""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import launches
import torch
import triton
from launch_driver import install
from triton import language as tl

from minegan_fast.ops import bias_act


@triton.jit
def wide_kernel(x_ptr, B):
    tl.store(x_ptr, B.to(tl.int64))  # where B is 1, it is a Python number


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gy):
        return gy * gy.sum().item()


def main():
    install()
    x, sizes = torch.randn(8), iter(range(1, 100))
    leaf = torch.randn(3, requires_grad=True)
    mask, index, counts = x > 0, torch.tensor([1, 0]), torch.tensor([1, 2])

    def fill():
        x[2] = 0
        x[1:3] = 0.5

    calls = {
        "B = 1": lambda: wide_kernel[(1,)](torch.zeros(1, dtype=torch.int64), 1, enable_fp_fusion=True),
        "B = 2": lambda: wide_kernel[(1,)](torch.zeros(1, dtype=torch.int64), 2, enable_fp_fusion=True),
        "another kernel each time": lambda: bias_act(torch.randn(1, 2 ** next(sizes)), act="lrelu"),
        "warns": lambda: warnings.warn("a planted warning", stacklevel=1),
        "raises": lambda: bias_act(x, act="none such"),
        "waits: item": lambda: x[0].item(),
        "waits: float": lambda: float(x[0]),
        "waits: bool": lambda: bool(mask[0]),
        "waits: tolist": lambda: x.tolist(),
        "waits: numpy": lambda: x.numpy(),
        "waits: cpu": lambda: x.cpu(),
        "waits: to cpu": lambda: x.to("cpu"),
        "waits: nonzero": lambda: mask.nonzero(),
        "waits: mask": lambda: x[mask],
        "waits: write by mask": lambda: x.__setitem__(mask, 0.0),
        "waits: unique": lambda: x.unique(),
        "waits: equal": lambda: torch.equal(x, x),
        "waits: repeat_interleave": lambda: index.repeat_interleave(counts),
        "waits: numbers to the GPU": lambda: torch.tensor([1.0], device=x.device),
        "waits: new_tensor": lambda: x.new_tensor([1.0]),
        "waits: index by a list": lambda: x[[0, 1]],
        "waits: write by a list": lambda: x.__setitem__([0, 1], 0.0),
        "waits: backward": lambda: ReadsInBackward.apply(leaf).sum().backward(),
        "copies: numbers of the host": lambda: torch.tensor([1], device="cpu"),
        "copies: memory of the host": lambda: torch.frombuffer(bytearray(8), dtype=torch.int64),
        "nothing: fill": fill,
        "nothing: index": lambda: x[index] + x[1:3],
        "nothing: to": lambda: x.to(x.device, torch.float64),
        "nothing: where": lambda: torch.where(mask, x, 0.0),
        "nothing: repeat_interleave": lambda: index.repeat_interleave(counts, output_size=3),
        "nothing: operations": lambda: (x.view(2, 4) + 1).t().mul_(torch.empty_like(x).new_empty(2)),
        "nothing: backward": lambda: (leaf * 2).sum().backward(),
    }
    found = {}
    for name, call in calls.items():
        row = launches.examine(name, [8], "float32", lambda call=call: call)
        row.pop("every")
        found[name] = row | {"wrong": launches.is_wrong(row)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
