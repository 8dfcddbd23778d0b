"""What a user gets in the end: one finetuning iteration of StyleGAN2-256 (config f), G and D sparse at 5 % of their
parameters, against dense training with a fused Adam; what G's training holds in memory beside the dense weights; and
on a GPU the demo's run of `transfer`, from start to end.

An iteration is a critic step and a generator step with the nonsaturating loss and an EMA of the generator.
"""

import copy
import gc
import statistics
import time
from contextlib import suppress

import pytest
import torch
from conftest import device_of
from measure import OURS
from torch.nn import functional as F

from minegan_fast import SparseFinetuner, data, load_generator, transfer
from minegan_fast.cli.demo import SETTINGS
from minegan_fast.models import StyleGAN2Discriminator, StyleGAN2Generator
from minegan_fast.training.captured import CudaGraphs

DENSE = "dense fused Adam"
CAPTURED = f"{OURS}, captured"
BATCHES = {"cpu": (2,), "cuda": (4, 16)}
UNTIMED = 4  # turns; in the last of them an iteration is captured
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SPARSE = {"budget": "parameters", "scope": "layer", "criterion": "random"}
EMA = 0.998


class Training:
    """G and D, their optimizers and the EMA; sparse where a density is given."""

    keeps_gradients = False

    def __init__(self, generator, critic, density: float | None, lr: float | torch.Tensor = 2e-3):
        self.G, self.D, self.density = generator, critic, density
        if density is not None:
            self.g, self.d = (SparseFinetuner(net, lr, density=density, **SPARSE) for net in (generator, critic))
            self.g.ema_decay = EMA
            self.g.select(), self.d.select()
            return
        self.g, self.d = (
            torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.99), fused=True) for net in (generator, critic)
        )
        self.average = [p.detach().clone() for p in generator.parameters()]

    def iteration(self, z, real) -> torch.Tensor:
        """The critic's loss."""
        self.G.requires_grad_(False), self.D.requires_grad_(True)
        self.d.zero_grad(set_to_none=not self.keeps_gradients)
        loss = F.softplus(self.D(self.G(z[0]))).mean() + F.softplus(-self.D(real)).mean()
        loss.backward()
        self.d.step()
        self.G.requires_grad_(True), self.D.requires_grad_(False)
        self.g.zero_grad(set_to_none=not self.keeps_gradients)
        F.softplus(-self.D(self.G(z[1]))).mean().backward()
        self.generator_step()
        return loss.detach()

    def generator_step(self):
        self.g.step()
        if self.density is None:
            torch._foreach_lerp_(self.average, list(self.G.parameters()), 1 - EMA)


class Captured(Training):
    """Runs its first iterations on a stream of its own, captures the next as a CUDA graph, and replays that from then
    on, with the latents and images of that iteration."""

    keeps_gradients = True

    def __init__(self, generator, critic, density: float):
        device = next(generator.parameters()).device
        super().__init__(generator, critic, density, torch.tensor(2e-3, device=device))
        self.turns, self.graphs = 0, CudaGraphs(device)

    def iteration(self, z, real) -> torch.Tensor:
        self.turns += 1
        eager = super().iteration
        if self.turns < UNTIMED:
            return self.graphs.warm_up(lambda: {"loss": eager(z, real)})[0]["loss"]
        if self.turns == UNTIMED:
            values, self.replay = self.graphs.capture(lambda: {"loss": eager(z, real)})
            self.loss = values["loss"]
        self.replay()
        return self.loss.clone()


