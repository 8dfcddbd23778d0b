# ruff: noqa: RUF001
"""What was promised of sparse finetuning and of StyleGAN2, and what came."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from report_density import plot_path
from report_rows import COMPACT, LOOP, MASK, Machine, updates


@dataclass
class Goal:
    what: str
    values: Callable[[Machine], Iterable[float]]
    cpu: float | None  # None: no goal there
    gpu: float | None
    most: bool = False  # the goal is a most, else a least
    unit: str = "×"


def _small(machine):
    return machine.ours("row_update", network="small layers", density=0.05, average=False)


def _memory(machine):
    rows = machine.ours("step", density=0.05)
    return [100 / row["ratio"]["dense fused Adam"] for row in rows if row["pass"].startswith("memory")]


def _gradients(machine, provider, few: bool | None = None):
    """Of 3×3 layers with 512 channels; few: up to 8 rows, or more."""
    rows = [r for r in machine.ours("row_gradient") if r.get("channels") == 512 and r.get("taps") == 9]
    if few is None:
        return [machine.ratio(r, provider, "median_us") for r in rows if r["density"] == 0.05]
    return [machine.ratio(r, provider, "median_us") for r in rows if (r["neurons"] <= 8) == few and r["density"] <= 0.5]


def _generator(machine, step, dtype, *rivals, field="median_us"):
    """Of StyleGAN2-256's generator: the best of the rivals, (provider, dtype), over ours."""
    for row in machine.ours("stylegan2", dtype=dtype):
        if row["pass"] == step:
            same = [r for r in machine.rows if all(r[k] == row[k] for k in ("op", "pass", "shape"))]
            theirs = [r[field] for r in same if (r["provider"], r["dtype"]) in rivals]
            yield min(theirs) / row[field] if theirs else math.nan


def _of_copy(machine, op):
    return [row["percent_of_copy"] for row in machine.ours(op) if row.get("percent_of_copy")]


def _mmd(machine, step, rival, D=2048):
    """Of samples of 2,000 and more: the rival's time over ours, or for the products, a floor, ours over theirs."""
    for row in machine.ours("mmd"):
        if row["pass"] == step and row["shape"][0] >= 2000 and D in (None, row["shape"][2]):
            ratio = machine.ratio(row, rival, "median_us")
            yield 1 / ratio if rival == "products" else ratio


def _of_products(machine):
    """The arithmetic of the pairs i < j alone over the time, of the rate of float32 products by three of tf32."""
    for row in machine.ours("mmd"):
        if row["pass"] == "forward" and row["shape"][0] >= 4000:
            yield 100 * row["tflop_s"] / (machine.runs[row["run"]]["ceilings"]["matmul_tf32_tflop_s"] / 3)


def _kid(machine, rival):
    return [machine.ratio(r, rival, "median_us") for r in machine.ours("mmd") if r["pass"].startswith("KID")]


def _groups(machine, rival, least=32, most=256):
    """Of batches of that many, with the gradient: the rival's time over ours, or ours over the products'."""
    for row in machine.ours("mmd_groups"):
        if row["pass"] == TRAINING and least <= row["shape"][0] <= most:
            ratio = machine.ratio(row, rival, "median_us")
            yield 1 / ratio if rival == "products" else ratio


def _multi(machine, step, branches, field="median_us"):
    """How many times as much as ours the formulation with all graphs needs; of `shares` what ours needs."""
    for row in machine.ours("multi"):
        if row["pass"] == step and row["shape"][0] == branches:
            yield row[field] if step == "shares" else machine.ratio(row, "all with a graph, maximum", field)


def _penalties(machine, name):
    """The rows of the passes that begin so; of kernels those that come from memory."""
    rows = [row for row in machine.ours("penalty") if row["pass"].startswith(name)]
    return [row for row in rows if row.get("cold", True)]


