"""What every benchmark calls: `run_case` checks implementations of a computation, times them, compares them.

A wrong result is refused before anything is timed. Times are of one call; what it needs first (its forward pass, say)
is not timed. `clock` says how, `machine` where.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from clock import Call, Provider, Samples, graph_time, interleave, peak_bytes
from machine import gpu_state

from minegan_fast.ops import BackendUnavailable, use_backend

PASSES = ("inference", "forward", "backward", "double backward")
OURS = "minegan_fast"
COLD_FROM = 4 << 20  # below this many bytes a call is overhead, and a flush would only add noise


class WrongResultError(AssertionError):
    """A provider's result is further from float64 than rounding explains."""


@dataclass
class Case:
    """What is computed. `bytes` is the least that must move, `flops` is given where arithmetic can be the limit.

    `expected` is in float64; the error of the provider named `yardstick` is the measure of everyone's. `rounding` is
    what one rounding does to a result, where that is more than the dtype's; `extra` is what else its rows hold.
    """

    op: str
    which: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    expected: Sequence[torch.Tensor]
    flops: int = 0
    yardstick: str = "eager"
    extra: dict = field(default_factory=dict)
    rounding: float = 0.0

    @property
    def key(self) -> dict:
        return {
            "op": self.op,
            "pass": self.which,
            "shape": list(self.shape),
            "dtype": str(self.dtype).split(".")[-1],
        } | self.extra


def make_pass(which: str, function: Callable, inputs: tuple, dy: torch.Tensor, cotangents: tuple) -> Callable[[], Call]:
    """A `make` for one pass of function(*inputs) -> tensor. All need a gradient; cotangents belong to the gradients."""

    def inference():
        plain = [tensor.detach() for tensor in inputs]
        return lambda: (function(*plain),)

    def forward():
        return lambda: (function(*inputs),)

    def backward():
        y = function(*inputs)
        return lambda: torch.autograd.grad(y, inputs, dy)

    def double_backward():
        gradients = torch.autograd.grad(function(*inputs), inputs, dy, create_graph=True)
        return lambda: torch.autograd.grad(gradients, dy, cotangents)

    return dict(zip(PASSES, (inference, forward, backward, double_backward), strict=True))[which]


