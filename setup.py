"""Builds minegan_fast._C with CMake and notes in minegan_fast/_build.txt what it could not. Never imports torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def say(text):
    """Prints at once what `pip install -v` shows, also on a console that cannot write every character."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


class BuildNative(build_ext):
    """Tries with CUDA, then without; a machine that can do neither gets the package without its native module."""

    def run(self):
        self.notes = []
        super().run()
        library = Path(self.get_ext_fullpath("minegan_fast._C"))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.with_name("_build.txt").write_text("".join(f"{note}\n" for note in self.notes), encoding="utf-8")

    def build_extension(self, ext):
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if "ninja" in missing and shutil.which("make"):
            missing.remove("ninja")
        if missing:
            self.note(f"no native module: {' and '.join(missing)} not found on PATH")
            return
        if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
            self.note("no CUDA kernels: nvcc not found on PATH")
        elif self.compile(ext, cuda=True):
            return
        if not self.compile(ext, cuda=False):
            self.note("no native module: CMake or the C++ compiler failed, see above")

    def compile(self, ext, cuda):
        import pybind11

        folder = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpp")
        shutil.rmtree(folder, ignore_errors=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        chosen = os.environ.get("MINEGAN_CUDA_ARCHITECTURES", "")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder),
            "-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMINEGAN_CUDA={'ON' if cuda else 'OFF'}",
            f"-DMINEGAN_CUDA_ARCHITECTURES={chosen}",
        ]  # fmt: skip
        if cuda:
            say(
                f"compiling the CUDA kernels for {chosen or '80;90;100 if nvcc knows them'}, which takes minutes. "
                "MINEGAN_CUDA_ARCHITECTURES=90 compiles for one alone (nvidia-smi --query-gpu=compute_cap "
                "--format=csv names it, without the point)"
            )
        for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
            lines = []
            try:
                with subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
                ) as running:
                    assert running.stdout is not None
                    for line in running.stdout:
                        say(line.rstrip())
                        lines.append(line.strip())
            except OSError as error:
                self.note(f"{command[0]} does not start: {error}")
                return False
            for line in lines:
                if line.startswith("minegan_fast: "):
                    self.note(line.removeprefix("minegan_fast: "))
            if running.returncode:
                errors = [line for line in lines if "fatal" in line or "error:" in line]
                errors += [line for line in lines if "Error" in line] + ["no message"]
                self.note(f"{'CUDA' if cuda else 'C++'} build failed: {errors[0]}")
                return False
        return True

    def note(self, text):
        say(f"minegan_fast: {text}")
        self.notes.append(text)


# minegan_fast/kernels is a link to kernels/. With it the package is one tree, and an editable installation is a path in
# a .pth file, which editors read as Python does. A checkout that cannot hold links (Windows) maps the folder instead:
# the package works there too, but setuptools installs an import hook for it, which editors do not run.
packages, package_dir = find_packages(include=["minegan_fast", "minegan_fast.*"]), {"": "."}
if "minegan_fast.kernels" not in packages:
    packages.append("minegan_fast.kernels")
    package_dir["minegan_fast.kernels"] = "kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=[Extension("minegan_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
