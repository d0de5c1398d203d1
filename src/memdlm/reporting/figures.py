"""Figures as PNG bytes, all in one look; no display and no global state of matplotlib is used."""

import io
from typing import Any

# Panels in a row, for as many panels as there may be; three for more.
_PANELS_IN_A_ROW = {1: 1, 2: 2, 4: 2}


def figure(num_panels: int = 1, height: float = 3.6) -> tuple[Any, list[Any]]:
    """Return a matplotlib figure and its panels, side by side, in rows of three at most.

    Args:
        num_panels: How many.
        height: Of a row, in inches.
    """
    # The object interface: no global state and no display needed.
    from matplotlib.figure import Figure

    in_a_row = _PANELS_IN_A_ROW.get(num_panels, 3)
    num_rows = -(-num_panels // in_a_row)
    width = 7.5 if num_panels == 1 else 11.0
    made = Figure(figsize=(width, height * num_rows), layout="constrained")
    grid = made.subplots(num_rows, in_a_row, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    panels = panels[:num_panels]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    return made, panels


def png(made: Any) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def plain(text: str) -> str:
    """Return a text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def look(index: int) -> dict[str, Any]:
    """Return the colour and line of one of many: ten colours, then the same ones dashed, ..."""
    return {"color": f"C{index % 10}", "ls": ("-", "--", ":", "-.")[index // 10 % 4]}