def clone_of(bytes_moved: int, device: str) -> Provider:
    """The lower bound of a memory-bound op: `torch.clone` of a tensor so large that it moves as many bytes."""
    source = torch.randn(max(1, bytes_moved // 8), device=device)
    return Provider("clone", lambda: lambda: (source.clone(),), floor=True)


def run_case(case: Case, providers: list[Provider], device: str, ceilings: dict, budget: float) -> list[dict]:
    """One row a provider that can run here, and one with a note a competitor that cannot.

    Raises WrongResultError, before anything is timed, where a provider is wrong.
    """
    errors, notes = check(case, providers)
    runnable = [provider for provider in providers if provider.floor or provider.label in errors]
    cold = device == "cuda" or case.bytes >= COLD_FROM
    samples = interleave(runnable, device, cold, budget)
    state = gpu_state() if device == "cuda" else {}
    rows = []
    for provider in runnable:
        row = case.key | {"provider": provider.name, "backend": provider.backend}
        row |= _rates(samples[provider.label], case, cold, ceilings)
        if device == "cuda" and case.which not in PASSES[2:]:  # a backward needs the graph of its forward
            seconds = graph_time(provider, budget / 10)
            row["graph_us"] = seconds and round(seconds * 1e6, 3)
        row |= {"peak_bytes": peak_bytes(provider, device), "error": errors.get(provider.label)} | state
        rows.append(row)
    competitors = [row for row in rows if row["provider"] != OURS]
    for row in rows:
        if row["provider"] == OURS:
            row["ratio"] = {r["provider"]: round(r["median_us"] / row["median_us"], 3) for r in competitors}
    return rows + [case.key | {"provider": name, "backend": "", "note": note} for name, note in notes.items()]


def whole_steps(key: dict, calls: dict[str, Call], device: str, turns: int = 3) -> list[dict]:
    """A row for each of the calls, ours among them, which take seconds: timed in turn, warm, the caller having checked
    and run them. `key` is what they are about."""
    peaks = {name: peak_bytes(Provider(name, lambda call=call: call), device) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for turn in range(turns):
        first = turn % len(calls)
        for name in [*calls][first:] + [*calls][:first]:
            start = time.perf_counter()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, seconds in times.items():
        low, median, high = (1e6 * s for s in statistics.quantiles(seconds, n=4, method="inclusive"))
        row = key | {"provider": name, "backend": "", "median_us": median, "q1_us": low, "q3_us": high}
        rows.append(row | {"samples": turns, "peak_bytes": peaks[name]})
    ours = next(row for row in rows if row["provider"] == OURS)
    others = [row for row in rows if row is not ours]
    ours["ratio"] = {row["provider"]: round(row["median_us"] / ours["median_us"], 3) for row in others}
    counted = [row for row in others if row["peak_bytes"]]  # what is not torch's is not seen
    ours["memory_ratio"] = {row["provider"]: round(ours["peak_bytes"] / row["peak_bytes"], 3) for row in counted}
    return rows


def check(case: Case, providers: list[Provider]) -> tuple[dict[str, float], dict[str, str]]:
    """The error of every provider that can run, and why a competitor cannot.

    Allowed are twice the yardstick's error and one rounding of the dtype; for a competitor, who sums in an order of its
    own, 64 roundings: that much shows that it computes the same. More raises WrongResultError.
    """
    errors, notes = {}, {}
    for provider in providers:
        if provider.floor:
            continue
        try:
            with use_backend(provider.backend or None), poisoned() if provider.name == OURS else nullcontext():
                errors[provider.label] = relative_error(provider.make()(), case.expected)
        except BackendUnavailable:
            continue
        except RuntimeError as error:
            refused = "double backward" in str(error) or "create_graph" in str(error)
            if not (refused and provider.name == "torch.compile" and case.which == "double backward"):
                raise
            notes[provider.name] = "not supported by torch.compile"
    rounding = max(case.rounding, torch.finfo(case.dtype).eps)
    for label, error in errors.items():
        allowed = 2 * errors[case.yardstick] + rounding if label.startswith(OURS) else 64 * rounding
        if not error <= allowed:
            raise WrongResultError(
                f"{case.key}: {label} is off by {error:.2e} of the largest entry, allowed {allowed:.2e}"
            )
    return errors, notes


def relative_error(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest |output - expected| over the largest |expected|, of the worst tensor; infinite for NaN."""
    worst = 0.0
    for output, reference in zip(outputs, expected, strict=True):
        if output.shape != reference.shape:
            return math.inf
        error = (output.detach().double() - reference.detach()).abs().max() / reference.detach().abs().max().clamp_min(
            1e-300
        )
        worst = max(worst, float(error) if torch.isfinite(error) else math.inf)
    return worst


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what `torch.empty` gives with NaN, so that an element that nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _rates(samples: Samples, case: Case, cold: bool, ceilings: dict) -> dict:
    """Median, quartiles and rates; a percentage of the copy bandwidth only where the data came from memory."""
    low, median, high = statistics.quantiles(samples.seconds, n=4, method="inclusive")
    row = {"median_us": median * 1e6, "q1_us": low * 1e6, "q3_us": high * 1e6, "samples": len(samples.seconds)}
    row |= {"host_us": statistics.median(samples.host) * 1e6, "bytes": case.bytes, "gb_s": case.bytes / median / 1e9}
    row |= {"cold": cold, "percent_of_copy": 100 * row["gb_s"] / ceilings["copy_gb_s"] if cold else None}
    if case.flops:
        row |= {"flops": case.flops, "tflop_s": case.flops / median / 1e12}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
