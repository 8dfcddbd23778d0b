"""What the ops and the steps of StyleGAN2's training launch on a GPU, seen without one: see launch_driver.

    python bench/launches.py [--batch 1 2 4] [--size 16] [--compile [N]] [--time SECONDS] [--json] [ops] [step]

Prints launches, specialisations, operations of ATen that launch something, and the host's time for each pass of each
op, and for each step (critic, generator, R1, path length; both networks under a SparseFinetuner; gradients keep their
memory, but for the operations of ATen are made anew). Then how many specialisations a first use needs, of each op's
kernels and of all, with --compile 1 also the CPU time of their machine code. Exits with 1 where a specialisation does
not get through the compiler's front end, where a repetition waits for the GPU, and with --compile where machine code
for compute capability 9.0 cannot be made.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from launch_driver import HostWatch, Specialisation, hollow_convolutions, install, launcher_times, recording
from torch.nn import functional as F

from minegan_fast import SparseFinetuner
from minegan_fast.layers import gradient_penalty, path_length_penalty, r1_penalty
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator
from minegan_fast.ops import (
    Chain,
    Hyperparameters,
    Mapping,
    MmdTarget,
    RowTensor,
    RowUpdate,
    bias_act,
    miner,
    minibatch_stddev,
    mmd2,
    mmd_groups,
    modulated_conv2d,
    noise_bias_act,
    row_gradient,
    row_score,
    upfirdn2d,
    use_backend,
    winner,
)
from minegan_fast.ops.demodulation import demodulation
from minegan_fast.ops.kernel_means import kernel_means
from minegan_fast.ops.penalty import interpolate_drawn

Make = Callable[[], Callable[[], object]]  # prepares a call, which is not looked at, and returns it

FULL = 256  # the resolution from which on the networks are those of config f
REPEATS = 30  # at most, of a call that is timed
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def examine(name: str, shape: list[int], dtype: str, make: Make, seconds: float = 0.0) -> dict:
    """What the call launches once an earlier one has planned and allocated, what is wrong with the launches of both,
    and what in it waits for the GPU. seconds: time that is spent on timing."""
    row = {"pass": name, "shape": shape, "dtype": dtype, "every": [], "launches": 0, "specialisations": 0}
    row |= {"aten": 0, "faults": [], "waits": [], "copies": [], "kernels": {}}
    with recording() as all_launches, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        try:
            make()()
            call = make()
            with recording() as unwatched:
                call()
            call = make()
            with recording() as launches, HostWatch() as watch:
                call()
        except Exception as error:
            return row | {"faults": [f"{type(error).__name__}: {error}"]}
    if [x.specialisation for x in launches] != [x.specialisation for x in unwatched]:
        row["faults"].append("a repetition launches other kernels, or does so while it is watched")
    every = dict.fromkeys(x.specialisation for x in (*all_launches, *unwatched, *launches))
    row |= {"every": [*every], "launches": len(launches), "specialisations": len({x.specialisation for x in launches})}
    row["faults"] += [f"{s}: {s.fault}" for s in every if s.fault]
    row["faults"] += [f"warns: {w.message}" for w in warned if issubclass(w.category, UserWarning)]
    row |= {"waits": watch.waits, "copies": watch.copies, "aten": watch.operations}
    row |= {"kernels": Counter(x.specialisation.kernel for x in launches)}
    return row | (timed(make, seconds) if seconds else {})


def timed(make: Make, seconds: float) -> dict:
    """The host's time of one call, and the part of it that our kernels' launchers take."""
    whole, ours, end = [], [], time.perf_counter() + seconds
    with launcher_times() as spent, recording():
        while len(whole) < REPEATS and (time.perf_counter() < end or len(whole) < 3):
            call = make()
            spent.clear()
            start = time.perf_counter()
            call()
            whole.append(1e6 * (time.perf_counter() - start))
            ours.append(1e6 * sum(spent))
    low, median, high = statistics.quantiles(whole, n=4, method="inclusive")
    rounded = {"median_us": median, "q1_us": low, "q3_us": high, "launchers_us": statistics.median(ours)}
    return {name: round(value, 1) for name, value in rounded.items()} | {"samples": len(whole)}


def passes(function: Callable, *inputs: torch.Tensor) -> Iterator[tuple[str, Make]]:
    """The passes of function(*inputs) -> tensor, all of whose inputs need a gradient."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    dy = torch.ones_like(function(*leaves)).requires_grad_()
    cotangents = tuple(map(torch.ones_like, leaves))

    def inference():
        with torch.no_grad():
            function(*leaves)

    def backward():
        y = function(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy)

    def second_order():
        gradients = torch.autograd.grad(function(*leaves), leaves, dy, create_graph=True)
        return lambda: torch.autograd.grad(gradients, (dy, *leaves), cotangents, allow_unused=True)

    yield "inference", lambda: inference
    yield "forward", lambda: functools.partial(function, *leaves)
    yield "backward", backward
    yield "second order", second_order


