"""A plugin of pytest: `-p at_once --at-once FILE` appends each test's result to FILE as soon as it is known, a line of
JSON each (machine.Lines), and each file's error whose tests cannot be collected. So what a run has found until it is
stopped is not lost.

In a rehearsal (rehearsal.py) it also puts the stand-in in the place of the GPU; `--every N` runs every N-th test alone.
"""

import time
from pathlib import Path

import pytest
import rehearsal
import torch
from machine import Lines


def pytest_addoption(parser):
    parser.addoption("--at-once", type=Path, metavar="FILE", help="append each result to FILE, as a line of JSON")
    parser.addoption("--every", type=int, default=1, metavar="N", help="every N-th test only")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    if rehearsal.asked():
        rehearsal.begin()


def pytest_configure(config):
    distributed = hasattr(config, "workerinput")
    if config.option.at_once and not distributed:
        config.pluginmanager.register(Writer(config.option.at_once))
    if rehearsal.asked() and (distributed or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(Rehearsed())


@pytest.hookimpl(trylast=True)  # of those that other options leave
def pytest_collection_modifyitems(config, items):
    if rehearsal.asked() and config.option.every > 1:
        rehearsal.write({"units": len(items)})
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % config.option.every])
    items[:] = items[:: config.option.every]


class Writer:
    def __init__(self, path: Path):
        self.lines = Lines(path, "cuda" if torch.cuda.is_available() else "cpu")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.lines.add(row | ({"says": report.longreprtext} if report.failed else {}))

    def pytest_collectreport(self, report):
        """A file that cannot be imported has no tests, whose results would tell."""
        if report.failed:
            self.lines.add({"test": report.nodeid, "outcome": "error", "says": report.longreprtext})


class Rehearsed:
    def __init__(self):
        self.tests, self.start = 0, time.process_time()

    def pytest_runtest_logreport(self, report):
        self.tests += report.when == "call" and not report.skipped

    def pytest_sessionfinish(self):
        rehearsal.note(self.tests, time.process_time() - self.start)
