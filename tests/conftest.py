"""For all tests: seeds, torch.empty full of NaN, and `backend` and `device` wherever a test of an op asks for them.

Without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is imported.
"""

import functools
import gc
import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._dynamo.trace_rules  # imports triton
from tiny_run import run_settings, tiny  # noqa: F401

from minegan_fast.layers.bilinear import Conv, Linear
from minegan_fast.ops import backend_report, backends, use_backend

# Which functions are torch's is noted now, while torch.empty still is, and never forgotten: reset() would note it anew.
torch._dynamo.trace_rules.get_torch_obj_rule_map()
torch._dynamo.trace_rules.clear_lru_cache = lambda: None
# Likewise which functions `with torch.device("meta")` moves there.
torch.utils._device._device_constructors()

DEVICES = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cpu", "cuda"), "cuda": ("cuda",)}


def places(op: str) -> list[tuple[str, str]]:
    """Every backend of the op that runs here, with every device it runs on."""
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    pairs = [(backend, device) for backend in backends()[op] for device in DEVICES[backend] if device in here]
    return [pair for pair in pairs if pair[0] != "triton" or (pair[1] == "cpu") == interpreted]


def pytest_generate_tests(metafunc):
    """A test in tests/ops/test_<op>.py with the arguments `backend` and `device` runs on each of the op's places."""
    if {"backend", "device"} <= set(metafunc.fixturenames):
        op = metafunc.module.__name__.rpartition("test_")[2]
        metafunc.parametrize(("backend", "device"), places(op), ids=lambda name: name, scope="session")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_report_header():
    return [f"backend {name}: {reason}" for name, (_, reason) in backend_report().items()]


@pytest.fixture(autouse=True)
def forced_backend(request):
    """A test with a `backend` runs under it."""
    with use_backend(request.getfixturevalue("backend") if "backend" in request.fixturenames else None):
        yield


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """What an op forgets to write shows up as NaN instead of, mostly, as the right answer of the call before."""

    def filled(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


@pytest.fixture
def row_gradients(monkeypatch) -> list[torch.Tensor]:
    """The gradients of some rows alone that layers compute, [k, ...] each, in their order."""
    found = []
    for layer in (Linear, Conv):
        monkeypatch.setattr(layer, "row_gradient", noted(layer.row_gradient, found))
    return found


@pytest.fixture
def group_of_one(tmp_path):
    """A process group of this one process; a test skips where torch has none."""
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    # The model of the test goes first. DDP's destructor keeps the GIL, and where it is what frees the group it waits
    # for gloo's threads, which may wait for the GIL.
    gc.collect()
    torch.distributed.destroy_process_group()


def noted(function, results: list):
    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call