def ops(B: int, dtype: torch.dtype) -> Iterator[tuple[str, list[int], Make]]:
    """Every op in every order, as (name, shape, make). All have Triton kernels, at any rate for float32."""
    draw = functools.partial(torch.randn, dtype=dtype)
    x, style, bias, noise = draw(B, 32, 16, 16), draw(B, 32), draw(32), torch.randn(B, 1, 16, 16)
    weight, strength, taps = torch.randn(32, 32, 3, 3), torch.randn(()), torch.ones(4)
    last = x.contiguous(memory_format=torch.channels_last)

    def of(name: str, shape: torch.Tensor, function: Callable, *inputs):
        for which, make in passes(function, *inputs):
            yield f"{name}, {which}", list(shape.shape), make

    def repeated(name: str, shape: list[int], call: Callable[[], object]):
        yield name, shape, lambda: call

    for label, image in (("", x), (" channels last", last)):
        yield from of(f"bias_act{label}", x, lambda x, b: bias_act(x, b, act="lrelu", gain=1.4), image, bias)
        yield from of(f"minibatch_stddev{label}", x, minibatch_stddev, image)
        yield from of(f"upfirdn2d{label}", x, lambda x: upfirdn2d(x, taps, padding=(2, 1, 2, 1)), image)

        def layer(c, d, f, h):
            return noise_bias_act(c, d, noise, f, h, act="lrelu", gain=1.4)

        yield from of(f"noise_bias_act{label}", x, layer, image, style, strength, bias)
    yield from of("noise_bias_act without noise", x, lambda c, h: noise_bias_act(c, bias=h, act="lrelu"), x, bias)
    yield from of("upfirdn2d up", x, lambda x: upfirdn2d(x, taps, 2, padding=(2, 1, 2, 1)), x)
    yield from of("upfirdn2d down", x, lambda x: upfirdn2d(x, taps, 1, 2, padding=1), x)
    for label, options in (("", {}), (" up", {"up": True, "kernel": taps}), (" down", {"down": True, "kernel": taps})):

        def convolved(x, weight, style, h, options=options):
            return modulated_conv2d(x, weight, style, bias=h, act="lrelu", **options)

        yield from of(f"modulated_conv2d{label}", x, convolved, x, weight, style, bias)

    demodulated = functools.partial(demodulation, weight=None, rows=None, eps=1e-8)
    yield from of("demodulation", x, lambda s, w: demodulated(s, w), style.float(), weight)

    # The convolution of a row gradient may be the library's: asked for by name, it is ours.
    def rows(x, gy):
        with use_backend("triton"):
            return row_gradient(x, gy, (3, 3), padding=1)

    yield from of("row_gradient", x, rows, x, draw(B, 4, 16, 16))

    def critic(x, w):
        return (x * w).square().flatten(1).sum(1)

    for name, penalty in (("R1", r1_penalty), ("WGAN-GP", functools.partial(gradient_penalty, fake=x.flip(0)))):

        def penalised(w, penalty=penalty):
            return penalty(functools.partial(critic, w=w), real=x)

        yield from of(f"penalty {name}", x, penalised, bias[:, None, None])

    def lengths(w):
        with torch.enable_grad():
            latents = style.detach().requires_grad_()
            images = latents[:, :, None, None] * w * x
        return path_length_penalty(images, latents, mean)[0]

    mean = torch.zeros(())
    yield from of("penalty path length", x, lengths, bias[:, None, None])
    # `interpolate` draws in the kernel where the images are on a GPU.
    yield from repeated("interpolate", list(x.shape), lambda: interpolate_drawn(x, x.flip(0), 5, 0))

    mapping = Mapping([torch.randn(32, 32)], [torch.randn(32)], [(0.1, 1.0, 1.4)])

    def mined(u, W1, b1, W2, b2):
        return miner([Chain(u, (W1, W2), (b1, b2), "tanh", "identity", True, mapping)])[0]

    layer = torch.randn(3, 32, 32), torch.randn(3, 32)
    yield from of("miner", style, mined, torch.randn(B, 32), *layer, *layer)

    dense = [torch.randn(64, 32, 3, 3), torch.randn(64), torch.randn(7, 3, 3, 3)]
    for kind in ("square", "product"):
        grads = [t.to(dtype) for t in dense]
        arguments = {"weights": grads} if kind == "product" else {}
        totals = torch.zeros(135, dtype=torch.float64)
        score = functools.partial(row_score, totals, grads, (0, 64, 128), kind=kind, **arguments)
        yield from repeated(f"row_score {kind}", [135], score)
    for rule in ("adam", "adamw", "sgd", "momentum"):
        tensors = [RowTensor(t[::3].clone(), {}, t.to(dtype), torch.arange(0, len(t), 3)) for t in dense]
        update = RowUpdate("sgd" if rule == "momentum" else rule, tensors, momentum=rule == "momentum", ema=True)
        hyper = Hyperparameters(lr=0.1, momentum=0.9 * (rule == "momentum"), ema_decay=0.9)
        step = functools.partial(update.step, [torch.ones_like(t.leaf) for t in tensors], hyper)
        yield from repeated(f"row_update {rule}", [135], step)

    many = [RowTensor(torch.randn(shape), {}) for shape in [(64, 64), (64,)] * 55]
    update, hyper = RowUpdate("adam", many), Hyperparameters(lr=0.1)
    kept, others = ([torch.ones_like(t.leaf) for t in many] for _ in range(2))
    yield from repeated("row_update adam, gradients where they were", [len(many)], lambda: update.step(kept, hyper))
    moved = itertools.cycle([others, kept])
    yield from repeated("row_update adam, gradients elsewhere", [len(many)], lambda: update.step(next(moved), hyper))

    scores = draw(B, 48)  # of as many branches as there are samples elsewhere
    yield from repeated("winner", [B, 48], lambda: winner(scores))

    p, q = draw(B, 64), draw(B + 2, 64)
    for kernel in ("gaussian", "laplacian", "polynomial", "energy"):
        bandwidth = {"bandwidth": (4.0, 8.0, 16.0)} if kernel in ("gaussian", "laplacian") else {}
        distance = functools.partial(mmd2, kernel=kernel, unbiased=B > 1, validate=False, **bandwidth)
        yield from of(f"mmd2 {kernel}", p, distance, p, q)
    target = MmdTarget([q, q[:, :20]], [(4.0, 8.0), (2.0, 4.0)], unbiased=B > 1)
    groups = functools.partial(lambda *xs: mmd_groups(xs, target, validate=False))
    yield from of("mmd_groups", p, groups, p, p[:, :20].contiguous())
    others = [[q.flip(0), q[:, 20:40]] for _ in range(2)]

    def means():
        leaves = [x.detach().requires_grad_() for x in (p, p[:, :20])]
        K, b = kernel_means([leaves, *others], target, validate=False)
        return torch.autograd.grad(K[0].sum() - b[0], leaves)

    yield from repeated("kernel_means", [B, 64], means)


