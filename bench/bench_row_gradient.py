"""row_gradient at the layers of StyleGAN2-256's generator, from 1 to 100 % of the rows. Bound by arithmetic or by x.

On a CPU also at those of a generator of 32 pixels, whose activations have their channels last.

python bench/bench_row_gradient.py --crossover     measures them here; writes minegan_fast/ops/row_gradient.json
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from clock import Provider, interleave, keep_pages
from conftest import device_of
from measure import OURS, Case

from minegan_fast.ops import row_gradient
from minegan_fast.ops.row_gradient import geometry_name

TABLE = Path(__file__).parents[1] / "minegan_fast" / "ops" / "row_gradient.json"
SHARES = (0.05, 0.01, 8 / 512, 0.02, 0.1, 0.2, 0.5, 1.0)
BATCH = {"cpu": 4, "cuda": 16}
# Channels in and out, size of the image that goes in, kernel (0: linear), stride of the transposed convolution, how
# often the generator has it. On a CPU images end at 64, where a dense call takes a large part of a second.
LAYERS = {
    "linear 512": (512, 512, 1, 0, 1, 22),
    "conv 512 at 16": (512, 512, 16, 3, 1, 1),
    "conv 512 at 32": (512, 512, 32, 3, 1, 1),
    "conv 512 at 64": (512, 512, 64, 3, 1, 1),
    "conv 256 at 128": (256, 256, 128, 3, 1, 1),
    "conv 128 at 256": (128, 128, 256, 3, 1, 1),
    "up 512 from 16": (512, 512, 16, 3, 2, 1),
    "up 512 from 32": (512, 512, 32, 3, 2, 1),
    "up 512 from 64": (512, 256, 64, 3, 2, 1),
    "up 256 from 128": (256, 128, 128, 3, 2, 1),
    "toRGB 512 at 64": (512, 3, 64, 1, 1, 1),
}
SMALL = {
    "conv 96 at 8": (96, 96, 8, 3, 1, 1),
    "conv 64 at 16": (64, 64, 16, 3, 1, 1),
    "conv 32 at 32": (32, 32, 32, 3, 1, 1),
    "up 96 from 8": (96, 64, 8, 3, 2, 1),
    "up 64 from 16": (64, 32, 16, 3, 2, 1),
    "toRGB 96 at 8": (96, 1, 8, 1, 1, 1),
    "toRGB 32 at 32": (32, 1, 32, 1, 1, 1),
}
LARGEST = {"test_row_gradient": "conv 128 at 256, 0.05"}  # its images are; some other layers have more products


class Layer:
    """Random operands of a layer, the selected rows, and the calls that are compared."""

    def __init__(self, name: str, share: float, device: str, dtype=torch.float32, last: bool = False):
        self.C, self.n, side, size, stride, self.count = (LAYERS | SMALL)[name]
        side = min(side, 64 if device == "cuda" or stride == 1 else 32) if device == "cpu" else side
        self.transposed, self.kernel = stride > 1, (size, size) if size else ()
        self.stride, self.padding = (stride,) * 2, (size // 2 if stride == 1 else 0,) * 2
        B = 16 if name in SMALL else BATCH[device] if side <= 32 or device == "cuda" else 1
        out = (side - 1) * stride + size if self.transposed else side
        generator = torch.Generator(device).manual_seed(0)

        def normal(channels, width):
            shape = (B, channels, width, width) if size else (B, channels)
            t = torch.randn(shape, device=device, generator=generator).to(dtype)
            return t.to(memory_format=torch.channels_last) if last else t

        self.x, self.gy = normal(self.C, side), normal(self.n, out)
        k = max(1, round(share * self.n))
        self.rows = torch.randperm(self.n, device=device, generator=generator)[:k].sort().values
        self.flops = 2 * B * self.C * k * side**2 * max(1, size) ** 2
        self.bytes = self.x.nbytes + k * (self.gy[:, 0].nbytes + self.C * max(1, size) ** 2 * self.x.element_size())

    def ours(self):
        geometry = (self.kernel, self.stride, self.padding, 1, self.transposed) if self.kernel else ()
        return row_gradient(self.x, self.gy, *geometry, rows=self.rows if len(self.rows) < self.n else None)

    def library(self, x, gy):
        if not self.kernel:
            return gy.T @ x
        small, big = (x, gy) if self.transposed else (gy, x)
        weight = big.new_zeros(1).expand(small.shape[1], big.shape[1], *self.kernel)
        geometry = self.stride, self.padding, (1, 1), False, (0, 0), 1, (False, True, False)
        dW = torch.ops.aten.convolution_backward(small, big, weight, None, *geometry)[1]
        return dW.transpose(0, 1) if self.transposed else dW

    def gathered(self):
        return self.library(self.x, self.gy.index_select(1, self.rows))

    def dense(self):
        return self.library(self.x, self.gy).index_select(0, self.rows)

    def expected(self):
        return self.library(self.x.double(), self.gy.index_select(1, self.rows).double())


def providers(layers: list[Layer]) -> list[Provider]:
    def make(which):
        return lambda: lambda: [getattr(layer, which)() for layer in layers for _ in range(layer.count)]

    few = max(len(layer.rows) for layer in layers) <= 32  # more are the library's: forcing our kernel shows nothing
    ours = [Provider(OURS, make("ours"), backend) for backend in ("", "cpp", "triton")[: 3 if few else 1]]
    return [*ours, Provider("dense", make("dense")), Provider("gathered", make("gathered"))]


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    shares = SHARES[:1] if quick else SHARES
    names = list(LAYERS)[:2] if quick else [*LAYERS, "all"]
    if not quick and device_of(metafunc.config) == "cpu":
        names = [name for name in names if not name.startswith(("conv 256", "conv 128", "up 256", "up 512 from 64"))]
    cases = [(name, share, False) for name in names for share in (shares if name != "all" else shares[:1])]
    if device_of(metafunc.config) == "cpu":
        cases += [(name, share, True) for name in list(SMALL)[: 1 if quick else None] for share in shares[:1]]
    ids = [f"{name}, {share:.2g}{', channels last' * last}" for name, share, last in cases]
    metafunc.parametrize(("name", "share", "last"), cases, ids=ids)


def test_row_gradient(compare, device, name, share, last):
    """`all`: the sum over the layers, as often as the generator has them."""
    names = LAYERS if name == "all" else [name]
    layers = [Layer(one, share, device, last=last) for one in names]
    expected = [e for layer in layers for e in [layer.expected()] * layer.count]
    rows = sum(len(layer.rows) * layer.count for layer in layers)
    moved, flops = (sum(getattr(layer, what) * layer.count for layer in layers) for what in ("bytes", "flops"))
    which = f"{name}, {share:.0%} of the rows" if name == "all" else f"{name}, {rows} of {layers[0].n} rows"
    which += ", channels last" * last
    extra = {"density": share}
    if name != "all":
        extra |= {"neurons": rows, "channels": layers[0].C, "taps": math.prod(layers[0].kernel)}
    case = Case("row_gradient", which, (rows, layers[0].C), torch.float32, moved, expected, flops, "gathered", extra)
    compare(case, providers(layers))


def crossover(device: str, budget: float) -> None:
    """Measures and writes this processor's part of the table; the parts of others stay.

    On a CPU operands stay in the cache that the forward and backward of a layer leave them in.
    """
    from minegan_fast import _C

    processor = (
        f"cpu {('baseline', 'avx2', 'avx512')[_C.cpu_isa()]}" if device == "cpu" else torch.cuda.get_device_name()
    )
    own, dense = {}, {}
    layers = [(name, False) for name in LAYERS]
    if device == "cpu":  # our kernel for channels last is one of the CPU's
        layers += [(name, True) for name, (_, _, _, size, *_) in (LAYERS | SMALL).items() if size]
    for name, last in layers:
        C, n, side, *_ = (LAYERS | SMALL)[name]
        if device == "cpu" and side > 64:
            continue
        key, found, faster = None, 0, 1.0
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
            if k > n or k > found + max(1, found):
                break
            layer = Layer(name, k / n, device, last=last)
            key = geometry_name(layer.kernel, layer.stride, layer.transposed, last)
            if not layer.kernel:
                break
            native = "cpp" if device == "cpu" else "triton"
            pair = [Provider("rows", lambda one=layer: lambda: [one.ours()], which) for which in (native, "reference")]
            times = {
                p: statistics.median(s.seconds) for p, s in interleave(pair, device, device == "cuda", budget).items()
            }
            if times[f"rows:{native}"] >= times["rows:reference"]:
                break
            found = k
        for share in (0.9, 0.75, 0.5, 0.35):
            layer = Layer(name, share, device)
            if n < 16 or last or len(layer.rows) == n:
                break
            pair = [Provider(w, lambda one=layer, w=w: lambda: [getattr(one, w)()]) for w in ("dense", "gathered")]
            times = {
                p: statistics.median(s.seconds) for p, s in interleave(pair, device, device == "cuda", budget).items()
            }
            if times["dense"] >= times["gathered"]:
                break
            faster = share
        positions = math.prod(Layer(name, 1 / n, device).x.shape[2:])
        own.setdefault(key, []).append({"channels": C, "positions": positions, "rows": found})
        if not last:
            dense[key] = max(dense.get(key, 0.0), faster)
        print(f"{name}: {key}, own kernel up to {found} rows, dense from {faster:.0%}", flush=True)
    table = json.loads(TABLE.read_text())
    table["own"][processor] = {key: cases for key, cases in own.items() if any(case["rows"] for case in cases)}
    table["dense"][device] = dense
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crossover", action="store_true", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds a comparison")
    arguments = parser.parse_args()
    keep_pages()
    crossover(arguments.device, arguments.budget)
