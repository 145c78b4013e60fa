"""The house: a folder imports only folders above it; none is named like a public function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import truedepth as td

PACKAGE = Path(td.__file__).parent

ROOMS = (
    *(
        "errors",
        "options",
        "version",
        "progress",
        "tensors",
        "modeling",
        "files",
        "families",
        "plan",
    ),
    *("sources", "checkpoint", "text", "runtime", "widening", "evaluation"),
    *("calibration", "healing", "depth_study", "engines", "planning", "conversion", "inspection"),
    *("speed", "demo", "report", "cli"),
)
"""From the ground up; docs/design.md says what each is for."""

OUTSIDE = ("__init__", "__main__")  # the doors, through which all rooms are reached

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # in other directories, the files of a checkpoint have only each other
                assert room_of(path) == "modeling", f"{path}: imports are absolute here"
                continue
            modules = {f"{node.module}.{name.name}" for name in node.names}
            found |= modules if node.module == "truedepth" else {str(node.module)}
    return {name.removeprefix("truedepth.") for name in found if name.startswith("truedepth.")}


def test_every_file_is_in_a_room_of_the_list():
    assert {room_of(path) for path in FILES} == {*ROOMS, *OUTSIDE}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_rooms_above_its_own(path):
    if (room := room_of(path)) in OUTSIDE:
        return
    allowed = ROOMS[: ROOMS.index(room) + 1]
    if room == "modeling":  # but for its door it travels with every checkpoint
        allowed = ("modeling",) if path.name == "__init__.py" else ()
    uphill = {module for module in imported(path) if module.split(".")[0] not in allowed}
    assert not uphill, f"{path.relative_to(PACKAGE)} may not import {sorted(uphill)}"


def test_no_two_files_import_each_other():
    uses = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imported(path) for path in FILES
    }
    state: dict[str, bool] = {}  # whether a module's imports have been followed to their end

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert state.get(module) is not False, f"a circle: {' -> '.join([*way, module])}"
        if module not in state:
            state[module] = False
            for other in uses.get(module, set()) & uses.keys():
                follow(other, (*way, module))
            state[module] = True

    for module in uses:
        follow(module, ())


def test_no_room_bears_the_name_of_a_public_function():
    """A submodule, once imported, would hide it."""
    assert not {*ROOMS} & {*td.__all__}


def test_every_folder_says_what_it_is_for_and_may_import():
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert said and "May import:" in said, folder
        assert len(said.splitlines()) <= 7, folder


def test_the_house_stays_easy_to_see():
    """At most 12 files at the top, and none over 400 lines."""
    assert len(list(PACKAGE.glob("*.py"))) <= 12
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_functions_stay_short():
    """At most 80 lines and 12 parameters; commands have a parameter for every option."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and room_of(path) != "cli":
                given = node.args
                parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs]
                assert len(parameters) <= 12, f"{path}: {node.name}"
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 80, f"{path}: {node.name} has {lines} lines"
