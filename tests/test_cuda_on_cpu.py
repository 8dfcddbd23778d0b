"""The CUDA kernels on the CPU, under ThreadSanitizer, and under AddressSanitizer and UBSan: some of the checks of
bench/sanitize.py, and faults that must be found. `python tests/cuda_on_cpu/harness.py` runs all of them."""

import pytest
import torch
from cuda_on_cpu.harness import PLANTED, SANITIZERS, Fault, check, compile_program, cuda_on_cpu, finds, missing

from minegan_fast.ops import Hyperparameters, RowTensor, RowUpdate, bias_act, use_backend

pytestmark = pytest.mark.timeout(900)  # the first test of each sanitizer compiles


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(scope="session", params=SANITIZERS)
def program(request, folder):
    return compile_program(folder, request.param)


@pytest.fixture
def native(program):
    with cuda_on_cpu(program) as native:
        yield native


@pytest.mark.parametrize(("op", "every"), [("bias_act", 7), ("row_update", 3)])
def test_some_checks(native, op, every):
    lines = check(native, op, every)
    assert len(lines) > 5
    assert [line for line in lines if not line.endswith(": right")] == []


def rows_of_all_ages() -> list[RowTensor]:
    """Rows in several parts, in whole items, up to 1024 in one, and in a part of one; every second of a weight, of five
    ages."""
    tensors = []
    for shape in ((3, 2500), (2, 4096), (1500, 3), (1100, 1), (1, 1)):
        leaf, weight = torch.randn(shape), torch.randn(2 * shape[0], *shape[1:])
        rows = torch.arange(1, 2 * shape[0], 2)
        state = {"step": torch.arange(shape[0]).float() % 5, "exp_avg": torch.randn(shape)}
        tensors.append(RowTensor(leaf, state | {"exp_avg_sq": torch.rand(shape)}, weight, rows))
    return tensors


def moved(backend: str | None, hyper: Hyperparameters, *flags, steps: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    tensors = rows_of_all_ages()
    with use_backend(backend):
        update = RowUpdate("adam", tensors)
        for _ in range(steps):
            update.step([torch.randn_like(t.leaf) for t in tensors], hyper, *flags)
    return [t for tensor in tensors for t in (tensor.leaf, tensor.weight, *tensor.state.values())]


def test_every_row_is_stepped_by_its_age(native):
    ours, expected = (
        moved(backend, Hyperparameters(lr=0.1), torch.full((1,), 4.0)) for backend in ("cuda", "reference")
    )
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_found_inf_leaves_everything(native):
    flags = torch.ones(1), torch.ones(1)
    for one, other in zip(
        moved("cuda", Hyperparameters(lr=0.1), *flags), moved("cuda", Hyperparameters(lr=0.1), steps=0), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class OnDevice(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lr_that_lies_on_the_device(native, dtype):
    lr = torch.tensor([0.125], dtype=dtype).as_subclass(OnDevice)
    for one, other in zip(moved("cuda", Hyperparameters(lr=lr)), moved("cuda", Hyperparameters(lr=0.125)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_no_elements(native):
    """Channels without positions: their sums are 0."""
    x, b = torch.empty(0, 5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    y = bias_act(x, b, act="lrelu")
    dx, db = torch.autograd.grad(y, (x, b), torch.empty(0, 5, 3))
    assert dx.shape == x.shape
    assert db.eq(0).all()


def test_a_launch_that_cuda_refuses_is_an_error(program):
    """A grid is at most 2^31 - 1 blocks wide."""
    with pytest.raises(Fault, match="bias_act_backward: invalid configuration"), cuda_on_cpu(program) as native:
        native.bias_act_backward_cuda(0, 0, 0, 0, 0, 0, 1, 2**31, 2, 0.2, 1.0, 0, 0)


@pytest.mark.parametrize(
    "name", ["no barrier between sums", "no barrier after ages", "no fence after a ticket", "a pack too many"]
)
def test_a_planted_fault_is_found(folder, name):
    assert finds(folder, PLANTED[name])
