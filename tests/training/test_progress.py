import io
import itertools
import os
import re
import sys
import time

import pytest
import torch
from rich.console import Console

from minegan_fast.training import progress as module
from minegan_fast.training.progress import Progress


class Clock:
    """time.monotonic under the test's hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def terminal(file=None, **options):
    return Console(file=file or io.StringIO(), force_terminal=True, width=120, **options)


def test_plain_lines_come_every_ten_seconds(clock):
    console = plain()
    with Progress(600, console=console) as progress:
        progress.stage("mining", 200)
        for step in range(1, 201):
            clock.now += 0.25
            progress.update(step, {"loss G": 0.5 + step, "loss D": torch.tensor(2.0), "p": "cats 50 %"})
        progress.stage("finetuning", 400)
        progress.log("[red] a message that is longer than the console is wide")
    assert console.file.getvalue().splitlines() == [
        "mining: 200 steps",
        "mining: step 40/600  loss G 40.5  loss D 2  p cats 50 %  4 steps/s  2:20 left",
        "mining: step 80/600  loss G 80.5  loss D 2  p cats 50 %  4 steps/s  2:10 left",
        "mining: step 120/600  loss G 120.5  loss D 2  p cats 50 %  4 steps/s  2:00 left",
        "mining: step 160/600  loss G 160.5  loss D 2  p cats 50 %  4 steps/s  1:50 left",
        "mining: step 200/600  loss G 200.5  loss D 2  p cats 50 %  4 steps/s  1:40 left",
        "mining: 200/200 steps, 0:50, step 200/600  loss G 200.5  loss D 2  p cats 50 %  4 steps/s  1:40 left",
        "finetuning: 400 steps",
        "[red] a message that is longer than the console is wide",
        "finetuning: 0/400 steps, 0:00, step 200/600  loss G 200.5  loss D 2  p cats 50 %",
    ]


def test_speed_is_that_of_the_recent_steps(clock):
    console = plain()
    with Progress(10_000, console=console) as progress:
        progress.stage("mining", 10_000)
        for step in range(1, 201):
            clock.now += 1.0 if step <= 50 else 4.0
            progress.update(step)
    lines = console.file.getvalue().splitlines()
    assert "1 steps/s" in lines[1]
    assert "4 s/step" in lines[-1]
    assert f"{(10_000 - 200) * 4 // 3600}:53:20 left" in lines[-1]


def test_values_stay_until_newer_ones_come(clock):
    console = plain()
    with Progress(100, console=console) as progress:
        progress.stage("mining", 100)
        progress.update(1, {"KID": 0.25, "loss G": 1.0})
        clock.now += 11
        progress.update(2, {"loss G": 3.0})
    assert "KID 0.25  loss G 3 " in console.file.getvalue().splitlines()[1]


def test_a_resumed_run_goes_on(clock):
    console = plain()
    with Progress(600, console=console, done=350) as progress:
        progress.stage("finetuning", 400, first=200)
        for step in range(351, 401):
            clock.now += 0.5
            progress.update(step)
    lines = console.file.getvalue().splitlines()
    assert lines[1] == "finetuning: step 370/600  2 steps/s  1:55 left"
    assert lines[-1].startswith("finetuning: 200/400 steps, 0:25, step 400/600")


def test_going_back_to_a_snapshot_gives_no_negative_speed(clock):
    console = plain()
    with Progress(100, console=console) as progress:
        progress.stage("mining", 100)
        for step in (50, 51, 10, 11):
            clock.now += 6
            progress.update(step)
    assert "6 s/step  8:54 left" in console.file.getvalue().splitlines()[-1]


def test_terminal_shows_bars_losses_and_time(clock):
    console = terminal()
    with Progress(600, console=console) as progress:
        progress.stage("mining", 200)
        for step in range(1, 201):
            clock.now += 0.25
            progress.update(step, {"loss G": step / 4})
        progress.stage("finetuning", 400)
        progress.update(300, {"KID": 0.125})
        progress.log("saved [snapshot]")
        clock.now += 1
        progress.update(302)
    output = console.file.getvalue()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output[output.rindex("mining") :]).splitlines()
    assert re.fullmatch(r"mining +━{40} +200/200 *", last[0])
    assert re.fullmatch(r"finetuning +[━╸╺]{40} +102/400 *", last[1])
    assert last[2].strip() == "step 302/600  loss G 50  KID 0.125  2 steps/s  2:29 left"
    assert "saved [snapshot]" in output
    assert output.endswith("\x1b[?25h")  # the cursor is back


def test_terminal_is_drawn_ten_times_a_second_and_tensors_are_read_only_then(clock):
    reads = []

    class Loss:
        def __float__(self):
            reads.append(clock.now)
            return 1.0

    with Progress(10_000, console=terminal()) as progress:
        progress.stage("mining", 10_000)
        for step in range(1, 1001):
            clock.now += 0.001
            progress.update(step, {"loss G": Loss()})
    assert 9 <= len(reads) <= 12  # one second, and the last picture


@pytest.mark.parametrize(("cost", "interval"), [(0.0, 0.1), (0.01, 0.5), (0.4, 1.0)])
def test_slow_drawing_is_done_less_often(clock, monkeypatch, cost, interval):
    draws = []

    def draw(self, live):
        draws.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(Progress, "_draw", draw)
    with Progress(1000, console=terminal()) as progress:
        progress.stage("mining", 1000)
        for step in range(1, 1001):
            clock.now += 0.01
            progress.update(step)
    gaps = [later - earlier for earlier, later in itertools.pairwise(draws[:-1])]
    assert gaps == pytest.approx([interval] * len(gaps), abs=0.011)


def test_graphs_are_not_kept():
    loss = torch.ones((), requires_grad=True) * 2
    with Progress(10, console=plain()) as progress:
        progress.stage("mining", 10)
        progress.update(1, {"loss G": loss})
        assert progress._values["loss G"].grad_fn is None


def test_disabled_prints_nothing(capsys):
    with Progress(10, enabled=False) as progress:
        progress.stage("mining", 10)
        progress.update(1, {"loss G": 1.0})
        progress.log("message")
    assert capsys.readouterr() == ("", "")


def test_default_is_standard_error(capsys):
    with Progress(10) as progress:
        progress.stage("mining", 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mining: 10 steps\n")


class BrokenFile(io.StringIO):
    def __init__(self, error, after):
        super().__init__()
        self.error, self.after = error, after

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().write(text)


def run_ten_steps(console):
    with Progress(10, console=console) as progress:
        progress.stage("mining", 10)
        for step in range(1, 11):
            progress._next_draw = 0
            progress.update(step, {"loss G": 1.0})
            progress.log("message")
    return step


@pytest.mark.parametrize("console", [terminal, lambda file: Console(file=file, force_terminal=False)])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    "error", [OSError(5, "I/O error"), ValueError("closed"), UnicodeEncodeError("ascii", "━", 0, 1, "")]
)
def test_a_failing_terminal_ends_the_display_not_the_run(console, after, error):
    streams = sys.stdout, sys.stderr
    assert run_ten_steps(console(BrokenFile(error, after))) == 10
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.parametrize("mode", ["0", "1"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_broken_pipe_leaves_standard_output_alone(after, mode, monkeypatch, capfd):
    monkeypatch.setenv("TTY_COMPATIBLE", mode)
    monkeypatch.setattr(sys, "stderr", BrokenFile(BrokenPipeError(), after))
    assert run_ten_steps(None) == 10
    os.write(1, b"alive")
    assert capfd.readouterr().out == "alive"


def test_the_exit_that_rich_makes_of_a_broken_pipe_is_not_taken():
    class ExitingConsole(Console):
        def on_broken_pipe(self):
            raise SystemExit(1)

    assert run_ten_steps(ExitingConsole(file=BrokenFile(BrokenPipeError(), 1), force_terminal=True)) == 10


def test_ascii_terminals_and_closed_files():
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    closed = io.StringIO()
    closed.close()
    for file in (ascii_file, closed):
        with Progress(10, console=terminal(file)) as progress:
            progress.stage("mining", 10)
            progress.update(5)
    ascii_file.seek(0)
    assert "5/10" in ascii_file.read()


@pytest.mark.parametrize("console", [terminal, plain])
def test_an_error_in_the_run_passes_and_reads_no_tensor(console):
    class Poisoned:
        def __float__(self):
            raise AssertionError("read after the device failed")

    def run():
        with Progress(10, console=console()) as progress:
            progress.stage("mining", 10)
            progress._next_draw = time.monotonic() + 60
            progress.update(1, {"loss G": Poisoned()})
            raise RuntimeError("device")

    with pytest.raises(RuntimeError, match="device"):
        run()
