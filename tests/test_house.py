"""The house: imports go down, files stay short, and the private names of PyTorch are there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import captum_abslrp
from benchmarks.tricks import TRICKS, Trick, switch
from captum_abslrp.engine.private import PRIVATE_NAMES

ROOT = Path(captum_abslrp.__file__).parent
ORDER = (
    {"text", "processes", "files"},
    {"engine"},
    {"rules"},
    {"mappings", "functional"},
    {
        "memory",
        "integers",
        "scores",
        "seeds",
        "selection",
        "targets",
        "eager",
        "noise_tunnel",
        "checks",
        "chunks",
        "captures",
        "guide",
        "tokens",
        "map_checks",
        "recommendation",
        "graphs",
        "program",
    },
    {"attribution", "layer", "lrp", "inspection", "tracing", "words", "__init__"},
    {"visualization", "hookable", "operations", "methods"},
    {"metrics", "report", "demo"},
    {"web"},
    {"concepts", "export"},
    {"cli", "__main__"},
)
"""The floors of the house, from the bottom: a file imports from its own floor and those below it."""
FLOORS = {name: floor for floor, names in enumerate(ORDER) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> str:
    """Its name, without that of the package."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file) for file in FILES}


def imported_by(file: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {
                n if n.removeprefix("captum_abslrp.") in MODULES else node.module for n in names
            }
    inside = {name for name in found if name.split(".")[0] == "captum_abslrp"}
    return {name.removeprefix("captum_abslrp").lstrip(".") or "__init__" for name in inside}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_down(file: Path) -> None:
    floor = FLOORS[module_of(file).split(".")[0]]
    above = {name for name in imported_by(file) if FLOORS[name.split(".")[0]] > floor}
    # The package itself stands for its version alone.
    assert not above - {"__init__"}


def test_no_file_imports_itself_by_others() -> None:
    edges = {module_of(file): imported_by(file) - {"__init__"} for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path, name))
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name in ("engine", "rules")], ids=module_of
)
def test_a_file_can_be_read_at_once(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 425


def test_no_import_inside_of_a_function() -> None:
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nested = {
            n for top in ast.walk(tree) if isinstance(top, ast.FunctionDef) for n in ast.walk(top)
        }
        for node in nested:
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("captum_abslrp"), f"{file}: {node.module}"


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_private_names_of_pytorch_are_there(name: str) -> None:
    module, _, attribute = name.partition(":")
    value = importlib.import_module(module)
    for part in attribute.split("."):
        assert hasattr(value, part), f"{name} has gone. What to do: {PRIVATE_NAMES[name]}"
        value = getattr(value, part)


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
def test_an_optimization_can_be_measured(trick: Trick) -> None:
    turn = switch(trick)
    turn(False)
    turn(True)
