"""A few damaged files of every kind; `.ci/run` reads many more, and `fuzz_files.py` as many as you like."""

import random

import pytest
from fuzz.fuzz_files import damaged, fuzz


@pytest.mark.timeout(300)
def test_damaged_files_are_read_or_refused(tmp_path):
    found, faults = fuzz(60, None, 0, [], tmp_path / "work")
    assert not faults
    assert sum(found.values()) == 60
    assert found["refused"] > 20


def test_the_same_seed_damages_alike():
    content = bytes(range(256)) * 4
    assert damaged(content, random.Random("a 1")) == damaged(content, random.Random("a 1"))
    assert len({damaged(content, random.Random(f"a {seed}")) for seed in range(50)}) > 40


def test_a_fault_is_found(tmp_path, monkeypatch):
    """A reader that lets another error through."""
    monkeypatch.setenv("MINEGAN_FUZZ_PLANTED", "1")
    found, faults = fuzz(8, None, 0, ["statistics"], tmp_path / "work")
    assert found["fault"]
    assert "KeyError" in faults[0]
