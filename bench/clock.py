"""How a call is timed: in turn with its competitors, cold where asked, device time apart from host time."""

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from machine import cache_bytes

from minegan_fast.ops import use_backend
from minegan_fast.training.captured import CudaGraphs

ROUNDS = 7, 200  # at least, at most
Call = Callable[[], Sequence[torch.Tensor]]


@dataclass
class Provider:
    """One implementation. `make` prepares a call, untimed, and returns it.

    A floor computes nothing that could be wrong: it only moves as many bytes.
    """

    name: str
    make: Callable[[], Call]
    backend: str = ""
    floor: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}:{self.backend}" if self.backend else self.name


@dataclass
class Samples:
    """Seconds of every timed call: on a GPU device time; `host` is how long the calling thread was busy."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def interleave(providers: list[Provider], device: str, cold: bool, budget: float) -> dict[str, Samples]:
    """Times the providers in turn (A B C, B C A, ...) until `budget` seconds are spent."""
    timer = _cuda_timer if device == "cuda" else _cpu_timer
    flush = flusher(device) if cold else lambda: None
    # Twice: the first calls compile, allocate, and fill caches.
    once = {provider.label: timer(provider, flush, 1, 0.0)[1] for _ in range(2) for provider in providers}
    repeats = {label: 1 if cold else max(1, round(1e-4 / max(host, 1e-7))) for label, host in once.items()}
    backlog = 2 * max(once.values()) + 1e-4
    samples = {provider.label: Samples() for provider in providers}
    end = time.perf_counter() + budget
    for turn in range(ROUNDS[1]):
        if turn >= ROUNDS[0] and time.perf_counter() > end:
            break
        first = turn % len(providers)
        for provider in providers[first:] + providers[:first]:
            seconds, host = timer(provider, flush, repeats[provider.label], backlog)
            samples[provider.label].seconds.append(seconds)
            samples[provider.label].host.append(host)
    return samples


def _cpu_timer(provider: Provider, flush: Callable, repeats: int, backlog: float) -> tuple[float, float]:
    with use_backend(provider.backend or None):
        calls = [provider.make() for _ in range(repeats)]
        flush()
        start = time.perf_counter()
        for call in calls:
            call()
        seconds = (time.perf_counter() - start) / repeats
    return seconds, seconds


def _cuda_timer(provider: Provider, flush: Callable, repeats: int, backlog: float) -> tuple[float, float]:
    # The GPU spins while the host enqueues, so the events hold device time without the host's gaps.
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with use_backend(provider.backend or None):
        call = provider.make()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(backlog * _spins_per_second()))
        flush()
        start.record()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3, host


@functools.cache
def _spins_per_second() -> float:
    spins, seconds = 10_000_000, []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.cuda._sleep(spins)
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    return spins / min(seconds)


@functools.cache
def flusher(device: str) -> Callable[[], torch.Tensor]:
    """Reads more than twice the last-level cache, at most 2 GiB: no dirty line is left to be written back later."""
    size = min(2 * cache_bytes(device) + (16 << 20), 2 << 30)
    return torch.ones(size // 4, device=device).sum


def keep_pages() -> None:
    """Makes the C allocator keep freed memory: else the page faults of large results are what a CPU benchmark times."""
    with suppress(AttributeError, OSError):
        libc, m_trim_threshold, m_mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def graph_time(provider: Provider, budget: float) -> float | None:
    """Median device time in seconds of the call replayed from a CUDA graph; None where it cannot be captured."""
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    with use_backend(provider.backend or None):
        try:
            graphs.warm_up(lambda: {"result": provider.make()()})
            kept, replay_graph = graphs.capture(lambda: {"result": provider.make()()})
        except RuntimeError:
            torch.cuda.synchronize()
            return None
    replay = Provider("replay", lambda: lambda: (replay_graph(), kept))
    return statistics.median(interleave([replay], "cuda", True, budget)["replay"].seconds)


def peak_bytes(provider: Provider, device: str) -> int:
    """The most that one call holds beyond what was there before it, as torch's allocator counts it."""
    with use_backend(provider.backend or None):
        call = provider.make()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure_ceilings(device: str) -> dict:
    """What this machine reaches in this run: GB/s of a large copy (read + written), TFLOP/s of random matrices.

    On a GPU also what two events around nothing show: every device time holds it.
    """
    if device == "cuda":
        size, n = min(4 << 30, torch.cuda.mem_get_info()[0] // 4), 8192
        kinds = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "bf16": (torch.bfloat16, True)}
    else:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        size, n = min(2 * cache_bytes("cpu"), physical // 8), 2048
        kinds = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False)}

    def median(call: Call) -> float:
        return statistics.median(interleave([Provider("ceiling", lambda: call)], device, False, 0.5)["ceiling"].seconds)

    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    ceilings = {"copy_gb_s": 2 * source.nbytes / median(functools.partial(target.copy_, source)) / 1e9}
    del source, target
    before = torch.backends.cuda.matmul.allow_tf32
    for name, (dtype, tf32) in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        ceilings[f"matmul_{name}_tflop_s"] = 2 * n**3 / median(functools.partial(torch.mm, a, b)) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = before
    if device == "cuda":
        ceilings["empty_us"] = median(tuple) * 1e6
    return {name: round(value, 3) for name, value in ceilings.items()}