def operations_of(make: Make) -> int:
    """Operations of ATen that launch something, in a call that repeats earlier ones."""
    make()(), make()()
    call = make()
    with recording(), HostWatch() as watch:
        call()
    return watch.operations


def steps(resolution: int, B: int, keep: bool = True) -> Iterator[tuple[str, list[int], Make]]:
    """The four steps of StyleGAN2's training, as (name, shape of the images, make).

    keep: gradients keep their memory, as a captured step needs it: nothing of them comes from the host. Otherwise they
    are made anew, as most loops do it, which saves the sum of old and new ones.
    """
    small = {} if resolution >= FULL else {"channel_base": 512, "channel_max": 32}
    G = StyleGAN2Generator(resolution, **small, **({"latent_dim": 32, "mapping_layers": 2} if small else {}))
    D = StyleGAN2Discriminator(resolution, **small)
    sparse = {"density": 0.05, "budget": "parameters", "scope": "layer", "criterion": "random", "ema_decay": 0.998}
    g, d = (SparseFinetuner(network, **sparse) for network in (G, D))
    g.select(), d.select()
    z, real = torch.randn(B, G.latent_dim), torch.randn(B, 3, resolution, resolution)
    mean = torch.zeros(())

    def trained(network, other, optimizer, loss) -> Make:
        def step():
            other.requires_grad_(False), network.requires_grad_(True)
            optimizer.zero_grad(set_to_none=not keep)
            loss().backward()
            optimizer.step()

        return lambda: step

    def path_length():
        w = G.mapping(z)[:, None].expand(-1, G.num_layers, -1).clone()
        return path_length_penalty(G.synthesis(w), w, mean)[0]

    losses = {
        "critic": (D, G, d, lambda: F.softplus(D(G(z))).mean() + F.softplus(-D(real)).mean()),
        "generator": (G, D, g, lambda: F.softplus(-D(G(z))).mean()),
        "R1": (D, G, d, lambda: r1_penalty(D, real)),
        "path length": (G, D, g, path_length),
    }
    for name, parts in losses.items():
        yield f"StyleGAN2-{resolution}, {name}", list(real.shape), trained(*parts)