def held_bytes(device: str) -> int:
    """Bytes of all living tensors."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
            with suppress(RuntimeError):  # a compiler's tensors without memory
                storage = torch.Tensor.untyped_storage(thing.detach())
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def row(which: str, shape: list[int], provider: str, **numbers) -> dict:
    case = {"op": "step", "pass": which, "shape": shape, "dtype": "float32"}
    return case | {"provider": provider, "backend": ""} | numbers


def timed(seconds: list[float]) -> dict:
    low, median, high = (1e6 * s for s in statistics.quantiles(seconds, n=4, method="inclusive"))
    return {"median_us": median, "q1_us": low, "q3_us": high, "samples": len(seconds)}


@pytest.fixture
def size(pytestconfig, device) -> dict:
    """Resolution, channels and rounds; few where the question is only whether it runs."""
    if pytestconfig.getoption("--quick"):
        return {"resolution": 32, "channel_base": 512, "rounds": 2}
    return {"resolution": 256, "channel_base": 32768, "rounds": {"cpu": 3, "cuda": 20}[device]}


def networks(size: dict, device: str):
    torch.manual_seed(0)
    arguments = {"channel_base": size["channel_base"]}
    return (
        StyleGAN2Generator(size["resolution"], **arguments).to(device),
        StyleGAN2Discriminator(size["resolution"], **arguments).to(device),
    )


def taking_turns(runs: dict, work, rounds: int, untimed: int, device: str) -> tuple[dict, dict]:
    """({name: seconds of work(run)}, {name: peak memory on a GPU}), in turns of which the first do not count. `work`
    returns a loss. In the first turn nothing has trained yet, and the losses of all runs have to agree; what is
    captured has to agree with ours in the first turn that counts too."""
    times, peaks = {name: [] for name in runs}, {}
    for turn in range(untimed + rounds):
        losses = []
        for name, run in list(runs.items()):
            torch.manual_seed(turn)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                losses.append(work(run))
            except RuntimeError as error:
                if name != CAPTURED:
                    raise
                print(f"no row of {CAPTURED}: turn {turn}: {error}")  # the others are still to be measured
                del runs[name], times[name]
                peaks.pop(name, None)
                continue
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            if turn >= untimed:
                times[name].append(time.perf_counter() - start)
        losses = dict(zip(runs, losses, strict=True))
        if turn == 0:
            for loss in losses.values():
                torch.testing.assert_close(loss, losses[OURS], rtol=1e-3, atol=1e-3)
        if turn == untimed and CAPTURED in runs:
            torch.testing.assert_close(losses[CAPTURED], losses[OURS], rtol=0.02, atol=0)
    return times, peaks


def record(recorder, which: str, shape: list[int], times: dict, peaks: dict):
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows = []
    for name, seconds in times.items():
        extra = {}
        if name == OURS:
            extra["ratio"] = {other: medians[other] / medians[OURS] for other in times if other != OURS}
        if name in peaks and name != CAPTURED:  # the memory of a graph is not what the allocator counts
            extra["peak_bytes"] = peaks[name]
        rows.append(row(which, shape, name, density=0.05, **timed(seconds), **extra))
    recorder.add(rows)


def pytest_generate_tests(metafunc):
    if metafunc.function is test_iteration:
        quick = metafunc.config.getoption("--quick")
        metafunc.parametrize("images", BATCHES["cuda" if quick else device_of(metafunc.config)])


def test_iteration(benchmark, device, recorder, size, images):
    torch.backends.cudnn.benchmark = True
    generator, critic = networks(size, device)
    runs = {OURS: Training(copy.deepcopy(generator), copy.deepcopy(critic), 0.05)}
    if device == "cuda":
        runs[CAPTURED] = Captured(copy.deepcopy(generator), copy.deepcopy(critic), 0.05)
    runs[DENSE] = Training(generator, critic, None)
    z = torch.randn(2, images, 512, device=device)
    real = torch.randn(images, 3, size["resolution"], size["resolution"], device=device)
    untimed = UNTIMED if CAPTURED in runs else 1
    found = taking_turns(runs, lambda run: run.iteration(z, real), size["rounds"], untimed, device)
    record(recorder, "iteration, 5 %", list(real.shape), *found)
    benchmark.pedantic(runs[OURS].iteration, args=(z, real))


def test_demo(benchmark, device, recorder, pytestconfig, tmp_path):
    """What `minegan-fast demo` runs, without its judge."""
    quick = pytestconfig.getoption("--quick")
    if device == "cpu" and not quick:
        pytest.skip("report_demo shows the demo of a CPU")
    few = {"mining_steps": 2, "finetune_steps": 2, "eval_samples": 64, "snapshot_every": 2} if quick else {}
    settings = SETTINGS | few | {"source": data.GENERATOR, "critic": data.CRITIC, "images": data.TARGET}
    start = time.perf_counter()
    benchmark.pedantic(transfer, kwargs=settings | {"out": tmp_path / "run", "device": device})
    seconds = time.perf_counter() - start
    steps = [settings["mining_steps"] + settings["finetune_steps"]]
    numbers = dict.fromkeys(("median_us", "q1_us", "q3_us"), 1e6 * seconds) | {"samples": 1, "ratio": {}}
    recorder.add([row("transfer of the demo", steps, OURS, **numbers)])


@pytest.mark.parametrize("batch", [16, 32])
def test_small_step(benchmark, device, recorder, pytestconfig, batch):
    """A step of the embedded generator, whose images have 32 pixels: calls cost as much as arithmetic."""
    plain = load_generator(data.GENERATOR).to(device).requires_grad_(True)
    z = torch.randn(batch, plain.latent_dim, device=device)
    runs = {OURS: Training(copy.deepcopy(plain), torch.nn.Linear(1, 1), 0.05)}
    runs[DENSE] = Training(plain, torch.nn.Linear(1, 1), None)

    def step(run):
        run.g.zero_grad()
        loss = run.G(z).square().mean()
        loss.backward()
        run.generator_step()
        return loss.detach()

    found = taking_turns(runs, step, 7 if pytestconfig.getoption("--quick") else 97, 3, device)
    record(recorder, "step, 32 px", [batch, 1, 32, 32], *found)
    benchmark.pedantic(step, args=(runs[OURS],))


def test_memory(benchmark, device, recorder, size):
    """After one step, gradients still there: leaves, gradients, moments, EMA and what verify() keeps."""
    before = held_bytes(device)
    generator, _ = networks(size, device)
    weights = held_bytes(device) - before
    held = {}
    for density in (None, *DENSITIES):
        generator.requires_grad_(True)
        run = Training(generator, torch.nn.Linear(1, 1), density)
        for p in run.g.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        run.generator_step()
        held[density] = held_bytes(device) - before - weights
        if density == DENSITIES[-1]:
            benchmark.pedantic(run.generator_step)
        if density is not None:
            run.g.release()
        for p in generator.parameters():
            p.grad = None
        del run, p
    assert held[1.0] > held[0.01] > 0
    parameters = [sum(p.numel() for p in generator.parameters())]
    for density in DENSITIES:
        shared = {"density": density}
        which = f"memory, {density:.0%}"
        numbers = {"held_bytes": held[density], "ratio": {DENSE: held[None] / held[density]}}
        theirs = row(which, parameters, DENSE, held_bytes=held[None], **shared)
        recorder.add([theirs, row(which, parameters, OURS, **numbers, **shared)])
