"""The native core by ctypes: structs as the header has them, statuses as exceptions, other builds refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from ctypes import addressof, c_float, c_int32, sizeof
from pathlib import Path

import pytest

from fssa_fast import _native
from fssa_fast._native import STRUCTS, load_native

ROOT = Path(__file__).resolve().parent.parent
core, reason = load_native()
native = pytest.mark.skipif(core is None, reason=str(reason))


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_structs_lie_as_the_compiler_lays_them(tmp_path):
    """Every member of every struct, by its offset and the bytes of the whole."""
    asked = [(name, member) for name, struct in STRUCTS.items() for member, *_ in struct._fields_]
    lines = [f'printf("%zu %zu\\n", offsetof({name}, {member}), sizeof({name}));' for name, member in asked]
    source = tmp_path / "layout.c"
    includes = f'#include <stddef.h>\n#include <stdio.h>\n#include "{ROOT}/csrc/fssa.h"\n'
    source.write_text(includes + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run(["cc", "-o", tmp_path / "layout", source], check=True)
    printed = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = [f"{getattr(STRUCTS[name], member).offset} {sizeof(STRUCTS[name])}" for name, member in asked]
    assert printed == expected


def test_every_struct_of_the_header_is_declared():
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc/fssa.h").read_text(), flags=re.DOTALL)
    found = dict(re.findall(r"typedef struct \{(.*?)\} (\w+);", header, re.DOTALL))
    members = {name: re.findall(r"(\w+)\s*[,;]", body) for body, name in found.items()}
    assert members == {name: [member for member, *_ in struct._fields_] for name, struct in STRUCTS.items()}


@native
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setitem(STRUCTS, "fssa_gate_args", _native.FilmArgs)
    with pytest.raises(ImportError, match="built from other sources than these: fssa_gate_args"):
        _native.Core(core.path)


@native
def test_what_a_status_raises():
    slots, row = (c_int32 * 1)(3), (c_float * 4)()
    of_a_row = addressof(row), 4
    with pytest.raises(IndexError, match=r"slots: expected values in \[0, 2\), got 3"):
        core.run("film", 0, 1, 4, of_a_row, (of_a_row, of_a_row), (addressof(slots), 0, 1, 1, 2), of_a_row, 1)
    with pytest.raises(ValueError, match="mmx"):
        core.set_isa("mmx")
