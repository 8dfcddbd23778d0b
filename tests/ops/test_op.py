"""The choice of a backend, on an op made here: twice(x) = 2 x."""

import os
import re
import subprocess
import sys
import threading
import types

import pytest
import torch

from minegan_fast.ops import BackendUnavailable, _op, backend_report, backends, bias_act, use_backend

NATIVE = types.SimpleNamespace(cuda_version="13.0", cuda_architectures="80,90", cuda_problem=lambda gpu: "")


@pytest.fixture
def calls():
    return []


@pytest.fixture
def twice(calls, monkeypatch):
    """An op with a reference and a cpp and a triton backend, none of which needs anything."""
    monkeypatch.setattr(_op, "_ops", {})
    monkeypatch.setattr(_op, "_missing", lambda backend: "torch sees no CUDA GPU" if backend == "cuda" else None)
    monkeypatch.setitem(sys.modules, "minegan_fast._C", NATIVE)
    monkeypatch.setitem(sys.modules, "minegan_fast.kernels.test_op", types.ModuleType("kernels"))

    def twice(x: torch.Tensor) -> torch.Tensor:
        calls.append("reference")
        return x * 2

    op = _op.Op(twice)
    for backend in ("cpp", "triton", "cuda"):
        op.register(backend)(lambda code, x, backend=backend: calls.append(backend) or x * 2)
    return op


def test_cpu_takes_cpp_else_the_reference(twice, calls, monkeypatch):
    twice(torch.ones(2))
    monkeypatch.setattr(_op, "_missing", lambda backend: "not built")
    twice._chosen.clear()
    twice(torch.ones(2))
    assert calls == ["cpp", "reference"]