def _miners(machine, step, rival=None):
    """Of banks of 8 and 64 miners, 512 wide and two layers deep: the rival's time over ours, or ours over the floor."""
    for row in machine.ours("miner"):
        if row["pass"] == step and row["shape"][0] in (8, 64) and row["shape"][2:] == [512, 2]:
            yield machine.above_floor(row) if rival is None else machine.ratio(row, rival, "median_us")


LAUNCHED = ("bias_act", "noise_bias_act", "upfirdn2d", "minibatch_stddev", "demodulation")


def _host(machine, *passes):
    """The host's microseconds in these passes of each op, by launches that compute nothing."""
    rows = {r["pass"]: r for r in machine.ours("launches") if r["shape"] == [4, 32, 16, 16] and r["dtype"] == "float32"}
    for op in LAUNCHED:
        if f"{op}, {passes[0]}" in rows:
            yield sum(rows[f"{op}, {step}"]["median_us"] for step in passes)


def _launches(machine, what, field):
    return [row[field] for row in machine.ours("launches") if row["pass"] == what and field in row]


def _first_use(machine, field):
    return [row[field] for row in machine.ours("first_use", part="step", kernels="all")]


PUBLIC = ("public", "float32"), ("public", "bfloat16")
TRAINING = "forward + backward"
NORMS = f"norm {TRAINING}"
GOALS = [
    Goal(
        "`row_update` at 5 %, against mask + fused Adam",
        lambda m: [m.ratio(r, MASK) for r in updates(m, density=0.05)], 15, 15,
    ),
    Goal(
        "the same with an average of the weights",
        lambda m: [m.ratio(r, MASK) for r in updates(m, True, density=0.05)], 15, 20,
    ),
    Goal(
        "against compact leaves, fused Adam, `index_copy_`: whole networks at 5 %",
        lambda m: [m.ratio(r, COMPACT) for r in updates(m, density=0.05)], 1.4, 8,
    ),
    Goal("the same, many small layers", lambda m: [m.ratio(r, COMPACT) for r in _small(m)], 4, 8),
    Goal("the same, at every density up to 50 %", lambda m: [m.ratio(r, COMPACT) for r in updates(m, most=0.5)], 1, 1),
    Goal(
        "`row_update` at 5 %, over the byte floor",
        lambda m: [m.above_floor(r) for r in updates(m, density=0.05)], 1.25, 1.2, most=True,
    ),
    Goal("host time of a step, 110 tensors", lambda m: [r["host_us"] for r in _small(m)], None, 25, True, " µs"),
    Goal(
        "host time without a GPU of `RowUpdate.step`, Adam, 110 tensors (64×64 and 64), gradients where they were",
        lambda m: _launches(m, "row_update adam, gradients where they were", "median_us"), 30, None, True, " µs",
    ),
    Goal(
        "the same, gradients elsewhere",
        lambda m: _launches(m, "row_update adam, gradients elsewhere", "median_us"), 120, None, True, " µs",
    ),
    Goal(
        f"host time without a GPU of a call of {', '.join(f'`{op}`' for op in LAUNCHED)}, 4×32×16×16, float32, "
        "without gradient",
        lambda m: _host(m, "inference"), 30, None, True, " µs",
    ),
    Goal("the same, forward and backward", lambda m: _host(m, "forward", "backward"), 90, None, True, " µs"),
    Goal(
        "PyTorch's launches in the generator's step of StyleGAN2-256, batch 4",
        lambda m: _launches(m, "StyleGAN2-256, generator", "aten"), 685, None, True, "",
    ),
    Goal(
        "specialisations of Triton kernels of the first four steps of StyleGAN2-256, batch 4",
        lambda m: _first_use(m, "specialisations"), 60, None, True, "",
    ),
    Goal("their compilation on one core", lambda m: _first_use(m, "compile_seconds"), 20, None, True, " s"),
    Goal("dW of a 3×3 layer of 512 channels at 5 %, against dense", lambda m: _gradients(m, "dense"), 10, 8),
    Goal("the same, up to 8 neurons, against the gathered library", lambda m: _gradients(m, "gathered", True), 2, 1.5),
    Goal("the same for more neurons", lambda m: _gradients(m, "gathered", False), 1, 1),
    Goal(
        "all dW of StyleGAN2-256's generator at 5 %, against dense",
        lambda m: [m.ratio(r, "dense", "median_us") for r in m.ours("row_gradient") if r["pass"].startswith("all")],
        5, 4,
    ),
    Goal(
        "an iteration of StyleGAN2-256, G and D at 5 %, against dense",
        lambda m: [r["ratio"]["dense fused Adam"] for r in m.ours("step") if r["pass"].startswith("iteration")],
        1.25, 1.2,
    ),
    Goal(
        "a step of the embedded generator, 32 pixels, at 5 %, against dense",
        lambda m: [r["ratio"]["dense fused Adam"] for r in m.ours("step") if r["pass"].startswith("step")],
        1, 1,
    ),
    Goal("all but the dense weights at 5 %, of dense training's", _memory, 7, 7, True, " %"),
    Goal(
        "scoring, against one image a pass and every gradient to the host",
        lambda m: [
            m.ratio(r, "one image a pass, to the host", "median_us")
            for r in m.ours("row_score") if r["pass"].startswith("scoring")
        ], 1.2, 50,
    ),
    Goal(
        "its peak memory, over one backward of as many images",
        lambda m: [
            1 / m.ratio(r, "one backward of a batch", "peak_bytes")
            for r in m.ours("row_score") if r["pass"].startswith("scoring")
        ], 1.3, 1.3, most=True,
    ),
    Goal(
        "StyleGAN2-256's generator, forward and backward, against the public formulation, float32",
        lambda m: _generator(m, TRAINING, "float32", PUBLIC[0]), 1.3, 1.5,
    ),
    Goal(
        "the same under bfloat16 autocast, against the faster of the public one's float32 and bfloat16",
        lambda m: _generator(m, TRAINING, "bfloat16", *PUBLIC), 2, 1.5,
    ),
    Goal(
        "the same, float32, against `torch.compile` of plain PyTorch",
        lambda m: _generator(m, TRAINING, "float32", ("torch.compile", "float32")), None, 1.2,
    ),
    Goal(
        "its peak memory, of the public formulation's",
        lambda m: [
            1 / value
            for dtype, rival in zip(("float32", "bfloat16"), PUBLIC, strict=True)
            for value in _generator(m, TRAINING, dtype, rival, field="peak_bytes")
        ], 0.6, 0.6, most=True,
    ),
    Goal(
        "a path length step of it, against the public formulation, float32",
        lambda m: _generator(m, "path length", "float32", PUBLIC[0]), 1.3, 1.3,
    ),
    # Ten times, which this was to be, would be less time than the products alone take.
    Goal("`mmd2`, D = 64, against `cdist`", lambda m: _mmd(m, "forward", "cdist", 64), 7, None),
    Goal("the same with its gradient", lambda m: _mmd(m, TRAINING, "cdist", 64), 4, None),
    Goal("`mmd2`, D = 2048, over the three products alone", lambda m: _mmd(m, "forward", "products"), 1.5, None, True),
    # Three times would need products that are faster than float32's.
    Goal("the same against `cdist`", lambda m: _mmd(m, "forward", "cdist"), 2, None),
    Goal("`mmd2`, D ≥ 64, against KeOps", lambda m: _mmd(m, "forward", "KeOps", None), 10, None),
    Goal("`mmd2`, of the rate of a matrix product", _of_products, None, 70, unit=" %"),
    Goal("`mmd2` with its gradient, against eager PyTorch", lambda m: _mmd(m, TRAINING, "norms"), None, 4),
    Goal("the same against `torch.compile`", lambda m: _mmd(m, TRAINING, "torch.compile"), None, 2),
    Goal(
        "`mmd2` with its gradient of 1,024 samples, D = 512",
        lambda m: [r[m.time] for r in m.ours("mmd") if r["pass"] == TRAINING and r["shape"] == [1024, 1024, 512]],
        None, 40, True, " µs",
    ),
    Goal(
        "memory of `mmd2` and its gradient, 2 × 20,000 samples, D = 512",
        lambda m: [r["peak_bytes"] / 1e6 for r in m.ours("mmd") if r["pass"].startswith("memory")],
        500, 500, True, " MB",
    ),
    Goal(
        "`mmd_groups` with its gradient, batches of 32 to 256, over its products alone",
        lambda m: _groups(m, "products"), 1.3, None, most=True,
    ),
    Goal(
        "the same of a batch of 32, against `mmd2` group by group",
        lambda m: _groups(m, "mmd2 in a loop", most=32), 3, 3,
    ),
    Goal(
        "a step under the kernel distance, over its generator and its features alone",
        lambda m: [1 / r["ratio"]["generator and features alone"] for r in m.ours("kernel_step")],
        1.15, 1.15, most=True,
    ),
    Goal("a bank of 8 or 64 miners, against a loop", lambda m: _miners(m, "forward", LOOP), 3, 3),
    Goal("the same against vmap", lambda m: _miners(m, "forward", "vmap"), 1.5, 1.5),
    Goal("the same against `baddbmm`", lambda m: _miners(m, "forward", "baddbmm"), 1.5, 1.5),
    Goal("the same over the byte floor of the weights", lambda m: _miners(m, "forward"), 1.6, 1.6, most=True),
    Goal("a bank with its gradients, against a loop", lambda m: _miners(m, TRAINING, LOOP), 3, 3),
    Goal("the same against vmap", lambda m: _miners(m, TRAINING, "vmap"), 1.5, 1.5),
    Goal("the same against `baddbmm`", lambda m: _miners(m, TRAINING, "baddbmm"), 1.5, 1.5),
    Goal("the same over the byte floor", lambda m: _miners(m, TRAINING), 1.6, 1.6, most=True),
    Goal(
        # 1.8 times, which this was to be, is more than the passes allow: 2 N of them against N + 2.
        "a mining step of 8 StyleGAN2 generators, 64 pixels, against all of them with a graph",
        lambda m: _multi(m, "step", 8), 1.3, 1.3,
    ),
    Goal("its peak memory: theirs over ours", lambda m: _multi(m, "step", 8, "peak_bytes"), 4, 4),
    Goal(
        "the shares of 64 GANs, solved for",
        lambda m: [us / 1e3 for us in _multi(m, "shares", 64)], 1, None, True, " ms",
    ),
    Goal("KID of 100 subsets of 1,000, against NumPy", lambda m: _kid(m, "NumPy"), 3, None),
    Goal("the same against torchmetrics", lambda m: _kid(m, "torchmetrics"), 3, 10),
    Goal(
        "its time",
        lambda m: [r["median_us"] / 1e3 for r in m.ours("mmd") if r["pass"].startswith("KID")], None, 3.5, True, " ms",
    ),
    Goal("`upfirdn2d`, of the copy bandwidth", lambda m: _of_copy(m, "upfirdn2d"), None, 85, unit=" %"),
    Goal("`bias_act`, of the copy bandwidth", lambda m: _of_copy(m, "bias_act"), None, 85, unit=" %"),
    Goal(
        # Two and a half times, which this was to be, is less time than reading and writing its bytes takes.
        "norm of a gradient and its penalty, forward and backward, against eager",
        lambda m: [m.ratio(r, "eager", "median_us") for r in _penalties(m, NORMS)], 1.7, 2.5,
    ),
    Goal(
        "the same, over the byte floor",
        lambda m: [m.above_floor(r) for r in _penalties(m, NORMS)], None, 1.3, most=True,
    ),
    Goal(
        # PyTorch's own kernels for the two passes do not come within 1.3 times the byte floor on every CPU.
        "the same, over the norm and the product that a user would write by hand",
        lambda m: [1 / m.ratio(r, "by hand", "median_us") for r in _penalties(m, NORMS)], 1.3, None, most=True,
    ),
    Goal(
        "interpolation with its draw, over `torch.lerp`",
        lambda m: [1 / m.ratio(r, "torch.lerp", "median_us") for r in _penalties(m, "interpolation")],
        1.1, 1.1, most=True,
    ),
    Goal(
        "an R1 step of StyleGAN2-256's discriminator, against plain layers",
        lambda m: [m.ratio(r, "plain layers", "median_us") for r in _penalties(m, "R1")], 1.3, 1.3,
    ),
    Goal(
        "a WGAN-GP step of a ResNet critic, against plain autograd",
        lambda m: [m.ratio(r, "plain autograd", "median_us") for r in _penalties(m, "WGAN-GP")], 1.3, 1.3,
    ),
    Goal(
        "peak memory of these steps, of the plain ones'",
        lambda m: [
            1 / m.ratio(r, rival, "peak_bytes")
            for name, rival in (("R1", "plain layers"), ("WGAN-GP", "plain autograd")) for r in _penalties(m, name)
        ], 1, 1, most=True,
    ),
]  # fmt: skip
SUMMARY = (
    "`row_update` at 5 %, against mask + fused Adam",
    "scoring, against one image a pass and every gradient to the host",
    "StyleGAN2-256's generator, forward and backward, against the public formulation, float32",
    "a mining step of 8 StyleGAN2 generators, 64 pixels, against all of them with a graph",
    "a WGAN-GP step of a ResNet critic, against plain autograd",
)


