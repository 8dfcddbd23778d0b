"""Nothing in a pickle may ever be called, whatever a test of this folder reads."""

import sys
import types

import pytest
from crafted_pickles import CALLS, Canary, touch


@pytest.fixture(autouse=True)
def canary(monkeypatch):
    """While a test runs, files find the canary in a module of that name; at its end nothing has been called."""
    module = types.ModuleType("canary")
    module.Canary, module.touch = Canary, touch
    monkeypatch.setitem(sys.modules, "canary", module)
    CALLS.clear()
    yield
    assert CALLS == []