@pytest.mark.parametrize(
    ("missing", "expected"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")]
)
def test_cuda_takes_cuda_then_triton_then_the_reference(twice, calls, monkeypatch, missing, expected):
    monkeypatch.setattr(_op, "_missing", lambda backend, gpu=None: "missing" if backend in missing else None)
    monkeypatch.setattr(_op, "_AUTOMATIC", {"cuda": ("cuda", "triton")})
    monkeypatch.setattr(_op, "_DEVICES", {"cuda": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",)})
    twice._choose(None, torch.device("cuda:0"), torch.float32)(torch.ones(2))
    assert calls == [expected]


def test_other_devices_take_the_reference(twice, calls):
    assert twice(torch.ones(2, device="meta")).shape == (2,)
    assert calls == ["reference"]


def test_forcing(twice, calls):
    with use_backend("reference"):
        twice(torch.ones(2))
        with use_backend(None):
            twice(torch.ones(2))
        twice(torch.ones(2))
    twice(torch.ones(2))
    twice(torch.ones(2), backend="reference")
    assert calls == ["reference", "cpp", "reference", "cpp", "reference"]


def test_forcing_ends_with_an_exception(twice, calls):
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    twice(torch.ones(2))
    assert calls == ["cpp"]


def test_forcing_holds_for_one_thread(twice, calls):
    with use_backend("reference"):
        thread = threading.Thread(target=twice, args=(torch.ones(2),))
        thread.start()
        thread.join()
    assert calls == ["cpp"]


def test_forcing_what_is_missing_raises(twice, calls):
    with use_backend("cuda"), pytest.raises(BackendUnavailable) as error:
        twice(torch.ones(2))
    message = str(error.value)
    assert "twice cannot use the backend 'cuda' for a cpu tensor: torch sees no CUDA GPU" in message
    assert "Usable: reference, cpp" in message
    assert isinstance(error.value, RuntimeError)
    assert calls == []


def test_forcing_the_wrong_device_raises(twice):
    with pytest.raises(BackendUnavailable, match=r"'cpp' for a cuda tensor: it takes cpu tensors\. Usable: reference"):
        twice._choose("cpp", torch.device("cuda"), torch.float32)


def test_forcing_what_the_op_does_not_have_raises(twice):
    del twice._launchers["triton"]
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="twice has no triton implementation"):
        twice(torch.ones(2))


def test_dtypes(twice, calls):
    twice.register("cpp", dtypes=(torch.float32, torch.bfloat16))(lambda code, x: calls.append("cpp") or x * 2)
    twice(torch.ones(2))
    twice(torch.ones(2, dtype=torch.float64))
    assert calls == ["cpp", "reference"]
    with use_backend("cpp"), pytest.raises(BackendUnavailable, match=r"it takes float32, bfloat16, not torch\.float64"):
        twice(torch.ones(2, dtype=torch.float64))


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that are not there, of these compute capabilities; the native module says what it cannot do on them."""

    def plug(capabilities, problems=("", ""), hip=None):
        native = types.SimpleNamespace(**{**vars(NATIVE), "cuda_problem": lambda gpu: problems[gpu]})
        monkeypatch.setitem(sys.modules, "minegan_fast._C", native)
        monkeypatch.setattr(_op, "_INTERPRETING", False)
        monkeypatch.setattr(torch.version, "hip", hip)
        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: len(capabilities),
            "current_device": lambda: 0,
            "get_device_capability": lambda gpu: capabilities[gpu],
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    forgotten = _op._missing, _op._unfit
    for function in forgotten:
        function.cache_clear()
    yield plug
    for function in forgotten:
        function.cache_clear()


OLD_DRIVER = "cudaGetDevice: CUDA driver version is insufficient for CUDA runtime version"


def test_what_a_gpu_cannot_run_is_known_before_the_first_launch(gpus):
    gpus([(6, 1), (9, 0)], ["", OLD_DRIVER])
    pascal = "the GPU's compute capability is 6.1, and the kernels need 7.0"
    problem = f"{OLD_DRIVER}; the GPU's compute capability is 9.0, and the kernels are for 80,90"
    assert _op.gpu_report(0) == {"triton": pascal, "cuda": "available"}
    assert _op.gpu_report(1) == {"triton": "available", "cuda": problem}
    assert _op._missing("triton") is None
    assert _op._missing("cuda") is None


def test_a_backend_that_no_gpu_can_run_is_missing(gpus):
    gpus([(6, 1), (6, 0)], [OLD_DRIVER, OLD_DRIVER])
    assert _op._missing("triton").count("and the kernels need 7.0") == 2
    assert OLD_DRIVER in _op._missing("cuda")
    assert "triton" not in backends()["bias_act"]
    assert backend_report()["cuda"] == (False, _op._missing("cuda"))


def test_rocm_has_no_kernels(gpus):
    gpus([(9, 4)], hip="6.4")
    assert set(_op.gpu_report(0).values()) == {"the kernels are for NVIDIA GPUs, and this torch is built for ROCm"}


class Elsewhere(float):
    """A number that calls itself a tensor of some device."""

    dtype = torch.float32

    def on(self, device: str):
        self.device = torch.device(device)
        return self


def test_every_gpu_is_chosen_for_by_itself(twice, calls, monkeypatch):
    monkeypatch.setattr(_op, "_missing", lambda backend, gpu=None: "too old" if gpu == 1 else None)
    monkeypatch.setattr(_op, "_AUTOMATIC", {"cuda": ("cuda", "triton")})
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        twice._run(Elsewhere().on(device))
    assert calls == ["cuda", "reference", "cuda"]
    with pytest.raises(BackendUnavailable, match="'cuda' for a cuda:1 tensor: too old"):
        twice._run(Elsewhere().on("cuda:1"), backend="cuda")


def test_the_native_module_says_that_there_is_no_driver():
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    if not native.cuda_version or torch.cuda.is_available():
        pytest.skip("needs CUDA kernels and no driver")
    assert re.search(r"CUDA driver.*; the kernels need CUDA \d+\.\d, the driver is missing$", native.cuda_problem(0))


def test_broken_kernels_are_told(twice, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "minegan_fast.kernels.test_op", None)
    twice(torch.ones(2))
    assert calls == ["cpp"]
    assert backends() == {"test_op": ["reference", "cpp"]}
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="its code cannot be imported: ModuleNotFound"):
        twice(torch.ones(2))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend must be one of reference, cpp, triton, cuda or None, got 'fast'"):
        use_backend("fast").__enter__()


def test_fake_tensors_and_the_compiler_go_through_the_library(twice, calls):
    with torch._subclasses.FakeTensorMode():
        assert twice(torch.ones(2, 3)).shape == (2, 3)
    compiled = torch.compile(lambda x: twice(x) + 1, fullgraph=True, backend="aot_eager")
    calls.clear()
    assert compiled(torch.ones(2)).tolist() == [3, 3]
    assert calls[-1] == "cpp"


def test_lists():
    assert "reference" in backends()["bias_act"]
    report = backend_report()
    assert list(report) == ["reference", "cpp", "triton", "cuda"]
    for backend, (available, reason) in report.items():
        assert available == any(backend in usable for usable in backends().values())
        assert (reason == "available") == available


def in_new_process(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", "import sys, torch\n" + code],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


TRY = """
from minegan_fast.ops import bias_act
try:
    print(bias_act(torch.ones(2, 3), act="relu", gain=2.0).sum().item())
except RuntimeError as error:
    print(error)
"""


def test_environment_variable():
    assert in_new_process(TRY, MINEGAN_BACKEND="reference") == "12.0\n"
    said = in_new_process(TRY, MINEGAN_BACKEND="fast")
    assert "cannot use the backend 'fast' for a cpu tensor: there is no such backend, only reference, cpp," in said


def test_triton_runs_on_the_cpu_only_in_its_interpreter():
    said = in_new_process(TRY, MINEGAN_BACKEND="triton")
    assert "cannot use the backend 'triton' for a cpu tensor" in said
    assert "Usable: reference" in said


def test_without_native_module_and_triton():
    said = in_new_process(
        "sys.modules['minegan_fast._C'] = sys.modules['triton'] = None\n"
        + TRY
        + "from minegan_fast.ops import backend_report, backends\n"
        + "print(backends()['bias_act'], backend_report()['cpp'], backend_report()['triton'])"
    )
    assert said.startswith("12.0\n['reference'] (False, 'the native module cannot be imported: ModuleNotFoundError")
    assert "(False, 'triton cannot be imported: ModuleNotFoundError" in said


def test_build_notes_reach_the_reason(monkeypatch, tmp_path):
    (tmp_path / "_build.txt").write_text("no native module: cmake not found on PATH\n")
    monkeypatch.setattr(_op, "__file__", str(tmp_path / "ops" / "_op.py"))
    monkeypatch.setitem(sys.modules, "minegan_fast._C", None)
    assert _op._missing.__wrapped__("cpp").endswith(
        "(the installation noted: no native module: cmake not found on PATH)"
    )


def test_a_real_op_follows_the_forced_backend():
    x = torch.randn(3, 4)
    with use_backend("reference"):
        expected = bias_act(x, act="relu", gain=2.0)
    assert torch.equal(bias_act(x, act="relu", gain=2.0), expected)


def test_an_op_that_mutates_is_always_called_directly(calls, monkeypatch):
    monkeypatch.setattr(_op, "_ops", {})

    def increment(x) -> None:  # no schema could be inferred for it
        calls.append(type(x).__name__)
        x.values += 1

    op = _op.Op(increment, mutates=True)
    box = types.SimpleNamespace(values=torch.zeros(2), device=torch.device("cpu"), dtype=torch.float32)
    op(box)
    assert calls == ["SimpleNamespace"]
    assert box.values.tolist() == [1, 1]
    assert op.library is None
