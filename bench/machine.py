"""What is measured, and on what: names, caches, clocks, versions, commit. And the files that keep the rows."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import rehearsal
import torch

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("minegan_fast", "kernels", "csrc", "CMakeLists.txt", "bench", ":!bench/results")
CASE = ("op", "pass", "shape", "dtype")


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's model and number of cores."""
    if rehearsal.asked():
        return rehearsal.NAME
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{re.sub(r'[(](R|TM)[)]', '', model)}, {cores} cores"


def slug(name: str) -> str:
    """A file name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache; 32 MiB where nothing tells."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def gpu_state() -> dict:
    """Clocks in MHz, power in W, temperature in °C, reasons for slowing down, by NVML; empty without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "slowed_by": hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
    except pynvml.NVMLError as error:
        return {"nvml": str(error)}


def driver() -> str:
    """The version of the GPU's driver."""
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return "unknown"


def commit() -> str:
    """The measured commit, with "+" where measured files differ from it; without git what MINEGAN_COMMIT says."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MINEGAN_COMMIT", "unknown")


def describe_run(device: str, ceilings: dict) -> dict:
    """What holds for every row of one run."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    now = datetime.datetime.now(datetime.timezone.utc)
    of_gpu = {"driver": driver(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "device": device_name(device),
        **of_gpu,
        "torch": torch.__version__,
        "triton": version("triton"),
        "minegan_fast": version("minegan_fast"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings,
    }


def merge(folder: Path, run: dict, rows: list[dict]) -> Path:
    """Puts the rows of a run into <folder>/<machine>.json, in place of those of the same cases; atomically.

    All rows of a case come from one run: a ratio between them is then one of times taken in turn.
    """
    path = Path(folder) / f"{slug(run['device'])}.json"
    old = json.loads(path.read_text()) if path.exists() else {"runs": {}, "rows": []}
    name = name_of(run)
    measured = {case_of(row) for row in rows}
    kept = [row for row in old["rows"] if case_of(row) not in measured]
    merged = sorted(kept + [row | {"run": name} for row in rows], key=lambda row: row["op"])
    runs = old["runs"] | {name: run}
    used = {row["run"] for row in merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        lines = ",\n".join("  " + json.dumps(row) for row in merged)
        kept_runs = json.dumps({key: run for key, run in runs.items() if key in used}, indent=1)
        file.write(f'{{\n"runs": {kept_runs},\n"rows": [\n{lines}\n]\n}}\n')
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


class Lines:
    """A file of JSON lines that processes append to, each line there from the moment it is written on: a line with
    `describes` for each run, and then what was found in it."""

    def __init__(self, path: Path, device: str):
        run = describe_run(device, {})
        self.path, self.run = path, name_of(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.add({"describes": run})

    def add(self, row: dict) -> None:
        line = json.dumps(row | {"run": self.run}) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())  # in one piece, so that processes do not write into each other's lines


def name_of(run: dict) -> str:
    return f"{run['date']} {run['commit']}"


def case_of(row: dict) -> tuple:
    """What a row is about, whoever was measured."""
    return tuple(json.dumps(row[name]) for name in CASE)
