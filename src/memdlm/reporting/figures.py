"""Figures as PNG bytes, all in one look; no display and no global state of matplotlib is used."""

import io
from typing import Any


def figure(num_panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a matplotlib figure and its panels, side by side."""
    # The object interface: no global state and no display needed.
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.5 if num_panels == 1 else 11.0, 3.6), layout="constrained")
    panels = list(made.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    return made, panels


def png(made: Any) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
