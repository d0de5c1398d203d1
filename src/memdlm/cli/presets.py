"""Named sets of recipe defaults: below the recipe's own keys, above the library's defaults."""

from collections.abc import Mapping
from typing import Any

from memdlm.cli.settings import nearest
from memdlm.errors import UsageError

# What the published training code does (docs/paper-notes.md, "The reference preset"). Values that
# are this library's defaults too are named, so that the preset holds whatever becomes of those.
REFERENCE: dict[str, Any] = {
    "attention": "full",
    "data": {"overlong": "truncate_right", "chat_template": "auto"},
    "objective": {
        "weighting": "schedule",
        "normaliser": "token",
        "padding": "supervised",
        "time_epsilon": 1e-3,
    },
    "memory": {
        "sharing": "batch",
        "supervision": "masked",
        "weighting": "schedule",
        "prompt_weighting": "uniform",
        "normaliser": "token",
        "clip_scope": "local",
        "hidden_comparison": "reference",
    },
}
PRESETS: dict[str, dict[str, Any]] = {"reference": REFERENCE}


def with_preset(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return recipe data with the defaults of its `preset` filled in; its own keys win.

    Args:
        data: A recipe as read from YAML.
        source: What to name in messages.

    Raises:
        UsageError: `preset` names none.
    """
    name = data.get("preset")
    if name is None:
        return dict(data)
    if not isinstance(name, str) or name not in PRESETS:
        hint = nearest(str(name), tuple(PRESETS)).replace("valid keys", "choose one of")
        raise UsageError(f"{source}: preset is {name!r}, which is none{hint}")
    return _merged(PRESETS[name], data)


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(own)
    for key, value in defaults.items():
        given = own.get(key)
        if isinstance(value, Mapping) and (given is None or isinstance(given, Mapping)):
            result[key] = _merged(value, given or {})
        else:
            result.setdefault(key, value)
    return result
