"""The paper's tables, figures and ablations as data: arms, tasks, settings, published numbers."""

import difflib

from memdlm.errors import UsageError
from memdlm.evaluation.presets.ablations import ablations
from memdlm.evaluation.presets.paper import figure3, figure5, figure8, table1, table2, table3
from memdlm.evaluation.presets.preset import EXPOSURE_BIAS, SAMPLING, SCORES, Preset, Variant

__all__ = [
    "EXPOSURE_BIAS",
    "GROUPS",
    "PRESETS",
    "SAMPLING",
    "SCORES",
    "Preset",
    "Variant",
    "find_presets",
]

_ALL = (table1(), table2(), table3(), figure3(), figure5(), figure8(), *ablations())

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}

# What stands for several presets: `paper`, `ablations`.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name in PRESETS if name.startswith(f"{group}/"))
    for group in ("paper", "ablations")
}


def find_presets(name: str) -> list[Preset]:
    """Return the preset called `name`, or those of a group.

    Raises:
        UsageError: There is none, with the nearest name.
    """
    if name in GROUPS:
        return [PRESETS[member] for member in GROUPS[name]]
    if name in PRESETS:
        return [PRESETS[name]]
    known = [*PRESETS, *GROUPS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    raise UsageError(f"there is no preset {name!r}; {hint}")
