"""What reads of checkpoints a run makes."""

import weakref
from collections import Counter

import pytest

from minegan_fast.files import reading


class Reads(Counter):
    """{path: how often it was read}, and whether what was read is still in memory."""

    def __init__(self):
        super().__init__()
        self.contents = []

    @property
    def in_memory(self) -> bool:
        return any(reference() is not None for reference in self.contents)


@pytest.fixture
def reads(monkeypatch) -> Reads:
    read_file, found = reading._read_file, Reads()

    def counting(path):
        found[path.resolve()] += 1
        contents = read_file(path)
        found.contents.append(weakref.ref(contents))
        return contents

    monkeypatch.setattr(reading, "_read_file", counting)
    return found
