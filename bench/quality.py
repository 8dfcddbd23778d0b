"""Which way of adapting a GAN is better, by how much, and when: runs cells, each one GAN, target, method and seed.

python bench/quality.py --quick              one setting, one seed, four methods: at most 15 minutes on two cores
python bench/quality.py --data FOLDER        all of it, about three hours on two cores; what is finished is not repeated
python bench/quality.py --list               the cells, which of them are finished, and how long the rest takes
python bench/quality.py tune --data FOLDER   the learning rates, on targets that are not reported
python bench/quality.py merge                only the finished cells into bench/results/quality.json

Every finished cell is one file in --cache, written at once, so a run may be stopped at any time and started again. At
its end it merges the cells; `make report` writes docs/quality.md from that file.
"""

import argparse
import fnmatch
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import quality_networks as networks
import quality_plan as planned
from quality_cells import load_cells, prepare, run_cell
from quality_merge import committed, merge, merge_rates
from quality_plan import Cell
from quality_settings import AVATARS, Places
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    options = parse(arguments)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    places = Places(options.cache, options.data, options.mnist)
    cells = [cell for cell in asked_for(options) if fnmatch.fnmatchcase(cell.name, options.only or "*")]
    if not cells:
        console.print(f"no cell matches {options.only!r}: --list shows their names", style="red")
        return 2
    rates = planned.rates(root / planned.RATES)
    before = committed(root)
    there = load_cells(cells, places, rates, before)
    todo = [cell for cell in cells if cell not in there]
    if options.list:
        for cell in cells:
            console.print(f"{'to run  ' if cell in todo else 'finished'}  {cell.name}")
        hours = sum(cell.seconds for cell in todo) / 3600
        console.print(
            f"{len(cells)} cells, {len(todo)} to run: {hours:.1f} hours of a core, {hours / options.jobs:.1f} with "
            f"{options.jobs} processes"
        )
        return 0
    failed = {}
    if options.command != "merge" and todo:
        try:
            prepare(todo, places)
        except networks.MissingError as error:
            console.print(str(error), style="red")
            return 1
        failed = run(todo, places, rates, options.jobs, options.budget, console)
    if options.command == "tune":
        merge_rates(load_cells(cells, places, rates), root)
    else:
        merge(load_cells(planned.plan(), places, rates, before), places, root)
    for name, error in failed.items():
        console.print(f"{name}: {error}", style="red")
    return int(bool(failed))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Packages:\n  {networks.NEEDED}\n\n{AVATARS}",
    )  # fmt: skip
    parser.add_argument("command", nargs="?", choices=("run", "tune", "merge"), default="run")
    parser.add_argument("--quick", action="store_true", help="avataaars where --data is given, else the shipped nines")
    parser.add_argument("--list", action="store_true", help="only show the cells")
    parser.add_argument("--only", metavar="PATTERN", help="cells whose name matches, as in 'avataaars-100-kernel-*'")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no cell after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="FOLDER/avataaars/*.png and so on")
    parser.add_argument("--mnist", type=Path, metavar="NPZ", help="default: digits that the embedded GAN makes")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "quality", metavar="FOLDER")
    return parser.parse_args(arguments)


def asked_for(options: argparse.Namespace) -> list[Cell]:
    if options.command == "tune":
        return planned.tuning()
    return planned.quick("avataaars" if options.data else "nines") if options.quick else planned.plan()


def processes(jobs: int) -> Executor:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start from here
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin_process)


def begin_process() -> None:
    warnings.simplefilter("ignore")  # what a run warns of, its cell measures
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when the one that started it has ended, also by a signal that it could not catch."""
    multiprocessing.parent_process().join()
    os._exit(1)


def run(
    cells: list[Cell],
    places: Places,
    rates: dict[str, float],
    jobs: int,
    budget: float | None,
    console: Console,
    work: Callable = run_cell,
    executor: Callable[[int], Executor] = processes,
) -> dict[str, str]:
    """Runs the cells, so many at a time; returns the errors of those that failed, by name."""
    failed, done, started = {}, [], time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    waiting, running = list(reversed(cells)), {}
    with executor(jobs) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("cells", total=len(cells), left="")
        try:
            while waiting or running:
                late = budget is not None and time.monotonic() - started > 60 * budget
                while waiting and len(running) < jobs and not late:
                    cell = waiting.pop()
                    running[pool.submit(work, cell, places, rates)] = cell
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    done.append(cell)
                    if error := future.exception():
                        failed[cell.name] = f"{type(error).__name__}: {error}"
                    if isinstance(error, BrokenProcessPool):  # a process was killed, perhaps for memory
                        waiting.clear()
                    seconds = time_left(time.monotonic() - started, done, [*waiting, *running.values()])
                    left = f"{said(seconds)} left" if seconds else "all done"
                    progress.update(task, advance=1, left=left)
                    console.print(f"{'failed' if error else 'finished'} {cell.name}, {left}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def time_left(elapsed: float, done: list[Cell], rest: list[Cell]) -> float:
    """Seconds, from what was expected of the finished cells and how long they took."""
    return elapsed * sum(cell.seconds for cell in rest) / sum(cell.seconds for cell in done)


def said(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"


if __name__ == "__main__":
    sys.exit(main())
