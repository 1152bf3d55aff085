"""The structure of the project: the files in the root, the imports, the length of functions, classes and modules."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
# Each level may import from earlier levels, and from its own level if the imports form no cycle.
LEVELS = (
    {"utils"},
    {"networks", "architectures", "cams", "studies", "datasets", "plot_utils"},
    {"lungs", "grad_cam"},
    {"inference"},
    {"evaluation", "training"},
    {"finetune", "overlay_cam", "lung_segmentation"},
)
# (importer, imported): training must not need the code that reads its results, nor evaluation the training.
FORBIDDEN = {("training", "evaluation"), ("training", "inference"), ("evaluation", "training")}
LEVEL_OF = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def modules():
    """Return dotted name -> file of the project's own modules, without tests and benchmarks."""
    files = [*PROJECT.glob("*.py"), *(file for room in LEVEL_OF for file in (PROJECT / room).rglob("*.py"))]
    return {".".join(file.relative_to(PROJECT).with_suffix("").parts): file for file in files}


@cache
def imports():
    """Return module -> the project's modules that it imports anywhere in its text."""
    files = modules()
    arrows = {}
    for name, file in files.items():
        imported = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        with_packages = imported | {f"{package}.__init__" for package in imported}
        arrows[name] = (with_packages & set(files)) - {name}
    return arrows


def room_of(module):
    return module.split(".")[0]


def room_arrows():
    pairs = {(room_of(a), room_of(b)) for a, imported in imports().items() for b in imported}
    return {(a, b) for a, b in pairs if a != b}


def test_every_module_has_a_level():
    assert {room_of(module) for module in modules()} == set(LEVEL_OF)


def test_no_module_imports_itself_in_a_circle():
    try:
        list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_room_imports_itself_in_a_circle():
    rooms = {room: {b for a, b in room_arrows() if a == room} for room in LEVEL_OF}
    try:
        list(TopologicalSorter(rooms).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_point_downwards():
    upward = {(a, b) for a, b in room_arrows() if LEVEL_OF[a] < LEVEL_OF[b]}
    assert not upward | (room_arrows() & FORBIDDEN)


def test_the_root_holds_what_a_user_opens():
    assert {file.name for file in PROJECT.glob("*.ipynb")} == {
        "1_data_exploration.ipynb",
        "2_finetune_models.ipynb",
        "3_evaluate_results.ipynb",
    }
    assert len(list(PROJECT.glob("*.py"))) <= 8


@pytest.mark.parametrize(("kind", "most"), [(ast.FunctionDef, 60), (ast.ClassDef, 250), (ast.Module, 450)])
def test_no_part_is_too_long_to_read(kind, most):
    too_long = []
    for module, file in modules().items():
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, kind):
                whole = kind is ast.Module
                lines = len(text.splitlines()) if whole else node.end_lineno - node.lineno + 1
                if lines > most:
                    too_long.append(f"{module}{'' if whole else '.' + node.name}: {lines} lines")
    assert not too_long
