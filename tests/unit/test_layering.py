"""Imports go down only: the rooms of src/memdlm and who may enter which.

Read from the source with `ast`, so an import hidden inside a function counts as well.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "memdlm"

# Files of no room, which every room may import; they import nothing of ours but each other.
COMMON = {"errors", "files", "plain", "seeding", "uncertainty", "versions"}

_NETWORKS = {"backbones", "diffusion"}
_PARTS = {"answer_text", "memory", "sampling", "data"} | _NETWORKS
_ANSWERS = {"inference"} | _PARTS

# Room -> the rooms it may import. A new room gets a row here, or the test fails.
ALLOWED: dict[str, set[str]] = {
    "diffusion": set(),
    "reporting": set(),
    "backbones": {"diffusion"},
    "data": {"diffusion"},
    "memory": _NETWORKS,
    "sampling": _NETWORKS,
    "answer_text": {"sampling"} | _NETWORKS,
    "inference": _PARTS,
    "training": _ANSWERS,
    "evaluation": _ANSWERS,
    "planning": {"training"} | _ANSWERS,
    "quickstart": {"reporting", "training", "evaluation"} | _ANSWERS,
}
ALLOWED["cli"] = {"planning", "quickstart"} | ALLOWED["quickstart"]

# The process is plain mathematics: besides these and the standard library it needs nothing.
DIFFUSION_MAY_IMPORT = {"torch"}


def room_of(path: Path, source: Path = SOURCE) -> str:
    """Return the room a file lies in: its first folder, or its own name at the top."""
    return path.relative_to(source).parts[0].removesuffix(".py")


def imports_of(path: Path, source: Path = SOURCE) -> Iterator[str]:
    """Yield the dotted name of everything a file imports, relative imports resolved.

    `from memdlm import data` yields `memdlm.data`; `from memdlm.data import read` yields
    `memdlm.data.read`.
    """
    package = ("memdlm", *path.relative_to(source).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *base]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def rooms_entered(path: Path, source: Path = SOURCE) -> set[str]:
    """Return the rooms and common files of ours that a file imports from."""
    names = (name.split(".") for name in imports_of(path, source))
    return {parts[1] for parts in names if parts[0] == "memdlm" and len(parts) > 1}


def violations(source: Path = SOURCE) -> list[str]:
    """Return one line for every import that goes up or sideways, and for every unknown room."""
    found = []
    for path in sorted(source.rglob("*.py")):
        room, where = room_of(path, source), path.relative_to(source)
        if room in ("__init__", "_registration"):
            continue  # the package's public names and entries elsewhere, imported when first used
        if room not in ALLOWED and room not in COMMON:
            found.append(f"{where}: unknown room {room!r}")
            continue
        may = {room} | COMMON | ALLOWED.get(room, set())
        found += [
            f"{where}: imports {other}" for other in sorted(rooms_entered(path, source) - may)
        ]
    return found


def test_the_library_imports_only_downwards() -> None:
    assert any(SOURCE.rglob("*.py"))
    assert violations() == []


def test_the_table_has_no_cycle() -> None:
    for room, below in ALLOWED.items():
        assert room not in below
        assert below <= ALLOWED.keys()
        for other in below:
            assert room not in ALLOWED[other], f"{room} and {other} may import each other"
            assert ALLOWED[other] <= below, f"{room} may import {other} but not what lies below it"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("sampling", "memory"), ("memory", "sampling"), ("data", "memory"), ("data", "training")],
)
def test_rooms_that_must_not_know_each_other(room: str, forbidden: str) -> None:
    assert forbidden not in ALLOWED[room]


def test_diffusion_needs_torch_and_nothing_else() -> None:
    tops = {
        name.split(".")[0]
        for path in (SOURCE / "diffusion").rglob("*.py")
        for name in imports_of(path)
    }
    assert tops - set(sys.stdlib_module_names) - {"memdlm"} <= DIFFUSION_MAY_IMPORT


@pytest.mark.parametrize(
    ("file", "code", "expected"),
    [
        ("sampling/canvas.py", "from memdlm.memory import ParametricMemory", "imports memory"),
        ("sampling/canvas.py", "from memdlm import memory", "imports memory"),
        ("sampling/canvas.py", "from ..memory import update", "imports memory"),
        ("sampling/canvas.py", "from .. import memory", "imports memory"),
        ("data/readers.py", "def f():\n    import memdlm.training.config", "imports training"),
        ("errors.py", "from memdlm.data import readers", "imports data"),
        ("attic/old.py", "x = 1", "unknown room 'attic'"),
        ("scratch.py", "x = 1", "unknown room 'scratch'"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, expected: str) -> None:
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(textwrap.dedent(code))
    assert violations(tmp_path) == [f"{file}: {expected}"]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("sampling/canvas.py", "from memdlm.sampling.choice import greedy"),
        ("inference.py", "from memdlm.memory import ParametricMemory\nimport memdlm.sampling"),
        ("memory/update.py", "from memdlm.errors import ConfigError\nfrom . import placement"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, code: str) -> None:
    target = tmp_path / file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(code)
    assert violations(tmp_path) == []
