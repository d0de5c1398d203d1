"""What was typed, for results to say: the arguments of `main`, whoever called it."""

import shlex
from collections.abc import Sequence

_arguments: list[str] = []


def remember(arguments: Sequence[str]) -> None:
    """Note the arguments of the command that begins, without the program's name."""
    _arguments[:] = arguments


def arguments() -> list[str]:
    """Return what was typed behind the program's name."""
    return list(_arguments)


def command_line() -> str:
    """Return the command as a shell would read it again."""
    return shlex.join(["memdlm", *_arguments])
