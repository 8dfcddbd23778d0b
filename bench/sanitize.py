"""Runs every op's GPU kernels at small, awkward shapes and checks what they return: what compute-sanitizer is to watch.

compute-sanitizer --tool memcheck python bench/sanitize.py [--backend cuda] [op ...]

Each tensor gets an allocation of its own, else an access past its end would land in torch's pool unseen.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from clock import Call
from measure import PASSES, make_pass, relative_error

from minegan_fast.ops import bias_act, row_gradient, use_backend
from minegan_fast.ops._op import _ops

Check = tuple[str, torch.dtype, Callable[[], Call], Callable[[], Call]]


def check_bias_act(device: str) -> Iterator[Check]:
    """Rows of one element, rows no 16-byte access fits, channels last, several blocks a channel."""
    shapes = [((1, 1), 1), ((5, 3), 0), ((3, 5, 7, 3), 1), ((2, 3, 8, 8), 1), ((2, 513, 3, 3), 1), ((2, 3, 33, 129), 1)]
    formats = (torch.contiguous_format, torch.channels_last)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for (shape, dim), dtype, layout in itertools.product(shapes, dtypes, formats):
        if layout == torch.channels_last and len(shape) != 4:
            continue
        x, dy, ddx = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(3))
        b, ddb = torch.randn(2, shape[dim], dtype=dtype)
        for act, which in itertools.product(("linear", "lrelu"), PASSES[1:]):
            calls = []
            for place, kind in ((device, dtype), ("cpu", torch.float64)):
                one, two, *rest = [t.detach().to(place, kind).requires_grad_() for t in (x, b, dy, ddx, ddb)]

                def function(x, b, act=act, dim=dim):
                    return bias_act(x, b, dim=dim, act=act, gain=1.5)

                calls.append(make_pass(which, function, (one, two), rest[0], tuple(rest[1:])))
            yield f"{which} {act} {list(shape)} {dtype} {layout}", dtype, calls[0], calls[1]


def check_row_gradient(device: str) -> Iterator[Check]:
    """Sizes that no tile divides, one to three axes, strides, dilation, channels last."""
    cases = [  # B, C, k, size of x, of gy, kernel, stride, padding, dilation, transposed
        (2, 5, 3, (7, 9), (7, 9), (3, 3), 1, 1, 1, False),
        (1, 130, 17, (6, 11), (6, 11), (3, 3), 1, 1, 1, False),
        (3, 4, 1, (9, 8), (5, 4), (3, 3), 2, 1, 1, False),
        (2, 6, 2, (11, 9), (9, 9), (3, 3), 1, (1, 2), 2, False),
        (2, 4, 3, (5, 6), (11, 13), (3, 3), 2, 0, 1, True),
        (2, 3, 2, (4, 5, 6), (4, 5, 6), (3, 3, 3), 1, 1, 1, False),
        (2, 7, 2, (33,), (33,), (5,), 1, 2, 1, False),
        (2, 7, 5, (3, 3), (3, 3), (1, 1), 1, 0, 1, False),
    ]
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    for (B, C, k, size, positions, *geometry), dtype, last in itertools.product(cases, dtypes, (False, True)):
        if last and len(size) != 2:
            continue
        x, gy = torch.randn(B, C, *size, dtype=dtype), torch.randn(B, k, *positions, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x

        def make(place, kind, x=x, gy=gy, geometry=geometry):
            one, two = x.to(place, kind), gy.to(place, kind)
            return lambda: (row_gradient(one, two, *geometry),)

        name = f"{list(x.shape)} {geometry} {dtype}{' channels last' * last}"
        yield (
            name,
            dtype,
            lambda make=make, dtype=dtype: make(device, dtype),
            lambda make=make: make("cpu", torch.float64),
        )


OPS: dict[str, Callable[[str], Iterator[Check]]] = {"bias_act": check_bias_act, "row_gradient": check_row_gradient}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton", "cpp"), help="whose kernels run")
    arguments = parser.parse_args()
    if unknown := [op for op in arguments.ops if op not in OPS]:
        parser.error(f"no table for {', '.join(unknown)}; there are {', '.join(OPS)}")
    device = "cpu" if arguments.backend == "cpp" else "cuda"
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    wrong = 0
    for op in arguments.ops or [op for op in OPS if any(arguments.backend in one._launchers for one in _ops[op])]:
        count = 0
        for name, dtype, make, make_expected in OPS[op](device):
            with use_backend(arguments.backend):
                outputs = [output.cpu() for output in make()()]
            with use_backend("reference"):
                error = relative_error(outputs, make_expected()())
            count += 1
            if not error <= 8 * torch.finfo(dtype).eps:
                print(f"{op} {name}: wrong by {error:.2e} of the largest entry")
                wrong += 1
        print(f"{op}, {arguments.backend}: {count} calls, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
