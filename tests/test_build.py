"""The build: what the native core links and exports, what a wheel holds, what an editable install finds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
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
    return subprocess.run(["readelf", "-W", *options, core.path], check=True, capture_output=True, text=True).stdout


# What a wheel holds does not depend on how well it was compiled.
QUICK = "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DFSSA_AVX512=OFF"


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
def test_exports_the_interface_alone():
    exported = [
        line.split()[-1]
        for line in _readelf("--dyn-syms").splitlines()
        if " GLOBAL DEFAULT" in line and " UND " not in line
    ]
    declared = re.findall(r"^FSSA_API .*?(\w+)\(", (ROOT / "csrc/fssa.h").read_text(), re.MULTILINE)
    assert sorted(exported) == sorted(declared)


@native
@readelf
def test_no_code_is_shared_between_instruction_sets():
    """A function from a header, compiled for a new instruction set, must not be the one that all of them call."""
    build = sorted((ROOT / "build").glob("*/CMakeFiles/fssa_cpu_*.dir/csrc/cpu/*.o"))
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


def _pip(*arguments: str | Path, folder: Path) -> None:
    """pip with what this environment has installed, without the variables of whoever runs the tests."""
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {"HOME": str(folder), "FSSA_CUDA": "0", "CMAKE_ARGS": QUICK}
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env=environment, timeout=560)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A source distribution of this checkout."""
    backend = pytest.importorskip("scikit_build_core.build")
    folder, before = tmp_path_factory.mktemp("sdist"), Path.cwd()
    os.chdir(ROOT)
    try:
        return folder / backend.build_sdist(str(folder))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, sdist, folder=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_what_a_source_distribution_holds(sdist):
    """What builds, what tests, and what the licence asks for; nothing that was built."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("csrc/fssa.h", "CMakeLists.txt", "setup.py", "kernels/aot.json", "tests/conftest.py", "docs/index.md",
                 "tests/golden", "Makefile", "LICENSE", "NOTICE", "fssa_fast/serving/page/page.js"):  # fmt: skip
        assert any(name == path or name.startswith(f"{path}/") for name in names), path
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("build/", ".venv"))]


@pytest.mark.slow
def test_what_a_wheel_holds(wheel):
    """One wheel for every Python of a platform: no file in it depends on one."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fssa_fast"}
    assert [name for name in names if name.endswith(".so")] == ["fssa_fast/_C.so"]
    for folder in (ROOT / "fssa_fast", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            inside = Path("fssa_fast") / path.relative_to(ROOT) if folder.name == "kernels" else path.relative_to(ROOT)
            assert inside.as_posix() in names
    assert {"fssa_fast/py.typed", "fssa_fast/serving/page/index.html"} <= set(names)
    assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    assert not [name for name in names if "test" in name or name.endswith((".cpp", ".h", ".cu", ".pyc"))]
    assert wheel.name.startswith(f"fssa_fast-{fssa_fast.__version__}-py3-none-")


@pytest.mark.slow
def test_a_wheel_works_where_it_is_installed(wheel, tmp_path):
    """In an environment of its own, which sees this one's packages, but not this checkout."""
    venv.create(tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    (site,) = (tmp_path / "environment").glob("lib/*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    seen = [path for path in sys.path if path.endswith("site-packages")]
    (site / "seen.pth").write_text("\n".join(seen))  # their own .pth files, of editable installs, are not read
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
    subprocess.run([python, "-c", program, site], check=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, timeout=120)