def _lines(machine: Machine) -> dict[str, str]:
    """{what: its row of the table} of the goals that the machine has measured."""
    lines = {}
    for goal in GOALS:
        target = goal.gpu if machine.gpu else goal.cpu
        values = [value for value in goal.values(machine) if not math.isnan(value)]
        if target is None or not values:
            continue
        worst = max(values) if goal.most else min(values)
        met = worst <= target if goal.most else worst >= target
        ends = sorted({_digits(min(values)), _digits(max(values))}, key=float)
        sign = "≤" if goal.most else "≥"
        cells = goal.what, f"{sign} {target}{goal.unit}", "–".join(ends) + goal.unit, "yes" if met else "no"
        lines[goal.what] = f"| {' | '.join(cells)} |\n"
    return lines


def _table(machine: Machine, lines: list[str]) -> str:
    run = machine.runs[max(machine.runs)]
    facts = f"**{machine.name}**, torch {run['torch']}, newest run {run['date']} at commit {run['commit']}\n\n"
    head = "| what | goal | measured, least to most | met |\n| --- | --- | --- | --- |\n"
    return facts + head + "".join(lines)


def _measured(machines: list[dict], red: set[str]) -> Iterable[Machine]:
    for machine in map(Machine, machines):
        machine.rows = [row for row in machine.rows if row["op"] not in red]
        yield machine


def summary(machines: list[dict], red: set[str]) -> str:
    """Five rows of the machine that has measured most of them."""
    found = [(m, [line for what, line in _lines(m).items() if what in SUMMARY]) for m in _measured(machines, red)]
    machine, lines = max(found, key=lambda pair: len(pair[1]), default=(None, []))
    return _table(machine, lines) if lines else "No measurements yet.\n"


def render(machines: list[dict], red: set[str]) -> str:
    """The goal table of every machine that has rows for it, and where its plots are."""
    parts = []
    for machine in _measured(machines, red):
        if lines := _lines(machine):
            parts.append(_table(machine, [*lines.values()]))
            if list(updates(machine)):
                parts.append(f"![time and memory over the density]({plot_path(machine)})\n")
    return "\n".join(parts) or "No measurements yet.\n"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
