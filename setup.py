"""Builds the native modules with CMake; everything else is in pyproject.toml. Never imports torch.

fssa_fast._C always; fssa_fast._cuda where the environment's torch has CUDA and nvcc is on the PATH, which an isolated
build cannot see (pip install --no-build-isolation). FSSA_CUDA=1 asks for it, FSSA_CUDA=0 for none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cuda_wanted() -> bool:
    """Whether to build the CUDA module."""
    asked = os.environ.get("FSSA_CUDA", "auto")
    if asked not in ("0", "1", "auto"):
        raise RuntimeError(f"FSSA_CUDA: expected 0 or 1, got {asked!r}")
    if asked != "auto":
        return asked == "1"
    torch = importlib.util.find_spec("torch")  # finds the package without importing it
    version = Path(torch.origin).with_name("version.py") if torch is not None and torch.origin else None
    if version is None or not version.exists() or not re.search(r"^cuda\b.*= '[0-9.]+'", version.read_text(), re.M):
        return False
    if shutil.which("nvcc") is None:
        print("torch has CUDA but nvcc is not on the PATH: fssa_fast._cuda is not built", file=sys.stderr)
        return False
    return True


class CMakeBuild(build_ext):
    """Runs CMake and ninja; an extension is CMake's target of the same name."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise RuntimeError("building fssa_fast needs cmake and ninja on the PATH")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DFSSA_CUDA={'ON' if CUDA else 'OFF'}",
        ]  # fmt: skip
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        name = ext.name.split(".")[-1]
        subprocess.run([cmake, "--build", str(build), "--target", name, "--parallel", jobs], check=True)
        if not target.exists():
            raise RuntimeError(f"CMake built no {target}")


CUDA = cuda_wanted()
MODULES = ["fssa_fast._C", *(["fssa_fast._cuda"] if CUDA else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
