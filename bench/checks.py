"""The calls of every op that bench/sanitize.py runs: small, awkward shapes, on which a kernel's edges show."""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from clock import Call
from measure import PASSES, make_pass

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
    row_gradient,
    row_score,
    upfirdn2d,
    winner,
)
from minegan_fast.ops.demodulation import demodulation_forward, demodulation_rows, demodulation_styles
from minegan_fast.ops.manhattan import manhattan_distance, manhattan_signs, manhattan_slopes
from minegan_fast.ops.mmd import KERNELS
from minegan_fast.ops.modulated_conv2d import modulate_backward, modulate_double_backward, modulate_forward
from minegan_fast.ops.noise_bias_act import (
    noise_bias_act_backward,
    noise_bias_act_double_backward,
    noise_bias_act_forward,
)
from minegan_fast.ops.penalty import interpolate_drawn, penalty_backward, penalty_forward

Check = tuple[str, torch.dtype, Callable[[], Call], Callable[[], Call]]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element into its memory: no 16-byte access fits its address."""
    return tensor.new_empty(tensor.numel() + 1).as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


def check_bias_act(device: str) -> Iterator[Check]:
    """Rows of one element, rows no 16-byte access fits, rows of such packs, channels last, several blocks a channel."""
    shapes = [((1, 1), 1), ((5, 3), 0), ((3, 5, 7, 3), 1), ((2, 3, 8, 8), 1), ((2, 513, 3, 3), 1), ((2, 3, 33, 129), 1)]
    shapes.append(((130, 264), 1))
    formats = (torch.contiguous_format, torch.channels_last)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for (shape, dim), dtype, layout, shift in itertools.product(shapes, dtypes, formats, (False, True)):
        if (layout == torch.channels_last and len(shape) != 4) or (shift and shape != (2, 3, 8, 8)):
            continue
        x, dy, ddx = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(3))
        b, ddb = torch.randn(2, shape[dim], dtype=dtype)
        for act, which in itertools.product(("linear", "lrelu"), PASSES[1:]):
            calls = []
            for place, kind in ((device, dtype), ("cpu", torch.float64)):
                tensors = [t.detach().to(place, kind) for t in (x, b, dy, ddx, ddb)]
                one, two, *rest = [(shifted(t) if shift else t).requires_grad_() for t in tensors]

                def function(x, b, act=act, dim=dim):
                    return bias_act(x, b, dim=dim, act=act, gain=1.5)

                calls.append(make_pass(which, function, (one, two), rest[0], tuple(rest[1:])))
            yield f"{which} {act} {list(shape)} {dtype} {layout}{' shifted' * shift}", dtype, calls[0], calls[1]


def check_row_update(device: str) -> Iterator[Check]:
    """Rows of one, 3 and 27 elements, of several work items, of whole packs; transposed weights; gradients that are
    missing or shifted."""
    shapes = [((5, 513, 3, 3), 0), ((9, 3, 3, 3), 0), ((8, 3), 0), ((33,), 0), ((3, 4096), 0), ((4, 7, 4, 4), 1)]
    pairs = [(torch.float32, kind) for kind in (torch.float32, torch.bfloat16, torch.float16)]
    pairs.append((torch.float64, torch.float64))
    for optimizer, (wide, dtype) in itertools.product(("adam", "adamw", "sgd", "momentum"), pairs):
        dense = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, _ in shapes]
        grads = [torch.randn(shape, dtype=wide).movedim(axis, 0)[::2].contiguous() for shape, axis in shapes]
        # Larger than weight decay's part: a sum that cancels to the size of Adam's eps has no digits for its quotient.
        grads = [g + g.sign() for g in grads]
        hyper = Hyperparameters(lr=0.1, weight_decay=0.1, momentum=0.9 * (optimizer == "momentum"), ema_decay=0.9)

        def make(place, exact, dense=dense, grads=grads, hyper=hyper, optimizer=optimizer, wide=wide):
            tensors = []
            for w, (shape, axis) in zip(dense, shapes, strict=True):
                w = w.to(place, torch.float64 if exact else None, copy=True)
                rows = torch.arange(0, shape[axis], 2, device=place)
                leaf = w.index_select(axis, rows).movedim(axis, 0).to(w.dtype if exact else wide).contiguous()
                tensors.append(RowTensor(leaf, {}, w, rows, axis))
            kind = "sgd" if optimizer == "momentum" else optimizer
            update = RowUpdate(kind, tensors, momentum=optimizer == "momentum", ema=True)
            own = [g.to(place, torch.float64 if exact else wide) for g in grads]

            def call():
                update.step(own, hyper)
                update.step(
                    [None, *map(shifted, own[1:])], hyper, torch.ones(1, device=place), torch.zeros(1, device=place)
                )
                return [t for tensor in tensors for t in (tensor.leaf, tensor.weight, *tensor.state.values())]

            return call

        yield f"{optimizer} {dtype}", dtype, lambda make=make: make(device, False), lambda make=make: make("cpu", True)


def check_row_score(device: str) -> Iterator[Check]:
    """Rows of one element, rows no 16-byte access fits, in many pieces, several launches for a list."""
    shapes = {(1,): 0, (): 0, (37,): 0, (5, 7): 0, (3, 513, 3, 3): 0, (9, 4, 3, 3): 1, (2, 3, 17, 19): 1, (6, 512): 0}
    axes, sizes = list(shapes.values()), [shape[axis] if shape else 1 for shape, axis in shapes.items()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def make(kind, grads, weights, place):
        grads, weights = ([t.to(place) for t in tensors] for tensors in (grads, weights))
        totals = torch.zeros(sum(sizes), dtype=torch.float64, device=place)
        others = weights if kind == "product" else None
        return lambda: (row_score(totals, grads, starts, axes=axes, weights=others, kind=kind),)

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for kind in ("square", "abs", "product"):
            tensors = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2)]
            calls = [functools.partial(make, kind, *tensors, place) for place in (device, "cpu")]
            yield f"{kind} {dtype}", torch.float64, *calls


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


def check_planes(device: str, op: str) -> Iterator[Check]:
    """Planes of one position, of sizes that no tile divides, of several tiles; both layouts; with and without noise."""
    # No single element: the sum that it is may cancel, and then has no digits of its own size.
    shapes = [(5, 7, 1, 1), (2, 5, 7, 3), (1, 33, 33, 41), (3, 300, 4, 4), (2, 1, 4, 3)]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    formats = (torch.contiguous_format, torch.channels_last)
    for shape, dtype, layout, noisy in itertools.product(shapes, dtypes, formats, (False, True)):
        a, b, c = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(3))
        small = torch.promote_types(dtype, torch.float32)
        k, noise = torch.rand(4, *shape[:2], dtype=small), torch.randn(shape[0], 1, *shape[2:], dtype=small)
        k[0] += 0.5  # d's gradient is divided by it: near 0 the quotient shows the rounding of a sum that cancels
        noise = noise if noisy else None

        def make(place, wide, a=a, b=b, c=c, k=k, noise=noise):
            kind = {True: torch.float64, False: None}[wide]
            x, y, z, k = (t.to(place, kind) for t in (a, b, c, k))
            n = noise if noise is None else noise.to(place, kind)
            if op == "modulated_conv2d":
                return lambda: (modulate_forward(x, k[0]), *modulate_backward(x, y, k[0]),
                                *modulate_double_backward(x, y, z, k[:2]))  # fmt: skip
            small = k[0], None if n is None else k[1, :, :1].contiguous(), k[2]
            return lambda: (noise_bias_act_forward(x, n, *small, 0.2, 1.5),
                            *noise_bias_act_backward(x, y, n, *small, 0.2, 1.5),
                            *noise_bias_act_double_backward(x, y, z, n, k, 0.2, 1.5))  # fmt: skip

        if noisy and op == "modulated_conv2d":
            continue
        calls = [functools.partial(make, place, wide) for place, wide in ((device, False), ("cpu", True))]
        yield f"{list(shape)} {dtype} {layout}{' noise' * noisy}", dtype, *calls


def check_upfirdn2d(device: str) -> Iterator[Check]:
    """Factors and kernels of all kinds, sizes that no tile divides, crops, one pixel, channels last."""
    cases = [  # shape of x, of the kernel, up, down, padding
        ((2, 3, 9, 9), (4,), 1, 1, 1),
        ((1, 33, 17, 5), (4, 4), 1, 1, 2),
        ((2, 3, 7, 6), (4,), 2, 1, (2, 1, 2, 1)),
        ((2, 5, 11, 8), (3,), 1, 2, 1),
        ((1, 2, 7, 130), (5, 7), 3, 2, (3, 3, -1, 2)),
        ((1, 1, 1, 1), (2, 2), 1, 1, (4, -2, -3, 6)),
    ]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for (shape, taps, *geometry), dtype, last in itertools.product(cases, dtypes, (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        x, kernel = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout), torch.rand(taps)

        def make(place, kind, x=x, kernel=kernel, geometry=geometry):
            one = x.to(place, kind).requires_grad_()
            f = kernel.to(place)

            def call():
                y = upfirdn2d(one, f, *geometry)
                return y, torch.autograd.grad(y, one, y.detach())[0]

            return call

        calls = [functools.partial(make, *where) for where in ((device, dtype), ("cpu", torch.float64))]
        yield f"{list(shape)} {taps} {geometry} {dtype}{' channels last' * last}", dtype, *calls


def check_minibatch_stddev(device: str) -> Iterator[Check]:
    """Groups and features that no tile divides, single samples, channels last; all three orders."""
    cases = [((8, 6, 4, 4), 4, 1), ((6, 35, 3, 3), None, 5), ((3, 5, 1, 1), 1, 1), ((4, 130, 5, 7), 4, 2)]
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for (shape, group, features), dtype, last in itertools.product(cases, dtypes, (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        x, ddx = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
        x += 2 * torch.arange(len(x)).view(-1, 1, 1, 1)  # where samples are alike, any rounding shows
        dy = torch.randn(shape[0], shape[1] + features, *shape[2:], dtype=dtype)

        def make(place, kind, tensors=(x, dy, ddx), group=group, features=features):
            one, two, three = (t.to(place, kind).requires_grad_() for t in tensors)

            def call():
                y = minibatch_stddev(one, group, features)
                (dx,) = torch.autograd.grad(y, one, two, create_graph=True)
                return y, dx, *torch.autograd.grad(dx, (two, one), three)

            return call

        calls = [functools.partial(make, *where) for where in ((device, dtype), ("cpu", torch.float64))]
        yield f"{list(shape)} {group} {features} {dtype}{' channels last' * last}", dtype, *calls


def check_winner(device: str) -> Iterator[Check]:
    """Branches and samples that no tile divides, several tiles, ties, NaN."""
    shapes = [(1, 1), (3, 5), (8, 130), (64, 300), (70, 3)]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        scores = (4 * torch.randn(shape)).round().to(dtype).masked_fill(torch.rand(shape) < 0.3, torch.nan)

        def make(place, scores=scores):
            one = scores.to(place)
            return lambda: tuple(t.double() for t in winner(one))

        yield f"{list(shape)} {dtype}", torch.float64, *(functools.partial(make, place) for place in (device, "cpu"))


def check_mmd(device: str) -> Iterator[Check]:
    """Tiles that no block divides, on the diagonal and off it, points that coincide; all orders."""
    for kernel, (N, M, D), order in itertools.product(KERNELS, [(5, 3, 2), (70, 130, 33), (129, 64, 64)], (0, 1, 2)):
        x, y = torch.randn(N, D), torch.randn(M, D) + 0.5
        y[:3] = x[:3]

        def make(place, kind, x=x, y=y, kernel=kernel, order=order, D=D):
            one, two = (t.to(place, kind).requires_grad_(order > 0) for t in (x, y))

            def call():
                value = mmd2(one, two, kernel, [D**0.5, 2 * D**0.5, 3.3 * D**0.5], False, validate=False)
                if order == 0:
                    return (value,)
                first = torch.autograd.grad(value, (one, two), create_graph=order == 2)
                if order == 1:
                    return first
                return torch.autograd.grad(first, (one, two), (one.detach(), -two.detach()))

            return call

        calls = [functools.partial(make, *where) for where in ((device, torch.float32), ("cpu", torch.float64))]
        yield f"{kernel} {[N, M, D]} order {order}", torch.bfloat16, *calls  # sums of cancelling terms: 3 digits


def check_mmd_groups(device: str) -> Iterator[Check]:
    """Groups that no block divides or starts aligned, batches of all tile sizes, points that coincide."""
    for (N, M, sizes), unbiased in itertools.product(
        [(2, 1, [1]), (33, 20, [4, 36, 8]), (70, 130, [33, 5, 64])], (True, False)
    ):
        if unbiased and M < 2:
            continue
        xs, ys = ([torch.randn(n, D) for D in sizes] for n in (N, M))
        xs[0][:1] = ys[0][:1]

        def make(place, kind, xs=xs, ys=ys, unbiased=unbiased):
            leaves = [x.to(place, kind).requires_grad_() for x in xs]
            bandwidths = [[s * y.shape[1] ** 0.5 for s in (1, 2, 3.3)] for y in ys]
            target = MmdTarget([y.to(place, kind) for y in ys], bandwidths, unbiased)

            def call():
                values = mmd_groups(leaves, target, validate=False)
                return values, *torch.autograd.grad(values.sum(), leaves)

            return call

        calls = [functools.partial(make, *where) for where in ((device, torch.float32), ("cpu", torch.float64))]
        yield f"{[N, M, sizes]} {'unbiased' if unbiased else 'biased'}", torch.bfloat16, *calls  # as of mmd


def check_manhattan(device: str) -> Iterator[Check]:
    """Sizes that no block divides, A transposed."""
    for r, c, D in [(1, 1, 1), (70, 33, 65), (64, 130, 64)]:
        p, q, hp, hq, A = (torch.randn(*size) for size in ((r, D), (c, D), (r, D), (c, D), (c, r)))

        def make(place, kind, tensors=(p, q, hp, hq, A)):
            p, q, hp, hq, A = (t.to(place, kind) for t in tensors)
            return lambda: (manhattan_distance(p, q), manhattan_slopes(p, q, hp, hq), manhattan_signs(A.T, p, q))

        calls = [functools.partial(make, *where) for where in ((device, torch.float32), ("cpu", torch.float64))]
        yield f"{[r, c, D]}", torch.float32, *calls


def check_demodulation(device: str) -> Iterator[Check]:
    """Sizes that no tile divides, both layouts, one tap and nine, all rows and some."""
    shapes = [(1, 1, 1, 1), (3, 70, 9, 3), (35, 64, 33, 1)]
    for (B, I, O, k), dtype, last in itertools.product(shapes, (torch.float32, torch.float64), (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        s, gd = torch.randn(B, I), torch.randn(B, O)
        weight = torch.randn(O, I, k, k).contiguous(memory_format=layout).flatten(2)

        def make(place, kind, s=s, gd=gd, weight=weight):
            s, gd, w = (t.to(place, kind) for t in (s, gd, weight))
            rows = torch.arange(0, len(w), 2, device=place)

            def call():
                d, q = demodulation_forward(s, w, 1e-8)
                gradients = (demodulation_rows(gd, d, s, *which) for which in ((w, None), (w[rows], rows)))
                return d, q, demodulation_styles(gd, d, s, q), *gradients

            return call

        calls = [functools.partial(make, *where) for where in ((device, dtype), ("cpu", torch.float64))]
        yield f"{[B, I, O, k]} {dtype}{' channels last' * last}", dtype, *calls


def check_miner(device: str) -> Iterator[Check]:
    """Sizes that no tile divides, one and several chains of other shapes in a call, a mapping network, three passes."""
    shapes = [(1, 1, (1, 3)), (2, 17, (33, 70, 5)), (3, 4, (64, 64, 64, 64))]
    chains = [(shapes[0],), (shapes[1],), (shapes[2], shapes[1])]
    for call, activation, mapped in itertools.product(chains, ("lrelu", "tanh"), (False, True)):
        sizes = [[*itertools.pairwise(layers)] for _, _, layers in call]
        us = [torch.randn(B, layers[0]) for _, B, layers in call]
        weights = [[torch.randn(N, o, i) / i**0.5 for i, o in ls] for (N, _, _), ls in zip(call, sizes, strict=True)]
        biases = [[torch.randn(N, o) for _, o in ls] for (N, _, _), ls in zip(call, sizes, strict=True)]
        last = call[-1][2][-1]
        maps = torch.randn(7, last), torch.randn(7)

        def make(place, kind, us=us, weights=weights, biases=biases, maps=maps, activation=activation, mapped=mapped):
            def leaf(t):
                return t.to(place, kind, copy=True).requires_grad_()

            groups = [(leaf(u), [*map(leaf, W)], [*map(leaf, b)]) for u, W, b in zip(us, weights, biases, strict=True)]
            leaves = [t for u, W, b in groups for t in (u, *W, *b)]
            M, m = (t.to(place, kind) for t in maps)
            chains = [Chain(u, W, b, activation, None, True) for u, W, b in groups]
            if mapped:
                chains[-1] = chains[-1]._replace(mapping=Mapping([M], [m], [(0.3, 0.5, 1.4)]))

            def passes():
                zs = miner(chains)
                ones = [torch.ones_like(z) for z in zs]
                first = torch.autograd.grad(zs, leaves, ones, create_graph=True)
                second = torch.autograd.grad(first, leaves, [g.detach() for g in first], allow_unused=True)
                return *zs, *first, *(g for g in second if g is not None)

            return passes

        calls = [functools.partial(make, *where) for where in ((device, torch.float32), ("cpu", torch.float64))]
        yield f"{call} {activation}{' mapping' * mapped}", torch.bfloat16, *calls  # sums that cancel, too


def check_penalty(device: str) -> Iterator[Check]:
    """Samples of one element, of sizes that no block divides, of several blocks; channels last; all kinds."""
    kinds = {"centred": (-0.7, 0.0, 1, False), "squared": (0.0, 0.0, 1, True), "path length": (0.0, 0.01, 3, False)}
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    shapes = [(1, 1, 1, 1), (5, 3, 7, 3), (3, 5, 31, 29), (1030, 2, 1, 1)]
    for shape, dtype, last, (name, args) in itertools.product(shapes, dtypes, (False, True), kinds.items()):
        layout = torch.channels_last if last else torch.contiguous_format
        g, other = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        mean = torch.tensor(-0.7) if name == "path length" else None  # nothing cancels

        def make(place, wide, g=g, other=other, mean=mean, args=args):
            one, two = (t.to(place, torch.float64 if wide else None) for t in (g, other))
            m = mean if mean is None else mean.to(place, torch.promote_types(one.dtype, torch.float32))

            def call():
                P, r, s, a = penalty_forward(one, m, *args)
                mixed = [interpolate_drawn(one, two, 123, 4)]
                return P, r, s, a, penalty_backward(one, s, torch.full_like(P, 1.5)), *mixed

            return call

        calls = [functools.partial(make, place, wide) for place, wide in ((device, False), ("cpu", True))]
        yield f"{name} {list(shape)} {dtype}{' channels last' * last}", dtype, *calls


OPS: dict[str, Callable[[str], Iterator[Check]]] = {
    "bias_act": check_bias_act,
    "row_update": check_row_update,
    "row_score": check_row_score,
    "row_gradient": check_row_gradient,
    "modulated_conv2d": functools.partial(check_planes, op="modulated_conv2d"),
    "noise_bias_act": functools.partial(check_planes, op="noise_bias_act"),
    "demodulation": check_demodulation,
    "upfirdn2d": check_upfirdn2d,
    "minibatch_stddev": check_minibatch_stddev,
    "winner": check_winner,
    "manhattan": check_manhattan,
    "mmd": check_mmd,
    "mmd_groups": check_mmd_groups,
    "miner": check_miner,
    "penalty": check_penalty,
}
