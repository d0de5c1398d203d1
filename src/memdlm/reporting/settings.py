"""Nested settings side by side: flat keys, and values as a recipe would have them."""

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"  # noqa: RUF001  (a dash in a cell without a value)


def flatten(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        full = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, full)
        else:
            flat[full] = value
    return flat


def as_text(value: Any) -> str:
    """Return a value as a recipe would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def differing(all_settings: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return dotted key -> value in each, as text, for the settings that are not all equal."""
    flat = [flatten(settings) for settings in all_settings]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    missing = object()
    return {
        key: [as_text(settings[key]) if key in settings else NOTHING for settings in flat]
        for key in keys
        if any(settings.get(key, missing) != flat[0].get(key, missing) for settings in flat)
    }
