"""Plain data: trees of mappings, lists and scalars, as JSON and YAML hold them."""

import json
from typing import Any


def as_json_gives_it(value: Any) -> Any:
    """Return a tree as JSON gives it back: tuples as lists, keys as texts."""
    return json.loads(json.dumps(value))


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """Return one `dotted.key: old -> new` line for every value in which two trees differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in dict.fromkeys([*before, *after]):
            full = f"{path}.{key}" if path else str(key)
            lines += differences(before.get(key), after.get(key), full)
        return lines
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]
