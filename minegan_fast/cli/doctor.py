"""What a bug report needs: versions, devices, backends, and why some of these are missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess

import torch

from .. import __version__
from ..ops import backend_report, backends
from ..ops._op import gpu_report
from ..training.sources import choose_device

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "rich", "typer", "matplotlib", "tensorboard")


def report(device: str | None = None) -> dict[str, dict[str, str]]:
    """{section: {name: value}}."""
    chosen = choose_device(device)
    return {
        "versions": {
            "minegan_fast": __version__,
            "python": f"{platform.python_version()}, {platform.platform()}",
            **{name: _version(name) for name in PACKAGES},
        },
        "devices": {**_devices(), "a run here uses": str(chosen)},
        "backends": {name: reason for name, (_, reason) in backend_report().items()},
        "ops": {name: ", ".join(available) for name, available in backends().items()},
        "native module": _native(),
        "tools": {name: _tool(name) for name in ("nvcc", "cmake", "ninja", "c++")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    found = {"cpu": f"{processor}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"}
    hip = torch.version.hip
    if hip is None and torch.version.cuda is None:
        return found | {"cuda": "this torch is a CPU build"}
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if hip is None else f"ROCm {hip}"
        return found | {"cuda": f"torch is built for {build}, but no GPU or driver is there"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = f"sm_{properties.major}{properties.minor}" if hip is None else f"ROCm {hip}"
        found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {kind}"
        for backend, reason in gpu_report(index).items():
            if reason != "available":
                found[f"cuda:{index} without {backend}"] = reason
    return found


def _native() -> dict[str, str]:
    spec = importlib.util.find_spec("minegan_fast._C")
    if spec is None:
        return {"minegan_fast._C": "not built"}
    native = importlib.import_module("minegan_fast._C")
    return {"minegan_fast._C": spec.origin or "", "CUDA": native.cuda_version or "compiled without"}


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found (only needed to build the native module)"
    try:
        printed = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {error}"
    lines = [line for line in printed.splitlines() if any(c.isdigit() for c in line)]
    return f"{lines[-1 if name == 'nvcc' else 0].strip()}" if lines else path
