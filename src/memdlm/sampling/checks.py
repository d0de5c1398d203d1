"""Range checks of sampling settings: each raises one line that names the field and the remedy."""

import math
from typing import Any

from memdlm.errors import ConfigError


def invalid(name: str, value: Any, remedy: str) -> ConfigError:
    """Return the error for a field with a value it cannot have."""
    return ConfigError(f"sampling.{name}: {value!r} is not valid; {remedy}")


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Refuse what is no integer from `minimum` to `maximum`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise invalid(name, value, f"use an integer {limits}")


def check_number(
    name: str, value: Any, minimum: float, maximum: float, *, exclusive: bool = False
) -> None:
    """Refuse what is no finite number from `minimum` (excluded, if `exclusive`) to `maximum`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_above = is_number and (value > minimum if exclusive else value >= minimum)
    if not is_number or not math.isfinite(value) or not is_above or value > maximum:
        limits = f"above {minimum:g}" if exclusive else f"of at least {minimum:g}"
        raise invalid(name, value, f"use a finite number {limits} and at most {maximum:g}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of `choices`."""
    if value not in choices:
        raise invalid(name, value, f"choose one of {', '.join(choices)}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise invalid(name, value, "use true or false")


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Return token ids as a tuple: a recipe gives a list, a frozen config holds a tuple.

    Raises:
        ConfigError: If it is neither, or holds anything but integers of at least 0.
    """
    if not isinstance(value, (list, tuple)):
        raise invalid(name, value, "give a list of token ids")
    for token in value:
        check_integer(name, token, minimum=0)
    return tuple(value)
