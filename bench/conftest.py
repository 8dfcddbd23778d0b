"""`pytest bench --benchmark-only [--record]` runs the benchmarks; without --record no file changes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from clock import Provider, keep_pages, measure_ceilings
from machine import ROOT, describe_run, merge
from measure import OURS, PASSES, Case, check, run_case

from minegan_fast.ops import use_backend


def pytest_addoption(parser):
    group = parser.getgroup("minegan_fast benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    group.addoption("--budget", type=float, default=None, help="seconds of timing a case (1.5; on a GPU 1)")
    group.addoption("--quick", action="store_true", help="the first shape and dtype only: does it run?")
    group.addoption("--largest", action="store_true", help="of the ops alone, each at its largest shape")
    group.addoption("--no-compile", action="store_true", help="without torch.compile among the competitors")
    group.addoption("--public-ops", type=Path, help="stylegan2: a built checkout of rosinality's, with the package op")
    group.addoption(
        "--record", nargs="?", type=Path, const=ROOT / "bench" / "results", metavar="FOLDER",
        help="merge the rows into FOLDER/<machine>.json (default: bench/results)",
    )  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "default")  # a compiler's warning is no error here, as it is in the tests


def pytest_collect_file(file_path, parent):
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)


def pytest_generate_tests(metafunc):
    """A benchmark module says its cases as data: SHAPES by device, DTYPES."""
    if "which" in metafunc.fixturenames:
        device = device_of(metafunc.config)
        quick, largest = (metafunc.config.getoption(name) for name in ("--quick", "--largest"))
        few = slice(1 if quick else None)
        cases = [
            pytest.param(shape, dtype, which, id=f"{which}-{'x'.join(map(str, shape))}-{str(dtype).split('.')[-1]}")
            for shape in metafunc.module.SHAPES[device][slice(-1, None) if largest and not quick else few]
            for dtype in metafunc.module.DTYPES[few]
            for which in PASSES
        ]
        metafunc.parametrize(("shape", "dtype", "which"), cases)


def pytest_collection_modifyitems(config, items):
    """--largest: a module whose cases are no data says in LARGEST by test what the names of its largest cases hold; a
    module about no op has neither. With --quick there are the first cases alone, and all of those tests stay."""
    if not config.getoption("--largest"):
        return
    quick = config.getoption("--quick")

    def stays(item) -> bool:
        largest = getattr(item.module, "LARGEST", {})
        named = item.originalname in largest and (quick or largest[item.originalname] in item.name)
        return named or hasattr(item.module, "SHAPES")

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = filter(stays, items)


def device_of(config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.exit("unset TRITON_INTERPRET: times of Triton's interpreter mean nothing", returncode=2)
    return device_of(pytestconfig)


class Recorder:
    """The ceilings that were measured at the start of this session, and its rows, which are in the file of --record as
    soon as they are known."""

    def __init__(self, folder: Path | None, device: str, ceilings: dict):
        self.folder, self.ceilings = folder, ceilings
        self.run, self.rows, self.path = describe_run(device, ceilings), [], None

    def add(self, rows: list[dict]) -> None:
        """The rows of a case, together."""
        self.rows += rows
        if self.folder:
            self.path = merge(self.folder, self.run, self.rows)


@pytest.fixture(scope="session")
def recorder(pytestconfig, device) -> Iterator[Recorder]:
    keep_pages()
    ceilings = {} if pytestconfig.getoption("benchmark_disable") else measure_ceilings(device)
    session = Recorder(pytestconfig.getoption("--record"), device, ceilings)
    yield session
    if session.path:
        print(f"\n{len(session.rows)} rows in {session.path}")


@pytest.fixture
def compare(benchmark, device, recorder, pytestconfig):
    """compare(case, providers): checks all, times all, records all; with --benchmark-disable it only checks."""

    def run(case: Case, providers: list[Provider]) -> None:
        if pytestconfig.getoption("--no-compile"):
            providers = [provider for provider in providers if "torch.compile" not in provider.name]
        if benchmark.disabled:
            check(case, providers)
            return
        budget = pytestconfig.getoption("--budget") or {"cpu": 1.5, "cuda": 1.0}[device]
        rows = run_case(case, providers, device, recorder.ceilings, budget)
        recorder.add(rows)
        benchmark.extra_info |= {"rows": rows, "ceilings": recorder.ceilings}
        automatic = next(provider for provider in providers if provider.name == OURS)
        with use_backend(None):
            benchmark.pedantic(lambda call: call(), setup=lambda: ((automatic.make(),), {}), rounds=3)

    return run
