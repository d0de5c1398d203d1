"""The error tree: its drawing, its exit codes, and what a caller may rely on."""

import inspect
import re

import pytest

from memdlm import errors

TREE_LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>\w+Error) +(?P<code>\d+)\b")


def drawn_tree() -> dict[str, tuple[str | None, int]]:
    """Read the docstring's drawing: class name -> (name of the class above it, exit code)."""
    assert errors.__doc__ is not None
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[tuple[int, str]] = []  # (indent, name) of the path to the current line
    for line in errors.__doc__.splitlines():
        match = TREE_LINE.match(line)
        if match is None:
            continue
        indent = len(match["indent"])
        above = [entry for entry in above if entry[0] < indent]
        tree[match["name"]] = (above[-1][1] if above else None, int(match["code"]))
        above.append((indent, match["name"]))
    return tree


def error_classes() -> dict[str, type[errors.MemDLMError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.MemDLMError)
    }


def test_the_drawing_shows_every_class_under_its_base_with_its_exit_code() -> None:
    actual = {
        name: (None if cls is errors.MemDLMError else cls.__base__.__name__, cls.exit_code)
        for name, cls in error_classes().items()
        if cls.__base__ is not None
    }
    assert drawn_tree() == actual


@pytest.mark.parametrize(
    ("name", "exit_code"),
    [
        ("MemDLMError", 1),
        ("UsageError", 2),
        ("ConfigError", 2),
        ("DataError", 1),
        ("CheckpointError", 1),
        ("NonFiniteError", 1),
        ("StoppedError", 130),
    ],
)
def test_exit_codes(name: str, exit_code: int) -> None:
    assert error_classes()[name].exit_code == exit_code


@pytest.mark.parametrize("cls", error_classes().values(), ids=lambda cls: cls.__name__)
def test_one_except_clause_catches_all_and_the_message_stays(
    cls: type[errors.MemDLMError],
) -> None:
    with pytest.raises(errors.MemDLMError, match=r"^rank: 0 is out of range$"):
        raise cls("rank: 0 is out of range")