def rows_of(what: list[str], batches: list[int], resolution: int, dtypes: list[str], seconds: float) -> Iterator[dict]:
    for B in batches:
        if "ops" in what:
            for dtype in dtypes:
                for name, shape, make in ops(B, DTYPES[dtype]):
                    yield examine(name, shape, dtype, make, seconds=seconds)
        if "step" in what:
            made_anew = [operations_of(make) for _, _, make in steps(resolution, B, keep=False)]
            for (name, shape, make), aten in zip(steps(resolution, B), made_anew, strict=True):
                yield examine(name, shape, "float32", make, seconds=seconds) | {"aten": aten}


def compile_some(specialisations: list[Specialisation], every: int) -> tuple[list[str], dict[Specialisation, float]]:
    """Machine code of every n-th: what the compiler says of those that have none, and the CPU time that each took, with
    that of the assembler, which is a process of its own."""
    faults, seconds = [], {}
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    for specialisation in specialisations[::every]:
        start = sum(os.times()[:4])
        try:
            specialisation.compile()
        except Exception as error:
            faults.append(f"{specialisation}: {type(error).__name__}: {error}")
        seconds[specialisation] = sum(os.times()[:4]) - start
    total = f"{sum(seconds.values()):.0f} s of CPU time"
    print(f"{len(seconds)} of {len(specialisations)} specialisations compiled in {total}", file=sys.stderr)
    return faults, seconds


def first_use(specialisations: list[Specialisation], seconds: dict[Specialisation, float]) -> list[dict]:
    """What a process that has compiled nothing needs, of the kernels of each file and of all together.
    `compile_seconds` is None where not all of them were compiled."""
    files = {s: s.kernel.partition(".")[0] for s in specialisations}
    rows = []
    for name in (*sorted({*files.values()}), "all"):
        own = [s for s in specialisations if name in (files[s], "all")]
        complete = {*own} <= seconds.keys()
        spent = round(sum(seconds[s] for s in own), 2) if complete else None
        rows.append({"kernels": name, "specialisations": len(own), "compile_seconds": spent})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="ops, step (default: both)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--size", type=int, default=16, help=f"resolution of the networks; config f from {FULL} on")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of the ops")
    parser.add_argument("--time", type=float, default=0.0, metavar="SECONDS", help="of timing, for each pass and step")
    parser.add_argument("--compile", type=int, nargs="?", const=4, metavar="N", help="machine code of every N-th (4th)")
    parser.add_argument("--json", action="store_true", help="the rows as JSON on the standard output")
    arguments = parser.parse_args()
    what = arguments.what or ["ops", "step"]
    if unknown := {*what} - {"ops", "step"}:
        parser.error(f"no such part: {', '.join(unknown)}; there are ops and step")
    install()
    if arguments.size >= FULL:
        hollow_convolutions()
    torch.manual_seed(0)
    rows, every = [], {}
    for row in rows_of(what, arguments.batch, arguments.size, arguments.dtype, arguments.time):
        every |= dict.fromkeys(row.pop("every"))
        rows.append(row)
        if not arguments.json:
            print(line(row), flush=True)
    sound = [s for s in every if not s.fault]
    faults, seconds = compile_some(sound, arguments.compile) if arguments.compile else ([], {})
    used = first_use([*every], seconds)
    if arguments.json:
        json.dump({"rows": rows, "first_use": used, "faults": faults}, sys.stdout)
    else:
        print(*faults, *map(use_line, used), sep="\n")
    return int(bool(faults) or any(map(is_wrong, rows)))


def is_wrong(row: dict) -> bool:
    return bool(row["faults"] or row["waits"])


def use_line(row: dict) -> str:
    spent = row["compile_seconds"]
    return f"{row['kernels']}: {row['specialisations']} specialisations" + (f", {spent:.0f} s" if spent else "")


def line(row: dict) -> str:
    numbers = f"{row['launches']:5} launches {row['specialisations']:4} specialisations {row['aten']:5} of ATen"
    if "median_us" in row:
        numbers += f" {row['median_us']:10.0f} us {row['launchers_us']:8.0f} us of launchers"
    name = f"{row['pass']} {'x'.join(map(str, row['shape']))} {row['dtype']}"
    return "\n  ".join([f"{name:64} {numbers}", *dict.fromkeys(row["faults"] + row["waits"] + row["copies"])])


if __name__ == "__main__":
    sys.exit(main())
