"""The house has no circles: each room of fssa_fast imports only rooms below it, and no module imports in a circle.

ROOMS is the order of the rooms, and the only place where it stands; CONTRIBUTING.md's map is held to it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROOMS = [  # from the top
    "__main__",
    "cli",
    "commands",
    "serving",
    "reproduce",
    "evaluation",
    "training",
    "vllm",
    "policy",
    "generation",
    "steering",
    "users",
    "nn",
    "data",
    "report",
    "ops",
    "backends",
    "kernels",
    "hub",
    "files",
    "records",
    "arguments",
    "_native",
]

BESIDE = {"__init__"}  # what is public is named there: it imports from everywhere, and the rooms only ask its version


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name without `fssa_fast.`."""
    found = {}
    for folder, prefix in ((ROOT / "fssa_fast", ()), (ROOT / "kernels", ("kernels",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """The modules of the package that a source imports: anywhere in it, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("fssa_fast."):
                continue
            within = name.removeprefix("fssa_fast.")
            if within in known:
                found.add(within)
            elif "." in within and within.rsplit(".", 1)[0] in known:
                found.add(within.rsplit(".", 1)[0])
            else:
                found.add("__init__")
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle, or None."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> list[str] | None:
        state[name] = 1
        path.append(name)
        for other in sorted(graph.get(name, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other)):
                return found
        state[path.pop()] = 2
        return None

    for name in sorted(graph):
        if name not in state and (found := visit(name)):
            return found
    return None


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room that is not below."""
    rooms = {name: name.split(".")[0] for name in graph}
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if not BESIDE & {name, other}
        and rooms[name] != rooms[other]
        and ROOMS.index(rooms[name]) >= ROOMS.index(rooms[other])
    ]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = modules()
    return {name: imports(path.read_text(), set(paths)) for name, path in paths.items()}


def test_every_room_has_its_place(graph: dict[str, set[str]]) -> None:
    assert {name.split(".")[0] for name in graph} - BESIDE == set(ROOMS)


def test_rooms_import_only_rooms_below(graph: dict[str, set[str]]) -> None:
    assert climbs(graph) == []


def test_no_circle(graph: dict[str, set[str]]) -> None:
    # A room's __init__ names what is public in it: for this test it stands for those modules.
    assert circle({name: others - {"__init__"} for name, others in graph.items() if name != "__init__"}) is None


def test_the_rooms_ask_the_package_for_its_version_only() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "fssa_fast" and name != "__init__":
                public = {alias.name for alias in node.names}
                assert name.startswith(("commands", "cli", "reproduce")) or public <= {"__version__", "_native"}, name


def test_the_map_in_contributing_names_the_rooms_in_their_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    house = text[text.index("fssa_fast/  ") : text.index("bench/ ")]
    lines = [line.split()[0] for line in house.splitlines()[1:] if line[2] != " "]
    named = [word.strip("/").removesuffix(".py") for word in lines]
    assert named == [room for room in ROOMS if room in named]
    assert set(ROOMS) - set(named) <= {"__main__", "kernels"}


def test_planted_faults_are_found() -> None:
    known = {"users.users", "policy.policy", "ops.lora", "backends"}
    lazy = "def f():\n    from fssa_fast.policy.policy import SteerablePolicy\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fssa_fast.policy.policy\n"
    for source in (lazy, typed):
        graph = {"users.users": imports(source, known), "policy.policy": {"users.users"}}
        assert climbs(graph) == ["users.users imports policy.policy"]
        assert circle(graph) == ["policy.policy", "users.users", "policy.policy"]
    assert climbs({"ops.lora": {"backends"}, "backends": set()}) == []
