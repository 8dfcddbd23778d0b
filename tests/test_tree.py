"""The repository's shape: who imports whom, and that a native function has its binding, its test and its benchmark."""

import ast
import importlib
import io
import os
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest

import minegan_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minegan_fast"

# Floors of the house, from the ground up: a module imports its own part of the package and parts below, none beside it.
FLOORS = (
    {"_torch", "kernels"},
    {"collectives", "files", "ops"},
    {"layers", "metrics"},
    {"data", "finetune", "mining", "models"},
    {"report"},
    {"training"},
    {"cli"},
)
BELOW = {part: set().union(*FLOORS[:i]) for i, floor in enumerate(FLOORS) for part in floor}
FINETUNE_ROOMS = 13


def sources():
    """Every module's path and its dotted name in the package."""
    for folder, name in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            yield path, name + ".".join(path.relative_to(folder).with_suffix("").parts)


def test_the_walk_sees_each_module_once():
    files = [path.resolve() for path, _ in sources()]
    assert len(files) == len(set(files))
    assert {ROOT / "kernels" / "bias_act.py", PACKAGE / "ops" / "bias_act.py"} <= set(files)


@pytest.mark.skipif(os.name == "nt", reason="a checkout on Windows may have no links")
def test_the_kernels_lie_in_the_package_for_editors():
    assert os.readlink(PACKAGE / "kernels") == "../kernels"


def imported(path: Path, name: str):
    """Names of all modules that a file imports, anywhere in it; relative ones made absolute."""
    package = ("minegan_fast." + name.removesuffix("__init__")).rstrip(".").split(".")
    if not name.endswith("__init__"):
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts(path: Path, name: str) -> set[str]:
    """The parts of the package (folders) that a module imports."""
    modules = [module.split(".") for module in imported(path, name)]
    return {m[1] for m in modules if m[0] == "minegan_fast" and len(m) > 1 and m[1] in BELOW}


@pytest.mark.parametrize(("path", "name"), sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way(path, name):
    part = name.split(".")[0]
    if part in BELOW:
        wrong = parts(path, name) - BELOW[part] - {part}
        assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"
    if part == "kernels":
        assert not [m for m in imported(path, name) if m.startswith("torch.nn")]


def test_the_walk_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from ..models.stylegan2 import X\nfrom .. import mining\nimport minegan_fast.cli\n")
    assert parts(file, "ops.module") == {"models", "mining", "cli"}


def rooms(folder: str) -> dict[str, set[str]]:
    """Which rooms, files and folders of the same folder, every room of it imports."""
    found: dict[str, set[str]] = {}
    for path, name in sources():
        if name.startswith(f"{folder}.") and name != f"{folder}.__init__":
            room = name.removeprefix(f"{folder}.").partition(".")[0]
            start = f"minegan_fast.{folder}."
            inside = {m.removeprefix(start).partition(".")[0] for m in imported(path, name) if m.startswith(start)}
            found.setdefault(room, set()).update(inside - {room})
    return {room: below & found.keys() for room, below in found.items()}


@pytest.mark.parametrize("folder", sorted(BELOW.keys() | {"finetune.rows", "finetune.samples", "models.layouts"}))
def test_no_circle_of_imports(folder):
    arrows = rooms(folder)
    while free := [room for room, below in arrows.items() if not below]:
        arrows = {room: below - set(free) for room, below in arrows.items() if room not in free}
    assert not arrows


def test_finetune_has_few_rooms():
    assert len(rooms("finetune")) <= FINETUNE_ROOMS


# Names of PyTorch that begin with an underscore or are not documented, as they stand in code.
PRIVATE = re.compile(
    r"\b(torch|nn)(\.\w+)*\._(?!_)\w+|ops\.aten|\.(_version|_is_view|_parameters|_buffers|_modules|_backward_hooks|_orig_mod)\b"
    r"|_execution_engine|\bis_in_torch_dispatch_mode as\b|^from torch(\.\w+)*\._\w+ import",
    re.MULTILINE,
)


def test_private_names_of_torch_have_one_door():
    found = [
        f"{path.name}: {match[0]}"
        for path, name in sources()
        if name != "_torch"
        for match in PRIVATE.finditer(without_strings(path.read_text()))
    ]
    assert not found
    assert len(PRIVATE.findall((PACKAGE / "_torch.py").read_text())) > 15


def without_strings(code: str) -> str:
    """Code without comments and what stands in quotes."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return "".join(t.string for t in tokens if t.type not in (tokenize.STRING, tokenize.COMMENT))


def native_functions() -> list[str]:
    return sorted(set(re.findall(r"^\w+ (\w+)\(", (ROOT / "csrc" / "ops.h").read_text(), re.MULTILINE)))


def test_native_functions_are_found():
    assert {"bias_act_cpu", "bias_act_cuda", "bias_act_backward_cpu", "bias_act_backward_cuda"} <= set(
        native_functions()
    )


@pytest.mark.parametrize("function", native_functions())
def test_native_functions_are_bound_tested_and_measured(function):
    bindings = (ROOT / "csrc" / "bindings.cpp").read_text()
    assert f'"{function}"' in bindings
    stems = [path.stem for path in (PACKAGE / "ops").glob("*.py") if function.startswith(path.stem)]
    assert stems, f"no op in minegan_fast/ops is named as the beginning of {function}"
    stem = max(stems, key=len)
    for path in (f"csrc/{stem}.c*", f"tests/ops/test_{stem}.py", f"bench/bench_{stem}.py"):
        assert list(ROOT.glob(path)), f"{function} has no {path}"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_a_cu_file_is_one_with_a_cuda_kernel(path):
    assert (path.suffix == ".cu") == ("__global__" in path.read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_a_gpu_is_asked_for_a_kernel_of_every_cu_file(path):
    assert f"minegan::{path.stem}_cuda_problem" in (ROOT / "csrc" / "bindings.cpp").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_launch_says_whether_products_are_fused_with_sums(path):
    pytest.importorskip("triton")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    launches = [call for call in calls if isinstance(call.func, ast.Subscript)]
    assert launches
    for launch in launches:
        assert "_OPTIONS" in [ast.unparse(word.value) for word in launch.keywords if word.arg is None], launch.lineno
    assert "enable_fp_fusion" in importlib.import_module(f"minegan_fast.kernels.{path.stem}")._OPTIONS


def test_every_op_and_kernel_file_has_its_test():
    for folder in (PACKAGE / "ops", ROOT / "kernels"):
        for path in folder.glob("*.py"):
            if path.stem != "__init__":
                assert (ROOT / "tests" / "ops" / f"test_{path.stem.lstrip('_')}.py").exists(), path.name


def test_native_module_knows_nothing_of_torch():
    native = pytest.importorskip("minegan_fast._C", reason="the native module is not built here")
    content = Path(native.__file__).read_bytes()
    for trace in (b"libtorch", b"libc10", b"_ZN3c10", b"_ZN2at6", b"_ZN5torch"):
        assert trace not in content
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "-D", native.__file__], capture_output=True, text=True, check=True).stdout
        names = [line.split()[-1] for line in symbols.splitlines()]  # without the addresses, which may spell anything
        assert "PyInit__C" in names
        assert not re.search(r"torch|c10|aten", "\n".join(names), re.IGNORECASE)


def test_the_package_is_typed():
    assert (Path(minegan_fast.__file__).parent / "py.typed").exists()


def test_no_machine_specific_code_is_asked_for():
    for path in (ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "csrc").iterdir()):
        assert "-march=native" not in path.read_text()
