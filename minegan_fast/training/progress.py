"""What a run says while it runs: bars on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

_DRAW_EVERY = (0.1, 1.0)  # seconds; between the two, drawing takes a fiftieth of the time
_LINE_EVERY = 10.0
_SAMPLE_EVERY = 0.25  # with _SAMPLES: the speed is that of the last half minute, or of longer where steps are slow
_SAMPLES = 120


class _Stage(NamedTuple):
    name: str
    steps: int
    first: int
    began: float

    def done(self, step: int) -> int:
        return min(max(step - self.first, 0), self.steps)


class _Stderr(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would close the program's standard output and exit


class Progress:
    """Shows stages, speed, time left and the latest values of a run of `total_steps` steps.

        with Progress(1200) as progress:
            progress.stage("mining", 200)
            for step in range(200):
                ...
                progress.update(step + 1, {"loss G": loss})

    Steps count those of the whole run that are done; a resumed run gives `done` and goes on from there. Tensors are
    read only when something is drawn, so no step waits for a CUDA stream. A terminal that fails (closed pipe, odd
    encoding) ends the display, never the run. console: a rich console; None is standard error. enabled=False prints
    nothing. keep: gets (step, message) of every `log`, printed or not.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,
        console: Console | None = None,
        *,
        done: int = 0,
        keep: Callable[[int, str], None] | None = None,
    ):
        self._total = total_steps
        self._console = (console or _Stderr(stderr=True)) if enabled else None
        self._live: Live | None = None
        self._stages: list[_Stage] = []
        self._values: dict[str, float | Tensor | str] = {}
        self._step = done
        self._keep = keep
        self._samples: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)
        self._next_draw = 0.0

    def __enter__(self) -> "Progress":
        if self._console and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._guard(self._start)
        return self

    def __exit__(self, kind, *_) -> None:
        if self._live:
            if kind is None:
                self._draw(self._live)
            if self._live:
                self._guard(self._live.stop)
        elif kind is None:
            self._end_stage()

    def stage(self, name: str, steps: int, first: int | None = None) -> None:
        """Begins a stage of `steps` steps, after the steps of the stages before it, or after step `first`."""
        self._end_stage()
        if first is None:
            first = self._stages[-1].first + self._stages[-1].steps if self._stages else 0
        self._stages.append(_Stage(name, steps, first, time.monotonic()))
        self._samples.clear()  # another stage, another speed
        self._next_draw = 0.0 if self._live else time.monotonic() + _LINE_EVERY
        if not self._live:
            self._print(f"{name}: {steps} steps")

    def update(self, step: int, values: Mapping[str, float | Tensor | str] | None = None) -> None:
        """Says that `step` steps of the whole run are done. values: shown until newer ones of the same name come."""
        self._step = step
        if not self._console:
            return
        for name, value in (values or {}).items():
            self._values[name] = value.detach() if isinstance(value, Tensor) else value
        now = time.monotonic()
        if self._samples and step < self._samples[-1][1]:  # the run went back to a snapshot
            self._samples.clear()
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_EVERY:
            self._samples.append((now, step))
        if now < self._next_draw:
            return
        if self._live:
            self._draw(self._live)
            fastest, slowest = _DRAW_EVERY
            self._next_draw = now + min(max(fastest, 50 * (time.monotonic() - now)), slowest)
        else:
            self._print(f"{self._stages[-1].name if self._stages else 'run'}: {self._status()}")
            self._next_draw = now + _LINE_EVERY

    def log(self, message: str) -> None:
        """Prints a line that stays, above the bars."""
        if self._keep:
            self._keep(self._step, message)
        self._print(message)

    def _start(self) -> None:
        # Prints go above the bars, but only those that would have reached this terminal.
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty())
        self._live.start()

    def _draw(self, live: Live) -> None:
        bars = Table.grid(padding=(0, 2))
        for stage in self._stages:
            done = stage.done(self._step)
            bars.add_row(stage.name, ProgressBar(total=stage.steps, completed=done, width=40), f"{done}/{stage.steps}")
        picture = Group(bars, Text(self._status()))
        self._guard(lambda: live.update(picture, refresh=True))

    def _status(self) -> str:
        parts = [f"step {self._step}/{self._total}"]
        shown = ((n, v if isinstance(v, str) else f"{float(v):.4g}") for n, v in self._values.items())
        parts += [f"{name} {text}" for name, text in shown]
        if self._samples:
            began, first = self._samples[0]
            speed = (self._step - first) / max(time.monotonic() - began, 1e-9)
            if speed > 0:
                parts.append(f"{speed:.3g} steps/s" if speed >= 1 else f"{1 / speed:.3g} s/step")
                parts.append(f"{_clock((self._total - self._step) / speed)} left")
        return "  ".join(parts)

    def _end_stage(self) -> None:
        if self._stages and not self._live:
            stage = self._stages[-1]
            spent = _clock(time.monotonic() - stage.began)
            self._print(f"{stage.name}: {stage.done(self._step)}/{stage.steps} steps, {spent}, {self._status()}")

    def _print(self, message: str) -> None:
        if console := self._console:
            self._guard(lambda: console.print(message, markup=False, highlight=False, soft_wrap=True))

    def _guard(self, write: Callable[[], None]) -> None:
        """Runs what touches the terminal; where that fails, the display ends."""
        try:
            write()
        except (OSError, ValueError, SystemExit):  # rich answers a broken pipe with SystemExit
            live, self._live, self._console = self._live, None, None
            if live:
                with suppress(OSError, ValueError, SystemExit):
                    live.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
