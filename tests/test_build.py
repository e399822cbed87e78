"""The build: what the native module links and exports, what a wheel holds, what an editable install finds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fssa_fast
from fssa_fast._native import load_native

ROOT = Path(__file__).resolve().parent.parent

core, reason = load_native()
native = pytest.mark.skipif(core is None, reason=str(reason))
readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


def _readelf(*options: str) -> str:
    return subprocess.run(["readelf", "-W", *options, core.__file__], check=True, capture_output=True, text=True).stdout


@native
@readelf
def test_links_neither_torch_nor_openmp_nor_python():
    needed = [line.split("[")[1].rstrip("]") for line in _readelf("-d").splitlines() if "(NEEDED)" in line]
    assert needed, "no libraries found"
    for library in needed:
        assert library.split(".")[0] in {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64",
                                         "ld-linux-aarch64", "librt", "libdl"}, needed  # fmt: skip


@native
@readelf
def test_exports_only_the_module():
    exported = [
        line.split()[-1]
        for line in _readelf("--dyn-syms").splitlines()
        if " GLOBAL DEFAULT" in line and " UND " not in line
    ]
    assert exported == ["PyInit__C"]


@native
@readelf
def test_no_code_is_shared_between_instruction_sets():
    """A function from a header, compiled for a new instruction set, must not be the one that all of them call."""
    build = sorted((ROOT / "build").glob("*/cmake/CMakeFiles/fssa_cpu_*.dir/csrc/cpu/*.o"))
    if not build:
        pytest.skip("not built in this checkout")
    for path in build:
        isa = path.parents[2].name.removeprefix("fssa_cpu_").removesuffix(".dir")
        listed = subprocess.run(["readelf", "-Ws", path], check=True, capture_output=True, text=True).stdout
        weak = [line.split()[-1] for line in listed.splitlines() if " WEAK " in line and " UND " not in line]
        ours = f"N4fssa{len(isa)}{isa}"
        assert [name for name in weak if ours not in name and "DW.ref" not in name] == [], path.name


def test_the_version_is_in_one_place():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    places = [
        path.name
        for path in (*ROOT.glob("*.toml"), *ROOT.glob("*.py"), *ROOT.glob("fssa_fast/**/*.py"))
        if f'"{fssa_fast.__version__}"' in path.read_text()
    ]
    assert places == ["__init__.py"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources, with what this environment has installed."""
    for tool in ("setuptools", "pybind11"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "golden")
    shutil.copytree(ROOT, source, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    subprocess.run(command, check=True, env=environment, timeout=560)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_what_a_wheel_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fssa_fast"}
    assert [name for name in names if name.startswith("fssa_fast/_C.") and name.endswith(".so")]
    for folder in (ROOT / "fssa_fast", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            inside = Path("fssa_fast") / path.relative_to(ROOT) if folder.name == "kernels" else path.relative_to(ROOT)
            assert inside.as_posix() in names
    assert not [name for name in names if "test" in name or name.endswith((".cpp", ".h", ".cu"))]
    assert wheel.name.startswith(f"fssa_fast-{fssa_fast.__version__}-cp")


@pytest.mark.slow
def test_a_wheel_works_where_it_is_installed(wheel, tmp_path):
    """In a folder of its own, before this checkout's package on the path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import fssa_fast, pathlib, sys\n"
        "assert pathlib.Path(fssa_fast.__file__).is_relative_to(sys.argv[1]), fssa_fast.__file__\n"
        "import importlib.util, torch\n"
        "assert importlib.util.find_spec('fssa_fast.kernels').origin.startswith(sys.argv[1])\n"
        "from fssa_fast.backends import use_backend\n"
        "from fssa_fast.ops import film\n"
        "x = torch.ones(2, 5)\n"
        "with use_backend('cpu'):\n"
        "    assert film(x, scale=x, shift=x, slots=torch.tensor([1, 0])).eq(3).all()\n"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")], check=True, cwd=tmp_path, env=environment, timeout=120
    )
