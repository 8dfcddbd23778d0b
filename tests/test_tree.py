"""The repository's shape: who imports whom, and that a native function has its binding, its test and its benchmark."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import minegan_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minegan_fast"

# cli -> training -> (mining, finetune, models, metrics) -> ops -> (kernels, csrc); a part may import itself and these.
BELOW = {
    "kernels": set(),
    "ops": set(),
    "metrics": {"ops"},
    "models": {"ops"},
    "mining": {"ops", "metrics"},
    "finetune": {"ops", "metrics"},
    "data": {"ops", "metrics", "models", "mining", "finetune", "training"},
    "training": {"ops", "metrics", "models", "mining", "finetune", "data"},
}


def sources():
    """Every module's path and its dotted name in the package."""
    for folder, name in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            yield path, name + ".".join(path.relative_to(folder).with_suffix("").parts)


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
    return {m[1] for m in modules if m[0] == "minegan_fast" and len(m) > 1 and m[1] in {*BELOW, "cli"}}


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
    for path in (f"csrc/{stem}.cu", f"tests/ops/test_{stem}.py", f"bench/bench_{stem}.py"):
        assert (ROOT / path).exists(), f"{function} has no {path}"


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
        listed = subprocess.run(["nm", "-D", native.__file__], capture_output=True, text=True, check=True).stdout
        symbols = "\n".join(line.split()[-1] for line in listed.splitlines())  # an address may hold "c10" as well
        assert "PyInit__C" in symbols
        assert not re.search(r"torch|c10|aten", symbols, re.IGNORECASE)


def test_the_package_is_typed():
    assert (Path(minegan_fast.__file__).parent / "py.typed").exists()


def test_no_machine_specific_code_is_asked_for():
    for path in (ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "csrc").iterdir()):
        assert "-march=native" not in path.read_text()
