"""One Adam step of the selected rows of whole generators, at shares of their parameters, against other ways to do it.

All providers work on the same weights and gradients; each has moments of its own kind. Least bytes a selected
parameter: 32 (read gradient, weight and two moments, write the latter three and the dense row), with an average 40.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
from clock import Provider
from measure import OURS, Case, clone_of

from minegan_fast.ops import Hyperparameters, RowTensor, RowUpdate, use_backend

LR, BETAS, EMA_DECAY = 1e-3, (0.0, 0.99), 0.998
DENSITIES = (0.05, 0.01, 0.02, 0.1, 0.2, 0.5, 1.0)
LARGEST = {"test_row_update": "StyleGAN2-256-0.05"}  # the case of the goals
WITH_AVERAGE = {"cpu": (0.05, 0.2), "cuda": DENSITIES}


def stylegan2(resolution: int) -> list[tuple[int, ...]]:
    """Karras et al. 2020, config f: weight, bias, noise strength and affine of each convolution, toRGB, mapping."""
    shapes, before, size = [(512, 512), (512,)] * 8 + [(512, 4, 4)], 512, 4
    while size <= resolution:
        width = min(512, 32768 // size)
        for inputs in (before, width) if size > 4 else (width,):
            shapes += [(width, inputs, 3, 3), (width,), (), (inputs, 512), (inputs,)]
        shapes += [(3, width, 1, 1), (3,), (width, 512), (width,)]
        before, size = width, 2 * size
    return shapes


def biggan256() -> list[tuple[int, ...]]:
    """Brock et al. 2019 with 96 channels: conditional batch norms are Linear layers of a 148-wide condition."""
    widths = [96 * f for f in (16, 16, 8, 8, 4, 2, 1)]
    shapes = [(16 * widths[0], 20), (16 * widths[0],), (1000, 128), (96,), (96,), (3, 96, 3, 3), (3,)]
    for inputs, width in itertools.pairwise(widths):
        shapes += [(width, inputs, 3, 3), (width,), (width, width, 3, 3), (width,), (width, inputs, 1, 1), (width,)]
        shapes += [(inputs, 148)] * 2 + [(width, 148)] * 2
    return [*shapes, (48, 384, 1, 1), (48, 384, 1, 1), (192, 384, 1, 1), (384, 192, 1, 1), ()]


def pgan1024() -> list[tuple[int, ...]]:
    """Karras et al. 2018."""
    widths = (512, 512, 512, 512, 256, 128, 64, 32, 16)
    shapes = [(8192, 512), (512,), (512, 512, 3, 3), (512,), (3, 16, 1, 1), (3,)]
    for inputs, width in itertools.pairwise(widths):
        shapes += [(width, inputs, 3, 3), (width,), (width, width, 3, 3), (width,)]
    return shapes


NETWORKS = {
    "small layers": lambda: [(64, 64), (64,)] * 55,
    "StyleGAN2-256": lambda: stylegan2(256),
    "BigGAN-256": biggan256,
    "PGAN-1024": pgan1024,
}


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    quick = metafunc.config.getoption("--quick")
    cases = [
        (network, density, average)
        for network in NETWORKS
        for density in (DENSITIES if network != "small layers" else (0.05, 0.5))
        for average in ((False, True) if density in WITH_AVERAGE[device] else (False,))
    ]
    metafunc.parametrize(("network", "density", "average"), cases[: 2 if quick else None], ids=str)


class Problem:
    """Weights, gradients and moments that all providers share; `reset` gives them their first values back."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], density: float, average: bool, device: str):
        generator = torch.Generator(device).manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        self.device, self.average, self.shapes = device, average, shapes
        self.weights = [normal(shape) for shape in shapes]
        sizes = [shape[0] if shape else 1 for shape in shapes]
        kept = [max(1, round(density * n)) for n in sizes]
        self.rows = [
            torch.randperm(n, generator=generator, device=device)[:k].sort().values
            for n, k in zip(sizes, kept, strict=True)
        ]
        self.leaves = [self._rows(w, r).clone().requires_grad_() for w, r in zip(self.weights, self.rows, strict=True)]
        for leaf in self.leaves:
            leaf.grad = normal(leaf.shape)
        self.start = [leaf.detach().clone() for leaf in self.leaves]
        self.moments = [[torch.zeros_like(leaf) for leaf in self.start] for _ in range(2)]
        self.means = [leaf.clone() for leaf in self.start] if average else None
        self.chosen = sum(leaf.numel() for leaf in self.leaves)
        self.fraction = self.chosen / sum(w.numel() for w in self.weights)
        self.checked = sorted({0, len(shapes) // 2, len(shapes) - 1})
        self.hyper = Hyperparameters(lr=LR, betas=BETAS, ema_decay=EMA_DECAY if average else None)

    @staticmethod
    def _rows(w, r):
        return w[r] if w.ndim else w.reshape(1)

    @torch.no_grad()
    def reset(self):
        for leaf, w, r, start in zip(self.leaves, self.weights, self.rows, self.start, strict=True):
            leaf.copy_(start)
            w.index_copy_(0, r, start) if w.ndim else w.copy_(start[0])
        torch._foreach_zero_(self.moments[0])
        torch._foreach_zero_(self.moments[1])
        if self.average:
            torch._foreach_copy_(self.means, self.start)

    def result(self, means=None):
        """Some of the weights' rows and averages: what a provider is judged by."""
        found = [self._rows(self.weights[i], self.rows[i]) for i in self.checked]
        return found + [means[i] for i in self.checked] if self.average else found

    def expected(self):
        tensors, grads = [], []
        for i in self.checked:
            tensors.append(RowTensor(self.start[i].double()))
            grads.append(self.leaves[i].grad.double())
        with use_backend("reference"):
            RowUpdate("adam", tensors, ema=self.average).step(grads, self.hyper)
        return [t.leaf for t in tensors] + [t.state["ema"] for t in tensors if self.average]

    def state(self, i: int) -> dict:
        return {"exp_avg": self.moments[0][i], "exp_avg_sq": self.moments[1][i]} | (
            {"ema": self.means[i]} if self.average else {}
        )

    def optimizer(self, parameters, moments) -> torch.optim.Adam:
        """Fused Adam with these moments; on a GPU such as a CUDA graph can hold."""
        cuda = self.device == "cuda"
        lr = torch.tensor(LR, device=self.device) if cuda else LR
        adam = torch.optim.Adam(parameters, lr=lr, betas=BETAS, fused=True, capturable=cuda)
        for p, mean, square in zip(parameters, *moments, strict=True):
            step = torch.zeros((), device=self.device)
            adam.state[p] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        return adam


def ours(problem: Problem):
    tensors = [
        RowTensor(leaf, problem.state(i), w, r)
        for i, (leaf, w, r) in enumerate(zip(problem.leaves, problem.weights, problem.rows, strict=True))
    ]
    update = RowUpdate("adam", tensors, ema=problem.average)

    def call():
        update.step([leaf.grad for leaf in problem.leaves], problem.hyper)

    return call, lambda: problem.result(problem.means)


def compact_leaves(problem: Problem, compiled: bool = False):
    """The strongest: given compact gradients as ours is, it needs no gather."""
    adam = problem.optimizer(problem.leaves, problem.moments)

    def write():
        for w, r, leaf in zip(problem.weights, problem.rows, problem.leaves, strict=True):
            w.copy_(leaf[0]) if w.ndim == 0 else w.index_copy_(0, r, leaf)
        if problem.average:
            torch._foreach_lerp_(problem.means, [leaf.detach() for leaf in problem.leaves], 1 - EMA_DECAY)

    def step():
        adam.step()
        with torch.no_grad():
            write()

    return torch.compile(step) if compiled else step, lambda: problem.result(problem.means)


def masked(problem: Problem):
    """What scripts do: the whole gradient times a mask, the whole optimizer, the whole average."""
    weights = [w.requires_grad_() for w in problem.weights]
    masks = []
    for w, r, leaf in zip(weights, problem.rows, problem.leaves, strict=True):
        w.grad, mask = torch.zeros_like(w), torch.zeros(w.shape[:1] + (1,) * (w.ndim - 1), device=w.device)
        if w.ndim:
            w.grad[r], mask[r] = leaf.grad, 1.0
        else:
            w.grad.copy_(leaf.grad[0]), mask.fill_(1.0)
        masks.append(mask)
    adam = problem.optimizer(weights, [[torch.zeros_like(w) for w in weights] for _ in range(2)])
    means = [w.detach().clone() for w in weights] if problem.average else None

    def call():
        torch._foreach_mul_([w.grad for w in weights], masks)
        adam.step()
        if problem.average:
            torch._foreach_lerp_(means, [w.detach() for w in weights], 1 - EMA_DECAY)

    def result():
        rows = [problem._rows(m, r) for m, r in zip(means or (), problem.rows, strict=bool(means))]
        return [t.detach() for t in problem.result(rows)]

    return call, result


def provider(name: str, build, problem: Problem, backend: str = "") -> Provider:
    """Built at its first call, from the first values; the call that is checked is that one."""
    built = []

    def make():
        if built:
            return built[0]
        problem.reset()
        call, result = build(problem)
        built.append(call)

        def first():
            call()
            return result()

        return first

    return Provider(name, make, backend)


def test_row_update(compare, device, network, density, average):
    problem = Problem(NETWORKS[network](), density, average, device)
    which = f"{network}, {density:.0%}{', average' if average else ''}"
    least = (40 if average else 32) * problem.chosen
    case = Case(
        "row_update", which, (len(problem.shapes), problem.chosen), torch.float32, least, problem.expected(),
        yardstick="compact leaves",
        extra={"network": network, "density": density, "fraction": round(problem.fraction, 5), "average": average},
    )  # fmt: skip
    providers = [provider(OURS, ours, problem, backend) for backend in ("cuda", "triton", "cpp")]
    providers.append(provider("compact leaves", compact_leaves, problem))
    if device == "cuda":
        compiled = functools.partial(compact_leaves, compiled=True)
        providers.append(provider("compact leaves, torch.compile", compiled, problem))
    providers.append(provider("mask", masked, problem))
    compare(case, [*providers, clone_of(least, device)])
