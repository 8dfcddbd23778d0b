"""Steps of training as CUDA graphs: a step's launches are recorded once, and given to the GPU in one call from then on.

A graph repeats the same kernels on the same addresses. So all that changes between two steps of one kind comes in
through tensors that stay where they are: the inputs of the step's function, weights, gradients, the optimizers' state
and learning rates. Random numbers come from the GPU's default generator, whose seed and offset each replay reads anew.
Nothing in a step may read a number back, or copy one from the host. What a module does in Python alone, such as
counting its calls, happens at the capture and at no replay.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import TransferConfig
from .methods import KERNEL
from .processes import Processes

Values = dict[str, Tensor]
# So many steps of a kind run one by one before it is captured. In the first, kernels are compiled, plans are made and
# gradients get their memory; the last shows whether a step waits.
WARM_UP = 3


def obstacle(config: TransferConfig, device: torch.device, processes: Processes) -> str:
    """Why a run's steps cannot be captured, as far as that is known before the first; empty where nothing is."""
    if device.type != "cuda":
        return f"the run is on {device}, and the graphs are CUDA's"
    if isinstance(config.source, list):
        return "of several sources the host learns in each step which have a part in it"
    if processes.size > 1:
        return f"the {processes.size} processes of the run exchange gradients within a step"
    if KERNEL in config.losses and config.part and config.part < config.batch:
        return f"a batch in parts (part {config.part}) sets the random state within a step"
    return ""


class CaptureError(RuntimeError):
    """A step was not captured, for the reason that the message gives. It has not run."""


class CudaGraphs:
    """Runs and captures functions beside the current stream, on a stream of its own. All graphs share their memory,
    as only one of them runs at a time."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.forget()

    def forget(self) -> None:
        """The graphs so far are not used any more; a pool without graphs takes no new ones."""
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Values]) -> tuple[Values, str]:
        """Its result, and where the host waited for the GPU; empty where it did not."""
        with self._beside(), _noting_waits() as waits:
            values = function()
        return values, ", ".join(dict.fromkeys(waits))

    def capture(self, function: Callable[[], Values]) -> tuple[Values, Callable[[], None]]:
        """(what each replay computes anew, the replay). Nothing is computed yet. Raises what the function raises."""
        graph, cause = torch.cuda.CUDAGraph(), None
        try:
            with self._beside(), torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                try:
                    values = function()
                except Exception as error:
                    cause = error
                    raise
        except Exception as error:
            # The end of a broken capture raises too, before it has told the generator and the allocator. The generator
            # gets a state that no graph knows; the allocator may still ask the graph, which therefore stays.
            generator = torch.cuda.default_generators[self.stream.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            _broken.append(graph)
            raise cause or error from None
        return values, graph.replay

    @contextmanager
    def _beside(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            here.wait_stream(self.stream)


_broken: list["torch.cuda.CUDAGraph"] = []


@contextmanager
def _noting_waits() -> Iterator[list[str]]:
    """Gives a list that holds, after the block, the places of the block in which the host waited for the GPU."""
    waits, before = [], torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in warned:
        if "synchronizing CUDA operation" in str(warning.message):
            waits.append(f"{Path(warning.filename).name}:{warning.lineno}")
        elif "debug mode" not in str(warning.message):  # by which torch says that the mode is new
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@dataclass
class _Graph:
    inputs: list[Tensor]
    values: Values
    replay: Callable[[], None]


class CapturedSteps:
    """Runs the steps of a training: each kind `WARM_UP` times as it is, later by its graph.

    graphs: captures, as `CudaGraphs` does; None: every step runs as it is.
    """

    def __init__(self, graphs: CudaGraphs | None = None):
        self.graphs = graphs
        self._warmed: dict[Hashable, tuple[int, str]] = {}  # how often a kind has run, and where it waited at last
        self._captured: dict[Hashable, _Graph] = {}

    def run(self, kind: Hashable, function: Callable[..., Values], inputs: Sequence[Tensor]) -> Values:
        """function(*inputs).

        kind: calls of one kind differ by the values of the inputs alone, whose shapes are the same. The function of a
            kind's capture is the one whose launches are repeated.

        CaptureError: the kind cannot be captured. This step has changed nothing on the GPU.
        """
        if self.graphs is None:
            return function(*inputs)
        times, waits = self._warmed.get(kind, (0, ""))
        if times < WARM_UP:
            values, waits = self.graphs.warm_up(lambda: function(*inputs))
            self._warmed[kind] = times + 1, waits
            return values
        if waits:
            raise CaptureError(f"a step waits for the GPU ({waits})")
        if kind not in self._captured:
            self._captured[kind] = self._capture(self.graphs, function, inputs)
        graph = self._captured[kind]
        for own, given in zip(graph.inputs, inputs, strict=True):
            own.copy_(given)
        graph.replay()
        return {name: value.clone() for name, value in graph.values.items()}  # the next replay overwrites it

    def forget(self) -> None:
        """Other tensors train from now on, or the same ones in other memory: every kind begins anew."""
        self._warmed.clear()
        self._captured.clear()
        if self.graphs is not None:
            self.graphs.forget()

    @staticmethod
    def _capture(graphs: CudaGraphs, function: Callable[..., Values], inputs: Sequence[Tensor]) -> _Graph:
        own = [t.clone() for t in inputs]
        try:
            return _Graph(own, *graphs.capture(lambda: function(*own)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise CaptureError(f"{type(error).__name__}: {lines[0]}") from error
